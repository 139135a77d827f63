"""Resuming a recipe's run: only with the same settings, and from its newest complete checkpoint."""

import json
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import folder_hashes, read_json, write_json


RUN_NAME = "run.json"
# Arguments that decide the weights. The length of a run is not one of them, so a run can be extended.
TRAINING = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "alignment", "alignment_weight", "anchors_at_any_depth",
    "baseline_decay", "beta", "data_seed", "delta", "depth_entropy_weight", "depth_gradient", "depth_reward",
    "depth_weight", "depth_weights", "drop_groups_without_signal", "entropy_coef", "entropy_coef_delta",
    "entropy_coef_max", "entropy_coef_min", "entropy_target", "epsilon", "epsilon_high", "fixed_depth",
    "gradient_accumulation_steps", "importance_sampling_level", "learning_rate", "loss_type", "max_grad_norm",
    "max_tokens_per_batch", "multi_objective_aggregation", "neighbour_targets", "num_generations", "num_iterations",
    "off_policy_mask_threshold", "optim", "per_device_train_batch_size", "policy_label_smoothing",
    "policy_learning_rate", "policy_weight",
    "prompts_per_user", "reward_weights", "sampling", "sapo_temperature_neg", "sapo_temperature_pos", "scale_rewards",
    "seed", "sid_loss", "step_cost", "step_cost_warmup", "steps_per_generation", "temperature", "terminal_weight",
    "top_entropy_quantile", "train_sampling_strategy", "use_adaptive_entropy", "use_bias_correction_kl",
    "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "weight_decay",
)  # fmt: skip
# Arguments that a longer run may change, or that change numbers by rounding only.
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16")

# Files of a checkpoint that a run begins with. A memory may be added later.
STARTING_FILES = ("*model*.safetensors", "sid_catalog*", "processor_config.json")


def starting_files(model: str | None) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint that decide a run that begins with it, for [`checkpoint_to_resume`]."""
    parts = [folder_hashes(model, pattern) for pattern in STARTING_FILES]
    return {name: digest for part in parts for name, digest in part.items()}


def checkpoint_to_resume(args: TrainingArguments, **origin: Any) -> str | None:
    """
    The newest complete checkpoint in `output_dir`, for `trainer.train(resume_from_checkpoint=...)`, or `None`.

    A run writes its settings to `run.json` when it starts; checkpoints of other settings are refused. Those without
    `trainer_state.json`, the last file of a checkpoint, are skipped.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the run.
        origin:
            Other settings that decide the weights: the recipe's arguments, hashes of the data and the starting model.
    """
    folder = Path(args.output_dir)
    settings = {name: value for name, value in args.to_dict().items() if name in TRAINING}
    settings = json.loads(json.dumps({**settings, **origin}, default=str))
    checkpoints = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if not checkpoints:
        if PartialState().is_main_process:
            write_json(folder / RUN_NAME, settings)
        return None
    before = read_json(folder / RUN_NAME)
    changed = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
    if changed:
        raise ValueError(
            f"{folder} contains checkpoints of a run with different settings ({', '.join(changed)}). Use another "
            "output_dir, or delete this one to start from scratch."
        )
    newest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    state = read_json(newest / TRAINER_STATE_NAME)
    is_complete = state["global_step"] >= state["max_steps"] != args.max_steps
    if is_complete and "constant" not in args.lr_scheduler_type:
        warnings.warn(f"{newest} ends a run: a longer one starts at learning rate 0, then jumps up.", stacklevel=2)
    return str(newest)
