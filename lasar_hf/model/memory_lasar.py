"""A memory of item-to-item steps, mixed with the model's distribution at the level of items.

A generative recommender generalises well and memorises badly; a table of which item follows which does the opposite.
With `M` the memory's distribution over items, given the items of the prompt, and `g` its weight, the mixture is

    p(item | X) = (1 - g) p_model(item | X) + g M(item | X)

The candidates are the items of the beams and the most likely ones of the memory. Both distributions are exact for all
of them.

Shapes: `B` prompts of `D` items, `C` candidates per prompt, `I` items of the catalogue.
"""

import copy
import hashlib
import json
import math
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file, logging

from .catalog_lasar import SidCatalog
from .files_lasar import atomic_file
from .trie_lasar import ItemFilter


logger = logging.get_logger(__name__)
MEMORY_NAME = "item_memory.safetensors"
TENSORS = ("pointers", "neighbours", "weights")


def catalog_hash(catalog: SidCatalog, num_items: int | None = None) -> str:
    """SHA-256 of the ids of a catalogue's items, or of the first `num_items`: they say what an item index means."""
    return hashlib.sha256(json.dumps(catalog.item_ids[:num_items]).encode()).hexdigest()


class ItemMemory:
    """
    A sparse item-to-item matrix `S` `(I, I)` and the weight of the memory in the mixture.

    Row `i` of the matrix has the items that follow item `i`. The score of an item is `Σ_k d^k S[h_{-k}, item]`, over
    the history `h` from its newest item `h_{-0}` with the decay `d`, and the memory's distribution is the scores
    divided by their sum over the items that can be recommended. Its weight is `sigmoid(a + b log s)`, with `s` the
    largest of these scores, and 0 if no score is positive: a memory that knows the history well counts more.

    Args:
        pointers (`torch.Tensor` of shape `(I + 1,)`), neighbours, weights (`torch.Tensor` of shape `(E,)`):
            The matrix in compressed rows: `neighbours[pointers[i] : pointers[i + 1]]` are the items that follow item
            `i`, and `weights`, all positive, their scores.
        catalog_sha256 (`str`):
            [`catalog_hash`] of the catalogue that the item indices belong to.
        decay (`float`, *optional*, defaults to `0.7`):
            Decay `d` of the items of a history.
        gate (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.0)`):
            `a` and `b` of the memory's weight, which is one half by default.

    Raises:
        `ValueError`: if shapes or item indices do not fit, or a weight is not positive.

    Example:

    ```python
    >>> memory = ItemMemory.from_pretrained("outputs/scientific/grpo")
    >>> model.recommend(**processor([["12", "40"]]), catalog=processor.catalog, memory=memory)
    ```
    """

    def __init__(
        self,
        pointers: torch.Tensor,
        neighbours: torch.Tensor,
        weights: torch.Tensor,
        catalog_sha256: str,
        decay: float = 0.7,
        gate: tuple[float, float] = (0.0, 0.0),
    ):
        num_items = len(pointers) - 1
        fits = num_items >= 0 and len(neighbours) == len(weights) == int(pointers[-1])
        if not fits or (len(neighbours) and not 0 <= int(neighbours.min()) <= int(neighbours.max()) < num_items):
            raise ValueError(
                f"The memory has {len(pointers)} pointers, {len(neighbours)} neighbours and {len(weights)} weights of "
                f"{num_items} items; expected the compressed rows of a matrix of these items."
            )
        is_valid = (
            bool(((weights > 0) & weights.isfinite()).all()) and 0 < decay <= 1 and all(map(math.isfinite, gate))
        )
        if not is_valid or int(pointers[0]) != 0 or bool((pointers.diff() < 0).any()):
            raise ValueError(
                f"The memory has decay {decay} and gate {gate}; expected a decay in (0, 1], finite numbers, positive "
                "weights and ascending pointers."
            )
        self.pointers, self.neighbours, self.weights = pointers.long(), neighbours.long(), weights.float()
        self.catalog_sha256 = catalog_sha256
        self.decay, self.gate = float(decay), (float(gate[0]), float(gate[1]))
        self._matched: SidCatalog | None = None  # the catalogue that was checked last

    def __len__(self) -> int:
        return len(self.pointers) - 1

    def to(self, device: torch.device | str) -> "ItemMemory":
        """This memory on a device."""
        moved = copy.copy(self)
        for name in TENSORS:
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def check_matches(self, catalog: SidCatalog) -> None:
        """
        Refuse the memory of another catalogue, with a `ValueError`. Items may have been added or removed since: the
        memory does not know added ones.
        """
        if catalog is self._matched:  # hashing a million ids takes time
            return
        if len(catalog) < len(self) or self.catalog_sha256 != catalog_hash(catalog, len(self)):
            raise ValueError(
                f"The memory of {len(self)} items belongs to another catalogue than that of {len(catalog)} items. "
                "Build it from the same data, with recipes/memory.py."
            )
        self._matched = catalog

    def recall(
        self, history: torch.Tensor, excluded: torch.Tensor | None = None, is_available: torch.Tensor | None = None
    ) -> "Recall":
        """
        The memory's distribution for each prompt.

        `history` `(B, D)` are item indices, oldest first, -1 at padding anywhere. The items `excluded` `(B, D')`, -1
        pads, and those that are not `is_available` `(I,)` have no probability. Returns a [`Recall`].
        """
        batch_size, num_items, device = len(history), len(self), history.device
        # 1. The weight d^k of each item; k counts the newer items. Added items have no neighbours.
        is_item = history >= 0  # (B, D)
        age = is_item.flip(1).cumsum(dim=1).flip(1) - 1  # (B, D)
        is_known = is_item & (history < num_items)
        factor = torch.where(is_known, self.decay**age, 0.0)  # (B, D)
        # 2. All neighbours of all items: E entries of (prompt, item, score).
        rows = torch.where(is_known, history, 0).flatten()  # (B · D,)
        lengths = torch.where(is_known.flatten(), self.pointers[rows + 1] - self.pointers[rows], 0)
        source = torch.repeat_interleave(lengths)  # (E,), index among B · D
        within = torch.arange(len(source), device=device) - (lengths.cumsum(0) - lengths)[source]
        entry = self.pointers[rows[source]] + within  # (E,)
        keys = source // history.shape[1] * num_items + self.neighbours[entry]
        # 3. Add up the scores of equal items: entries in ascending order of prompt and item.
        keys, index = torch.unique(keys, return_inverse=True)
        weights = factor.flatten()[source] * self.weights[entry]  # (E,)
        scores = torch.zeros(len(keys), device=device).index_add(0, index, weights)
        # 4. Leave out what cannot be recommended, and scores that are too small for a float32.
        is_kept = scores > 0
        if excluded is not None:
            own = torch.arange(batch_size, device=device)[:, None] * num_items + excluded
            is_kept &= ~torch.isin(keys, own[(excluded >= 0) & (excluded < num_items)])
        if is_available is not None:
            is_kept &= is_available[keys % num_items]
        keys, scores = keys[is_kept], scores[is_kept]
        # 5. One row per prompt, N entries at most.
        prompt = keys // num_items
        num_of = torch.bincount(prompt, minlength=batch_size)  # (B,)
        column = torch.arange(len(keys), device=device) - (num_of.cumsum(0) - num_of)[prompt]
        shape = batch_size, max(int(num_of.max()), 1)
        items = torch.full(shape, num_items, device=device).index_put((prompt, column), keys % num_items)  # (B, N)
        scores = torch.zeros(shape, device=device).index_put((prompt, column), scores)  # (B, N)
        total = scores.sum(dim=1, keepdim=True)  # (B, 1)
        # 6. The weight in the mixture.
        strength = scores.amax(dim=1)  # (B,)
        a, b = self.gate
        weight = torch.sigmoid(a + b * strength.clamp(min=torch.finfo(torch.float32).tiny).log())  # (B,)
        probs = torch.where(total > 0, scores / total, 0.0)  # (B, N)
        return Recall(items, probs, torch.where(strength > 0, weight, 0.0), strength)

    def content_hash(self) -> str:
        """SHA-256 of matrix and settings, as 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps([self.catalog_sha256, self.decay, self.gate]).encode())
        for name in TENSORS:
            digest.update(getattr(self, name).cpu().contiguous().numpy())
        return digest.hexdigest()

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `item_memory.safetensors`, with a hash of its content, to a folder, beside the catalogue."""
        os.makedirs(save_directory, exist_ok=True)
        path = os.path.join(save_directory, MEMORY_NAME)
        settings = {"catalog_sha256": self.catalog_sha256, "decay": self.decay, "gate": self.gate}
        tensors = {name: getattr(self, name).cpu() for name in TENSORS}
        metadata = {"settings": json.dumps(settings), "sha256": self.content_hash()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def from_pretrained(cls, pretrained_directory: str | os.PathLike, **kwargs) -> "ItemMemory":
        """
        Read a memory written by [`~ItemMemory.save_pretrained`], from a folder or a model id on the Hub. `kwargs` such
        as `revision` and `token` are passed to [`~transformers.utils.cached_file`].
        """
        memory = cls.find(pretrained_directory, **kwargs)
        if memory is None:
            raise FileNotFoundError(f"{pretrained_directory} has no {MEMORY_NAME}. Make one with recipes/memory.py.")
        return memory

    @classmethod
    def find(cls, pretrained_directory: str | os.PathLike, **kwargs) -> "ItemMemory | None":
        """As [`~ItemMemory.from_pretrained`], but `None` if a checkpoint has no memory."""
        path = cached_file(pretrained_directory, MEMORY_NAME, _raise_exceptions_for_missing_entries=False, **kwargs)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Make it again with recipes/memory.py.") from error
        if set(tensors) != set(TENSORS):
            raise ValueError(
                f"{path} has {sorted(tensors)}; expected {', '.join(TENSORS)}. Its weight depended on other "
                "numbers in an older version. Make it again with recipes/memory.py."
            )
        try:
            memory = cls(**tensors, **json.loads(metadata["settings"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}). Make it again with recipes/memory.py.") from error
        if "sha256" not in metadata:
            logger.warning_once(f"{path} has no sha256, so damage is not found. Save the memory again.")
        elif metadata["sha256"] != memory.content_hash():
            raise ValueError(
                f"{path} does not have the sha256 with which it was saved. Make it again with recipes/memory.py."
            )
        return memory


class Recall:
    """
    The memory's distribution for a batch: `probs` `(B, N)` of the ascending `items` `(B, N)`, padded with the number
    of items, the `weight` `(B,)` of the memory and its `strength` `(B,)`, the largest score. All other items have
    probability 0.
    """

    def __init__(self, items: torch.Tensor, probs: torch.Tensor, weight: torch.Tensor, strength: torch.Tensor):
        self.items, self.probs, self.weight, self.strength = items, probs, weight, strength

    def candidates(self, count: int, item_filter: ItemFilter | None = None) -> torch.Tensor:
        """The `count` most likely permitted items of each prompt, `(B, count)`, best first; -1 pads."""
        probs = self.probs
        if item_filter is not None:
            items = torch.where(probs > 0, self.items, 0)
            probs = probs.masked_fill(item_filter.excludes_items(items), 0.0)
        order = probs.argsort(dim=1, descending=True, stable=True)[:, :count]
        items = torch.where(probs.gather(1, order) > 0, self.items.gather(1, order), -1)
        return nn.functional.pad(items, (0, count - items.shape[1]), value=-1)

    def probabilities(self, items: torch.Tensor) -> torch.Tensor:
        """Probabilities of `items` `(B, C)`, 0 at padding (-1) and for items that the memory does not know."""
        index = torch.searchsorted(self.items, items).clamp(max=self.items.shape[1] - 1)  # (B, C)
        return torch.where(self.items.gather(1, index) == items, self.probs.gather(1, index), 0.0)

    def mix(self, log_probs: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(B, C)` of items under the mixture, from those under the model."""
        weight = self.weight[:, None]
        model = log_probs + torch.log1p(-weight)
        return torch.logaddexp(model, (weight * self.probabilities(items)).log())


__all__ = ["ItemMemory", "Recall"]
