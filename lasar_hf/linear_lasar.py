"""Matrix products of inference on a CPU, by oneDNN where PyTorch would ask MKL.

PyTorch hands float32 products to MKL, which leaves half the vector width of other makers' processors unused, and reads
the weights with a single thread when a product has one row, as that of a latent step has. oneDNN, which every x86 build
of PyTorch holds and uses for bfloat16, does neither.
"""

from contextlib import contextmanager

import torch
from torch import nn


MIN_PRODUCT = 2**18  # multiplications; below, the call costs more than it saves
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


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
    is_large = states.numel() * weight.shape[0] >= MIN_PRODUCT
    is_float = weight.is_cpu and weight.is_contiguous() and weight.dtype == states.dtype == torch.float32
    is_plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    if HAS_ONEDNN and is_large and is_float and is_plain:
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return nn.functional.linear(states, weight, bias)


@contextmanager
def fast_linear_layers(model: nn.Module):
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
        layer.forward = lambda states, layer=layer: linear(states, layer.weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
