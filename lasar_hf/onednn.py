"""Faster linear layers for inference on x86 CPUs, by oneDNN instead of MKL.

    with onednn_linear(model):
        model.recommend(**prompts, catalog=catalog)

PyTorch multiplies float32 matrices by MKL, which uses half the vector width of non-Intel processors, and one thread if
there is a single row, as in a latent step. oneDNN has neither limit, and every x86 build of PyTorch contains it.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


MIN_PRODUCT = 2**18  # multiplications; for smaller products the call costs more than it saves
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
_PLAIN = (torch.Tensor, nn.Parameter)  # quantised and sharded weights have other types


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, by oneDNN for large float32 products on a CPU without gradients."""
    if not _supports(states, weight, bias):
        return nn.functional.linear(states, weight, bias)
    rows = states.numel() // states.shape[-1]
    extra = _rounded(rows) - rows
    if not extra:
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    padded = nn.functional.pad(states.reshape(rows, -1), (0, 0, 0, extra))
    product = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return product[:rows].view(*states.shape[:-1], -1)


def _supports(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
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
    `rows` rounded up to four significant bits. oneDNN compiles and caches a kernel per size, up to a megabyte each, so
    the number of sizes must be small while prompts have any length.
    """
    step = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // step) * step


def _forward(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    return linear(states, layer.weight, layer.bias)


@contextmanager
def onednn_linear(model: nn.Module):
    """
    Context in which the `nn.Linear` layers of a model use [`linear`].

    Each layer's `forward` is replaced, since a `TorchFunctionMode` would slow down all other calls. A layer whose
    `forward` has already been replaced is not changed.
    """
    layers = [part for part in model.modules() if type(part) is nn.Linear and "forward" not in vars(part)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
