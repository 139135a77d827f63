"""The layout of a batch: prompt, latent slots and answer of each sequence, and trees of prompts that share a prefix.

Shapes: `B` sequences of `L` tokens, answers of at most `A` tokens. A prompt is a body of at most `P` tokens and its
last token, `<|latent_start|>`. `T` trees of `R` paths with `W` branches each; `U = T · R` paths in all.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from .cache_lasar import LinkedCache
from .configuration_lasar import LasarConfig
from .static_lasar import StaticCache


@dataclass
class ReasoningState:
    """
    Prompts after their latent steps, ready for answers. The paths of a tree are in one sequence of the backbone: its
    keys are the body, then one `<|latent_start|>` per path, one slot per path for each step, and the tokens that
    [`~LasarModel.read_tokens`] reads, path by path.
    """

    hidden_states: torch.Tensor  # (T, P + R, H), final hidden states of the left-padded bodies and the starts
    depth_logits: torch.Tensor  # (U, C), logits of the policy head on h_0
    depths: torch.Tensor  # (U,), latent steps N of each path; a branch may leave it after fewer
    cache: LinkedCache | StaticCache  # keys and values read so far
    visible: torch.Tensor  # (U, S), the keys of bodies, starts and slots that a path sees
    position: torch.Tensor  # (U,), position of the first token after the latent slots
    slot: torch.Tensor | None  # (U, H), input of the last slot, which is read with the next tokens; None without slots
    slot_states: list[torch.Tensor]  # (U, H) per step: outputs of the slots read so far, aligned at the last step
    num_paths: int = 1  # R
    num_read: list[int] = field(default_factory=list)  # tokens per path of each call of `read_tokens`

    def latent_states(self) -> torch.Tensor:
        """`h_0 … h_N` of each path, `(U, 1 + max N, H)`, zero after its depth."""
        start_states = self.hidden_states[:, -self.num_paths :].flatten(0, 1)  # (U, H)
        states = torch.stack([start_states, *self.slot_states], dim=1)  # (U, 1 + max N, H)
        num_steps = len(self.slot_states)
        step = torch.arange(1 + num_steps, device=states.device)  # (1 + max N,)
        # Latent steps are aligned at their end: step t of a path was computed `max N - N` iterations later.
        index = torch.where(step > 0, step + num_steps - self.depths[:, None], 0).clamp(max=num_steps)
        states = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        return states.masked_fill((step > self.depths[:, None])[..., None], 0)

    def keys_of_tokens(self, visible: torch.Tensor) -> torch.Tensor:
        """
        Turn `visible` `(U, Q, C)`, which of the `C` tokens of its own path each token sees, into `(U, Q, R · C)`,
        which of the tokens of its tree. Each call of `read_tokens` has its keys path by path.
        """
        if self.num_paths == 1:
            return visible
        own_path = torch.eye(self.num_paths, dtype=torch.bool, device=visible.device)[:, None, :, None]  # (R, 1, R, 1)
        parts = [
            (part.unflatten(0, (-1, self.num_paths))[..., None, :] & own_path).flatten(-2).flatten(0, 1)
            for part in visible.split([*self.num_read, visible.shape[-1] - sum(self.num_read)], dim=-1)
        ]  # (U, Q, R · c) each
        return torch.cat(parts, dim=-1)


def check_token_tensor(input_ids: torch.Tensor) -> None:
    """Refuse, with a `ValueError`, what is no batch of token ids."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {kind}; expected a tensor of token ids (int64), (B, L).")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (B, L), at least one token.")


