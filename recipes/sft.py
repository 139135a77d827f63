"""
Supervised stages: 1 grounds Semantic IDs, 2 teaches latent reasoning.

    accelerate launch recipes/sft.py --config recipes/scientific/stage1.yaml
    accelerate launch recipes/sft.py --config recipes/scientific/stage2.yaml

Resumes from the last checkpoint in `output_dir` where there is one.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from accelerate import PartialState
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from lasar_hf import LasarForGenerativeRec, LasarSFTConfig, LasarSFTTrainer, SidCatalog
from lasar_hf.arguments import check_choices, read_json_object
from lasar_hf.data import LasarProcessor, PreparedData, reasoning_examples, sft_examples, stage1_examples
from lasar_hf.evaluation import RankingEvaluator
from lasar_hf.files import folder_hashes
from lasar_hf.reasoning import AnchorStore, checkpoint_hash, encode_anchors
from lasar_hf.semantic_ids import ResidualKMeans
from lasar_hf.trainers import (
    LasarModelConfig,
    checkpoint_to_resume,
    lora_from_arguments,
    save_trained,
    unsharded_weights,
)


@dataclass
class SFTScriptArguments:
    """Which stage, from what, on which rows."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    stage: int = field(default=1, metadata={"help": "1: SID grounding, 2: latent reasoning.", "choices": [1, 2]})
    backbone_config: dict | str | None = field(
        default=None, metadata={"help": "Stage 1 from scratch: arguments of the backbone's config, with `model_type`."}
    )
    max_latent_steps: int = field(default=8, metadata={"help": "Largest number of latent steps."})
    instruction: str = field(default="Recommend the next item.", metadata={"help": "Text before the history."})
    max_history: int = field(default=50, metadata={"help": "Most items of a history that are shown."})
    codebook_init: bool = field(
        default=False, metadata={"help": "Stage 1: start the Semantic-ID tokens from the quantizer's codebooks."}
    )
    rows: list[str] = field(
        default_factory=lambda: ["next_item", "alignment"],
        metadata={
            "help": "Stage 1 rows: next_item (each sample), history (loss on every item of a user), alignment or some "
            "of its tasks title_to_sid, description_to_sid, sid_to_title, titles_to_sid. A weight is how often a row "
            "is seen in an epoch: next_item=2 is twice, alignment=0.5 a half of the rows, the same in every epoch."
        },
    )
    anchor_context: str = field(
        default="segment",
        metadata={
            "help": "Stage 2: encode a segment alone (segment; the paper) or after prompt and earlier ones (chain).",
            "choices": ["segment", "chain"],
        },
    )
    eval_users: int = field(default=0, metadata={"help": "Validation users to rank at each evaluation; 0 for none."})

    def __post_init__(self):
        check_choices(self)
        read_json_object(self, "backbone_config")
        if self.backbone_config is not None and self.backbone_config.get("model_type") not in CONFIG_MAPPING:
            kind = self.backbone_config.get("model_type")
            raise ValueError(f"backbone_config has the model_type {kind!r}: name one that transformers knows.")


def load_model(script: SFTScriptArguments, model_args: LasarModelConfig, data: PreparedData):
    """The stage-1 checkpoint of stage 2; for stage 1 a pre-trained backbone, or one from scratch."""
    if script.stage == 2:
        if model_args.model_name_or_path is None:
            raise ValueError("Stage 2 continues stage 1: name its checkpoint in model_name_or_path.")
        catalog = SidCatalog.from_pretrained(model_args.model_name_or_path)
        data.check_catalog(catalog.item_ids, catalog.codes, model_args.model_name_or_path)
        model = LasarForGenerativeRec.from_pretrained(model_args.model_name_or_path, **model_args.init_kwargs)
        return model, AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if script.backbone_config is None:
        if model_args.model_name_or_path is None:
            raise ValueError("Stage 1 starts from a backbone: give model_name_or_path or backbone_config.")
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        backbone = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_args.init_kwargs)
    else:
        tokenizer = AutoTokenizer.from_pretrained(Path(script.data_dir, "tokenizer"))
        config_class = CONFIG_MAPPING[script.backbone_config["model_type"]]
        known = {"model_type", *config_class.attribute_map, *(part.name for part in fields(config_class))}
        unknown = sorted(set(script.backbone_config) - known)
        if unknown:
            raise ValueError(f"backbone_config holds {unknown}, which {config_class.__name__} does not have.")
        config = AutoConfig.for_model(
            **script.backbone_config, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
        backbone = AutoModelForCausalLM.from_config(config, **model_args.from_config_kwargs)
    model = LasarForGenerativeRec.from_backbone(
        backbone, tokenizer, data.codes.shape[1], data.codebook_size, script.max_latent_steps
    )
    if script.codebook_init:
        if not Path(script.data_dir, "quantizer").exists():
            raise ValueError(f"codebook_init needs a quantizer, but {script.data_dir} has none: unset it.")
        model.set_sid_embeddings(ResidualKMeans.from_pretrained(Path(script.data_dir, "quantizer")).codebooks)
    return model, tokenizer


def stage2_anchors(
    script: SFTScriptArguments, model, data: PreparedData, processor: LasarProcessor, folder: Path
) -> AnchorStore:
    """Anchors by the stage-1 checkpoint, computed by the main process and read by all."""
    stage1 = checkpoint_hash(model)
    state = PartialState()
    if state.is_main_process:  # resumes, and does nothing where the same segments were encoded
        samples, prompts = data.samples["train"], None
        if script.anchor_context == "chain":
            prompts = [processor.prompt_ids(history) for history in samples["history"]]
        encode_anchors(
            model.model.backbone, processor.tokenizer, samples["segments"], stage1, device=state.device, folder=folder,
            context=script.anchor_context, prompts=prompts,
        )
    state.wait_for_everyone()
    return AnchorStore.load(folder, stage1)


def main(script: SFTScriptArguments, training_args: LasarSFTConfig, model_args: LasarModelConfig) -> None:
    """Train one stage and save model, tokenizer and catalogue together."""
    set_seed(training_args.seed)
    data = PreparedData.load(script.data_dir)
    checkpoint = checkpoint_to_resume(
        training_args, **asdict(script), **asdict(model_args), data=folder_hashes(script.data_dir, "**/data-*.arrow"),
        start=folder_hashes(model_args.model_name_or_path, "*.safetensors"),
    )
    catalog = SidCatalog.from_pretrained(Path(script.data_dir, "catalog"))
    with unsharded_weights():
        model, tokenizer = load_model(script, model_args, data)
    processor = data.processor(tokenizer, script.instruction, script.max_history)
    anchors = None
    if script.stage == 1:
        rows = stage1_examples(data, processor, script.rows)
    else:
        anchors = stage2_anchors(script, model, data, processor, Path(training_args.output_dir, "anchors"))
        rows = reasoning_examples(data.samples["train"], processor, anchors.depths)
    validation = data.samples["validation"]
    eval_samples = validation.shuffle(seed=0).select(range(min(script.eval_users, len(validation))))
    evaluator = None
    if script.eval_users:
        evaluator = RankingEvaluator(eval_samples, processor, catalog, latent_steps=0 if script.stage == 1 else None)
    trainer = LasarSFTTrainer(
        model, training_args, catalog, anchors, train_dataset=rows,
        eval_dataset=sft_examples(eval_samples, processor).remove_columns("task") if script.eval_users else None,
        processing_class=tokenizer, ranking_evaluator=evaluator, peft_config=lora_from_arguments(model, model_args),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    save_trained(trainer)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser((SFTScriptArguments, LasarSFTConfig, LasarModelConfig)).parse_args_and_config())
