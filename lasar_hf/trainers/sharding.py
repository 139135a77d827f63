"""Models whose weights are split over processes: making them whole under ZeRO-3, drawing from them under FSDP2."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.integrations import deepspeed


T = TypeVar("T")


@contextmanager
def unsharded_weights():
    """
    Make and load models with all their weights, whatever the run's DeepSpeed stage.

    Once ZeRO-3 is configured, which the training arguments do, transformers splits the weights of a model while it is
    made. Weights can then be neither resized ([`LasarForGenerativeRec.from_backbone`]) nor hashed, and a single
    process cannot run the model. A model that was made whole is split by the trainer. Nothing to do without ZeRO-3.

    Example:

    ```python
    >>> with unsharded_weights():
    ...     model = LasarForGenerativeRec.from_backbone("Qwen/Qwen3-0.6B", tokenizer)
    >>> trainer = LasarSFTTrainer(model, args, catalog, train_dataset=rows)
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
    Call a function while the weights that FSDP2 gathers around the root's forward (embeddings, head) are gathered.

    Args:
        root (`nn.Module`):
            The model as the trainer wrapped it; one that is not under FSDP2 has nothing to gather.
        function (`Callable`):
            Uses the model otherwise than by its forward, on every process.

    Returns:
        What the function returns.
    """
    if not isinstance(root, FSDPModule):
        return function()
    root._gathered = function
    register_fsdp_forward_method(root, "_gathered")
    try:
        return root._gathered()
    finally:
        del root._gathered
