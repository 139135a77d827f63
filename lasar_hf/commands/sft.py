"""
Supervised training: stage 1 grounds the Semantic IDs, stage 2 teaches latent reasoning.

Stage 1 can also continue a checkpoint of its own or of a later stage with other tasks: set `model_name_or_path` to it.
Resumes from the last checkpoint in `output_dir`. The result contains model, tokenizer, catalogue and prompt format.
"""

import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from ..arguments import check_choices, read_json_object, read_switch
from ..card import CardFacts, changed_settings
from ..data import PreparedData, reasoning_examples, sft_examples, stage1_examples, with_neighbours
from ..evaluation import RankingEvaluator, neighbour_draws, similar_items, tune_memory
from ..files import folder_hashes
from ..model.base_lasar import most_likely_depth
from ..model.configuration_lasar import LATENT_INPUTS, LasarConfig
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from ..processes import locked_for_all
from ..reasoning import AnchorStore, checkpoint_hash, encode_anchors
from ..semantic_ids import load_quantizer
from ..trainers import (
    LasarModelConfig,
    LasarSFTConfig,
    LasarSFTTrainer,
    checkpoint_to_resume,
    is_adapter,
    load_model,
    lora_from_arguments,
    starting_files,
    unsharded_weights,
)
from .parser import ScriptParser