class BatchLayout:
    """
    Splits each sequence of a batch into prompt (`X … <|latent_start|>`), `N` latent slots and answer. Padding may be
    on either side. A sequence without `<|latent_start|>` (plain text) is all prompt. `name` is that of a sequence in
    errors.
    """

    def __init__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: LasarConfig, name: str = "Sequence"
    ):
        check_token_tensor(input_ids)
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

        # 2. Slots must follow <|latent_start|> without a gap, and there are maxima.
        offset = self.position - self.prompt_length[:, None]
        is_expected = (start >= 0)[:, None] & (offset >= 0) & (offset < self.depth[:, None])
        limit = getattr(config.backbone_config, "max_position_embeddings", None)  # some backbones have no limit
        unknown = valid & ((input_ids < 0) | (input_ids >= config.vocab_size))  # (B, L)
        too_long = self.length > (self.length if limit is None else limit)  # (B,)
        misplaced, too_deep = (is_slot & ~is_expected).any(dim=1), self.depth > config.max_latent_steps  # (B,)
        is_wrong = torch.stack([misplaced, too_deep, unknown.any(dim=1), too_long])  # (4, B)

        # 3. Copy all numbers that Python needs from the device at once.
        self.max_prompt, self.max_depth, max_answer, num_errors = torch.stack(
            [self.prompt_length.max(), self.depth.max(), self.answer_length.max(), is_wrong.sum()]
        ).tolist()
        self.max_answer = max(max_answer, 1)  # equal prompts without answers still read one (invisible) token
        if num_errors:
            problem, index = is_wrong.nonzero()[0].tolist()
            messages = (
                ": the <|latent|> slots must follow <|latent_start|> directly and without a gap.",
                f" has {int(self.depth[index])} latent slots, but max_latent_steps is {config.max_latent_steps}. Use "
                "fewer slots or a model with more steps.",
                f" has token ids outside 0 … {config.vocab_size - 1}.",
                f" has {int(self.length[index])} tokens, but the backbone has max_position_embeddings={limit}. Use "
                "fewer history items.",
            )
            raise ValueError(f"{name} {index}{messages[problem]}")

    def columns(self) -> torch.Tensor:
        """Column of `input_ids` that holds the r-th token (padding not counted) of each sequence, `(B, L)`."""
        return torch.argsort((~self.valid).to(torch.uint8), dim=1, stable=True)

    def last_prompt_column(self) -> torch.Tensor:
        """Column of the last prompt token of each sequence, `(B, 1)`."""
        return self.columns().gather(1, (self.prompt_length[:, None] - 1).clamp(min=0))

    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts and their mask, both `(B, P + 1)`."""
        rank = torch.arange(self.max_prompt, device=self.length.device)
        rank = rank - (self.max_prompt - self.prompt_length[:, None])  # (B, P + 1)
        columns = self.columns().gather(1, rank.clamp(min=0))
        return self.input_ids.gather(1, columns).masked_fill(rank < 0, 0), rank >= 0

    def answers(self) -> torch.Tensor:
        """Right-padded answers, `(B, A)`."""
        rank = torch.arange(self.max_answer, device=self.input_ids.device).expand(len(self.length), -1)
        first = self.prompt_length + self.depth
        columns = self.columns().gather(1, (first[:, None] + rank).clamp(max=self.input_ids.shape[1] - 1))
        return self.input_ids.gather(1, columns).masked_fill(rank >= self.answer_length[:, None], 0)


class PrefixTrees:
    """
    Trees of sequences whose prompts share a prefix. Bodies that are prefixes of one another are read once, as the
    longest of them. Every distinct prompt is a path, which leaves the body after its own tokens and takes the latent
    steps of its deepest sequence. The sequences of equal prompts are branches of that path, each of which leaves it
    after its own number of steps; without `join_equal` they are paths of their own.

    All trees are padded to `R` paths and all paths to `W` branches. If that padding or the attention of long trees
    would cost more than sharing saves, trees and paths are split into the number that needs the least work.

    Attributes:
        path, branch (`torch.Tensor` of shape `(B,)`): path of each sequence, among the `U`, and branch of that path.
        member (`torch.Tensor` of shape `(U,)`): a sequence of each path.
        depth (`torch.Tensor` of shape `(U,)`): latent steps of each path, the most of its branches.
        longest (`torch.Tensor` of shape `(T,)`): the sequence with the body of each tree.
        num_trees, num_paths, num_branches (`int`): `T`, `R` and `W`.
    """

    def __init__(self, layout: BatchLayout, hidden_size: int, share: bool, join_equal: bool = True):
        batch_size, device = len(layout.length), layout.length.device
        sequences = torch.arange(batch_size, device=device)  # (B,)
        # Without sharing, every sequence is a tree of its own.
        self.num_trees, self.num_paths, self.num_branches = batch_size, 1, 1
        self.path = self.member = self.longest = sequences
        self.branch = torch.zeros_like(sequences)
        self.depth = layout.depth
        if not share or batch_size == 1:
            return

        # 1. Find the D classes of equal prompts; class_of (B,), counts (D,). The order is that of a dictionary, so the
        #    bodies that begin with a body follow it.
        prompt_ids, prompt_mask = layout.prompts()  # (B, P + 1)
        prompt_ids = prompt_ids.masked_fill(~prompt_mask, -1)
        first = prompt_mask.long().argmax(dim=1, keepdim=True)  # (B, 1)
        column = first + torch.arange(layout.max_prompt - 1, device=device)  # (B, P)
        bodies = prompt_ids[:, :-1].gather(1, column.clamp(max=max(layout.max_prompt - 2, 0)))
        bodies = bodies.masked_fill(column > layout.max_prompt - 2, -1)  # (B, P), right-padded
        number = torch.zeros_like(sequences) if join_equal else sequences
        keys = torch.cat([bodies, prompt_ids[:, -1:], number[:, None]], dim=1)  # (B, P + 2)
        unique, class_of, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)

        # 2. A class is in the tree of the next one if its body is a prefix of the next body. K trees.
        body = unique[:, :-2]  # (D, P)
        is_last = ~((body[:-1] == body[1:]) | (body[:-1] < 0)).all(dim=1)  # (D - 1,)
        tree_of = nn.functional.pad(is_last.cumsum(0), (1, 0))  # (D,)
        if len(counts) == batch_size == int(tree_of[-1]) + 1:
            return

        # 3. Choose W among the sizes that occur, and R, by the work of the backbone.
        num_trees, num_paths, num_branches = self._cheapest(layout, counts, tree_of, hidden_size)
        if num_trees >= batch_size:
            return
        self.num_trees, self.num_paths, self.num_branches = num_trees, num_paths, num_branches

        # 4. Number the members of each class from 0: sort by class, then subtract the start of the class.
        order = torch.argsort(class_of, stable=True)  # (B,)
        number = torch.empty_like(sequences)
        number[order] = sequences - (counts.cumsum(0) - counts)[class_of[order]]
        self.branch = number % num_branches

        # 5. Number the paths of each tree, and fill trees of R paths one after the other.
        paths = (counts + num_branches - 1) // num_branches  # (D,), paths of each class
        paths_of_tree = torch.zeros_like(counts).index_add(0, tree_of, paths)  # (D,), 0 beyond K
        first_path = paths.cumsum(0) - paths - (paths_of_tree.cumsum(0) - paths_of_tree)[tree_of]  # (D,)
        path = first_path[class_of] + number // num_branches  # (B,), within its tree before the split
        parts = (paths_of_tree + num_paths - 1) // num_paths  # (D,)
        tree = (parts.cumsum(0) - parts)[tree_of][class_of] + path // num_paths  # (B,)
        self.path = tree * num_paths + path % num_paths

        # 6. Later paths have longer bodies. Paths that only fill up a tree repeat its last one.
        order = torch.argsort(self.path, stable=True)  # (B,)
        self.longest = order[torch.bincount(tree).cumsum(0) - 1]
        self.member = self.longest.repeat_interleave(num_paths).scatter(0, self.path, sequences)
        self.depth = torch.zeros_like(self.member).scatter_reduce(0, self.path, layout.depth, "amax")

    def prompts(self, layout: BatchLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Left-padded trunks and the last prompt tokens of their paths, `(T, P + R)`, and which of them each path sees,
        `(U, P + R)`.
        """
        prompt_ids = layout.prompts()[0]  # (B, P + 1)
        num_trees, num_paths = self.num_trees, self.num_paths
        last_tokens = prompt_ids[self.member, -1].view(num_trees, num_paths)  # (T, R)
        # A path sees the first tokens of the trunk, as many as its body has, and its own last token.
        first = layout.max_prompt - layout.prompt_length[self.longest].repeat_interleave(num_paths)  # (U,)
        end = first + layout.prompt_length[self.member] - 1  # (U,)
        column = torch.arange(layout.max_prompt - 1, device=first.device)  # (P,)
        in_body = (column >= first[:, None]) & (column < end[:, None])  # (U, P)
        own_token = torch.eye(num_paths, dtype=torch.bool, device=first.device).repeat(num_trees, 1)  # (U, R)
        token_ids = torch.cat([prompt_ids[self.longest, :-1], last_tokens], dim=1)  # (T, P + R)
        return token_ids, torch.cat([in_body, own_token], dim=1)

    @staticmethod
    def _cheapest(layout: BatchLayout, counts, tree_of, hidden_size: int) -> tuple[int, int, int]:
        """Numbers of trees, of paths per tree and of branches per path that need the least work."""
        best = None
        for num_branches in torch.cat([counts.new_ones(1), counts]).unique().tolist():
            paths = (counts + num_branches - 1) // num_branches  # (D,)
            paths = torch.zeros_like(counts).index_add(0, tree_of, paths)  # (D,), paths of each tree
            per_path = 1 + layout.max_depth + num_branches * layout.max_answer  # tokens
            half = (paths.amax(dim=0, keepdim=True) + 1) // 2
            num_paths = torch.cat([counts.new_ones(1), half, paths[paths > 0]]).unique()  # (C,)
            num_trees = ((paths + num_paths[:, None] - 1) // num_paths[:, None]).sum(dim=1)  # (C,)
            tokens = layout.max_prompt - 1 + num_paths * per_path  # (C,), of a tree
            # A layer does about 12 H² multiplications per token and 2 H per pair of tokens.
            work = num_trees * tokens * (1 + tokens / (6 * hidden_size))  # (C,)
            index = int(work.argmin())
            if best is None or work[index] < best[0]:
                best = work[index], int(num_trees[index]), int(num_paths[index]), num_branches
        return best[1:]
