"""
Reinforcement learning (GRPO) of recommendation quality and depth.

Resumes from the last checkpoint in `output_dir`. The prompt format is that of the starting checkpoint. With
`eval_users`, the result is compared with the starting checkpoint on validation users, and the better one is saved.
"""

import logging
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import set_seed

from ..card import CardFacts, changed_settings
from ..data import PreparedData, grpo_examples
from ..evaluation import RankingEvaluator
from ..files import folder_hashes
from ..model.configuration_lasar import LasarConfig
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.processing_lasar import LasarProcessor
from ..processes import locked_for_all
from ..reasoning import AnchorStore, checkpoint_hash
from ..trainers import (
    LasarGRPOConfig,
    LasarGRPOTrainer,
    LasarModelConfig,
    checkpoint_to_resume,
    is_adapter,
    load_model,
    load_rewards,
    lora_from_arguments,
    starting_files,
    unsharded_weights,
)
from .parser import ScriptParser


logger = logging.getLogger(__name__)

NOT_BETTER = "It made the model worse on validation users: the weights are those of the checkpoint that it began with."


@dataclass
class GRPOScriptArguments:
    """Arguments of reinforcement learning, next to those of the trainer and the model."""

    data_dir: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    anchors_dir: str | None = field(
        default=None, metadata={"help": "Anchors that stage 2 wrote. Without them there is no terminal loss."}
    )
    stage1_model: str | None = field(default=None, metadata={"help": "Stage-1 checkpoint that encoded the anchors."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["exact_match", "ranking"],
        metadata={
            "help": "Rewards: exact_match, ranking, prefix, or the dotted path of a function, such as mine.diversity."
        },
    )
    eval_users: int = field(
        default=0,
        metadata={
            "help": "Validation users to rank at each evaluation (see eval_strategy). The result must not be worse on "
            "them (NDCG@10) than the starting checkpoint, which is saved otherwise; 0 for no comparison."
        },
    )


def terminal_anchors(script: GRPOScriptArguments, dtype: str) -> np.ndarray | None:
    """Last anchor of each sample `(S, H)`, after a check that the stage-1 checkpoint encoded it."""
    if script.anchors_dir is None:
        return None
    if script.stage1_model is None:
        raise ValueError("anchors_dir is set without stage1_model: name the checkpoint that encoded the anchors.")
    with unsharded_weights():
        stage1 = LasarForGenerativeRec.from_pretrained(script.stage1_model, dtype=dtype)
    return AnchorStore.load(script.anchors_dir, checkpoint_hash(stage1)).terminal()


def save_better(trainer: LasarGRPOTrainer, evaluator: RankingEvaluator, start: LasarForGenerativeRec) -> None:
    """Save the trained model, or the one it started from if that ranks better on validation users."""
    trained = trainer.on_gathered_weights(evaluator)["NDCG@10"]
    before = evaluator(start.to(trainer.accelerator.device))["NDCG@10"]
    logger.info("Validation NDCG@10: %.4f before and %.4f after training.", before, trained)
    is_worse = [trained < before]
    broadcast_object_list(is_worse)  # all processes save the same
    if not is_worse[0]:
        trainer.save_model()
        return
    logger.warning("Training made the model worse on validation users. The starting checkpoint is saved instead.")
    trainer.card_facts = replace(trainer.card_facts, note=NOT_BETTER)
    if trainer.is_world_process_zero():
        start.save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)
        trainer.save_processor(trainer.args.output_dir)
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    if trainer.args.push_to_hub:
        trainer.upload("Model save")


def main(script: GRPOScriptArguments, training_args: LasarGRPOConfig, model_args: LasarModelConfig) -> None:
    """Train and save a checkpoint that evaluation and serving load."""
    with locked_for_all(training_args.output_dir):
        train(script, training_args, model_args)


def train(script: GRPOScriptArguments, training_args: LasarGRPOConfig, model_args: LasarModelConfig) -> None:
    """Train in a folder that no other command writes to."""
    if model_args.model_name_or_path is None:
        raise ValueError("GRPO continues stage 2: set model_name_or_path to its checkpoint.")
    set_seed(training_args.seed)
    data = PreparedData.load(script.data_dir)
    checkpoint = checkpoint_to_resume(
        training_args,
        **asdict(script),
        **asdict(model_args),
        data=PreparedData.file_hashes(script.data_dir),
        anchors=folder_hashes(script.anchors_dir, "anchors.json"),  # has the hashes of the arrays
        start=starting_files(model_args.model_name_or_path),
    )
    model, revision = model_args.model_name_or_path, model_args.model_revision
    processor = LasarProcessor.from_pretrained(model, revision=revision)
    data.check_catalog(processor.catalog, model)
    data.processor(processor.tokenizer, processor.instruction, processor.max_history)  # warns if samples keep less
    if model_args.use_peft or is_adapter(model):  # adapters are named after the layers of the loaded model
        with unsharded_weights():
            model = load_model(model, **model_args.init_kwargs)
        config = model.config
    else:  # by name, so that TRL can load the reference model too
        training_args.model_init_kwargs = model_args.init_kwargs | (training_args.model_init_kwargs or {})
        config = LasarConfig.from_pretrained(model, revision=revision)
    evaluator = None
    if script.eval_users:
        validation = data.draw("validation", script.eval_users)
        evaluator = RankingEvaluator(validation, processor, latent_steps=training_args.fixed_depth)
    rewards = load_rewards(script.reward_funcs, processor.catalog, config, training_args.num_generations)
    trainer = LasarGRPOTrainer(
        model,
        training_args,
        reward_funcs=rewards,
        processing_class=processor,
        ranking_evaluator=evaluator,
        train_dataset=grpo_examples(data.samples["train"], processor, terminal_anchors(script, model_args.dtype)),
        peft_config=lora_from_arguments(model, model_args),
    )
    trainer.card_facts = CardFacts(
        model_args.model_name_or_path,
        data.data_card(script.data_dir),
        changed_settings(script),
        revision=revision,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if evaluator is not None:
        with unsharded_weights():
            start = load_model(model_args.model_name_or_path, **model_args.init_kwargs)
        start = start.merge_and_unload() if isinstance(start, PeftModel) else start
        save_better(trainer, evaluator, start)
    else:
        trainer.save_model()
    trainer.accelerator.end_training()


def run() -> None:
    """Run the command with the arguments of the command line."""
    main(*ScriptParser((GRPOScriptArguments, LasarGRPOConfig, LasarModelConfig), __doc__).parse_args_and_config())


if __name__ == "__main__":
    run()