@dataclass
class SFTScriptArguments:
    """Arguments of supervised training, next to those of the trainer and the model."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    stage: int = field(default=1, metadata={"help": "1: SID grounding, 2: latent reasoning.", "choices": [1, 2]})
    backbone_config: dict | str | None = field(
        default=None, metadata={"help": "Stage 1 from scratch: config of the backbone with `model_type` (or JSON)."}
    )
    max_latent_steps: int = field(default=8, metadata={"help": "Stage 1: largest number of latent steps."})
    min_latent_steps: int = field(
        default=1, metadata={"help": "Stage 1: smallest number that the depth policy may choose.", "choices": [0, 1]}
    )
    codebook_init: bool = field(
        default=False, metadata={"help": "Stage 1: initialise the Semantic-ID tokens from the quantizer's codebooks."}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["next_item", "alignment"],
        metadata={
            "help": "Stage 1 tasks: next_item (one example per sample), history (loss on every item of a user), "
            "chain_end (the last segment alone, then the target: gives anchors a meaning), explicit (the chain of "
            "thought as text before the target, for eval.py's @text), reasoning (latent steps without anchors, drawn "
            "uniformly: the paper's mixed training), alignment, or some of its "
            "parts title_to_sid, description_to_sid, sid_to_title, titles_to_sid. next_item=2 repeats the examples "
            "of a task, alignment=0.5 keeps a fixed half of them."
        },
    )
    instruction: str | None = field(
        default=None, metadata={"help": "Text before the history. Stage 2 uses that of the stage-1 checkpoint."}
    )
    max_history: int | None = field(
        default=None,
        metadata={"help": "Maximum number of history items in a prompt (most recent kept). Stage 2: as instruction."},
    )
    exclude_history: str = field(
        default="auto",
        metadata={
            "help": "Stage 1: give the items of the history no probability. auto: as the prepared data says. Later "
            "stages use that of the stage-1 checkpoint. (auto, true, false)"
        },
    )
    anchor_context: str = field(
        default="segment",
        metadata={
            "help": "Stage 2: encode a segment alone (as in the paper) or after the prompt and the earlier segments.",
            "choices": ["segment", "chain"],
        },
    )
    depth_source: str = field(
        default="segments",
        metadata={
            "help": "Stage 2: latent steps of a sample. segments: as its chain of thought, which was written with the "
            "target in view (as in the paper); uniform: drawn up to max_latent_steps, so the policy head learns "
            "to draw likewise; policy: the most likely ones under the policy of the starting checkpoint; a number: "
            "that many, 0 for the compute-matched direct model."
        },
    )
    latent_input: str | None = field(
        default=None,
        metadata={
            "help": "Stage 2: input of a latent slot. raw: the state before it (as in the paper); normalized: "
            "LayerNorm of its sum with the first state, plus an embedding of the step; pause: the embedding of "
            "<|latent|>. Defaults to that of the starting checkpoint.",
            "choices": list(LATENT_INPUTS),
        },
    )
    shuffle_anchors: bool = field(
        default=False,
        metadata={"help": "Stage 2: give each sample the anchors of another one, as a control of their meaning."},
    )
    eval_users: int = field(
        default=0,
        metadata={
            "help": "Validation users to rank at each evaluation; 0 for none. Ranking uses the depth policy or, if it "
            "is not trained, a fixed depth_source; in stage 2, eval_loss is that of the most common depth of training."
        },
    )

    def __post_init__(self):
        check_choices(self)
        read_switch(self, "exclude_history")
        read_json_object(self, "backbone_config")
        self.depth_source = str(self.depth_source)
        if not (self.depth_source in ("segments", "uniform", "policy") or self.depth_source.isdecimal()):
            raise ValueError(f"depth_source is {self.depth_source!r}; expected segments, uniform, policy or a number.")
        if self.backbone_config is not None and self.backbone_config.get("model_type") not in CONFIG_MAPPING:
            model_type = self.backbone_config.get("model_type")
            raise ValueError(f"backbone_config has model_type {model_type!r}; expected one that transformers knows.")


def new_backbone(script: SFTScriptArguments, model_args: LasarModelConfig, tokenizer):
    """A backbone with random weights for the tokenizer that prepare.py fitted."""
    config_class = CONFIG_MAPPING[script.backbone_config["model_type"]]  # type: ignore[index]
    names = {"model_type", *config_class.attribute_map, *(part.name for part in fields(config_class))}
    unknown = sorted(set(script.backbone_config) - names)
    if unknown:
        raise ValueError(f"backbone_config has {unknown}, which {config_class.__name__} does not have.")
    config = AutoConfig.for_model(  # type: ignore[arg-type]
        **script.backbone_config,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    heads, key_value_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if key_value_heads and heads % key_value_heads:
        raise ValueError(
            f"backbone_config has {heads} num_attention_heads and {key_value_heads} num_key_value_heads (perhaps the "
            "default); expected a divisor. Set num_key_value_heads."
        )
    return AutoModelForCausalLM.from_config(
        config, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation
    )


def stage1_model(script: SFTScriptArguments, model_args: LasarModelConfig, data: PreparedData):
    """A pre-trained or new backbone with Semantic-ID tokens, or the checkpoint of a recommender; and its processor."""
    path = model_args.model_name_or_path
    if (path is None) == (script.backbone_config is None):
        raise ValueError(
            f"model_name_or_path is {path!r} and backbone_config is {script.backbone_config}. Stage 1 loads a "
            "backbone or makes one: set one of them and leave the other out, on the command line and in the YAML file."
        )
    if path is None:
        tokenizer = AutoTokenizer.from_pretrained(Path(script.data_dir, "tokenizer"))  # nosec B615: a local folder
        backbone = new_backbone(script, model_args, tokenizer)
    elif is_recommender(path, model_args.model_revision):
        return stage2_model(script, model_args, data)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model_args.model_revision)
        backbone = AutoModelForCausalLM.from_pretrained(path, **model_args.init_kwargs)  # nosec B615: has the revision
    model = LasarForGenerativeRec.from_backbone(
        backbone,
        tokenizer,
        data.catalog.num_levels,
        data.codebook_size,
        script.max_latent_steps,
        script.min_latent_steps,
    )
    model.config.exclude_history = data.exclude_history if script.exclude_history is None else script.exclude_history
    if script.codebook_init:
        quantizer = Path(script.data_dir, "quantizer")
        if not quantizer.exists():
            raise ValueError(f"codebook_init needs a quantizer, but {script.data_dir} has none. Set it to false.")
        model.set_sid_embeddings(load_quantizer(script.data_dir).codebooks)
    instruction = "Recommend the next item." if script.instruction is None else script.instruction
    return model, data.processor(tokenizer, instruction, 50 if script.max_history is None else script.max_history)


def is_recommender(path: str, revision: str) -> bool:
    """Whether a folder or name is that of a recommender rather than of a language model or an adapter."""
    if is_adapter(path):
        return False
    return AutoConfig.from_pretrained(path, revision=revision).model_type == LasarConfig.model_type


def stage2_model(script: SFTScriptArguments, model_args: LasarModelConfig, data: PreparedData):
    """The stage-1 checkpoint and its processor."""
    if model_args.model_name_or_path is None:
        raise ValueError("Stage 2 continues stage 1: set model_name_or_path to its checkpoint.")
    processor = LasarProcessor.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    processor.check_format(instruction=script.instruction, max_history=script.max_history)
    data.check_catalog(processor.catalog, model_args.model_name_or_path)
    data.processor(processor.tokenizer, processor.instruction, processor.max_history)  # warns if samples keep less
    return load_model(model_args.model_name_or_path, **model_args.init_kwargs), processor


def stage2_anchors(script: SFTScriptArguments, model, data: PreparedData, processor, folder: Path) -> AnchorStore:
    """Anchors of the training samples, encoded by the main process and memory-mapped by all."""
    samples, prompts = data.samples["train"], None
    if script.anchor_context == "chain":
        prompts = [processor.prompt_ids(history) for history in samples["history"]]
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # with the layers of the adapter
    state = PartialState()
    if state.is_main_process:  # opens the folder if it already holds these anchors
        encode_anchors(model, processor, samples["segments"], folder=folder, prompts=prompts, device=state.device)
    state.wait_for_everyone()
    return AnchorStore.load(folder, checkpoint_hash(model))


def set_latent_input(model, latent_input: str | None) -> None:
    """Change what a latent slot reads, if asked for. Anchors are encoded before, by the checkpoint as it is."""
    if latent_input in (None, model.config.latent_input):
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            f"latent_input is {latent_input!r}, but an adapter keeps that of its base model, "
            f"{model.config.latent_input!r}. Start from the merged model."
        )
    model.set_latent_input(latent_input)


def check_depths(script: SFTScriptArguments, args: LasarSFTConfig, config: LasarConfig, data: PreparedData) -> None:
    """Refuse settings with more latent steps than the model takes, before anchors are encoded."""
    if args.depth_weights is not None:
        config.check_depth("The last depth of depth_weights", len(args.depth_weights) - 1)
    if script.stage == 2 and script.depth_source == "segments":
        deepest = max(map(len, data.samples["train"]["segments"]))
        config.check_depth("The number of segments of a chain of thought (max_latent_steps of the data)", deepest)
    elif script.stage == 2 and script.depth_source.isdecimal():
        config.check_depth("depth_source", int(script.depth_source))


def training_depths(source: str, anchors: AnchorStore, model, processor, samples: Dataset, seed: int) -> np.ndarray:
    """Latent steps of each training sample."""
    if source == "segments":
        return anchors.depths
    if source == "uniform":
        return np.random.default_rng(seed).integers(
            model.config.min_latent_steps, model.config.max_latent_steps + 1, len(anchors)
        )
    if source == "policy":
        depths = policy_depths(model, processor, samples["history"])
        if len(set(depths)) == 1:
            warnings.warn(
                f"The policy of the starting checkpoint gives every training sample {depths[0]} latent steps. Stage 1 "
                "does not train it; start from a stage-2 or GRPO checkpoint.", stacklevel=2,
            )  # fmt: skip
        return depths
    return np.full(len(anchors), int(source))


def warn_of_untrained_depths(weights: list[float], depths: np.ndarray) -> None:
    """Warn if the policy learns to take numbers of latent steps after which no answer is trained."""
    untrained = [int(depth) for depth in np.unique(depths) if depth >= len(weights) or weights[depth] == 0]
    if untrained:
        warnings.warn(
            f"The policy learns to take {untrained} latent steps, but depth_weights has no weight for them, so no "
            "answer after them is trained. Give every depth of depth_source a weight.", stacklevel=2,
        )  # fmt: skip


def policy_depths(model, processor, histories: list[list[int]], batch_size: int = 256) -> np.ndarray:
    """Most likely latent steps of each history under the model's policy, computed on every process."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.to(PartialState().device)
    item_ids, depths = processor.catalog.item_ids, []
    with base.evaluation_mode():
        for start in tqdm(range(0, len(histories), batch_size), desc="policy's depths", disable=None):
            batch = [[item_ids[item] for item in history] for history in histories[start : start + batch_size]]
            logits = base.model(**processor(batch).to(base.device)).depth_logits  # (B, C)
            depths += most_likely_depth(logits, base.config.min_latent_steps).tolist()
    return np.array(depths)


