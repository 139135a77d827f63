"""The catalogue of Semantic IDs: its items, and what a request may get of them."""

import copy
import json
import os
from collections.abc import Sequence
from functools import cached_property

import torch
from safetensors.torch import load_file, save_file
from torch import nn

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
        self, codes, item_ids: Sequence[str], allow_collisions: bool = False, removed: torch.Tensor | None = None
    ):
        self.item_ids = [str(item_id) for item_id in item_ids]
        self.codes = _checked_codes(codes, self.item_ids)
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
    def row_of(self) -> dict[str, int]:
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

    def add(self, codes, item_ids: Sequence[str]) -> "SidCatalog":
        """
        A catalogue with more items. Rows keep their numbers; an item that was removed returns to its old row.

        The index is not built again: only the new items are sorted.

        Args:
            codes (`torch.Tensor` or array of shape `(A, M)`):
                Semantic IDs of the items to add.
            item_ids (`list[str]` of length `A`):
                Their public ids.

        Returns:
            [`SidCatalog`]: the new catalogue; this one stays as it is.

        Raises:
            `ValueError`: as the constructor, and if the catalogue holds an item already or has another number of
            levels.
        """
        item_ids = [str(item_id) for item_id in item_ids]
        codes = _checked_codes(codes, item_ids)
        if codes.shape[1] != self.num_levels:
            raise ValueError(f"The catalogue has {self.num_levels} levels but the new codes have {codes.shape[1]}.")
        rows = [self.row_of.get(item_id, -1) for item_id in item_ids]
        for item_id, row in zip(item_ids, rows, strict=True):
            if row >= 0 and not self.removed[row]:
                raise ValueError(f"The catalogue holds the item {item_id!r} already: remove it to change its codes.")
        new_ids = [item_id for item_id, row in zip(item_ids, rows, strict=True) if row < 0]
        row_of = {**self.row_of, **dict(zip(new_ids, range(len(self), len(self) + len(new_ids)), strict=True))}
        rows = torch.tensor([row_of[item_id] for item_id in item_ids])
        all_codes = torch.cat([self.codes, self.codes.new_empty(len(new_ids), self.num_levels)])
        removed = torch.cat([self.removed, self.removed.new_empty(len(new_ids))])
        all_codes[rows], removed[rows] = codes, False
        trie = self._trie.including(codes, rows, len(all_codes))
        return self._changed(trie, removed, codes=all_codes, item_ids=self.item_ids + new_ids, row_of=row_of)

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
            rows.append(self.row_of.get(item_id, -1))
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
        changed.num_items = len(trie.item_rows)
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
        config = {"num_levels": self.num_levels, "allow_collisions": self.allow_collisions, "item_ids": self.item_ids}
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
        return cls(tensors["codes"], config["item_ids"], config["allow_collisions"], tensors.get("removed"))


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


def _as_rows(items, device: torch.device) -> torch.Tensor | None:
    """Row numbers as a tensor; `None` for what is none: a mask, fractions, names."""
    try:
        rows = torch.as_tensor(items, device=device)
    except (TypeError, ValueError, RuntimeError):
        return None
    if rows.numel() and (rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex()):
        return None
    return rows.long()


