"""The layout of a batch: prompt, latent slots and answer of each sequence, and groups of sequences with equal prompts.

Shapes: `B` sequences of `L` tokens, prompts of at most `P` tokens, answers of at most `A` tokens, `U` groups.
"""

from dataclasses import dataclass

import torch

from .cache_lasar import LinkedCache
from .configuration_lasar import LasarConfig


@dataclass
class ReasoningState:
    """Prompts after their latent steps, ready for answers. One sequence per group of equal prompts."""

    hidden_states: torch.Tensor  # (U, P, H), final hidden states of the left-padded prompts
    depth_logits: torch.Tensor  # (U, N_max), logits of the policy head on h_0
    depths: torch.Tensor  # (U,), latent steps N of each sequence
    cache: LinkedCache  # keys and values read so far
    visible: torch.Tensor  # (U, S), False where a key of the prompt or of the slots is padding
    position: torch.Tensor  # (U,), position of the first token after the latent slots
    slot: torch.Tensor | None  # (U, H), input of the last slot, which is read with the next tokens; None without slots
    slot_states: list[torch.Tensor]  # (U, H) per step: outputs of the slots read so far, aligned at the last step

    def latent_states(self) -> torch.Tensor:
        """`h_0 … h_N` of each sequence, `(U, 1 + max N, H)`, zero after its depth."""
        states = torch.stack([self.hidden_states[:, -1], *self.slot_states], dim=1)  # (U, 1 + max N, H)
        num_steps = len(self.slot_states)
        step = torch.arange(1 + num_steps, device=states.device)  # (1 + max N,)
        # Latent steps are aligned at their end: step t of a sequence was computed `max N - N` iterations later.
        index = torch.where(step > 0, step + num_steps - self.depths[:, None], 0).clamp(max=num_steps)
        states = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        return states.masked_fill((step > self.depths[:, None])[..., None], 0)


class BatchLayout:
    """
    Splits each sequence of a batch into prompt (`X … <|latent_start|>`), `N` latent slots and answer. Padding may be
    on either side. A sequence without `<|latent_start|>` (plain text) is all prompt.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: LasarConfig):
        if input_ids.ndim != 2 or len(input_ids) == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected a batch (B, L) of at least one sequence."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
            raise ValueError(
                "attention_mask does not have the shape of input_ids, (B, L). Masks of another shape, such as those "
                "of a static cache, cannot be used with latent steps."
            )
        self.input_ids = input_ids
        self.valid = valid = attention_mask.bool()  # (B, L)
        self.position = valid.cumsum(dim=1) - 1  # (B, L), padding not counted
        self.length = valid.sum(dim=1)  # (B,)

        # 1. Lengths of the three parts.
        is_start = valid & (input_ids == config.latent_start_token_id)  # (B, L)
        is_slot = valid & (input_ids == config.latent_token_id)  # (B, L)
        start = torch.where(is_start, self.position, -1).amax(dim=1)  # (B,), -1 in plain text
        self.depth = is_slot.sum(dim=1)  # (B,), latent slots
        self.prompt_length = torch.where(start >= 0, start + 1, self.length)
        self.answer_length = self.length - self.prompt_length - self.depth

        # 2. Slots must follow <|latent_start|> without a gap, and there is a maximum.
        offset = self.position - self.prompt_length[:, None]
        is_expected = (start >= 0)[:, None] & (offset >= 0) & (offset < self.depth[:, None])
        misplaced = (is_slot & ~is_expected).any(dim=1)  # (B,)
        too_deep = self.depth > config.max_latent_steps  # (B,)

        # 3. Copy all numbers that Python needs from the device at once.
        self.max_prompt, self.max_depth, max_answer, num_errors = torch.stack(
            [self.prompt_length.max(), self.depth.max(), self.answer_length.max(), (misplaced | too_deep).sum()]
        ).tolist()
        self.max_answer = max(max_answer, 1)  # equal prompts without answers still read one (invisible) token
        if num_errors and misplaced.any():
            index = int(misplaced.nonzero()[0])
            raise ValueError(
                f"Sequence {index}: the <|latent|> slots must follow <|latent_start|> directly and without a gap."
            )
        if num_errors:
            index = int(too_deep.nonzero()[0])
            raise ValueError(
                f"Sequence {index} has {int(self.depth[index])} latent slots, but max_latent_steps is "
                f"{config.max_latent_steps}. Use fewer slots or a model with more steps."
            )

    def columns(self) -> torch.Tensor:
        """Column of `input_ids` that holds the r-th token (padding not counted) of each sequence, `(B, L)`."""
        return torch.argsort((~self.valid).to(torch.uint8), dim=1, stable=True)

    def last_prompt_column(self) -> torch.Tensor:
        """Column of the last prompt token of each sequence, `(B, 1)`."""
        return self.columns().gather(1, (self.prompt_length[:, None] - 1).clamp(min=0))

    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts and their mask, both `(B, P)`."""
        device = self.input_ids.device
        rank = torch.arange(self.max_prompt, device=device) - (self.max_prompt - self.prompt_length[:, None])
        columns = self.columns().gather(1, rank.clamp(min=0))
        return self.input_ids.gather(1, columns).masked_fill(rank < 0, 0), rank >= 0

    def answers(self) -> torch.Tensor:
        """Right-padded answers, `(B, A)`."""
        rank = torch.arange(self.max_answer, device=self.input_ids.device).expand(len(self.length), -1)
        first = self.prompt_length + self.depth
        columns = self.columns().gather(1, (first[:, None] + rank).clamp(max=self.input_ids.shape[1] - 1))
        return self.input_ids.gather(1, columns).masked_fill(rank >= self.answer_length[:, None], 0)


