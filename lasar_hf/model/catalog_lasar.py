"""The catalogue: items, their Semantic IDs and titles."""

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file, logging

from .files_lasar import atomic_file
from .trie_lasar import SidTrie


logger = logging.get_logger(__name__)
CATALOG_WEIGHTS_NAME = "sid_catalog.safetensors"
CATALOG_CONFIG_NAME = "sid_catalog.json"
CONFIG_FIELDS = ("num_levels", "allow_collisions", "item_ids", "titles")
# Loaded catalogues that are in use, by the state of their files: model and processor of a checkpoint share one.
_IN_USE: WeakValueDictionary[tuple, "SidCatalog"] = WeakValueDictionary()


class SidCatalog:
    """
    The items that can be recommended, each with its Semantic ID.

    Item indices are stable: `add` appends items and `remove` only hides them. A hidden item is never recommended, and
    the probabilities are those of a catalogue without it. Its codes stay readable, since histories may contain it.

    Args:
        codes (`torch.Tensor` or array of shape `(I, M)`):
            Semantic ID of each item, non-negative integers.
        item_ids (`list[str]`):
            Public id of each item. The model returns its index in this list.
        allow_collisions (`bool`, *optional*, defaults to `False`):
            Whether several items may share a Semantic ID. They are recommended separately, with equal scores, in order
            of their indices.
        removed (`torch.Tensor` of shape `(I,)`, *optional*):
            Which items are hidden. By default, no item is.
        titles (`list[str | None]` of length `I`, *optional*):
            Title of each item, `None` if it has no title.

    Attributes:
        codes (`torch.Tensor` of shape `(I, M)`):
            Semantic IDs, int32, hidden items included.
        num_items (`int`):
            Items that can be recommended, without hidden ones.

    Raises:
        `ValueError`: if the shapes disagree, a code is negative or not an integer, a title is not a string, an item id
        repeats, a text cannot be written as UTF-8, two items share a Semantic ID, or all items are hidden.

    Example:

    ```python
    >>> import torch
    >>> from lasar_hf import SidCatalog

    >>> catalog = SidCatalog(torch.tensor([[0, 1], [0, 2], [3, 0]]), ["apple", "pear", "chair"])
    >>> len(catalog)
    3
    >>> catalog = catalog.add([[3, 1]], ["table"]).remove(["pear"])
    >>> len(catalog), catalog.num_items
    (4, 3)
    ```
    """

    def __init__(
        self,
        codes,
        item_ids: Sequence[str],
        allow_collisions: bool = False,
        removed: torch.Tensor | None = None,
        titles: Sequence[str | None] | None = None,
    ):
        self.item_ids = [str(item_id) for item_id in item_ids]
        self.codes = _checked_codes(codes, self.item_ids)
        self.titles = _checked_titles(titles, len(self.item_ids))
        self.allow_collisions = allow_collisions
        if removed is None:
            removed = torch.zeros(len(self.codes), dtype=torch.bool)
        self.removed = removed.cpu().to(torch.bool, copy=True)
        if self.removed.shape != self.codes.shape[:1] or self.removed.all():
            raise ValueError(
                f"removed has shape {tuple(self.removed.shape)} and hides {int(self.removed.sum())} items; expected "
                f"shape ({len(self.codes)},) and at least one item that is not hidden."
            )
        self.num_items = len(self.codes) - int(self.removed.sum())
        self._max_code = int(self.codes.max())
        self._trie = SidTrie(self.codes, (~self.removed).nonzero()[:, 0])
        self._copies: dict[torch.device, SidTrie] = {}
        self._check_collisions()

    def _check_collisions(self) -> None:
        if self._trie.fan_out[-1] > 1 and not self.allow_collisions:
            leaf = int((self._trie.leaf_ptr.diff() > 1).nonzero()[0])
            first, second = self._trie.items(self._trie.leaf_ptr.new_tensor(leaf).long())[:2].tolist()
            raise ValueError(
                f"Items {self.item_ids[first]!r} and {self.item_ids[second]!r} share the Semantic ID "
                f"{self.codes[first].tolist()}. Resolve the collision, or pass allow_collisions=True."
            )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        """Codes of one Semantic ID, `M`."""
        return self.codes.shape[1]

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Index of each item id, hidden items included."""
        return dict(zip(self.item_ids, range(len(self)), strict=True))

    def trie(self, device: torch.device | str) -> SidTrie:
        """The trie of the items that are not hidden, copied to a device once."""
        device = torch.device(device)
        if device.type == "cpu":
            return self._trie
        if device not in self._copies:
            self._copies[device] = self._trie.to(device)
        return self._copies[device]

    def trie_of_all(self, device: torch.device | str) -> SidTrie:
        """The trie of all items on a device, also the hidden ones, which histories may contain; built once."""
        if not self.removed.any():
            return self.trie(device)
        key = "all", torch.device(device)
        if key not in self._copies:
            self._copies[key] = SidTrie(self.codes.to(device))
        return self._copies[key]

    def add(self, codes, item_ids: Sequence[str], titles: Sequence[str | None] | None = None) -> "SidCatalog":
        """
        A new catalogue that also has these `A` items. Indices do not change, and a removed item returns to its old
        index.

        Args:
            codes, item_ids, titles:
                As for [`SidCatalog`]. Without `titles`, new items get no title and returning items keep theirs.

        Returns:
            [`SidCatalog`]: the new catalogue; this one is unchanged.

        Raises:
            `ValueError`: as [`SidCatalog`], and if this catalogue already has an item or another number of levels.
        """
        # 1. Check the new items.
        item_ids = [str(item_id) for item_id in item_ids]
        codes, titles = _checked_codes(codes, item_ids), _checked_titles(titles, len(item_ids))
        if codes.shape[1] != self.num_levels:
            raise ValueError(f"codes have {codes.shape[1]} levels; expected the catalogue's {self.num_levels}.")
        for item_id in item_ids:
            index = self.index_of.get(item_id)
            if index is not None and not self.removed[index]:
                raise ValueError(f"The catalogue already has the item {item_id!r}. Remove it to change its codes.")
        # 2. Give indices to the new items.
        new_ids = [item_id for item_id in item_ids if item_id not in self.index_of]
        index_of = self.index_of | {item_id: len(self) + i for i, item_id in enumerate(new_ids)}
        indices = torch.tensor([index_of[item_id] for item_id in item_ids])  # (A,)
        # 3. Extend the lists, and write the added items into them.
        all_codes = torch.cat([self.codes, self.codes.new_empty(len(new_ids), self.num_levels)])
        removed = torch.cat([self.removed, self.removed.new_empty(len(new_ids))])
        all_codes[indices], removed[indices] = codes, False
        all_titles = self.titles
        if titles is not None or all_titles is not None:
            all_titles = [*(all_titles or [None] * len(self)), *[None] * len(new_ids)]
            for index, title in zip(indices.tolist(), titles or [], strict=titles is not None):
                all_titles[index] = title
        return self._changed(
            self._trie.including(codes, indices, len(all_codes)),
            removed,
            codes=all_codes,
            item_ids=self.item_ids + new_ids,
            index_of=index_of,
            titles=all_titles,
        )

    def remove(self, item_ids: Sequence[str]) -> "SidCatalog":
        """
        A new catalogue that hides the items with these ids; indices do not change.

        Raises:
            `ValueError`: if the catalogue does not have an item, or no item would be left.
        """
        removed, indices = self.removed.clone(), []
        for item_id in map(str, item_ids):
            index = self.index_of.get(item_id)
            if index is None or removed[index]:
                raise ValueError(f"The catalogue has no item {item_id!r} to remove.")
            removed[index] = True
            indices.append(index)
        if removed.all():
            raise ValueError("item_ids names all items of the catalogue; expected at least one item to remain.")
        return self._changed(self._trie.without(torch.tensor(indices, dtype=torch.long)), removed)

    def _changed(self, trie: SidTrie, removed: torch.Tensor, **parts) -> "SidCatalog":
        """A copy of this catalogue with another trie, `removed` and other attributes, which are not checked again."""
        changed = copy.copy(self)
        vars(changed).update(parts, _trie=trie, _copies={}, removed=removed)
        changed.num_items, changed._max_code = len(trie.item_indices), int(changed.codes.max())
        changed._check_collisions()
        return changed

    def check_matches(self, num_sid_levels: int, codebook_size: int) -> None:
        """Refuse a catalogue that a model with these sizes cannot write, with a `ValueError`."""
        if self.num_levels != num_sid_levels:
            raise ValueError(
                f"The catalogue has {self.num_levels} levels, but the model has {num_sid_levels}. Build the Semantic "
                "IDs with the model's number of levels."
            )
        if self._max_code >= codebook_size:
            index = int((self.codes >= codebook_size).any(dim=1).nonzero()[0])
            raise ValueError(
                f"Item {self.item_ids[index]!r} (index {index}) has the codes {self.codes[index].tolist()}, but the "
                f"model's codebook_size is {codebook_size}."
            )

    def content_hash(self) -> str:
        """SHA-256 of codes, hidden items, ids, titles and settings, as 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps([getattr(self, name) for name in CONFIG_FIELDS]).encode())
        for tensor in (self.codes, self.removed):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Write `sid_catalog.safetensors` and `sid_catalog.json` to a folder, with a hash of their content. The JSON file
        is removed first and written last, so it only exists after a complete save.
        """
        os.makedirs(save_directory, exist_ok=True)
        config = {name: getattr(self, name) for name in CONFIG_FIELDS} | {"sha256": self.content_hash()}
        weights_path = os.path.join(save_directory, CATALOG_WEIGHTS_NAME)
        config_path = os.path.join(save_directory, CATALOG_CONFIG_NAME)
        with atomic_file(config_path) as temporary:
            temporary.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
            with atomic_file(weights_path) as temporary_weights:
                save_file({"codes": self.codes, "removed": self.removed}, temporary_weights)
                if os.path.exists(config_path):
                    os.remove(config_path)

    def __deepcopy__(self, memo) -> "SidCatalog":
        return self  # it never changes: `add` and `remove` make new ones

    @classmethod
    def from_pretrained(cls, pretrained_directory: str | os.PathLike, **kwargs) -> "SidCatalog":
        """
        Read a catalogue written by [`~SidCatalog.save_pretrained`], from a folder or a model id on the Hub. `kwargs`
        such as `revision` and `token` are passed to [`~transformers.utils.cached_file`].

        Raises:
            `FileNotFoundError`: if there is no catalogue.
            `ValueError`: if a file is damaged, or the two files do not belong together.
        """
        catalog = cls.find(pretrained_directory, **kwargs)
        if catalog is None:
            raise FileNotFoundError(
                f"{pretrained_directory} has no {CATALOG_CONFIG_NAME}. Save the catalogue of the training to it."
            )
        return catalog

    @classmethod
    def find(cls, pretrained_directory: str | os.PathLike, **kwargs) -> "SidCatalog | None":
        """As [`~SidCatalog.from_pretrained`], but `None` if a checkpoint has no catalogue."""
        config_path = cached_file(
            pretrained_directory, CATALOG_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **kwargs
        )
        if config_path is None:
            return None
        weights_path = cached_file(pretrained_directory, CATALOG_WEIGHTS_NAME, **kwargs)
        key = _file_state(config_path), _file_state(weights_path)
        catalog = _IN_USE.get(key)
        if catalog is None:
            catalog = _IN_USE[key] = cls._read(config_path, weights_path)
        return catalog

    @classmethod
    def _read(cls, config_path: str, weights_path: str) -> "SidCatalog":
        # 1. Settings, ids and titles.
        try:
            with open(config_path, encoding="utf-8") as file:
                config = json.load(file)
            num_levels, allow_collisions, item_ids = (config[name] for name in CONFIG_FIELDS[:3])
            titles, digest = config.get("titles"), config.get("sha256")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{config_path} is damaged ({error!r}). Save the catalogue again.") from error
        is_valid = {
            "allow_collisions": isinstance(allow_collisions, bool),
            "item_ids": isinstance(item_ids, list) and all(isinstance(item_id, str) for item_id in item_ids),
            "titles": isinstance(titles, list | None),
        }
        if not all(is_valid.values()):
            name = min(is_valid, key=is_valid.get)
            raise ValueError(f"{config_path} has {name} of another type than it was saved with. Save it again.")
        # 2. Codes.
        try:
            tensors = load_file(weights_path)
            codes, removed = tensors["codes"], tensors["removed"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{weights_path} is damaged ({error!r}). Save the catalogue again.") from error
        if codes.shape != (len(item_ids), num_levels):
            raise ValueError(
                f"{config_path} describes {len(item_ids)} items with num_levels={num_levels}, but {weights_path} has "
                f"codes of shape {tuple(codes.shape)}. Save the catalogue again."
            )
        # 3. Both together.
        try:
            catalog = cls(codes, item_ids, allow_collisions, removed, titles)
        except ValueError as error:
            raise ValueError(
                f"{config_path} and {weights_path} do not fit: {error} Save the catalogue again."
            ) from error
        if digest is None:
            logger.warning_once(f"{config_path} has no sha256, so damage is not found. Save the catalogue again.")
        elif digest != catalog.content_hash():
            raise ValueError(
                f"{config_path} or {weights_path} changed after it was saved: codes, ids or titles do not have the "
                "sha256 of the catalogue. Save the catalogue again."
            )
        return catalog


def _file_state(path: str) -> tuple:
    """What changes when a file is written again."""
    state = os.stat(path)
    return os.path.realpath(path), state.st_ino, state.st_size, state.st_mtime_ns


def _check_text(name: str, texts: list[str]) -> None:
    """Refuse half of a surrogate pair, which no file can contain."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        text = next(text for text in texts if any("\ud800" <= letter <= "\udfff" for letter in text))
        raise ValueError(f"{name} has {text!r}, which UTF-8 cannot write. Replace the half surrogate pair.") from error


