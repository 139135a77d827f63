"""
Reinforcement learning of quality and depth together.

    accelerate launch recipes/grpo.py --config recipes/scientific/grpo.yaml

Resumes from the last checkpoint in `output_dir` where there is one.
"""

from dataclasses import asdict, dataclass, field

from transformers import AutoTokenizer, set_seed
from trl import TrlParser

from lasar_hf import LasarForGenerativeRec, LasarGRPOConfig, LasarGRPOTrainer, SidCatalog
from lasar_hf.data import PreparedData, grpo_examples
from lasar_hf.files import folder_hashes
from lasar_hf.reasoning import AnchorStore, checkpoint_hash
from lasar_hf.trainers import (
    LasarModelConfig,
    checkpoint_to_resume,
    lora_from_arguments,
    save_trained,
    unsharded_weights,
)


@dataclass
class GRPOScriptArguments:
    """From what, on which rows."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    stage1_model: str | None = field(
        default=None, metadata={"help": "Stage-1 checkpoint, whose anchors are used; no terminal loss if not given."}
    )
    anchors_dir: str | None = field(default=None, metadata={"help": "Anchors that stage 2 wrote."})
    instruction: str = field(default="Recommend the next item.", metadata={"help": "Text before the history."})
    max_history: int = field(default=50, metadata={"help": "Most items of a history that are shown."})


def terminal_anchors(script: GRPOScriptArguments, dtype: str) -> AnchorStore | None:
    """The anchors of stage 2, checked against the checkpoint that made them."""
    if script.anchors_dir is None:
        return None
    if script.stage1_model is None:
        raise ValueError("anchors_dir is given without stage1_model: name the checkpoint that made the anchors.")
    with unsharded_weights():
        stage1 = LasarForGenerativeRec.from_pretrained(script.stage1_model, dtype=dtype)
    return AnchorStore.load(script.anchors_dir, checkpoint_hash(stage1))


def main(script: GRPOScriptArguments, training_args: LasarGRPOConfig, model_args: LasarModelConfig) -> None:
    """Train and save model, tokenizer and catalogue together."""
    set_seed(training_args.seed)
    data = PreparedData.load(script.data_dir)
    checkpoint = checkpoint_to_resume(
        training_args, **asdict(script), **asdict(model_args), data=folder_hashes(script.data_dir, "**/data-*.arrow"),
        start=folder_hashes(model_args.model_name_or_path, "*.safetensors"),
    )
    catalog = SidCatalog.from_pretrained(model_args.model_name_or_path)
    data.check_catalog(catalog.item_ids, catalog.codes, model_args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    processor = data.processor(tokenizer, script.instruction, script.max_history)
    training_args.model_init_kwargs = model_args.init_kwargs | (training_args.model_init_kwargs or {})
    peft_config = None
    if model_args.use_peft:
        with unsharded_weights():
            model = LasarForGenerativeRec.from_pretrained(model_args.model_name_or_path, **model_args.init_kwargs)
        peft_config = lora_from_arguments(model, model_args)
    trainer = LasarGRPOTrainer(
        model_args.model_name_or_path, training_args, catalog,
        train_dataset=grpo_examples(data.samples["train"], processor, terminal_anchors(script, model_args.dtype)),
        processing_class=tokenizer, peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    save_trained(trainer)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser((GRPOScriptArguments, LasarGRPOConfig, LasarModelConfig)).parse_args_and_config())
