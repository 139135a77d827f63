"""The part of a model card that says how the model was trained."""

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import yaml
from transformers import TrainerState, TrainingArguments


# Settings that are shown also where they have their default. The weights of the losses are in a line of their own.
SHOWN = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_tokens_per_batch", "num_generations", "seed",
)  # fmt: skip
# Settings that name folders, or say how a run was executed and evaluated rather than what it learned.
HIDDEN = (
    "data_dir", "anchors_dir", "stage1_model", "model_init_kwargs", "eval_users", "eval_strategy", "eval_steps",
    "eval_on_start", "per_device_eval_batch_size", "do_eval", "save_strategy", "save_steps", "use_cpu", "debug",
    "accelerator_config", "deepspeed", "fsdp", "fsdp_config", "ddp_backend", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class CardFacts:
    """
    What a trainer does not know of its own run, for the model card: its attribute `card_facts`.

    Args:
        start (`str`, *optional*):
            Folder or Hub id of the checkpoint that the run began with. Its card has the earlier stages.
        data_card (`Mapping`, *optional*):
            Content of the `data_card.json` that `recipes/prepare.py` wrote.
        settings (`Mapping`, *optional*):
            Other settings of the run, such as its tasks. See [`changed_settings`].
        title (`str`, *optional*):
            Name of the stage, such as `"Stage 1"`.
        note (`str`, *optional*):
            A sentence on how the run ended, if the weights are not those that it trained.
        revision (`str`, *optional*):
            Branch, tag or commit of `start` on the Hub.
    """

    start: str | None = None
    data_card: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    note: str = ""
    revision: str | None = None


def changed_settings(
    arguments: Any, shown: Sequence[str] = (), names: Collection[str] | None = None
) -> dict[str, Any]:
    """
    Fields of a dataclass that differ from their defaults, and those in `shown`, ready for JSON. Without `names`, all
    fields but those that name files.
    """
    found = {}
    for part in fields(arguments):
        if part.name in HIDDEN or names is not None and part.name not in names:
            continue
        value = getattr(arguments, part.name)
        default = part.default if part.default_factory is MISSING else part.default_factory()
        if value is not None and (part.name in shown or value != default):
            found[part.name] = value
    if found.get("max_tokens_per_batch"):
        found.pop("per_device_train_batch_size", None)
    return json.loads(json.dumps(found, default=lambda value: getattr(value, "value", str(value))))


def losses_text(losses: Mapping[str, float]) -> str:
    """The sum of the terms of a loss, such as "next item + 0.1 × alignment"."""
    terms = [name if weight == 1 else f"{weight:g} × {name}" for name, weight in losses.items() if weight]
    return " + ".join(terms)


def training_text(
    description: str,
    args: TrainingArguments,
    state: TrainerState,
    losses: Mapping[str, float],
    names: Collection[str],
    facts: CardFacts,
    num_processes: int = 1,
    has_adapter: bool = False,
) -> str:
    """
    Markdown of one stage: its loss, its length, its settings and the versions of the packages.

    Args:
        description (`str`):
            What kind of training it is.
        args (`TrainingArguments`), state (`TrainerState`):
            Arguments and state of the trainer.
        losses (`Mapping[str, float]`):
            Weight of each term of the loss by its name.
        names (`list[str]`):
            Arguments that decide the weights.
        facts ([`CardFacts`]):
            The rest.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes.
        has_adapter (`bool`, *optional*, defaults to `False`):
            Whether an adapter was trained instead of all weights.
    """
    lines = [f"{description} {facts.note}".strip(), f"Loss: {losses_text(losses)}."]
    length = f"{state.global_step:,} updates" + (f", {state.epoch:.2f} epochs" if state.epoch else "")
    trained = "a LoRA adapter, the new token rows and the policy head" if has_adapter else "all weights"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    lines.append(f"Length: {length}, on {processes}. Trained: {trained}.")
    if args.load_best_model_at_end and state.best_global_step and not facts.note:
        lines.append(
            f"The weights are those after {state.best_global_step:,} updates, the best ones on validation data "
            f"({args.metric_for_best_model} {state.best_metric:.4f})."
        )
    settings = {**facts.settings, **changed_settings(args, SHOWN, names)}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lasar_hf", *PACKAGES))
    block = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return "\n".join(lines) + f"\n\n```yaml\n{block}```\n\nMade with {versions}."
