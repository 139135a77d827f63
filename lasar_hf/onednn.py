"""Matrix products of inference on a CPU, by oneDNN where PyTorch would ask MKL.

PyTorch hands float32 products to MKL, which leaves half the vector width of other makers' processors unused, and reads
the weights with a single thread when a product has one row, as that of a latent step has. oneDNN, which every x86
build of PyTorch holds and uses for bfloat16, does neither.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


MIN_PRODUCT = 2**18  # multiplications; below, the call costs more than it saves
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
_PLAIN = (torch.Tensor, nn.Parameter)  # what quantises or shards weights brings tensors of its own


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `torch.nn.functional.linear`, by oneDNN where that is faster: large float32 products on a CPU without gradients.

    Args:
        states (`torch.Tensor` of shape `(..., I)`):
            Inputs.
        weight (`torch.Tensor` of shape `(O, I)`):
            Weight.
        bias (`torch.Tensor` of shape `(O,)`, *optional*):
            Bias.

    Returns:
        `torch.Tensor` of shape `(..., O)`.
    """
    if not _takes_onednn(states, weight, bias):
        return nn.functional.linear(states, weight, bias)
    rows = states.numel() // states.shape[-1]
    extra = _rounded(rows) - rows
    if not extra:
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    padded = nn.functional.pad(states.reshape(rows, -1), (0, 0, 0, extra))
    product = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return product[:rows].view(*states.shape[:-1], -1)


def _takes_onednn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    is_plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    return (
        HAS_ONEDNN
        and is_plain
        and states.numel() * weight.shape[0] >= MIN_PRODUCT
        and weight.is_cpu
        and weight.dtype == states.dtype == torch.float32
        and type(weight) in _PLAIN
        and type(states) in _PLAIN
        and states.shape[-1] == weight.shape[-1]
        and (bias is None or bias.shape == weight.shape[:1])
        and weight.is_contiguous()
    )


def _rounded(rows: int) -> int:
    """
    `rows`, from 16 on to four significant bits. oneDNN keeps what it compiled for every size, up to a megabyte each;
    prompts come in all lengths, and these are few.
    """
    step = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // step) * step


def _forward(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return linear(states, layer.weight, layer.bias)


@contextmanager
def onednn_linear(model: nn.Module):
    """
    Context in which the linear layers of a model use [`linear`].

    The layers are changed one by one: a `TorchFunctionMode` would slow every other call of a pass. A layer whose
    forward pass something else has replaced is left alone.

    Args:
        model (`torch.nn.Module`):
            The model.
    """
    layers = [part for part in model.modules() if type(part) is nn.Linear and "forward" not in vars(part)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
