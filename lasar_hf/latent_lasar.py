"""Parts of the latent loop: linked keys and values, the chain of a prompt, the layout of a batch, equal prompts."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_lasar import LasarConfig


class _SegmentLayer(DynamicLayer):
    """One layer's keys and values of one segment, linked to those of the segments before it."""

    def __init__(self, parent: "_SegmentLayer | None"):
        super().__init__()
        self.parent = parent

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.is_autocast_enabled(key_states.device.type):
            # As attention would, but before they are joined: it would keep its own copy of the prompt's for every
            # step.
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        # A segment is written once; a second write is the replay of gradient checkpointing and stores equal values.
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return self.states()

    def pieces(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values of each segment, the first one's first."""
        keys, values = self.parent.pieces() if self.parent is not None else ([], [])
        return [*keys, self.keys], [*values, self.values]

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(B, heads, S, head dim)` of this segment and all before it."""
        if self.parent is None:
            return self.keys, self.values
        keys, values = self.pieces()
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        own = self.keys.shape[-2] if self.is_initialized else 0
        return own + (self.parent.get_seq_length() if self.parent is not None else 0)


class _JoinAgain:
    """
    Hooks for tensors saved for the backward pass, see [`~LinkedCache.keeping_pieces`].

    The graph holds them, so they must not hold it when they are done.
    """

    def __init__(self):
        # Keys and values joined last, each with its pieces. They are held, so that no other tensor lies where they do.
        self.joined: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def pack(self, tensor: torch.Tensor):
        for joined, pieces in self.joined:
            if tensor.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr():
                view = tensor.shape, tensor.stride(), tensor.storage_offset()
                return [piece.detach() for piece in pieces], view
        # A parameter stays itself, since ZeRO-3 swaps its data; an output that stayed itself would hold its own graph.
        return tensor if tensor.is_leaf else tensor.detach()

    @staticmethod
    def unpack(packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        pieces, view = packed
        return torch.cat(pieces, dim=-2).as_strided(*view)


class LinkedCache(Cache):
    """
    Append-only cache made of linked segments, one for each call of the backbone.

    `DynamicCache` under grad copies the prompt's keys and values at every step, and transformers drops any cache under
    gradient checkpointing because a layer that is replayed in the backward pass would append twice. A segment only
    stores its own keys and values and returns its parents' and its own, so writing it again is harmless.

    Args:
        num_layers (`int`):
            Layers of the backbone.
        parent ([`LinkedCache`], *optional*):
            Segment that this one continues.
    """

    def __init__(self, num_layers: int, parent: "LinkedCache | None" = None):
        parents = parent.layers if parent is not None else [None] * num_layers
        super().__init__(layers=[_SegmentLayer(layer) for layer in parents])
        self._hooks: _JoinAgain | None = None

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._hooks is not None:
            self._hooks.joined = list(zip(states, self.layers[layer_idx].pieces(), strict=True))
        return states

    @contextmanager
    def keeping_pieces(self):
        """
        Keep the pieces of joined keys and values for the backward pass, and join them again there.

        Attention keeps its keys and values for the backward pass: joined ones would be a copy of the prompt's for
        every latent step. Nothing to do without gradients.
        """
        if not torch.is_grad_enabled():
            yield
            return
        hooks = self._hooks = _JoinAgain()
        try:
            with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
                yield
        finally:
            self._hooks, hooks.joined = None, []


@dataclass
class LatentChain:
    """
    Prompts that were read and reasoned about, ready for answers.

    Args:
        hidden_states (`torch.Tensor` of shape `(U, P, H)`):
            Final hidden states of the left-padded prompts.
        depth_logits (`torch.Tensor` of shape `(U, N_max)`):
            Logits of the policy head on `h_0`.
        depths (`torch.Tensor` of shape `(U,)`):
            Latent steps `N` of each row.
        cache ([`LinkedCache`]):
            Keys and values read so far.
        visible (`torch.Tensor` of shape `(U, S)`):
            Which keys of prompt and latent slots exist.
        position (`torch.Tensor` of shape `(U,)`):
            Position of the first token after the latent slots.
        slot (`torch.Tensor` of shape `(U, H)`, *optional*):
            Input of the last latent slot, which is read together with the next tokens. `None` without latent steps.
        slot_states (`list[torch.Tensor]` of shape `(U, H)`):
            Outputs of the latent slots read so far, one for each step; rows end at the last.
    """

    hidden_states: torch.Tensor
    depth_logits: torch.Tensor
    depths: torch.Tensor
    cache: LinkedCache
    visible: torch.Tensor
    position: torch.Tensor
    slot: torch.Tensor | None
    slot_states: list[torch.Tensor]

    def latent_states(self) -> torch.Tensor:
        """`h_0 … h_N` of each row, `(U, 1 + max N, H)`, zero beyond the row's depth."""
        states = torch.stack([self.hidden_states[:, -1], *self.slot_states], dim=1)
        num_steps = len(self.slot_states)
        step = torch.arange(1 + num_steps, device=states.device)
        # Chains are aligned at their end, so step t of a row stands `num_steps - N` places later.
        place = torch.where(step > 0, step + num_steps - self.depths[:, None], 0)
        inside = (step <= self.depths[:, None])[..., None]
        states = states.gather(1, place.clamp(max=num_steps)[..., None].expand(-1, -1, states.shape[-1]))
        return states.masked_fill(~inside, 0)


def _valid_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens `(B, L)` are not padding; refuses what is not a batch of rows and its mask."""
    if input_ids.ndim != 2 or len(input_ids) == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: pass a batch (B, L) of at least one row.")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        raise ValueError(
            "attention_mask must mark the tokens of input_ids, (B, L): masks of another shape, as a static cache "
            "makes them, cannot be used with latent steps."
        )
    return attention_mask.bool()


class _Layout:
    """
    How the rows of a batch are cut: `X … <|latent_start|>` (prompt), `<|latent|>` x N, answer.

    A row without `<|latent_start|>` (plain text) is all prompt. Rows may be padded on the left, on the right or not.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`):
            Token ids.
        valid (`torch.Tensor` of shape `(B, L)`):
            Which tokens are not padding.
        config ([`LasarConfig`]):
            Configuration with the control tokens.
    """

    def __init__(self, input_ids: torch.Tensor, valid: torch.Tensor, config: LasarConfig):
        self.input_ids, self.valid = input_ids, valid
        self.position = valid.cumsum(dim=1) - 1
        self.length = valid.sum(dim=1)
        is_start = valid & (input_ids == config.latent_start_token_id)
        is_slot = valid & (input_ids == config.latent_token_id)
        start = torch.where(is_start, self.position, -1).amax(dim=1)
        self.depth = is_slot.sum(dim=1)
        self.prompt_length = torch.where(start >= 0, start + 1, self.length)
        self.answer_length = self.length - self.prompt_length - self.depth
        offset = self.position - self.prompt_length[:, None]
        in_place = (start >= 0)[:, None] & (offset >= 0) & (offset < self.depth[:, None])
        misplaced = (is_slot & ~in_place).any(dim=1)
        too_deep = self.depth > config.max_latent_steps
        self.max_prompt, self.max_depth, self.max_answer, errors = torch.stack(
            [self.prompt_length.max(), self.depth.max(), self.answer_length.max(), (misplaced | too_deep).sum()]
        ).tolist()
        if errors:
            self._raise(misplaced, config.max_latent_steps)
        self.max_answer = max(self.max_answer, 1)  # nothing to read of equal bare prompts: one token that none sees

    def _raise(self, misplaced: torch.Tensor, max_latent_steps: int):
        if misplaced.any():
            row = int(misplaced.nonzero()[0])
            raise ValueError(
                f"Row {row}: the <|latent|> slots must follow <|latent_start|> directly and without a gap."
            )
        row = int((self.depth > max_latent_steps).nonzero()[0])
        raise ValueError(
            f"Row {row} has {int(self.depth[row])} latent slots but max_latent_steps is {max_latent_steps}: "
            "use fewer slots or a model with more steps."
        )

    def _columns(self) -> torch.Tensor:
        """Column of each row's r-th token that is not padding, `(B, L)`."""
        return torch.argsort((~self.valid).to(torch.uint8), dim=1, stable=True)

    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts and their mask, both `(B, P)`."""
        device = self.input_ids.device
        rank = torch.arange(self.max_prompt, device=device) - (self.max_prompt - self.prompt_length[:, None])
        columns = self._columns().gather(1, rank.clamp(min=0))
        return self.input_ids.gather(1, columns).masked_fill(rank < 0, 0), rank >= 0

    def answers(self) -> torch.Tensor:
        """Right-padded answers, `(B, A)`."""
        rank = torch.arange(self.max_answer, device=self.input_ids.device).expand(len(self.length), -1)
        first = self.prompt_length + self.depth
        columns = self._columns().gather(1, (first[:, None] + rank).clamp(max=self.input_ids.shape[1] - 1))
        return self.input_ids.gather(1, columns).masked_fill(rank >= self.answer_length[:, None], 0)


class _Groups:
    """
    Rows of equal (prompt, depth): one trunk row for each group, the members' answers are its branches.

    Every group is padded to the branches of the largest. Where few prompts repeat often and many do not, that would
    cost more than it saves, so equal rows are dealt to as many groups as make the fewest tokens in all.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, P)`):
            Left-padded prompts.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            Their mask.
        depth (`torch.Tensor` of shape `(B,)`):
            Latent steps of each row.
        answer_length (`int`):
            Tokens of a branch.
        share (`bool`):
            Whether to look for equal rows at all.
    """

    def __init__(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, depth: torch.Tensor, answer_length: int, share: bool
    ):
        batch_size, device = len(depth), depth.device
        rows = torch.arange(batch_size, device=device)
        self.num_groups = batch_size
        self.group, self.first = rows, rows  # (B,) group of each row; (U,) one member of each group
        self.branch, self.num_branches = torch.zeros_like(rows), 1  # (B,) branch of each row in its group
        if not share or batch_size == 1:
            return
        keys = torch.cat([prompt_ids.masked_fill(~prompt_mask, -1), depth[:, None]], dim=1)
        unique, equal_to, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        if len(unique) == batch_size:
            return
        sizes = torch.cat([counts.new_ones(1), counts]).unique()  # branches a group may have at most
        groups_of = (counts + sizes[:, None] - 1) // sizes[:, None]  # (sizes, unique)
        tokens = groups_of.sum(dim=1) * (prompt_ids.shape[1] + answer_length * sizes)
        best = int(tokens.argmin())
        self.num_branches, self.num_groups = int(sizes[best]), int(groups_of[best].sum())
        members = torch.argsort(equal_to, stable=True)  # equal rows after equal rows
        begin = counts.cumsum(0) - counts
        place = torch.empty_like(rows)  # of each row among its equals
        place[members] = rows - begin[equal_to[members]]
        first_group = groups_of[best].cumsum(0) - groups_of[best]
        self.group = first_group[equal_to] + place // self.num_branches
        self.branch = place % self.num_branches
        self.first = torch.empty(self.num_groups, dtype=rows.dtype, device=device)
        self.first[self.group] = rows  # any member will do
