"""The catalogue of Semantic IDs, the one policy distribution over items, and beam search that shares the prompt.

A model writes an item as `M` codes. Only codes that continue some item of the catalogue can follow, so every
probability here is normalised over the children of the prefix in the catalogue's trie:

    log p(item | X) = sum_l log softmax over { c : (c_<l, c) starts some item } of the level-l head rows

Training (`sid_loss="catalog"`), sampling, the RL ratios and beam search all use this one distribution. The trie is held
as flat tensors (compressed rows, children in code order): a step of the constraint is a gather, never a Python loop.

Two things differ from the textbook beam search of `generate`. The prompt is never expanded: the beams of a level are
extra tokens of the prompt's own row, each seeing the prompt, the latent steps and its own ancestors. And a level
multiplies by its `K` rows of the head, not by the whole vocabulary.
"""

import json
import os
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import ModelOutput


CATALOG_WEIGHTS_NAME = "sid_catalog.safetensors"
CATALOG_CONFIG_NAME = "sid_catalog.json"


class SidTrie:
    """
    Trie of a catalogue's Semantic IDs as flat tensors.

    Node `n` of depth `l` (a prefix of `l` codes) owns the children `child_ptr[l][n] … child_ptr[l][n + 1]` of depth
    `l + 1`, in ascending order of code; a leaf owns a run of items in the same manner.

    Args:
        codes (`torch.Tensor` of shape `(I, M)`):
            Codes of the items, on the device where the trie shall live.
    """

    def __init__(self, codes: torch.Tensor):
        num_items, self.num_levels = codes.shape
        order = torch.arange(num_items, device=codes.device)
        for level in reversed(range(self.num_levels)):  # least significant key first: a stable lexicographic sort
            order = order[torch.sort(codes[order, level], stable=True).indices]
        ordered = codes[order]

        self.item_rows = order.to(torch.int32)  # item row numbers, leaf after leaf
        self.child_code: list[torch.Tensor] = []
        self.child_ptr: list[torch.Tensor] = []
        first = torch.zeros(1, dtype=torch.long, device=codes.device)  # first item of each node, here of the root
        is_first = torch.zeros(num_items, dtype=torch.bool, device=codes.device)
        is_first[0] = True
        for level in range(self.num_levels):
            is_first[1:] |= ordered[1:, level] != ordered[:-1, level]
            child_first = is_first.nonzero().squeeze(1)
            self.child_code.append(ordered[child_first, level].to(torch.int32))
            self.child_ptr.append(self._pointers(first, child_first))
            first = child_first
        self.leaf_ptr = torch.cat([first, first.new_tensor([num_items])]).to(torch.int32)
        self.num_nodes = [1] + [len(code) for code in self.child_code]
        pointers = [*self.child_ptr, self.leaf_ptr]
        # Widest fan-out a level, and most items that share one Semantic ID: the shapes of every later gather.
        self.fan_out = [int((pointer[1:] - pointer[:-1]).max()) for pointer in pointers]

    @staticmethod
    def _pointers(first: torch.Tensor, child_first: torch.Tensor) -> torch.Tensor:
        starts = torch.searchsorted(child_first, first)
        return torch.cat([starts, starts.new_tensor([len(child_first)])]).to(torch.int32)

    def children(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Children of nodes.

        Args:
            level (`int`):
                Depth `l` of the nodes, `0` for the root.
            nodes (`torch.Tensor` of shape `(...)`):
                Node numbers.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(..., F)`, `F` the widest fan-out of that depth: the children's codes
            (0 where there is none) and their node numbers (-1 where there is none).
        """
        pointer = self.child_ptr[level]
        start, end = pointer[nodes].long(), pointer[nodes + 1].long()
        child = start[..., None] + torch.arange(self.fan_out[level], device=nodes.device)
        exists = child < end[..., None]
        codes = self.child_code[level][torch.where(exists, child, 0)].long()
        return torch.where(exists, codes, 0), torch.where(exists, child, -1)

    def descend(self, level: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """
        The child of each node by code.

        Args:
            level (`int`):
                Depth of the nodes.
            nodes (`torch.Tensor` of shape `(n,)`):
                Node numbers; -1 stays -1.
            codes (`torch.Tensor` of shape `(n,)`):
                Code to follow from each node.

        Returns:
            `torch.Tensor` of shape `(n,)`: node numbers of depth `level + 1`, -1 where the catalogue has no such prefix.
        """
        child_codes, child = self.children(level, nodes.clamp(min=0))
        match = (child_codes == codes[:, None]) & (child >= 0) & (nodes >= 0)[:, None]
        return torch.where(match, child, -1).max(dim=1).values

    def items(self, leaves: torch.Tensor) -> torch.Tensor:
        """
        Items of leaves.

        Args:
            leaves (`torch.Tensor` of shape `(...)`):
                Leaf numbers.

        Returns:
            `torch.Tensor` of shape `(..., C)`, `C` the most items that share one Semantic ID: item row numbers in
            ascending order, -1 where there is none.
        """
        start, end = self.leaf_ptr[leaves].long(), self.leaf_ptr[leaves + 1].long()
        place = start[..., None] + torch.arange(self.fan_out[-1], device=leaves.device)
        exists = place < end[..., None]
        return torch.where(exists, self.item_rows[torch.where(exists, place, 0)].long(), -1)


class SidCatalog:
    """
    The items that can be recommended, each with its Semantic ID.

    Args:
        codes (`torch.Tensor` or array of shape `(I, M)`):
            Semantic ID of each item, non-negative integers.
        item_ids (`list[str]`):
            Public id of each item; the row number is what the model returns.
        allow_collisions (`bool`, *optional*, defaults to `False`):
            Whether several items may share a Semantic ID. Each then gets its own row in a result, with the same score,
            the lower row number first.

    Raises:
        `ValueError`: if the shapes disagree, a code is negative, an item id repeats, or two items share a Semantic ID.

    Example:

    ```python
    >>> import torch
    >>> from lasar_hf import SidCatalog

    >>> catalog = SidCatalog(torch.tensor([[0, 1], [0, 2], [3, 0]]), ["apple", "pear", "chair"])
    >>> len(catalog)
    3
    ```
    """

    def __init__(self, codes, item_ids: list[str], allow_collisions: bool = False):
        codes = torch.as_tensor(codes).long().cpu()
        item_ids = [str(item_id) for item_id in item_ids]
        if codes.ndim != 2 or len(codes) != len(item_ids) or len(codes) == 0:
            raise ValueError(
                f"codes has shape {tuple(codes.shape)} but there are {len(item_ids)} item ids: pass one row of codes "
                "for each of at least one item."
            )
        if (codes < 0).any():
            row = int((codes < 0).any(dim=1).nonzero()[0])
            raise ValueError(f"Item {item_ids[row]!r} (row {row}) has a negative code: {codes[row].tolist()}.")
        if len(set(item_ids)) != len(item_ids):
            seen = set()
            repeated = next(item_id for item_id in item_ids if item_id in seen or seen.add(item_id))
            raise ValueError(f"The item id {repeated!r} appears twice: item ids must be unique.")
        self.codes = codes
        self.item_ids = item_ids
        self.allow_collisions = allow_collisions
        self._trie = SidTrie(codes)
        if self._trie.fan_out[-1] > 1 and not allow_collisions:
            leaf = int((self._trie.leaf_ptr.diff() > 1).nonzero()[0])
            first, second = self._trie.items(torch.tensor(leaf))[:2].tolist()
            raise ValueError(
                f"Items {item_ids[first]!r} and {item_ids[second]!r} share the Semantic ID {codes[first].tolist()}: "
                "resolve the collision, or pass allow_collisions=True."
            )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        """Codes of one Semantic ID, `M`."""
        return self.codes.shape[1]

    def trie(self, device: torch.device | str) -> SidTrie:
        """
        The catalogue's trie on a device, built there once.

        Args:
            device (`torch.device` or `str`):
                Where the model lives.

        Returns:
            [`SidTrie`]: the trie.
        """
        if self._trie.item_rows.device != torch.device(device):
            self._trie = SidTrie(self.codes.to(device))
        return self._trie

    def check_matches(self, num_sid_levels: int, codebook_size: int) -> None:
        """
        Check that a model can write this catalogue's Semantic IDs.

        Args:
            num_sid_levels (`int`):
                Levels of the model.
            codebook_size (`int`):
                Codes a level of the model.

        Raises:
            `ValueError`: if the levels differ, or a code lies outside the codebook.
        """
        if self.num_levels != num_sid_levels:
            raise ValueError(
                f"The catalogue has {self.num_levels} levels but the model has {num_sid_levels}: build the Semantic IDs "
                "with the model's number of levels."
            )
        if int(self.codes.max()) >= codebook_size:
            row = int((self.codes >= codebook_size).any(dim=1).nonzero()[0])
            raise ValueError(
                f"Item {self.item_ids[row]!r} (row {row}) has the codes {self.codes[row].tolist()}, but the model's "
                f"codebooks have {codebook_size} entries."
            )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Write `sid_catalog.safetensors` and `sid_catalog.json`, beside a checkpoint for instance.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, created if missing.
        """
        os.makedirs(save_directory, exist_ok=True)
        config = {"num_levels": self.num_levels, "allow_collisions": self.allow_collisions, "item_ids": self.item_ids}
        weights_path = os.path.join(save_directory, CATALOG_WEIGHTS_NAME)
        config_path = os.path.join(save_directory, CATALOG_CONFIG_NAME)
        save_file({"codes": self.codes.to(torch.int32)}, weights_path + ".tmp")
        with open(config_path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(config, file, ensure_ascii=False)
        os.replace(weights_path + ".tmp", weights_path)
        os.replace(config_path + ".tmp", config_path)

    @classmethod
    def from_pretrained(cls, pretrained_directory: str | os.PathLike) -> "SidCatalog":
        """
        Read a catalogue written by [`~SidCatalog.save_pretrained`].

        Args:
            pretrained_directory (`str` or `os.PathLike`):
                Folder that holds the two files.

        Returns:
            [`SidCatalog`]: the same catalogue.
        """
        with open(os.path.join(pretrained_directory, CATALOG_CONFIG_NAME), encoding="utf-8") as file:
            config = json.load(file)
        codes = load_file(os.path.join(pretrained_directory, CATALOG_WEIGHTS_NAME))["codes"]
        return cls(codes, config["item_ids"], allow_collisions=config["allow_collisions"])


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
    """

    items: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    latent_steps: torch.Tensor | None = None


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
        drawn = torch.multinomial(log_probs.exp().flatten(0, 1), draws, replacement=True).view(batch_size, -1)
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


def _search(model, chain, trie: SidTrie, select, temperature: float, width_limit: bool) -> _Beams:
    """Walk down the trie; `select` chooses the prefixes that go on at each level."""
    trunk, batch_size, device = model.model, len(chain.depths), chain.depths.device
    end = torch.full((batch_size, 1), model.config.latent_end_token_id, device=device)
    hidden_states = trunk.read(chain, end, torch.ones(batch_size, 1, 1, dtype=torch.bool, device=device))
    beams = _Beams.root(batch_size, device)
    ancestors = None  # (B, W, S): which of the tokens read so far each prefix descends from
    for level in range(trie.num_levels):
        if level > 0:
            token_ids = model.config.sid_token_offset + (level - 1) * model.config.codebook_size + beams.codes
            ancestors = _own_ancestors(ancestors, beams)
            hidden_states = trunk.read(chain, token_ids, ancestors)
        head = model.sid_head(level)
        beams = select(beams, *child_log_probs(hidden_states, head, trie, level, beams.nodes, temperature))
        if width_limit:  # a level has no more live prefixes than the catalogue has
            beams = _Beams(*(field[:, : trie.num_nodes[level + 1]] for field in vars(beams).values()))
    if beams.scores.isnan().any():
        raise ValueError("The model's logits hold NaN: check the weights and the data type (bfloat16 or float32).")
    return beams


@torch.no_grad()
def beam_search(model, chain, trie: SidTrie, num_beams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Trie-constrained beam search that shares the prompt (METHOD.md 6).

    Level 0 reads `<|latent_end|>` once for each prompt. At every later level the beams are `W` extra tokens of the
    prompt's row; a token sees the prompt, the latent steps, `<|latent_end|>` and its own ancestors, so nothing is
    expanded and no cache is reordered.

    Args:
        model ([`LasarForGenerativeRec`]):
            The model.
        chain ([`LatentChain`]):
            Prompts that were read and reasoned about, `B` rows.
        trie ([`SidTrie`]):
            Trie of the catalogue, on the model's device.
        num_beams (`int`):
            Width `W` of the search.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, W')`, `W'` at most `num_beams`: leaves of the trie and their
        log-probabilities, best first (`-inf` where the search found fewer).

    Raises:
        `ValueError`: if the model's logits hold NaN.
    """
    beams = _search(model, chain, trie, _select_best(num_beams), temperature=1.0, width_limit=True)
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
        chain ([`LatentChain`]):
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
        temperature, most likely first (`-inf` where the catalogue has fewer items than were asked without replacement).

    Raises:
        `ValueError`: if the model's logits hold NaN.
    """
    select = _select_independent(num_samples) if replacement else _select_perturbed(num_samples)
    beams = _search(model, chain, trie, select, temperature, width_limit=not replacement)
    scores = beams.scores.masked_fill(beams.key == -torch.inf, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return beams.nodes.gather(1, order), scores


def _own_ancestors(ancestors: torch.Tensor | None, beams: _Beams) -> torch.Tensor:
    """Visibility `(B, W, S + W)` of the tokens since `<|latent_end|>` (itself first) for a new level of beams."""
    batch_size, width = beams.codes.shape
    itself = torch.eye(width, dtype=torch.bool, device=beams.codes.device).expand(batch_size, width, width)
    if ancestors is None:
        inherited = torch.ones(batch_size, width, 1, dtype=torch.bool, device=beams.codes.device)
    else:
        inherited = ancestors.gather(1, beams.parent[..., None].expand(-1, -1, ancestors.shape[-1]))
    return torch.cat([inherited, itself], dim=-1)


def rank_items(leaves: torch.Tensor, scores: torch.Tensor, trie: SidTrie, top_k: int):
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

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, k)`: item rows (-1 pads) and scores (`-inf` pads).
    """
    items = trie.items(leaves)
    scores = scores[..., None].expand_as(items).masked_fill(items < 0, -torch.inf).flatten(1)
    items = items.flatten(1).masked_fill(scores == -torch.inf, -1)
    by_row = items.argsort(dim=1)
    items, scores = items.gather(1, by_row), scores.gather(1, by_row)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    items, scores = items.gather(1, best), scores.gather(1, best)
    missing = top_k - items.shape[1]
    return nn.functional.pad(items, (0, missing), value=-1), nn.functional.pad(scores, (0, missing), value=-torch.inf)
