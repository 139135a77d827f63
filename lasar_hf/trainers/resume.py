"""Resuming a run of a recipe: only its own, and from the newest checkpoint that is whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import write_json


RUN_NAME = "run.json"
# What decides the weights. The length of a run is not among it: a run may be continued further.
TRAINING = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "alignment", "alignment_weight", "baseline_decay", "beta", "data_seed",
    "depth_entropy_weight", "depth_weight", "epsilon", "epsilon_high", "gradient_accumulation_steps", "learning_rate",
    "loss_type", "max_grad_norm", "num_generations", "num_iterations", "optim", "per_device_train_batch_size",
    "policy_weight", "sampling", "scale_rewards", "seed", "sid_loss", "step_cost", "steps_per_generation",
    "temperature", "terminal_weight", "train_sampling_strategy", "weight_decay",
)  # fmt: skip


def checkpoint_to_resume(args: TrainingArguments, **origin: Any) -> str | None:
    """
    The newest whole checkpoint in `output_dir`, if the run that wrote it is this one.

    A run leaves its settings in `output_dir/run.json` when it starts. A checkpoint whose writing was cut short, which
    lacks the file that is written last, is passed over.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the run.
        origin:
            What else decides the weights, ready for JSON: arguments of the recipe, hashes of data and starting model.

    Returns:
        `str`, *optional*: path for `trainer.train(resume_from_checkpoint=...)`, `None` where a run starts anew.

    Raises:
        `ValueError`: if the checkpoints are those of a run with other settings.
    """
    folder = Path(args.output_dir)
    settings = {name: value for name, value in args.to_dict().items() if name in TRAINING}
    settings = json.loads(json.dumps({**settings, **origin}, default=str))
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if not whole:
        if PartialState().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RUN_NAME, settings)
        return None
    changed = _changed(json.loads((folder / RUN_NAME).read_text(encoding="utf-8")), settings)
    if changed:
        raise ValueError(
            f"{folder} holds checkpoints of a run with another {', '.join(changed)}: choose another output_dir, or "
            "delete this one to start anew."
        )
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
