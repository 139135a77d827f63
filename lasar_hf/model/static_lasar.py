"""Fixed shapes for serving, so that `torch.compile` and CUDA graphs can reuse the passes of the backbone.

A request of `B` prompts with at most `P` tokens uses a bucket, the next larger batch size and prompt length of a short
list. All passes of a bucket write to one tensor of keys and one of values per layer. The inputs of a pass are padded
to a fixed number of sequences, tokens and keys. No token sees the padding, and the next pass overwrites its keys.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache_lasar import LinkedCache


class _WrittenKeys(Cache):
    """Keys and values of fixed shape, written at the given columns of each layer's `(B, heads, S, head dim)`."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], columns: torch.Tensor):
        super().__init__(layers=[])
        self.keys, self.values, self.columns = keys, values, columns

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.columns, key_states)
        values.index_copy_(2, self.columns, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # only read by backbones to count positions, which are passed


def _read(backbone, inputs_embeds, attention_mask, position_ids, first_column, keys, values) -> torch.Tensor:
    """One pass of the backbone, which becomes one graph per shape."""
    columns = first_column + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
    return backbone(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=_WrittenKeys(keys, values, columns),
        use_cache=False,
    ).last_hidden_state


class StaticCache:
    """
    Keys and values of one bucket, and its compiled passes; one request at a time.

    A pass reads `Q` tokens per sequence, padded to the next of three sizes: 2 (latent slots and `<|latent_end|>`), the
    number of beams, and the length of a prompt. Each size is one graph.
    """

    def __init__(self, backbone, batch_size: int, sizes: Sequence[int], num_keys: int, compile_options: dict):
        self.backbone, self.batch_size, self.sizes = backbone, batch_size, sorted(set(sizes))
        self.num_keys = -(-num_keys // 16) * 16  # CUDA kernels need rows of a mask to be aligned
        self.length = 0  # keys of the request so far
        # 1. A pass over one token shows the shape of each layer's keys and values.
        probe = LinkedCache(backbone.config.num_hidden_layers)
        token = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
        backbone(input_ids=token, past_key_values=probe, use_cache=False)
        states = [layer.states() for layer in probe.layers]
        # 2. CUDA graphs may write to tensors whose address never changes.
        self.keys, self.values = (
            [part.new_zeros(batch_size, part.shape[1], self.num_keys, part.shape[3]) for part in parts]
            for parts in zip(*states, strict=True)
        )
        for tensor in (*self.keys, *self.values):
            torch._dynamo.mark_static_address(tensor)
        # 3. PyTorch limits the number of graphs per code object, so each size has a copy of the function.
        self.passes: dict[int, Callable] = {}
        for size in self.sizes:
            function = FunctionType(_read.__code__.replace(), _read.__globals__)
            self.passes[size] = torch.compile(function, dynamic=False, fullgraph=True, **compile_options)

    def reset(self) -> "StaticCache":
        """Forget the request before. Zeros also remove NaN, which would pass through a mask."""
        torch._foreach_zero_([*self.keys, *self.values])
        self.length = 0
        return self

    def read(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor):
        """Read tokens `(B, Q, H)` after those before, with an additive mask `(B, 1, Q, S)`. Returns `(B, Q, H)`."""
        batch_size, width = position_ids.shape
        size = next(size for size in self.sizes if size >= width)
        rows, extra = self.batch_size - batch_size, size - width
        hidden = torch.finfo(attention_mask.dtype).min
        # 1. Pad sequences, tokens and keys.
        inputs_embeds = nn.functional.pad(inputs_embeds, (0, 0, 0, extra, 0, rows))
        position_ids = nn.functional.pad(position_ids, (0, extra, 0, rows))
        unwritten = self.num_keys - attention_mask.shape[-1]
        attention_mask = nn.functional.pad(attention_mask, (0, unwritten, 0, extra, 0, 0, 0, rows), value=hidden)
        # 2. Read. The keys of padding are in columns that the next pass overwrites.
        first_column = torch.full((1,), self.length, device=inputs_embeds.device)
        self.length += width
        torch.compiler.cudagraph_mark_step_begin()
        hidden_states = self.passes[size](
            self.backbone, inputs_embeds, attention_mask, position_ids, first_column, self.keys, self.values
        )
        # 3. Copy the output, since the next run of a CUDA graph overwrites it.
        return hidden_states[:batch_size, :width].clone()


class StaticPasses:
    """
    The buckets of [`~LasarForGenerativeRec.compile_for_serving`], whose arguments these are. A bucket is made when a
    request needs it for the first time. A request holds `lock`, since the next one writes to the same tensors.
    """

    def __init__(self, prompt_buckets: Sequence[int], batch_buckets: Sequence[int], num_beams: int, **compile_options):
        for name, sizes in (
            ("prompt_buckets", prompt_buckets), ("batch_buckets", batch_buckets), ("num_beams", [num_beams])
        ):  # fmt: skip
            if not sizes or min(sizes) < 1:
                raise ValueError(f"{name} is {sizes}; expected numbers of at least 1.")
        self.prompt_buckets, self.batch_buckets = sorted(prompt_buckets), sorted(batch_buckets)
        self.num_beams, self.compile_options = num_beams, compile_options
        self.caches: dict[tuple[int, int], StaticCache] = {}
        self.lock = threading.Lock()

    def __reduce__(self):
        # The copy of a model makes buckets of its own.
        sizes = self.prompt_buckets, self.batch_buckets, self.num_beams
        return partial(StaticPasses, **self.compile_options), sizes

    def cache(self, model, batch_size: int, prompt_length: int, num_beams: int) -> StaticCache:
        """The empty cache of the bucket for a request to a [`LasarModel`]."""
        # 1. The next larger sizes.
        for name, size, largest in (
            ("The longest prompt, in tokens,", prompt_length, self.prompt_buckets[-1]),
            ("The number of prompts", batch_size, self.batch_buckets[-1]), ("num_beams", num_beams, self.num_beams),
        ):  # fmt: skip
            if size > largest:
                raise ValueError(
                    f"{name} is {size}, but the model was compiled for at most {largest}. Use a smaller one, or call "
                    "compile_for_serving with larger sizes."
                )
        rows = next(size for size in self.batch_buckets if size >= batch_size)
        length = next(size for size in self.prompt_buckets if size >= prompt_length)
        # 2. Room for the prompt, the latent steps, <|latent_end|> and the beams of all levels but the last.
        if (rows, length) not in self.caches:
            beams, config = max(self.num_beams, 2), model.config
            num_keys = length + config.max_latent_steps + 1 + (config.num_sid_levels - 1) * beams
            sizes = [2, beams, max(length, 2)]
            self.caches[rows, length] = StaticCache(model.backbone, rows, sizes, num_keys, self.compile_options)
        return self.caches[rows, length].reset()
