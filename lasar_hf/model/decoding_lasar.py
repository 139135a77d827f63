"""The policy distribution over items, and beam search and sampling that share the prompt.

An item is written as `M` codes. Only codes that continue some item of the catalogue can follow, so every probability
is normalised over the children of the prefix in the catalogue's trie:

    log p(item | X) = Σ_l log softmax over { c : (c_<l, c) starts some item } of the logits of level l

Training (`sid_loss="catalog"`), sampling, the RL ratios and beam search all use this distribution.

Two things differ from the beam search of `generate`. The prompt is never expanded, since the beams of a level are
extra tokens of the prompt's own sequence. And a level multiplies by the `K` head rows of its codes instead of the
whole vocabulary.

Shapes: `B` prompts, `W` beams per prompt, `F` children per node (padded), `K` codes per level.
"""

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.utils import ModelOutput

from .batching_lasar import ReasoningState
from .catalog_lasar import SidCatalog
from .configuration_lasar import LasarConfig
from .memory_lasar import Recall
from .trie_lasar import ItemFilter, SidTrie


NAN_MESSAGE = "The model's logits contain NaN."


def nan_error(model: nn.Module) -> ValueError:
    """The error of a search that ended in NaN; it names the weights that are not finite."""
    names = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if not names:
        return ValueError(f"{NAN_MESSAGE} The weights are finite, so use another data type (bfloat16 or float32).")
    return ValueError(
        f"{NAN_MESSAGE} {', '.join(names[:3])}{' …' if names[3:] else ''} has values that are not finite. Save or "
        "download the checkpoint again, or train it with a smaller learning rate."
    )


@dataclass
class RecommendOutput(ModelOutput):
    """
    Recommendations of a batch.

    Args:
        items (`torch.Tensor` of shape `(B, k)`):
            Item indices in the catalogue, best first; -1 pads a result with fewer items.
        scores (`torch.Tensor` of shape `(B, k)`):
            Log-probability of each item under the catalogue-normalised policy; `-inf` at padding.
        latent_steps (`torch.Tensor` of shape `(B,)`):
            Latent steps `N` taken for each prompt.
        model_scores, memory_scores (`torch.Tensor` of shape `(B, k)`, *optional*):
            With a memory: log-probabilities under the model and under the memory, whose mixture `scores` are.
        memory_strength (`torch.Tensor` of shape `(B,)`, *optional*):
            With a memory: its largest score, on which its weight depends.
    """

    items: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    latent_steps: torch.Tensor | None = None
    model_scores: torch.Tensor | None = None
    memory_scores: torch.Tensor | None = None
    memory_strength: torch.Tensor | None = None

    # These two use `items` as the method of a dictionary in the base class.
    def __getitem__(self, key):
        return dict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