def draw_neighbours(data: PreparedData, training_args: LasarSFTConfig) -> np.ndarray | None:
    """Neighbours of each training sample, from the memory with the best settings on validation, if they are used."""
    if training_args.neighbour_targets == 0:
        return None
    similar = similar_items(data.text_vectors)
    tuning = tune_memory(data, similar)
    return neighbour_draws(
        data.split.train,
        len(data.items),
        similar,
        exclude_history=data.exclude_history,
        seed=training_args.seed,
        **tuning.settings,
    )


def ranking_depth(script: SFTScriptArguments, training_args: LasarSFTConfig) -> int | None:
    """Latent steps for ranking during training: the policy's if it is trained, or those of stage 1 or stage 2."""
    if script.stage == 1:
        return None if training_args.policy_weight > 0 else 0
    fixed = script.depth_source.isdecimal() and training_args.policy_weight == 0
    return int(script.depth_source) if fixed else None


def main(script: SFTScriptArguments, training_args: LasarSFTConfig, model_args: LasarModelConfig) -> None:
    """Train one stage and save a checkpoint that the next stage, evaluation and serving load."""
    with locked_for_all(training_args.output_dir):
        train(script, training_args, model_args)


def train(script: SFTScriptArguments, training_args: LasarSFTConfig, model_args: LasarModelConfig) -> None:
    """Train one stage in a folder that no other command writes to."""
    set_seed(training_args.seed)
    data = PreparedData.load(script.data_dir)
    hashes = PreparedData.file_hashes(script.data_dir)
    if training_args.neighbour_targets > 0:  # similar texts are neighbours
        hashes |= folder_hashes(script.data_dir, "embeddings.npy")
    if script.codebook_init:
        hashes |= folder_hashes(script.data_dir, "quantizer/*")
    checkpoint = checkpoint_to_resume(
        training_args,
        **asdict(script),
        **asdict(model_args),
        data=hashes,
        start=starting_files(model_args.model_name_or_path),
    )
    with unsharded_weights():
        model, processor = (stage1_model if script.stage == 1 else stage2_model)(script, model_args, data)
    check_depths(script, training_args, model.config, data)
    anchors, neighbours = None, draw_neighbours(data, training_args)
    if script.stage == 1:
        first, last = model.config.min_latent_steps, model.config.max_latent_steps
        depths = np.random.default_rng(training_args.seed).integers(first, last + 1, len(data.samples["train"]))
        examples = stage1_examples(data, processor, script.tasks, neighbours, depths)
    else:
        anchors = stage2_anchors(script, model, data, processor, Path(training_args.output_dir, "anchors"))
        depths = training_depths(
            script.depth_source, anchors, model, processor, data.samples["train"], training_args.seed
        )
        training_args.anchors_at_any_depth |= script.depth_source != "segments" or script.shuffle_anchors
        examples = reasoning_examples(data.samples["train"], processor, depths)
        examples = examples if neighbours is None else with_neighbours(examples, neighbours)
        if script.shuffle_anchors:
            order = np.random.default_rng(training_args.seed).permutation(len(examples))
            examples = examples.remove_columns("sample_index").add_column("sample_index", order)
        set_latent_input(model, script.latent_input)
    learns_depth = script.stage == 2 or any(task.partition("=")[0] == "reasoning" for task in script.tasks)
    if learns_depth and training_args.depth_weights is not None and training_args.policy_weight > 0:
        warn_of_untrained_depths(training_args.depth_weights, depths)
    eval_examples, evaluator = None, None
    if script.eval_users:
        validation = data.draw("validation", script.eval_users)
        if script.stage == 1:
            eval_examples = sft_examples(validation, processor)
        else:  # held-out samples have no segments: all have the most common depth of training
            common = np.full(len(validation), np.bincount(depths).argmax())
            eval_examples = reasoning_examples(validation, processor, common).remove_columns("sample_index")
        evaluator = RankingEvaluator(validation, processor, latent_steps=ranking_depth(script, training_args))
    trainer = LasarSFTTrainer(
        model,
        training_args,
        anchors=anchors,
        ranking_evaluator=evaluator,
        train_dataset=examples,
        eval_dataset=eval_examples,
        processing_class=processor,
        peft_config=lora_from_arguments(model, model_args),
    )
    shown = ("tasks", "max_latent_steps") if script.stage == 1 else ("depth_source", "anchor_context")
    trainer.card_facts = CardFacts(
        model_args.model_name_or_path,
        data.data_card(script.data_dir),
        changed_settings(script, shown),
        title=f"Stage {script.stage}",
        revision=model_args.model_revision,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.accelerator.end_training()


def run() -> None:
    """Run the command with the arguments of the command line."""
    main(*ScriptParser((SFTScriptArguments, LasarSFTConfig, LasarModelConfig), __doc__).parse_args_and_config())


if __name__ == "__main__":
    run()
