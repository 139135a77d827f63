"""How a batch is laid out: prompt, latent slots and answer of each sequence, and sequences with equal prompts."""

from dataclasses import dataclass

import torch

from .cache_lasar import LinkedCache
from .configuration_lasar import LasarConfig


@dataclass
class ReasoningState:
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


def valid_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
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


class BatchLayout:
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


class PromptGroups:
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