def _checked_titles(titles: Sequence[str | None] | None, num_items: int) -> list[str | None] | None:
    """Titles `(I,)` as a list; empty ones become `None`."""
    if titles is None:
        return None
    if len(titles) != num_items:
        raise ValueError(f"titles has {len(titles)} entries; expected one for each of the {num_items} items.")
    for index, title in enumerate(titles):
        if title is not None and not isinstance(title, str):
            raise ValueError(f"titles has {title!r} for the item with index {index}; expected a string or None.")
    _check_text("titles", [title or "" for title in titles])
    return [title or None for title in titles]


def _checked_codes(codes, item_ids: list[str]) -> torch.Tensor:
    """Codes `(I, M)` as int32 on the CPU, one Semantic ID per item id; the ids are unique."""
    codes = torch.as_tensor(codes).cpu()
    if codes.dtype in (torch.bool, torch.uint64) or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes are {codes.dtype}; expected integers below 2**31.")
    codes = codes.long()  # PyTorch cannot compare all integer types
    _check_text("item_ids", item_ids)
    if len(set(item_ids)) != len(item_ids):
        repeated = Counter(item_ids).most_common(1)[0][0]
        raise ValueError(f"item_ids has {repeated!r} twice; expected unique ids.")
    if codes.ndim != 2 or len(codes) != len(item_ids) or codes.numel() == 0:
        raise ValueError(
            f"codes has shape {tuple(codes.shape)}, but there are {len(item_ids)} item ids; expected (I, M) with at "
            "least one item."
        )
    if int(codes.max()) >= 2**31:
        raise ValueError(f"codes are up to {int(codes.max())}; expected integers below 2**31.")
    if (codes < 0).any():
        index = int((codes < 0).any(dim=1).nonzero()[0])
        raise ValueError(
            f"Item {item_ids[index]!r} (index {index}) has the codes {codes[index].tolist()}; expected 0 or more."
        )
    return codes.to(torch.int32, copy=True)  # later changes of the caller's array have no effect
