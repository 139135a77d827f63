"""The one policy distribution over items, and beam search and sampling that share the prompt.

A model writes an item as `M` codes. Only codes that continue some item of the catalogue can follow, so every
probability here is normalised over the children of the prefix in the catalogue's trie:

    log p(item | X) = sum_l log softmax over { c : (c_<l, c) starts some item } of the level-l head rows

Training (`sid_loss="catalog"`), sampling, the RL ratios and beam search all use this one distribution.

Two things differ from the textbook beam search of `generate`. The prompt is never expanded: the beams of a level are
extra tokens of the prompt's own row, each seeing the prompt, the latent steps and its own ancestors. And a level
multiplies by its `K` rows of the head, not by the whole vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.utils import ModelOutput

from .catalog_lasar import SidCatalog
from .configuration_lasar import LasarConfig
from .trie_lasar import ItemFilter, SidTrie


@dataclass
class RecommendOutput(ModelOutput):
    """
    Recommendations of a batch.

    Args:
        items (`torch.Tensor` of shape `(B, k)`):
            Row numbers in the catalogue, best first; -1 pads a row with fewer items.
        scores (`torch.Tensor` of shape `(B, k)`):
            Log-probability of each item under the catalogue-normalised policy; `-inf` where padded.
        latent_steps (`torch.Tensor` of shape `(B,)`):
            Latent steps `N` taken for each prompt.
        text_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Tokens of the chain of thought, when one was written out; padded behind its end.
    """

    items: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    latent_steps: torch.Tensor | None = None
    text_ids: torch.Tensor | None = None


def child_log_probs(
    hidden_states: torch.Tensor, head: tuple[torch.Tensor, torch.Tensor | None], trie: SidTrie, level: int,
    nodes: torch.Tensor, temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of the codes that can follow, normalised over the children of each prefix.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., H)`):
            Final hidden states of the positions that predict the code of `level`.
        head (`tuple` of `torch.Tensor` of shapes `(K, H)` and `(K,)` or `None`):
            The level's rows of the language-model head and of its bias.
        trie ([`SidTrie`]):
            Trie of the catalogue.
        level (`int`):
            Level of the code to come.
        nodes (`torch.Tensor` of shape `(...)`):
            Trie node of the codes already written.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(..., F)`: log-probabilities in float32 (`-inf` where there is no
        child), codes, and child node numbers (-1 where there is none).
    """
    codes, child = trie.children(level, nodes)
    logits = nn.functional.linear(hidden_states, *head).float() / temperature
    logits = logits.gather(-1, codes).masked_fill(child < 0, -torch.inf)
    return logits.log_softmax(dim=-1), codes, child


@dataclass
class _Beams:
    """
    Live prefixes of one level, each field `(B, W)`.

    `nodes` and last `codes` in the trie, cumulated log-probability `scores`, index of the `parent` prefix of the level
    before, and the `key` by which stochastic beams are ranked (equal to `scores` elsewhere).
    """

    nodes: torch.Tensor
    codes: torch.Tensor
    scores: torch.Tensor
    parent: torch.Tensor
    key: torch.Tensor

    @classmethod
    def root(cls, batch_size: int, device: torch.device) -> "_Beams":
        zero = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        return cls(zero, zero, zero.float(), zero, zero.float())


def _expand(beams: _Beams, log_probs, codes, child, place: torch.Tensor, keys: torch.Tensor) -> _Beams:
    """The children at `place` `(B, W)` of the flattened `(B, W_before * F)` children."""
    scores = (beams.scores[..., None] + log_probs).flatten(1)
    return _Beams(
        nodes=child.flatten(1).gather(1, place).clamp(min=0),
        codes=codes.flatten(1).gather(1, place),
        scores=scores.gather(1, place),
        parent=place // log_probs.shape[-1],
        key=keys.flatten(1).gather(1, place),
    )


def _select_best(width: int):
    """Deterministic beams: the `width` most likely prefixes."""

    def select(beams: _Beams, log_probs, codes, child) -> _Beams:
        keys = (beams.scores[..., None] + log_probs).flatten(1)
        place = keys.topk(min(width, keys.shape[1]), dim=1).indices
        return _expand(beams, log_probs, codes, child, place, keys)

    return select


