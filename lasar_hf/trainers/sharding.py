"""Several processes: DDP's search for unused parameters, and DeepSpeed's ZeRO-3, which shards each model's weights."""

from contextlib import contextmanager

from peft import PeftConfig, PeftModel
from transformers import TrainingArguments
from transformers.integrations import deepspeed


def uses_zero3(args: TrainingArguments) -> bool:
    """Whether the run shards weights with DeepSpeed's stage 3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def refuse_zero3(model: object, args: TrainingArguments, peft_config: PeftConfig | None) -> None:
    """Raise a `ValueError` for an adapter under ZeRO-3; the arguments are those of a trainer."""
    if uses_zero3(args) and (peft_config is not None or isinstance(model, PeftModel)):
        raise ValueError(
            "LoRA is not supported under ZeRO-3, which needs reentrant checkpointing; the latent loop would be wrong. "
            "Use recipes/accelerate_configs/zero2.yaml."
        )


def refuse_unused_search(args: TrainingArguments) -> None:
    """
    Turn off DDP's search for unused parameters; raise a `ValueError` if it was asked for.

    DDP searches the output of the forward. The extra losses reach the policy head through a hook, so the search would
    mark the head as unused. The search is not needed: every trained parameter has a gradient in every step.
    """
    if args.ddp_find_unused_parameters:
        raise ValueError(
            "ddp_find_unused_parameters is True, but the search fails on the policy head. Leave it out: every trained "
            "parameter is used in every step."
        )
    args.ddp_find_unused_parameters = False  # for None, transformers may search


@contextmanager
def unsharded_weights():
    """
    Create and load models with all their weights, whatever the run's DeepSpeed stage.

    Once training arguments configured ZeRO-3, transformers shards every model that is created. Sharded weights cannot
    be resized or hashed, and one process cannot run the model. The trainer shards a whole model itself.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            deepspeed.set_hf_deepspeed_config(reference())
