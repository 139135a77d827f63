"""
Resuming a run exactly: only with the same settings, and only from a checkpoint of which every file is whole.

`run.json` in the output folder has the settings of the run. `checkpoint_files.json` in each checkpoint has the hashes
of its files; it is written once all processes have saved theirs, whatever DDP, DeepSpeed or FSDP call them.
"""

import json
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import checkpoint_hashes, file_hash, read_json, remove_temporary_files, write_json
from ..locks import LOCK_NAME
from ..processes import on_main_process


logger = logging.getLogger(__name__)

RUN_NAME = "run.json"
FILES_NAME = "checkpoint_files.json"
# A run can be extended, so its length may change, with a warning if its schedule depends on the length.
LENGTH = ("max_steps", "num_train_epochs")
# When checkpoints are saved decides which of them can be the best one, see `load_best_model_at_end`.
SAVING = ("save_strategy", "save_steps")
# Arguments that cannot change the weights. All others must be the same when a run resumes, those of evaluation too: it
# draws random numbers, after which dropout and candidates differ.
FREE = (
    # names, folders and the Hub; the content of data and anchors is compared
    "output_dir", "data_dir", "anchors_dir",
    "run_name", "project", "license", "dataset", "push_to_hub", "hub_model_id", "hub_token",
    "hub_private_repo", "hub_revision", "hub_strategy", "hub_always_push", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "resume_from_checkpoint",
    # logs, which are written after the update of a step
    "report_to", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step",
    "logging_strategy", "logging_steps", "logging_nan_inf_filter", "log_completions", "log_completions_hub_repo",
    "log_multimodal", "log_unique_prompts", "num_completions_to_print",
    # how many checkpoints are kept, where, and with which parts: one without optimizer is never resumed
    "save_total_limit", "save_on_each_node", "save_only_model",
    # which processes read the examples: their order and all draws are those of the main process
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "dataloader_multiprocessing_context", "dataset_num_proc",
    # memory against time, with the same numbers
    "gradient_checkpointing", "activation_checkpointing", "torch_empty_cache_steps",
    # number of this process, and how long it waits for the others
    "local_rank", "ddp_timeout",
)  # fmt: skip

# Files of a checkpoint that a run begins with. A memory may be added later.
STARTING_FILES = (
    "*model*.safetensors", "config.json", "adapter_config.json", "sid_catalog*", "processor_config.json", "tokenizer*",
    "vocab*", "merges.txt",
)  # fmt: skip