class PromptGroups:
    """
    Groups of sequences with equal prompt and depth. The backbone reads a group's prompt once and the answers of its
    members as branches of `answer_length` tokens.

    Every group is padded to the branches of the largest. If a few prompts repeat often and many do not, that padding
    would cost more than sharing saves, so equal sequences are split into the number of groups that needs the fewest
    tokens in total.

    `group` and `branch` `(B,)` are the group of each sequence and its branch in that group, and `first` `(U,)` is one
    member of each group.
    """

    def __init__(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, depth: torch.Tensor, answer_length: int, share: bool
    ):
        batch_size, device = len(depth), depth.device
        sequences = torch.arange(batch_size, device=device)  # (B,)
        # Without sharing, every sequence is a group of its own.
        self.num_groups, self.num_branches = batch_size, 1  # U, and branches per group
        self.group, self.first, self.branch = sequences, sequences, torch.zeros_like(sequences)
        if not share or batch_size == 1:
            return

        # 1. Find the D distinct (prompt, depth) keys; class_of (B,), counts (D,).
        keys = torch.cat([prompt_ids.masked_fill(~prompt_mask, -1), depth[:, None]], dim=1)  # (B, P + 1)
        unique, class_of, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        if len(unique) == batch_size:
            return

        # 2. Choose the branches per group, among the C sizes that occur, by the number of tokens to read.
        sizes = torch.cat([counts.new_ones(1), counts]).unique()  # (C,)
        num_groups = (counts + sizes[:, None] - 1) // sizes[:, None]  # (C, D)
        tokens = num_groups.sum(dim=1) * (prompt_ids.shape[1] + answer_length * sizes)  # (C,)
        best = int(tokens.argmin())
        self.num_branches, self.num_groups = int(sizes[best]), int(num_groups[best].sum())

        # 3. Number the members of each class from 0: sort by class, then subtract the start of the class.
        order = torch.argsort(class_of, stable=True)  # (B,)
        class_start = counts.cumsum(0) - counts  # (D,)
        member = torch.empty_like(sequences)
        member[order] = sequences - class_start[class_of[order]]

        # 4. Fill the groups of each class one after the other.
        first_group = num_groups[best].cumsum(0) - num_groups[best]  # (D,)
        self.group = first_group[class_of] + member // self.num_branches
        self.branch = member % self.num_branches
        self.first = torch.empty(self.num_groups, dtype=sequences.dtype, device=device)
        self.first[self.group] = sequences  # members are equal, so it does not matter which one is kept