def _select_independent(num_samples: int):
    """Ancestral sampling: `num_samples` prefixes of each row go their own ways, with replacement."""

    def select(beams: _Beams, log_probs, codes, child) -> _Beams:
        batch_size, width, fan_out = log_probs.shape
        draws = num_samples // width  # all from the root, then one from each prefix
        # NaN, which the search reports at its end, would crash the draw on a GPU.
        probs = log_probs.exp().nan_to_num(nan=1.0).flatten(0, 1)
        drawn = torch.multinomial(probs, draws, replacement=True).view(batch_size, -1)
        parent = torch.arange(width, device=drawn.device).repeat_interleave(draws)
        keys = beams.scores[..., None] + log_probs
        return _expand(beams, log_probs, codes, child, parent * fan_out + drawn, keys)

    return select


def _select_perturbed(width: int):
    """Stochastic beams: the `width` largest Gumbel-perturbed prefixes, a sample without replacement of the items."""

    def select(beams: _Beams, log_probs, codes, child) -> _Beams:
        scores = beams.scores[..., None] + log_probs
        uniform = torch.rand_like(scores).clamp(min=torch.finfo(scores.dtype).tiny)
        gumbel = scores - (-uniform.log()).log()
        # Condition the children's largest key on their parent's, in the numerically stable form of Kool et al. 2019
        # (arXiv 1903.06059, appendix B.3).
        largest = gumbel.max(dim=-1, keepdim=True).values
        gap = (gumbel - largest).clamp(max=0)
        value = beams.key[..., None] - gumbel + torch.where(
            gap > -0.6931472, (-torch.expm1(gap)).log(), torch.log1p(-gap.exp())
        )
        keys = beams.key[..., None] - value.clamp(min=0) - torch.log1p((-value.abs()).exp())
        keys = keys.masked_fill((child < 0) | (beams.key == -torch.inf)[..., None], -torch.inf).flatten(1)
        place = keys.topk(min(width, keys.shape[1]), dim=1).indices
        return _expand(beams, log_probs, codes, child, place, keys)

    return select


def _search(
    model, chain, trie: SidTrie, select, temperature: float, width_limit: bool, item_filter: ItemFilter | None = None
) -> _Beams:
    """Walk down the trie; `select` chooses the prefixes that go on at each level."""
    trunk, batch_size, device = model.model, len(chain.depths), chain.depths.device
    end = torch.full((batch_size, 1), model.config.latent_end_token_id, device=device)
    ancestors = torch.ones(batch_size, 1, 1, dtype=torch.bool, device=device)  # (B, W, S): what each prefix sees
    hidden_states = trunk.read_tokens(chain, end, ancestors)
    beams = _Beams.root(batch_size, device)
    for level in range(trie.num_levels):
        if level > 0:
            hidden_states, ancestors = _read_open(model, chain, trie, level, beams, ancestors)
        head = model.sid_head(level)
        log_probs, codes, child = child_log_probs(hidden_states, head, trie, level, beams.nodes, temperature)
        if item_filter is not None:
            log_probs = log_probs.masked_fill(item_filter.excludes_nodes(level, child), -torch.inf)
        beams = select(beams, log_probs, codes, child)
        if width_limit:  # a level has no more live prefixes than the catalogue has
            beams = _Beams(*(field[:, : trie.num_nodes[level + 1]] for field in vars(beams).values()))
    if beams.scores.isnan().any():
        raise ValueError("The model's logits hold NaN: check the weights and the data type (bfloat16 or float32).")
    return beams


