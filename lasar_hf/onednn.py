"""Faster linear layers for inference on x86 CPUs: oneDNN's float32 products instead of MKL's, and int8 weights.

    with onednn_linear(model):
        model.recommend(**prompts, catalog=catalog)

PyTorch multiplies float32 matrices by MKL, which uses half the vector width of non-Intel processors, and one thread if
there is a single row, as in a latent step. oneDNN has neither limit, and every x86 build of PyTorch contains it.

    int8_linear(model)
    model.recommend(**prompts, catalog=catalog)

Int8 weights need a quarter of the memory and are several times faster again, but scores change in the third digit.
"""

from contextlib import contextmanager
from functools import partial
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn


MIN_PRODUCT = 2**18  # multiplications; for smaller products the call costs more than it saves
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
_CONTEXTS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # open contexts of each replaced layer
_LOCK = Lock()  # of the line above
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
    `forward` has already been replaced is not changed. It is a state of the model, not of a thread: contexts may
    overlap, and all threads use [`linear`] until the last one ends.
    """
    with _LOCK:
        layers = [part for part in model.modules() if part in _CONTEXTS or _is_plain(part)]
        for layer in layers:
            if layer not in _CONTEXTS:
                layer.forward = partial(_forward, layer)
            _CONTEXTS[layer] = _CONTEXTS.get(layer, 0) + 1
    try:
        yield
    finally:
        with _LOCK:
            for layer in layers:
                _CONTEXTS[layer] -= 1
                if not _CONTEXTS[layer]:
                    del _CONTEXTS[layer]
                    vars(layer).pop("forward", None)


def _is_plain(part: nn.Module) -> bool:
    return type(part) is nn.Linear and "forward" not in vars(part)


class Int8Linear(nn.Module):
    """
    A linear layer with int8 weights, for inference on a CPU.

    Each row `w` of the weight and each input `x` is divided by its largest absolute value and rounded to -127 … 127.
    The product of these numbers is exact, so the output for an input does not depend on the rest of the batch. The
    scheme is that of torchao's `Int8DynamicActivationInt8WeightConfig`.

    Args:
        layer (`nn.Linear`):
            The layer to convert. Its bias stays in its data type.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight, scale = _to_int8(layer.weight.detach())
        self.register_buffer("weight", weight)  # (N, H)
        self.register_buffer("scale", scale[:, 0])  # (N,)
        self.bias = layer.bias
        self.register_state_dict_pre_hook(_refuse_saving)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and states.requires_grad:
            raise ValueError("The model has int8 layers, which have no gradients. Train it before int8_linear.")
        # 1. Round the inputs.
        rows, scale = _to_int8(states.reshape(-1, states.shape[-1]))  # (R, H), (R, 1)
        # 2. Multiply. Rows of zeros fill up to a size that oneDNN knows.
        extra = _rounded(len(rows)) - len(rows)
        padded = nn.functional.pad(rows, (0, 0, 0, extra)) if extra else rows
        product = torch._int_mm(padded, self.weight.t())[: len(rows)]  # (R, N)
        # 3. Scale back.
        output = product * scale * self.scale
        if self.bias is not None:
            output = output + self.bias
        return output.to(states.dtype).view(*states.shape[:-1], len(self.weight))


def _to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `(R, H)` as whole numbers in -127 … 127, and the float32 scale `(R, 1)` of each row."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
    return (rows / scale).round().to(torch.int8), scale


def _refuse_saving(layer: Int8Linear, prefix: str, keep_vars: bool) -> None:
    raise ValueError("The model has int8 layers, which cannot be saved. Save it before int8_linear.")


def int8_linear(model: nn.Module) -> None:
    """
    Give the linear layers of a recommender's backbone int8 weights, in place and for inference only. The embeddings,
    the head and the policy head keep their data type.

    Args:
        model ([`LasarForGenerativeRec`]):
            The loaded model, on a CPU. It can neither be trained nor saved afterwards.

    Raises:
        `ValueError`: if the CPU has no AVX512-VNNI, the model is not on the CPU, or its backbone has no `nn.Linear`.

    Example:

    ```python
    >>> model = LasarForGenerativeRec.from_pretrained("outputs/grpo")
    >>> int8_linear(model)
    >>> model.recommend(**prompts, catalog=catalog)
    ```
    """
    if not (HAS_ONEDNN and torch.cpu._is_vnni_supported()):
        raise ValueError("int8_linear needs a CPU with AVX512-VNNI. Use float32 or bfloat16 weights.")
    backbone = model.model.backbone
    layers = [
        (parent, name, layer)
        for parent in backbone.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]
    if not layers or not all(layer.weight.is_cpu for _, _, layer in layers):
        raise ValueError("model has no linear layers on the CPU. Load it with device_map='cpu'.")
    for parent, name, layer in layers:
        setattr(parent, name, Int8Linear(layer))