class ItemFilter:
    """
    Which items each row of a batch may get: its allow list, if it has one, less its deny list.

    Lists become places of the trie. A node stands for one run of places, so two binary searches tell how many listed
    items lie under it, and a prefix without any item left is pruned before it takes a beam.

    Args:
        trie ([`SidTrie`]):
            Trie of the catalogue.
        batch_size (`int`):
            Rows of the batch, `B`.
        allow (`list[torch.Tensor | None]` of length `B`, *optional*):
            Item rows that a row may get, `None` for all.
        deny (`list[torch.Tensor | None]` of length `B`, *optional*):
            Item rows that a row may not get.
        allow_empty (`bool`, *optional*, defaults to `False`):
            Whether a row may be left without any item.

    Raises:
        `ValueError`: if there are not `B` lists, a list names a row that the catalogue has not, or a row may get no
        item at all and `allow_empty` is not set.
    """

    def __init__(
        self,
        trie: SidTrie,
        batch_size: int,
        allow: Sequence[torch.Tensor | None] | None = None,
        deny: Sequence[torch.Tensor | None] | None = None,
        allow_empty: bool = False,
    ):
        self._trie = trie
        num_items, device = len(trie.item_rows), trie.item_rows.device
        allow = self._places("allow", allow, batch_size)
        deny = self._places("deny", deny, batch_size)
        listed = []
        for allowed, denied in zip(allow, deny, strict=True):
            if allowed is None:
                listed.append(trie.item_places[:0] if denied is None else denied)
            else:
                listed.append(allowed if denied is None else allowed[~torch.isin(allowed, denied)])
        self.is_allow = torch.tensor([allowed is not None for allowed in allow], device=device)
        # (B, D): ascending, padded beyond the last place; for deny lists what is listed is excluded.
        self.listed = nn.utils.rnn.pad_sequence(listed, batch_first=True, padding_value=num_items)
        counts = (self.listed < num_items).sum(dim=1)
        empty = torch.where(self.is_allow, counts == 0, counts == num_items)
        if not allow_empty and empty.any():
            raise ValueError(
                f"Row {int(empty.nonzero()[0])} may get no item at all by its allow and deny lists: pass "
                "allow_empty=True to get an empty result for such rows."
            )

    def _places(self, name: str, lists, batch_size: int) -> list[torch.Tensor | None]:
        """Ascending places of each row's list, without repeats and without items that the trie does not hold."""
        if lists is None:
            return [None] * batch_size
        if len(lists) != batch_size:
            raise ValueError(f"{name} has {len(lists)} lists for {batch_size} rows: pass a list or None for each row.")
        num_rows, places = len(self._trie.item_places), []
        for row, items in enumerate(lists):
            if items is None:
                places.append(None)
                continue
            items = _as_rows(items, self._trie.item_places.device)
            if items is None or items.ndim != 1 or ((items < 0) | (items >= num_rows)).any():
                raise ValueError(
                    f"The {name} list of row {row} must be one-dimensional and hold row numbers of the catalogue, "
                    f"0 … {num_rows - 1}."
                )
            found = self._trie.item_places[items].unique()
            places.append(found[found < len(self._trie.item_rows)])
        return places

    def excludes_nodes(self, level: int, child: torch.Tensor) -> torch.Tensor:
        """
        Children under which a row may get no item.

        Args:
            level (`int`):
                Depth of the children's parents.
            child (`torch.Tensor` of shape `(B, W, F)`):
                Children as [`SidTrie.children`] gives them.

        Returns:
            `torch.Tensor` of shape `(B, W, F)`, boolean; of no meaning where there is no child.
        """
        edges = child[..., :1] + torch.arange(child.shape[-1] + 1, device=child.device)
        edges = edges.clamp(max=self._trie.num_nodes[level + 1])
        first = self._trie.first_place(level + 1, edges)
        listed = torch.searchsorted(self.listed, first.flatten(1), out_int32=True).view_as(first).diff(dim=-1)
        return torch.where(self.is_allow[:, None, None], listed == 0, listed == first.diff(dim=-1))

    def excludes_items(self, items: torch.Tensor) -> torch.Tensor:
        """
        Items that a row may not get.

        Args:
            items (`torch.Tensor` of shape `(B, n)`):
                Item rows, -1 where there is none.

        Returns:
            `torch.Tensor` of shape `(B, n)`, boolean.
        """
        place = self._trie.item_places[items]
        padded = nn.functional.pad(self.listed, (0, 1), value=len(self._trie.item_rows))
        found = padded.gather(1, torch.searchsorted(self.listed, place))
        return (found == place) != self.is_allow[:, None]