@torch.no_grad()
def beam_search(
    model, chain, trie: SidTrie, num_beams: int, item_filter: ItemFilter | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Trie-constrained beam search that shares the prompt (METHOD.md 6).

    Level 0 reads `<|latent_end|>` once for each prompt. At every later level the beams are at most `W` extra tokens of
    the prompt's row; a token sees the prompt, the latent steps, `<|latent_end|>` and its own ancestors, so nothing is
    expanded and no cache is reordered. A beam whose codes leave a single item is not read any more.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model.
        chain ([`ReasoningState`]):
            Prompts that were read and reasoned about, `B` rows.
        trie ([`SidTrie`]):
            Trie of the catalogue, on the model's device.
        num_beams (`int`):
            Width `W` of the search.
        item_filter ([`ItemFilter`], *optional*):
            Allow and deny lists. Prefixes without an item left are pruned; scores stay those of the whole catalogue.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, W')`, `W'` at most `num_beams`: leaves of the trie and their
        log-probabilities, best first (`-inf` where the search found fewer).

    Raises:
        `ValueError`: if the model's logits hold NaN.
    """
    beams = _search(model, chain, trie, _select_best(num_beams), 1.0, width_limit=True, item_filter=item_filter)
    return beams.nodes, beams.scores


@torch.no_grad()
def sample_items(
    model, chain, trie: SidTrie, num_samples: int, temperature: float = 1.0, replacement: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw items from the policy, all samples of a prompt in one row, most likely first.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model.
        chain ([`ReasoningState`]):
            Prompts that were read and reasoned about, `B` rows.
        trie ([`SidTrie`]):
            Trie of the catalogue, on the model's device.
        num_samples (`int`):
            Items to draw for each prompt, `G`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.
        replacement (`bool`, *optional*, defaults to `True`):
            Whether to draw independently; otherwise by stochastic beams (Gumbel top-k), which never repeat an item.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, G)`: leaves of the trie and their log-probabilities at that
        temperature, most likely first (`-inf` where the catalogue has fewer items than were asked without
        replacement).

    Raises:
        `ValueError`: if the model's logits hold NaN, or `num_samples` or `temperature` is not positive.
    """
    if num_samples < 1 or not temperature > 0:
        raise ValueError(f"num_samples is {num_samples} and temperature is {temperature}: both must be positive.")
    select = _select_independent(num_samples) if replacement else _select_perturbed(num_samples)
    beams = _search(model, chain, trie, select, temperature, width_limit=not replacement)
    scores, order = beams.scores.sort(dim=1, descending=True, stable=True)
    return beams.nodes.gather(1, order), scores


def _read_open(model, chain, trie: SidTrie, level: int, beams: _Beams, ancestors: torch.Tensor):
    """
    Read the last codes of the live prefixes, all beams of a row side by side.

    A prefix that a single item continues is certain of every further code, whatever the model says: only the others
    are read, moved to the front. All ancestors of an open prefix were open.

    Returns the hidden states `(B, W, H)`, zero where nothing was read, and what each prefix sees `(B, W, S + R)`.
    """
    config, (batch_size, width) = model.config, beams.codes.shape
    num_items = trie.first_position(level, beams.nodes + 1) - trie.first_position(level, beams.nodes)
    is_open = (num_items > 1) & (beams.scores > -torch.inf)
    inherited = ancestors.gather(1, beams.parent[..., None].expand(-1, -1, ancestors.shape[-1]))
    hidden_states = torch.zeros(batch_size, width, config.hidden_size, dtype=model.dtype, device=ancestors.device)
    num_read = int(is_open.sum(dim=1).max())
    if num_read == 0:
        return hidden_states, inherited
    first = is_open.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_read]  # (B, R)
    own = first[:, None] == torch.arange(width, device=first.device)[:, None]  # (B, W, R)
    visible = torch.cat([inherited, own], dim=-1)
    token_ids = config.sid_token_offset + (level - 1) * config.codebook_size + beams.codes.gather(1, first)
    seen = visible.gather(1, first[..., None].expand(-1, -1, visible.shape[-1]))
    read = model.model.read_tokens(chain, token_ids, seen)
    place = first[..., None].expand(-1, -1, config.hidden_size)
    return hidden_states.to(read.dtype).scatter(1, place, read), visible


def rank_items(
    leaves: torch.Tensor, scores: torch.Tensor, trie: SidTrie, top_k: int, item_filter: ItemFilter | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    From leaves to items: each item its own place, equal scores in ascending order of the item's row number.

    Args:
        leaves (`torch.Tensor` of shape `(B, W)`):
            Leaves of the trie.
        scores (`torch.Tensor` of shape `(B, W)`):
            Their log-probabilities, `-inf` where the search found none.
        trie ([`SidTrie`]):
            Trie of the catalogue.
        top_k (`int`):
            Items to return, `k`.
        item_filter ([`ItemFilter`], *optional*):
            Allow and deny lists, which may part items that share a Semantic ID.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, k)`: item rows (-1 pads) and scores (`-inf` pads).
    """
    items = trie.items(leaves)
    scores = scores[..., None].expand_as(items).masked_fill(items < 0, -torch.inf).flatten(1)
    items = items.flatten(1)
    if item_filter is not None:
        scores = scores.masked_fill(item_filter.excludes_items(items), -torch.inf)
    items = items.masked_fill(scores == -torch.inf, -1)
    by_row = items.argsort(dim=1)
    items, scores = items.gather(1, by_row), scores.gather(1, by_row)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    items, scores = items.gather(1, best), scores.gather(1, best)
    missing = top_k - items.shape[1]
    return nn.functional.pad(items, (0, missing), value=-1), nn.functional.pad(scores, (0, missing), value=-torch.inf)


class SidLogitsProcessor(LogitsProcessor):
    """
    The catalogue's constraint for `generate`: after `<|latent_end|>` every code continues some item, and the scores
    are the log-probabilities of the one policy distribution.

    An open latent region can only be closed, a whole Semantic ID is followed by the end of the text. Rows of plain
    text are left alone. With `num_beams=W`, `max_new_tokens=M` after `<|latent_end|>` and `length_penalty=0.0` (plain
    sums of log-probabilities), `generate` returns the items, order and scores of
    [`~LasarForGenerativeRec.recommend`], if more slowly; where fewer than `W` items are found, it pads with
    sequences of a score below -1e8. With `do_sample=True` pass `top_k=0`: transformers cuts at 50 by default.

    Args:
        catalog ([`SidCatalog`]):
            The items.
        config ([`LasarConfig`]):
            Configuration of the model.

    Raises:
        `ValueError`: if the catalogue does not match the model.

    Example:

    ```python
    >>> processor = SidLogitsProcessor(catalog, model.config)
    >>> model.generate(**prompt, logits_processor=[processor], num_beams=50, max_new_tokens=4, length_penalty=0.0)
    ```
    """

    def __init__(self, catalog: SidCatalog, config: LasarConfig):
        catalog.check_matches(config.num_sid_levels, config.codebook_size)
        self.catalog, self.config = catalog, config
        eos = config.backbone_config.eos_token_id
        self.eos_token_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Tokens so far.
            scores (`torch.FloatTensor` of shape `(B, V)`):
                Logits or log-probabilities of the next token.

        Returns:
            `torch.FloatTensor` of shape `(B, V)`: log-probabilities within the constraint, `-inf` outside.

        Raises:
            `ValueError`: if the codes of a row begin no item, the scores hold NaN, or a row goes on behind a whole
            Semantic ID although the model has no end-of-text token.
        """
        config, trie = self.config, self.catalog.trie(input_ids.device)
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        end = torch.where(input_ids == config.latent_end_token_id, column, -1).amax(dim=1)
        num_codes = torch.where(end >= 0, column[-1] - end, -1)  # -1: no Semantic ID has begun
        is_open = (input_ids[:, -1] == config.latent_start_token_id) | (input_ids[:, -1] == config.latent_token_id)
        scores = scores.clone()
        self._leave_only(scores, is_open, [config.latent_end_token_id])
        nodes = torch.zeros_like(end)
        for level in range(config.num_sid_levels):
            start = config.sid_token_id(level, 0)
            rows = (num_codes == level).nonzero()[:, 0]
            scores[rows] = self._continue(scores[rows], nodes[rows], trie, level, start)
            token = input_ids.gather(1, (end + 1 + level).clamp(max=input_ids.shape[1] - 1)[:, None])[:, 0]
            nodes = torch.where(num_codes > level, trie.descend(level, nodes, token - start), nodes)
            if (nodes < 0).any():
                row = int((nodes < 0).nonzero()[0])
                raise ValueError(f"The codes after <|latent_end|> in row {row} begin no item of the catalogue.")
        is_whole = num_codes >= config.num_sid_levels
        if not self.eos_token_ids and is_whole.any():
            raise ValueError(f"A Semantic ID has {config.num_sid_levels} tokens: set max_new_tokens to that.")
        self._leave_only(scores, is_whole, self.eos_token_ids)
        return scores

    @staticmethod
    def _leave_only(scores: torch.Tensor, rows: torch.Tensor, token_ids: list[int]) -> None:
        """In place: rows in which the first of `token_ids` is certain."""
        scores.masked_fill_(rows[:, None], -torch.inf)
        for token_id in token_ids[:1]:
            scores[:, token_id].masked_fill_(rows, 0.0)

    @staticmethod
    def _continue(scores: torch.Tensor, nodes: torch.Tensor, trie: SidTrie, level: int, start: int) -> torch.Tensor:
        """Scores `(n, V)` of rows with the prefixes `nodes` `(n,)`: normalised over the children, `-inf` elsewhere."""
        codes, child = trie.children(level, nodes)
        token_ids = torch.where(child >= 0, start + codes, scores.shape[1])  # one more column takes the missing ones
        log_probs = scores.gather(1, start + codes).masked_fill(child < 0, -torch.inf).log_softmax(dim=-1)
        if log_probs.isnan().any():
            raise ValueError("The model's logits hold NaN: check the weights and the data type (bfloat16 or float32).")
        constrained = scores.new_full((scores.shape[0], scores.shape[1] + 1), -torch.inf)
        return constrained.scatter(1, token_ids, log_probs)[:, :-1]
