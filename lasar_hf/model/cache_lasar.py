"""Keys and values in linked blocks: an append-only cache that survives gradient checkpointing."""

from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, DynamicLayer


class _BlockLayer(DynamicLayer):
    """Keys and values of one layer in one block, linked to the blocks before it."""

    def __init__(self, parent: "_BlockLayer | None"):
        super().__init__()
        self.parent = parent

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.is_autocast_enabled(key_states.device.type):
            # Cast before joining. Attention would cast the joined tensors, and so keep a copy of the prompt per step.
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        # A block is written once. A second write is the replay of gradient checkpointing and stores equal values.
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return self.states()

    def pieces(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of each block, from the first block to this one."""
        keys, values = self.parent.pieces() if self.parent is not None else ([], [])
        return [*keys, self.keys], [*values, self.values]

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(B, heads, S, head dim)` of this block and all before it."""
        if self.parent is None:
            return self.keys, self.values
        keys, values = self.pieces()
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        length = self.keys.shape[-2] if self.is_initialized else 0
        return length + (self.parent.get_seq_length() if self.parent is not None else 0)


class _RejoinHooks:
    """
    Hooks for tensors saved for the backward pass, see [`~LinkedCache.keeping_blocks`].

    The autograd graph refers to these hooks. If they referred to the graph, it would never be freed. Tensors are
    therefore detached, and `joined` is cleared on exit.
    """

    def __init__(self):
        # The last joined keys and values with their pieces. While they exist, no other tensor gets their address.
        self.joined: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def pack(self, tensor: torch.Tensor):
        for joined, pieces in self.joined:
            if tensor.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr():
                view = tensor.shape, tensor.stride(), tensor.storage_offset()
                return [piece.detach() for piece in pieces], view
        # Parameters are not detached, since ZeRO-3 swaps their data. Other tensors would refer to their graph.
        return tensor if tensor.is_leaf else tensor.detach()

    @staticmethod
    def unpack(packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        pieces, view = packed
        return torch.cat(pieces, dim=-2).as_strided(*view)


class LinkedCache(Cache):
    """
    Append-only cache made of linked blocks, one per call of the backbone; `parent` is the block before this one.

    With gradients, a `DynamicCache` copies the prompt's keys and values at every step. Under gradient checkpointing a
    layer is replayed in the backward pass and would append twice, so transformers drops any cache. A block stores only
    its own keys and values and returns them joined to those of its parents, so writing it again is harmless.
    """

    def __init__(self, num_layers: int, parent: "LinkedCache | None" = None):
        parents = parent.layers if parent is not None else [None] * num_layers
        super().__init__(layers=[_BlockLayer(layer) for layer in parents])
        self._hooks: _RejoinHooks | None = None

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._hooks is not None:
            self._hooks.joined = list(zip(states, self.layers[layer_idx].pieces(), strict=True))
        return states

    @contextmanager
    def keeping_blocks(self):
        """
        Context in which attention saves the pieces of its joined keys and values, and joins them again in the backward
        pass. Otherwise every latent step would keep a copy of the prompt's. Without gradients it does nothing.
        """
        if not torch.is_grad_enabled():
            yield
            return
        hooks = self._hooks = _RejoinHooks()
        try:
            with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
                yield
        finally:
            self._hooks, hooks.joined = None, []
