"""Models whose weights are sharded over processes: loading them whole under ZeRO-3, using them under FSDP2."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import TrainingArguments
from transformers.integrations import deepspeed


T = TypeVar("T")


def uses_zero3(args: TrainingArguments) -> bool:
    """Whether the run shards weights with DeepSpeed's stage 3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


@contextmanager
def unsharded_weights():
    """
    Create and load models with all their weights, whatever the run's DeepSpeed stage.

    Once training arguments configured ZeRO-3, transformers shards every model that is created. Sharded weights cannot
    be resized or hashed, and one process cannot run the model. The trainer shards a whole model itself.

    Example:

    ```python
    >>> with unsharded_weights():
    ...     model = LasarForGenerativeRec.from_backbone("Qwen/Qwen3-0.6B", tokenizer)
    ```
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            deepspeed.set_hf_deepspeed_config(reference())


def run_with_gathered_weights(root: nn.Module, function: Callable[[], T]) -> T:
    """
    Call a function that uses the wrapped model `root` other than through its forward, while FSDP2 gathers the weights
    of the root's forward (embeddings and head). Every process must call it.
    """
    if not isinstance(root, FSDPModule):
        return function()
    root._gathered = function
    register_fsdp_forward_method(root, "_gathered")
    try:
        return root._gathered()
    finally:
        del root._gathered
