"""The catalogue of Semantic IDs: its items, and what a request may get of them."""

import copy
import json
import os
from collections.abc import Sequence
from functools import cached_property

import torch
from safetensors.torch import load_file, save_file

from .trie_lasar import SidTrie


CATALOG_WEIGHTS_NAME = "sid_catalog.safetensors"
CATALOG_CONFIG_NAME = "sid_catalog.json"


class SidCatalog:
    """
    The items that can be recommended, each with its Semantic ID.

    A row number stands for its item for ever: `add` appends rows, `remove` only hides some. A hidden row is never
    returned and the probabilities are those of a catalogue that never had the item; its codes stay readable, since
    histories may hold it.

    Args:
        codes (`torch.Tensor` or array of shape `(I, M)`):
            Semantic ID of each item, non-negative integers.
        item_ids (`list[str]`):
            Public id of each item; the row number is what the model returns.
        allow_collisions (`bool`, *optional*, defaults to `False`):
            Whether several items may share a Semantic ID. Each then gets its own row in a result, with the same score,
            the lower row number first.
        removed (`torch.Tensor` of shape `(I,)`, *optional*):
            Boolean mask of the rows that are hidden, none if not given.
        titles (`list[str | None]` of length `I`, *optional*):
            Title of each item, `None` where there is none.

    Attributes:
        codes (`torch.Tensor` of shape `(I, M)`):
            Semantic IDs, int32, hidden rows included.

    Raises:
        `ValueError`: if the shapes disagree, a code is negative or no integer, an item id repeats, two items share a
        Semantic ID, or every row is hidden.

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
                f"removed hides {int(self.removed.sum())} of {len(self.removed)} rows, the catalogue has "
                f"{len(self.codes)}: one flag a row, and at least one item must stay."
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
                f"{self.codes[first].tolist()}: resolve the collision, or pass allow_collisions=True."
            )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        """Codes of one Semantic ID, `M`."""
        return self.codes.shape[1]

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Row number of each item id, hidden rows included."""
        return dict(zip(self.item_ids, range(len(self)), strict=True))

    def trie(self, device: torch.device | str) -> SidTrie:
        """
        The catalogue's trie on a device, copied there once.

        Args:
            device (`torch.device` or `str`):
                Where the model lives.

        Returns:
            [`SidTrie`]: the trie.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self._trie
        if device not in self._copies:
            self._copies[device] = self._trie.to(device)
        return self._copies[device]

    def add(
        self, codes, item_ids: Sequence[str], titles: Sequence[str | None] | None = None
    ) -> "SidCatalog":
        """
        A catalogue with more items. Rows keep their numbers; an item that was removed returns to its old row.

        The index is not built again: only the new items are sorted.

        Args:
            codes (`torch.Tensor` or array of shape `(A, M)`):
                Semantic IDs of the items to add.
            item_ids (`list[str]` of length `A`):
                Their public ids.
            titles (`list[str | None]` of length `A`, *optional*):
                Their titles.

        Returns:
            [`SidCatalog`]: the new catalogue; this one stays as it is.

        Raises:
            `ValueError`: as the constructor, and if the catalogue holds an item already or has another number of
            levels.
        """
        item_ids = [str(item_id) for item_id in item_ids]
        codes, titles = _checked_codes(codes, item_ids), _checked_titles(titles, len(item_ids))
        if codes.shape[1] != self.num_levels:
            raise ValueError(f"The catalogue has {self.num_levels} levels but the new codes have {codes.shape[1]}.")
        rows = [self.index_of.get(item_id, -1) for item_id in item_ids]
        for item_id, row in zip(item_ids, rows, strict=True):
            if row >= 0 and not self.removed[row]:
                raise ValueError(f"The catalogue holds the item {item_id!r} already: remove it to change its codes.")
        new_ids = [item_id for item_id, row in zip(item_ids, rows, strict=True) if row < 0]
        index_of = {**self.index_of, **dict(zip(new_ids, range(len(self), len(self) + len(new_ids)), strict=True))}
        rows = torch.tensor([index_of[item_id] for item_id in item_ids])
        all_codes = torch.cat([self.codes, self.codes.new_empty(len(new_ids), self.num_levels)])
        removed = torch.cat([self.removed, self.removed.new_empty(len(new_ids))])
        all_codes[rows], removed[rows] = codes, False
        trie = self._trie.including(codes, rows, len(all_codes))
        all_titles = self.titles
        if titles is not None or all_titles is not None:
            all_titles = [*(self.titles or [None] * len(self)), *[None] * len(new_ids)]
            for row, title in zip(rows.tolist(), titles or [None] * len(item_ids), strict=True):
                all_titles[row] = title
        return self._changed(
            trie, removed, codes=all_codes, item_ids=self.item_ids + new_ids, index_of=index_of, titles=all_titles
        )

    def remove(self, item_ids: Sequence[str]) -> "SidCatalog":
        """
        A catalogue in which some rows are hidden. All rows keep their numbers, and the index is not built again.

        Args:
            item_ids (`list[str]`):
                Public ids of the items to hide.

        Returns:
            [`SidCatalog`]: the new catalogue; this one stays as it is.

        Raises:
            `ValueError`: if the catalogue does not hold an item, or none would be left.
        """
        removed, rows = self.removed.clone(), []
        for item_id in map(str, item_ids):
            rows.append(self.index_of.get(item_id, -1))
            if rows[-1] < 0 or removed[rows[-1]]:
                raise ValueError(f"The catalogue holds no item {item_id!r} that could be removed.")
            removed[rows[-1]] = True
        if removed.all():
            raise ValueError("All items would be removed: at least one item must stay.")
        return self._changed(self._trie.without(torch.tensor(rows, dtype=torch.long)), removed)

    def _changed(self, trie: SidTrie, removed: torch.Tensor, **parts) -> "SidCatalog":
        """This catalogue with another trie and what else is new; the rest is shared, not checked again."""
        changed = copy.copy(self)
        vars(changed).update(parts, _trie=trie, _copies={}, removed=removed)
        changed.num_items = len(trie.item_indices)
        changed._max_code = int(changed.codes.max())
        changed._check_collisions()
        return changed

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
                f"The catalogue has {self.num_levels} levels but the model has {num_sid_levels}: build the Semantic "
                "IDs with the model's number of levels."
            )
        if self._max_code >= codebook_size:
            row = int((self.codes >= codebook_size).any(dim=1).nonzero()[0])
            raise ValueError(
                f"Item {self.item_ids[row]!r} (row {row}) has the codes {self.codes[row].tolist()}, but the model's "
                f"codebooks have {codebook_size} entries."
            )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Write `sid_catalog.safetensors` and `sid_catalog.json`, beside a checkpoint for instance.

        The JSON file goes first and comes last: where it lies, the codes beside it are its own.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, created if missing.
        """
        os.makedirs(save_directory, exist_ok=True)
        config = {
            "num_levels": self.num_levels, "allow_collisions": self.allow_collisions, "item_ids": self.item_ids,
            "titles": self.titles,
        }
        weights_path = os.path.join(save_directory, CATALOG_WEIGHTS_NAME)
        config_path = os.path.join(save_directory, CATALOG_CONFIG_NAME)
        save_file({"codes": self.codes, "removed": self.removed}, weights_path + ".tmp")
        with open(config_path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(config, file, ensure_ascii=False)
        if os.path.exists(config_path):
            os.remove(config_path)
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
        tensors = load_file(os.path.join(pretrained_directory, CATALOG_WEIGHTS_NAME))
        return cls(
            tensors["codes"], config["item_ids"], config["allow_collisions"], tensors.get("removed"),
            config.get("titles"),
        )


def _checked_titles(titles: Sequence[str | None] | None, num_items: int) -> list[str | None] | None:
    if titles is None:
        return None
    if len(titles) != num_items:
        raise ValueError(f"titles has {len(titles)} entries for {num_items} items.")
    return [title or None for title in titles]


def _checked_codes(codes, item_ids: list[str]) -> torch.Tensor:
    """Codes `(I, M)` as int32 on the CPU, one row for each item id; the ids are unique."""
    codes = torch.as_tensor(codes).cpu()
    if len(set(item_ids)) != len(item_ids):
        seen = set()
        repeated = next(item_id for item_id in item_ids if item_id in seen or seen.add(item_id))
        raise ValueError(f"The item id {repeated!r} appears twice: item ids must be unique.")
    if codes.ndim != 2 or len(codes) != len(item_ids) or codes.numel() == 0:
        raise ValueError(
            f"codes has shape {tuple(codes.shape)} but there are {len(item_ids)} item ids: pass one row of codes "
            "for each of at least one item."
        )
    if codes.is_floating_point() or int(codes.max()) >= 2**31:
        raise ValueError(f"codes are {codes.dtype} up to {codes.max()}: Semantic IDs are integers below 2**31.")
    if (codes < 0).any():
        row = int((codes < 0).any(dim=1).nonzero()[0])
        raise ValueError(f"Item {item_ids[row]!r} (row {row}) has a negative code: {codes[row].tolist()}.")
    return codes.to(torch.int32, copy=True)  # the caller's array may change