def starting_files(model: str | None) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint that decide a run that begins with it, for [`checkpoint_to_resume`]."""
    return checkpoint_hashes(model, STARTING_FILES)


def run_settings(args: TrainingArguments, **origin: Any) -> dict[str, Any]:
    """All settings of a run that may change its weights, ready for JSON."""
    settings = {name: value for name, value in args.to_dict().items() if name not in FREE}
    launch = {
        "num_processes": args.world_size,
        "num_gpus": args.n_gpu,  # without a launcher, one process may use several
        "device": args.device.type,
        "mixed_precision": args.mixed_precision,
        "zero_stage": None if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage,
        "uses_fsdp": os.environ.get("ACCELERATE_USE_FSDP", "false"),
    }
    return json.loads(json.dumps({**settings, **launch, **origin}, default=str))


def checkpoint_to_resume(args: TrainingArguments, **origin: Any) -> str | None:
    """
    The newest whole checkpoint in `output_dir`, for `trainer.train(resume_from_checkpoint=...)`, or `None` to start
    from the beginning. A resumed run ends with the weights of one that was never stopped, or is refused.

    A run writes its settings to `run.json` when it starts. All that may change the weights are compared: arguments but
    those in `FREE`, the number of processes and the precision, and `origin`. The length may change, since a run can be
    extended. If its schedule depends on the length, a warning says that the weights will be others.

    A checkpoint is whole if all its files have the content that `checkpoint_files.json` says, and if its
    `trainer_state.json`, the last file, is complete. With `load_best_model_at_end`, so must be the best checkpoint. A
    warning in the log names each newer one that is skipped. A run that was killed before it saved a whole one
    starts from the beginning, which gives the same weights. But if a saved checkpoint was damaged later and there is
    no other, the run is refused: perhaps the file can be copied again, and training would overwrite the folder.

    Every process must call this function. The main process decides for all.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the run.
        origin:
            Other settings that decide the weights: the recipe's arguments, hashes of the data and the starting model.

    Returns:
        `str` or `None`: folder of the checkpoint.

    Raises:
        `ValueError`: if the settings differ or are unknown, or if there are only damaged checkpoints.

    Example:

    ```python
    >>> checkpoint = checkpoint_to_resume(training_args, data=PreparedData.file_hashes("outputs/toy/data"))
    >>> trainer.train(resume_from_checkpoint=checkpoint)
    ```
    """
    settings = run_settings(args, **origin)
    checkpoint = on_main_process(lambda: _decide(args, settings))
    return None if checkpoint is None else str(checkpoint)


def _decide(args: TrainingArguments, settings: dict[str, Any]) -> Path | None:
    folder = Path(args.output_dir)
    saved = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r".*-\d+", path.name)]
    saved = sorted(saved, key=_step, reverse=True)
    if not any((path / TRAINER_STATE_NAME).exists() for path in saved):  # killed before the first was complete
        write_json(folder / RUN_NAME, settings)
        return None
    before = _same_settings(folder, settings, () if args.load_best_model_at_end else SAVING)
    damages = {}
    for checkpoint in saved:
        damages[checkpoint] = checkpoint_damage(checkpoint, args.load_best_model_at_end)
        if damages[checkpoint] is None:
            _warn_of_length(checkpoint, before, settings)
            return checkpoint
        logger.warning("%s is skipped, since it is not whole: %s.", checkpoint, damages[checkpoint])
    for checkpoint, damage in damages.items():
        if _state(checkpoint) is not None:
            raise ValueError(
                f"{folder} has no whole checkpoint to resume from; the newest is {checkpoint.name}: {damage}. Put the "
                "file back, or delete the checkpoints to start from the beginning."
            )
    logger.warning("%s has no whole checkpoint: the run starts from the beginning.", folder)
    return None


def _same_settings(folder: Path, settings: dict[str, Any], saving: tuple[str, ...]) -> dict[str, Any]:
    """The settings in `run.json`, if they are those of this run."""
    path = folder / RUN_NAME
    if not path.exists():
        raise ValueError(
            f"{folder} has checkpoints but no {RUN_NAME}, so it is unknown which settings made them. Put the file "
            "back, use another output_dir, or delete the checkpoints to start from the beginning."
        )
    before = read_json(path)
    names = (before.keys() | settings.keys()) - {*FREE, *LENGTH, *saving}
    unknown = sorted(name for name in names if name not in before)
    changed = sorted(name for name in names if name in before and before[name] != settings.get(name))
    if changed or unknown:
        parts = [f"with different settings ({', '.join(changed)})"] if changed else []
        parts += [f"of an older version, which did not record {', '.join(unknown)}"] if unknown else []
        raise ValueError(
            f"{folder} contains checkpoints of a run {' and '.join(parts)}. Use another output_dir, or delete this "
            "one to start from scratch."
        )
    return before


def _warn_of_length(checkpoint: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Warn if the length changed, and with it the learning rates or step costs of the steps so far."""
    names = [name for name in LENGTH if before.get(name) != settings[name]]
    is_constant = "constant" in settings["lr_scheduler_type"] and not 0 < settings["warmup_steps"] < 1
    if names and not (is_constant and not settings.get("step_cost_warmup")):
        state = read_json(checkpoint / TRAINER_STATE_NAME)
        jump = " The learning rate starts at 0, then jumps up." if state["global_step"] >= state["max_steps"] else ""
        changed = ", ".join(f"{name} was {before.get(name)} and is {settings[name]}" for name in names)
        warnings.warn(
            f"{checkpoint}: {changed}. The steps so far had the schedule of the old length, so the weights "
            f"will differ from those of one run of the new length.{jump}",
            stacklevel=4,
        )


def checkpoint_damage(checkpoint: Path, needs_best: bool = False) -> str | None:
    """
    What is wrong with the files of a checkpoint, or `None` if it is whole. With `needs_best`, the best checkpoint
    until then must be whole too.
    """
    state = _state(checkpoint)
    if state is None:
        return f"{TRAINER_STATE_NAME} is missing or incomplete, as after a kill"
    hashes = _read(checkpoint / FILES_NAME)
    if hashes is None:
        return f"{FILES_NAME} is missing or cut; with save_only_model there is no optimizer to resume with"
    for name, digest in hashes.items():
        path = checkpoint / name
        if not path.exists() or file_hash(path) != digest:
            return f"{name} is {'not the file that was saved' if path.exists() else 'missing'}"
    best = state.get("best_model_checkpoint") if needs_best else None
    if best is not None and Path(best).name != checkpoint.name:
        damage = checkpoint_damage(checkpoint.with_name(Path(best).name))
        return None if damage is None else f"in the best checkpoint until then, {Path(best).name}, {damage}"
    return None


def _state(checkpoint: Path) -> dict | None:
    """Content of a complete `trainer_state.json`, which transformers writes in place."""
    state = _read(checkpoint / TRAINER_STATE_NAME)
    return state if state is not None and state.get("global_step") == _step(checkpoint) else None


def _read(path: Path) -> dict | None:
    try:
        content = read_json(path)
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def seal_checkpoint(checkpoint: str | Path) -> None:
    """
    Bring the files of a checkpoint to the disk and write their hashes to `checkpoint_files.json`. Cards, to which
    evaluations add results, and `trainer_state.json`, which follows, are not among them.
    """
    checkpoint = Path(checkpoint)
    remove_temporary_files(checkpoint)
    hashes = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if path.name not in (TRAINER_STATE_NAME, FILES_NAME, LOCK_NAME) and path.suffix != ".md":
            with path.open("rb") as file:
                os.fsync(file.fileno())
            hashes[path.relative_to(checkpoint).as_posix()] = file_hash(path)
    write_json(checkpoint / FILES_NAME, hashes)