def child_log_probs(
    hidden_states: torch.Tensor,
    head: torch.Tensor,
    trie: SidTrie,
    level: int,
    nodes: torch.Tensor,
    temperature: float = 1.0,
    history: ItemFilter | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Float32 log-probabilities, codes and node numbers, all `(..., F)`, of the codes that can follow the prefixes
    `nodes` `(...)` of depth `level`. Missing children have `-inf`, 0 and -1.

    `hidden_states` `(..., H)` predict these codes through `head` `(K, H)`, the head's rows for the level. Logits are
    divided by `temperature` and normalised over the children of each prefix. A child also has `-inf` if `history`
    excludes all items below it, see [`history_filter`].
    """
    codes, child = trie.children(level, nodes)  # (..., F)
    logits = nn.functional.linear(hidden_states, head).float() / temperature  # (..., K)
    is_missing = child < 0
    if history is not None:
        is_missing = is_missing | history.excludes_nodes(level, child)
    logits = logits.gather(-1, codes).masked_fill(is_missing, -torch.inf)
    # The last step is for children of dead prefixes, all of which may be missing.
    return logits.log_softmax(dim=-1).masked_fill(is_missing, -torch.inf), codes, child


def history_filter(config: LasarConfig, trie: SidTrie, input_ids: torch.Tensor) -> ItemFilter | None:
    """
    The items that prompts `(B, L)` contain, which have no probability if the configuration says `exclude_history`. An
    item that shares its Semantic ID with another one is not excluded.
    """
    if not config.exclude_history:
        return None
    return ItemFilter.without_leaves(trie, trie.leaves_in(input_ids - config.sid_token_offset, config.codebook_size))


@dataclass
class _Beams:
    """Live prefixes of one level; each field has shape `(B, W)`."""

    nodes: torch.Tensor  # nodes of the trie
    codes: torch.Tensor  # last codes
    scores: torch.Tensor  # log-probabilities of the whole prefixes
    parent: torch.Tensor  # indices among the prefixes of the level before
    key: torch.Tensor  # the numbers by which beams are ranked: the scores, or the perturbed scores

    @classmethod
    def root(cls, batch_size: int, device: torch.device) -> "_Beams":
        zero = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        return cls(zero, zero, zero.float(), zero, zero.float())


# Three ways to choose the prefixes of the next level. Each returns the chosen indices `(B, W')` among the flattened
# `(B, W * F)` children, and the keys of all children.


def _select_best(beams: _Beams, log_probs, child, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search: the `width` most likely prefixes."""
    keys = (beams.scores[..., None] + log_probs).flatten(1)  # (B, W * F)
    return keys.topk(min(width, keys.shape[1]), dim=1).indices, keys


def _select_independent(beams: _Beams, log_probs, child, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ancestral sampling with replacement: `num_samples` independent prefixes per prompt."""
    batch_size, width, fan_out = log_probs.shape
    draws = num_samples // width  # all samples from the root, then one from each prefix
    # multinomial would crash on NaN on a GPU. The search reports NaN at its end.
    probs = log_probs.exp().nan_to_num(nan=1.0).flatten(0, 1)  # (B * W, F)
    drawn = torch.multinomial(probs, draws, replacement=True).view(batch_size, -1)  # (B, num_samples)
    parent = torch.arange(width, device=drawn.device).repeat_interleave(draws)  # (num_samples,)
    return parent * fan_out + drawn, (beams.scores[..., None] + log_probs).flatten(1)


def _select_perturbed(beams: _Beams, log_probs, child, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Stochastic beams: the `width` prefixes with the largest Gumbel-perturbed scores, which is sampling without
    replacement (Kool et al. 2019, arXiv 1903.06059).
    """
    # 1. Perturb the score of each child independently.
    scores = beams.scores[..., None] + log_probs  # (B, W, F)
    uniform = torch.rand_like(scores).clamp(min=torch.finfo(scores.dtype).tiny)
    gumbel = scores - (-uniform.log()).log()
    # 2. Shift them so that the largest child has its parent's key, in the numerically stable form of appendix B.3.
    largest = gumbel.max(dim=-1, keepdim=True).values  # (B, W, 1)
    gap = (gumbel - largest).clamp(max=0)
    log1m_exp_gap = torch.where(gap > -0.6931472, (-torch.expm1(gap)).log(), torch.log1p(-gap.exp()))
    value = beams.key[..., None] - gumbel + log1m_exp_gap
    keys = beams.key[..., None] - value.clamp(min=0) - torch.log1p((-value.abs()).exp())
    # 3. Missing children and children of dead prefixes lose. Keep the largest keys.
    keys = keys.masked_fill((child < 0) | (beams.key == -torch.inf)[..., None], -torch.inf).flatten(1)
    return keys.topk(min(width, keys.shape[1]), dim=1).indices, keys


def _search(
    model,
    state: ReasoningState,
    trie: SidTrie,
    select,
    temperature: float,
    width_limit: bool,
    item_filter: ItemFilter | None = None,
    history: ItemFilter | None = None,
) -> _Beams:
    """Walk down the trie; `select` chooses the prefixes to keep at each level."""
    batch_size, device = len(state.depths), state.depths.device
    # 1. <|latent_end|> is the root. `ancestors` (B, W, R): which of the R tokens read so far each prefix sees.
    end = torch.full((batch_size, 1), model.config.latent_end_token_id, device=device)
    ancestors = torch.ones(batch_size, 1, 1, dtype=torch.bool, device=device)
    hidden_states = model.model.read_tokens(state, end, ancestors)  # (B, 1, H)
    beams = _Beams.root(batch_size, device)
    for level in range(trie.num_levels):
        # 2. Read the codes chosen at the level before.
        if level > 0:
            hidden_states, ancestors = _read_open(model, state, trie, level, beams, ancestors)  # (B, W, H)
        # 3. Score their children, without those that lead to no permitted item.
        start = model.config.sid_token_id(level, 0)
        head = model.lm_head.weight[start : start + model.config.codebook_size]  # (K, H)
        log_probs, codes, child = child_log_probs(hidden_states, head, trie, level, beams.nodes, temperature, history)
        if item_filter is not None:
            log_probs = log_probs.masked_fill(item_filter.excludes_nodes(level, child), -torch.inf)
        # 4. Choose. Distinct prefixes are at most as many as the trie has nodes.
        index, keys = select(beams, log_probs, child)
        if width_limit:
            index = index[:, : trie.num_nodes[level + 1]]
        beams = _Beams(
            nodes=child.flatten(1).gather(1, index).clamp(min=0),
            codes=codes.flatten(1).gather(1, index),
            scores=(beams.scores[..., None] + log_probs).flatten(1).gather(1, index),
            parent=index // log_probs.shape[-1],
            key=keys.gather(1, index),
        )
    if beams.scores.isnan().any():
        raise nan_error(model)
    return beams


def _read_open(model, state: ReasoningState, trie: SidTrie, level: int, beams: _Beams, ancestors: torch.Tensor):
    """
    Read the last codes of the open prefixes. Returns hidden states `(B, W, H)`, zero where nothing was read, and the
    new `ancestors` `(B, W, R + O)`.

    A prefix is open if at least two items continue it. If only one does, its further codes have probability 1 and
    need not be read. All ancestors of an open prefix were open.
    """
    config, (batch_size, width) = model.config, beams.codes.shape
    # 1. Find the open prefixes; O is the largest number of them in a prompt.
    num_items = trie.first_position(level, beams.nodes + 1) - trie.first_position(level, beams.nodes)
    is_open = (num_items > 1) & (beams.scores > -torch.inf)  # (B, W)
    num_open = int(is_open.sum(dim=1).max())
    # 2. Each prefix sees what its parent saw.
    inherited = ancestors.gather(1, beams.parent[..., None].expand(-1, -1, ancestors.shape[-1]))  # (B, W, R)
    hidden_states = torch.zeros(batch_size, width, config.hidden_size, dtype=model.dtype, device=ancestors.device)
    if num_open == 0:
        return hidden_states, inherited
    # 3. The open beams of each prompt, filled up with others; each beam sees itself in addition.
    beam = is_open.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_open]  # (B, O)
    is_itself = beam[:, None] == torch.arange(width, device=beam.device)[:, None]  # (B, W, O)
    visible = torch.cat([inherited, is_itself], dim=-1)  # (B, W, R + O)
    # 4. Read them, and write their hidden states to the beams they belong to.
    token_ids = config.sid_token_offset + (level - 1) * config.codebook_size + beams.codes.gather(1, beam)
    visible_to_read = visible.gather(1, beam[..., None].expand(-1, -1, visible.shape[-1]))  # (B, O, R + O)
    outputs = model.model.read_tokens(state, token_ids, visible_to_read)  # (B, O, H)
    index = beam[..., None].expand(-1, -1, config.hidden_size)
    return hidden_states.to(outputs.dtype).scatter(1, index, outputs), visible


@torch.no_grad()
def beam_search(
    model,
    state: ReasoningState,
    trie: SidTrie,
    num_beams: int,
    item_filter: ItemFilter | None = None,
    history: ItemFilter | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Trie-constrained beam search that shares the prompt (LASAR, arXiv 2605.10207, inference). Returns leaves of the
    trie and their log-probabilities, both `(B, W)` with `W` at most `num_beams`, best first; `-inf` pads.

    Level 0 reads `<|latent_end|>` once per prompt, and every later level at most `W` extra tokens of the prompt's
    sequence. A token sees the prompt, the latent steps, `<|latent_end|>` and its own ancestors, so the prompt is never
    expanded and no cache is reordered. `item_filter` prunes prefixes without a permitted item and does not change the
    scores; `history` is that of [`history_filter`].
    """
    select = partial(_select_best, width=num_beams)
    beams = _search(model, state, trie, select, 1.0, width_limit=True, item_filter=item_filter, history=history)
    return beams.nodes, beams.scores


@torch.no_grad()
def sample_items(
    model,
    state: ReasoningState,
    trie: SidTrie,
    num_samples: int,
    temperature: float = 1.0,
    replacement: bool = True,
    history: ItemFilter | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sample `num_samples` items per prompt from the policy at a temperature. Returns leaves of the trie and their
    log-probabilities at that temperature, both `(B, num_samples)`, most likely first.

    With `replacement` the items are drawn independently. Otherwise stochastic beams (Gumbel top-k) never repeat an
    item, and `-inf` pads if the catalogue has too few.
    """
    if num_samples < 1 or not temperature > 0:
        raise ValueError(f"num_samples is {num_samples} and temperature is {temperature}; expected positive numbers.")
    if replacement:
        select = partial(_select_independent, num_samples=num_samples)
    else:
        select = partial(_select_perturbed, width=num_samples)
    beams = _search(model, state, trie, select, temperature, width_limit=not replacement, history=history)
    scores, order = beams.scores.sort(dim=1, descending=True, stable=True)
    return beams.nodes.gather(1, order), scores


@torch.no_grad()
def score_items(
    model, state: ReasoningState, trie: SidTrie, items: torch.Tensor, history: ItemFilter | None = None
) -> torch.Tensor:
    """
    Log-probabilities of `items` `(B, C)` under the policy distribution, in one pass; `-inf` at padding (-1) and for
    items that are not in the trie. May follow a search on the same state.

    Items share the tokens of their common prefixes, and prefixes that only one item continues are not read.
    """
    config = model.config
    # 1. The nodes above each item, from the root to its leaf.
    position = torch.where(items >= 0, trie.item_positions[items.clamp(min=0)], len(trie.item_indices))  # (B, C)
    exists = position < len(trie.item_indices)
    nodes = trie.path_to(torch.where(exists, position, 0))  # (1 + M, B, C)
    # 2. Read the last token of each prefix, which is <|latent_end|> at the root and sees its ancestors.
    base = torch.tensor([0, *trie.num_nodes], device=items.device).cumsum(0)  # number of the first node of each depth
    keys = _open_prefixes(trie, nodes, exists, base)  # (B, T)
    tokens, visible = _prefix_tokens(trie, keys, base, config)  # (B, T), (B, T, T)
    visible = nn.functional.pad(visible, (sum(state.num_read), 0))  # nothing that a search read
    hidden_states = model.model.read_tokens(state, tokens, visible)  # (B, T, H)
    # 3. Add up the log-probabilities of the codes. The code after a prefix that was not read has probability 1.
    scores = torch.zeros(items.shape, device=items.device)
    for level in range(trie.num_levels):
        start = config.sid_token_id(level, 0)
        head = model.lm_head.weight[start : start + config.codebook_size]  # (K, H)
        parents = nodes[level] if level > 0 else nodes[0][:, :1]  # (B, P): P = C, or 1 since all items have the root
        index = torch.searchsorted(keys, parents + base[level]).clamp(max=keys.shape[1] - 1)  # (B, P)
        states = hidden_states.gather(1, index[..., None].expand(-1, -1, hidden_states.shape[-1]))  # (B, P, H)
        log_probs, _, child = child_log_probs(states, head, trie, level, parents, history=history)  # (B, P, F)
        # The children of a parent are consecutive nodes.
        column = nodes[level + 1] - child[..., 0]  # (B, C)
        log_probs = log_probs.expand(-1, items.shape[1], -1)  # (B, C, F)
        scores = scores + log_probs.gather(-1, column[..., None])[..., 0]
    if scores.isnan().any():
        raise nan_error(model)
    return scores.masked_fill(~exists, -torch.inf)


def _open_prefixes(trie: SidTrie, nodes: torch.Tensor, exists: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """
    The root and the distinct prefixes of items that at least two items of the trie continue. `nodes` `(1 + M, B, C)`
    are those above each item. Returns ascending numbers `(B, T)` of nodes, `base[depth] + node`; `base[-1]` pads.
    """
    keys = []
    for depth in range(trie.num_levels):
        num_items = trie.first_position(depth, nodes[depth] + 1) - trie.first_position(depth, nodes[depth])
        is_open = exists & (num_items > 1)
        keys.append(torch.where(is_open, nodes[depth] + base[depth], base[-1]))  # (B, C)
    keys[0] = torch.zeros_like(keys[0])  # the root is always read
    keys = torch.cat(keys, dim=1).sort(dim=1).values  # (B, M · C)
    is_repeated = nn.functional.pad(keys[:, 1:] == keys[:, :-1], (1, 0))
    keys = torch.where(is_repeated, base[-1], keys).sort(dim=1).values
    return keys[:, : int((keys < base[-1]).sum(dim=1).max())].contiguous()


def _prefix_tokens(trie: SidTrie, keys: torch.Tensor, base: torch.Tensor, config: LasarConfig):
    """Last tokens `(B, T)` of the prefixes `keys` `(B, T)`, and which of each other they see, `(B, T, T)`."""
    depth_of = torch.searchsorted(base, keys, right=True) - 1  # (B, T)
    tokens = torch.full_like(keys, config.latent_end_token_id)
    first, end = torch.zeros_like(keys), torch.zeros_like(keys)  # the run of items below each prefix
    for depth in range(trie.num_levels):
        is_depth = depth_of == depth
        node = torch.where(is_depth, keys - base[depth], 0)
        first = torch.where(is_depth, trie.first_position(depth, node), first)
        end = torch.where(is_depth, trie.first_position(depth, node + 1), end)
        if depth > 0:
            codes = trie.child_code[depth - 1][node].long()
            tokens = torch.where(is_depth, config.sid_token_id(depth - 1, 0) + codes, tokens)
    # A prefix sees all prefixes whose run contains its own run. Of two with the same run, the longer sees the shorter.
    visible = (first[:, None] <= first[..., None]) & (end[..., None] <= end[:, None])
    visible &= depth_of[:, None] <= depth_of[..., None]
    # Padding sees the root, and nothing sees padding.
    return tokens, visible & (keys < base[-1])[:, None]


def rank_items(
    leaves: torch.Tensor, scores: torch.Tensor, trie: SidTrie, top_k: int, item_filter: ItemFilter | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best items and their scores, both `(B, top_k)`, of the `leaves` and `scores` `(B, W)` of [`beam_search`]; -1
    and `-inf` pad. Items that share a leaf are listed separately, and equal scores are in order of the item index.
    `item_filter` may exclude some of the items that share a leaf.
    """
    # 1. All C items of each leaf, with the leaf's score.
    items = trie.items(leaves)  # (B, W, C)
    scores = scores[..., None].expand_as(items).masked_fill(items < 0, -torch.inf).flatten(1)  # (B, W * C)
    items = items.flatten(1)
    if item_filter is not None:
        scores = scores.masked_fill(item_filter.excludes_items(items), -torch.inf)
    items = items.masked_fill(scores == -torch.inf, -1)
    # 2. The best ones.
    items, (scores,) = _sort_and_pad(items, scores, top_k)
    return items, scores


def _sort_and_pad(items: torch.Tensor, scores: torch.Tensor, top_k: int, *others: torch.Tensor):
    """
    The `top_k` best of `items` `(B, n)`, and `scores` and `others` in their order. Equal scores are in order of the
    item index; -1 and `-inf` pad.
    """
    order = items.argsort(dim=1)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :top_k]
    missing = top_k - order.shape[1]
    items = nn.functional.pad(items.gather(1, order), (0, missing), value=-1)
    return items, [nn.functional.pad(p.gather(1, order), (0, missing), value=-torch.inf) for p in (scores, *others)]


@torch.no_grad()
def mix_memory(
    model,
    state: ReasoningState,
    trie: SidTrie,
    leaves: torch.Tensor,
    scores: torch.Tensor,
    recall: Recall,
    top_k: int,
    item_filter: ItemFilter | None = None,
    history: ItemFilter | None = None,
) -> RecommendOutput:
    """
    Rank the items of the beams (`leaves` and `scores` `(B, W)` of [`beam_search`]) and the `W` most likely ones of a
    memory by the mixture of both distributions, see [`ItemMemory`].
    """
    # 1. Items of the beams, then those of the memory that are not among them.
    width = leaves.shape[1] * trie.fan_out[-1]
    items, log_probs = rank_items(leaves, scores, trie, width, item_filter)  # (B, W · C)
    recalled = recall.candidates(leaves.shape[1], item_filter)  # (B, W)
    is_new = ~(recalled[..., None] == items[:, None]).any(dim=-1)
    recalled = torch.where(is_new, recalled, -1)
    # 2. Their probability under the model, then the mixture.
    log_probs = torch.cat([log_probs, score_items(model, state, trie, recalled, history)], dim=1)
    items = torch.cat([items, recalled], dim=1)
    mixed = recall.mix(log_probs, items).masked_fill(log_probs == -torch.inf, -torch.inf)
    items = items.masked_fill(mixed == -torch.inf, -1)
    # 3. The best ones.
    items, (mixed, log_probs) = _sort_and_pad(items, mixed, top_k, log_probs)
    return RecommendOutput(
        items=items,
        scores=mixed,
        latent_steps=state.depths,
        model_scores=log_probs,
        memory_scores=recall.probabilities(items).log(),
        memory_strength=recall.strength,
    )


class SidLogitsProcessor(LogitsProcessor):
    """
    The catalogue's constraint for `generate`. After `<|latent_end|>` every code continues some item, and the scores
    are the log-probabilities of the policy distribution.

    An open latent region can only be closed, and the text ends after a complete Semantic ID. Plain text is not
    constrained. With `num_beams=W`, `max_new_tokens=M` after `<|latent_end|>` and `length_penalty=0.0` (plain sums of
    log-probabilities), `generate` returns the items, order and scores of [`~LasarForGenerativeRec.recommend`], but is
    slower. If fewer than `W` items are found, it pads with sequences of a score below -1e8. With `do_sample=True` pass
    `top_k=0`, since transformers keeps 50 tokens by default.

    Raises:
        `ValueError`: if the catalogue does not match the model. In a call: if codes do not begin any item, the scores
        contain NaN, or a sequence goes on after its Semantic ID and the model has no end-of-text token.

    Example:

    ```python
    >>> constraint = SidLogitsProcessor(catalog, model.config)
    >>> model.generate(**prompt, logits_processor=[constraint], num_beams=50, max_new_tokens=4, length_penalty=0.0)
    ```
    """

    def __init__(self, catalog: SidCatalog, config: LasarConfig):
        catalog.check_matches(config.num_sid_levels, config.codebook_size)
        self.catalog, self.config = catalog, config
        eos = config.backbone_config.eos_token_id
        self.eos_token_id = eos[0] if isinstance(eos, list) else eos

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Log-probabilities `(B, V)` under the constraint, `-inf` for all other tokens, from the tokens so far `(B, L)`
        and the logits or log-probabilities `(B, V)` of the next token.
        """
        config, trie = self.config, self.catalog.trie(input_ids.device)
        # 1. Codes written after the last <|latent_end|>; -1 without a <|latent_end|>.
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        end = torch.where(input_ids == config.latent_end_token_id, column, -1).amax(dim=1)  # (B,)
        num_codes = torch.where(end >= 0, column[-1] - end, -1)  # (B,)
        # 2. Close open latent regions.
        is_open = (input_ids[:, -1] == config.latent_start_token_id) | (input_ids[:, -1] == config.latent_token_id)
        scores = scores.clone()
        scores[is_open] = -torch.inf
        scores[is_open, config.latent_end_token_id] = 0.0
        # 3. Walk down the trie. Sequences that have reached a level are constrained to the children of their node.
        nodes = torch.zeros_like(end)  # (B,)
        prompt_ids = input_ids.masked_fill(column > end[:, None], -1)  # (B, L)
        for level in range(config.num_sid_levels):
            start = config.sid_token_id(level, 0)
            selected = (num_codes == level).nonzero()[:, 0]  # (n,)
            history = history_filter(config, trie, prompt_ids[selected])
            scores[selected] = self._constrain(scores[selected], nodes[selected], trie, level, start, history)
            token = input_ids.gather(1, (end + 1 + level).clamp(max=input_ids.shape[1] - 1)[:, None])[:, 0]
            nodes = torch.where(num_codes > level, trie.descend(level, nodes, token - start), nodes)
            if (nodes < 0).any():
                index = int((nodes < 0).nonzero()[0])
                raise ValueError(
                    f"Sequence {index} of input_ids: the codes after <|latent_end|> do not begin any item of the "
                    "catalogue."
                )
        # 4. End complete Semantic IDs.
        is_complete = num_codes >= config.num_sid_levels
        if is_complete.any():
            if self.eos_token_id is None:
                raise ValueError(
                    f"max_new_tokens is too large: a Semantic ID has {config.num_sid_levels} tokens, and the model "
                    "has no end-of-text token to write after it."
                )
            scores[is_complete] = -torch.inf
            scores[is_complete, self.eos_token_id] = 0.0
        return scores

    @staticmethod
    def _constrain(
        scores: torch.Tensor, nodes: torch.Tensor, trie: SidTrie, level: int, start: int, history: ItemFilter | None
    ) -> torch.Tensor:
        """Scores `(n, V)` normalised over the children of the prefixes `nodes` `(n,)`, `-inf` elsewhere."""
        codes, child = trie.children(level, nodes)  # (n, F)
        is_missing = child < 0
        if history is not None:
            is_missing = is_missing | history.excludes_nodes(level, child)
        token_ids = torch.where(is_missing, scores.shape[1], start + codes)  # an extra column for missing children
        log_probs = scores.gather(1, start + codes).masked_fill(is_missing, -torch.inf).log_softmax(dim=-1)
        if log_probs.isnan().any():
            raise ValueError(f"{NAN_MESSAGE} Check the weights and the data type (bfloat16 or float32).")
        constrained = scores.new_full((scores.shape[0], scores.shape[1] + 1), -torch.inf)
        return constrained.scatter(1, token_ids, log_probs)[:, :-1]
