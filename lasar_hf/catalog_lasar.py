"""The catalogue of Semantic IDs: its items, its trie as flat tensors, and what a request may get.

The trie is held as compressed rows with the children in code order, so that a step of the constraint is a gather,
never a Python loop.
"""

import copy
import json
import os
from collections.abc import Sequence
from functools import cached_property

import torch
from safetensors.torch import load_file, save_file
from torch import nn


CATALOG_WEIGHTS_NAME = "sid_catalog.safetensors"
CATALOG_CONFIG_NAME = "sid_catalog.json"


def _lexicographic_order(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows` `(n,)` in the order of their codes, level after level, equal codes by row number."""
    num_levels = codes.shape[1]
    bits = max(int(codes.max()).bit_length(), 1)
    if bits * num_levels <= 63:  # one integer holds the whole Semantic ID
        keys = torch.zeros(len(rows), dtype=torch.long, device=codes.device)
        for level in range(num_levels):
            keys = (keys << bits) | codes[rows, level]
        return rows[torch.sort(keys, stable=True).indices]
    for level in reversed(range(num_levels)):  # least significant level first
        rows = rows[torch.sort(codes[rows, level], stable=True).indices]
    return rows


class SidTrie:
    """
    Trie of a catalogue's Semantic IDs as flat tensors, about 20 bytes an item at 4 levels of 256 codes.

    Items stand in the order of their codes, each at its place `0 … I' - 1`. Node `n` of depth `l` (a prefix of `l`
    codes) owns the children `child_ptr[l][n] … child_ptr[l][n + 1]` of depth `l + 1`, in ascending order of code; a
    leaf owns a run of places in the same manner. So every node stands for one run of places.

    Args:
        codes (`torch.Tensor` of shape `(I, M)`):
            Codes of the items, on the device where the trie shall live.
        rows (`torch.Tensor` of shape `(I',)`, *optional*):
            Ascending row numbers of the items to hold, all of them if not given.
    """

    def __init__(self, codes: torch.Tensor, rows: torch.Tensor | None = None):
        self.num_levels = codes.shape[1]
        if rows is None:
            rows = torch.arange(len(codes), device=codes.device)
        order = _lexicographic_order(codes, rows)
        ordered, num_items = codes[order], len(order)
        places = torch.arange(num_items, dtype=torch.int32, device=codes.device)

        self.item_rows = order.to(torch.int32)  # row number of the item at each place
        self.item_places = torch.full((len(codes),), num_items, dtype=torch.int32, device=codes.device)
        self.item_places[order] = places  # place of each row's item, `I'` of a row that is not held
        self.child_code: list[torch.Tensor] = []
        self.child_ptr: list[torch.Tensor] = []
        code_type = torch.int16 if int(codes.max()) < 2**15 else torch.int32
        first = places[:1]  # first place of each node, here of the root
        is_first = places == 0
        for level in range(self.num_levels):
            is_first[1:] |= ordered[1:, level] != ordered[:-1, level]
            child_first = places[is_first]
            self.child_code.append(ordered[child_first, level].to(code_type))
            self.child_ptr.append(self._pointers(first, child_first))
            first = child_first
        self.leaf_ptr = torch.cat([first, first.new_tensor([num_items])])
        self.num_nodes = [1] + [len(code) for code in self.child_code]
        pointers = [*self.child_ptr, self.leaf_ptr]
        # Widest fan-out a level, and most items that share one Semantic ID: the shapes of every later gather.
        self.fan_out = [int((pointer[1:] - pointer[:-1]).max()) for pointer in pointers]

    @staticmethod
    def _pointers(first: torch.Tensor, child_first: torch.Tensor) -> torch.Tensor:
        starts = torch.searchsorted(child_first, first, out_int32=True)
        return torch.cat([starts, starts.new_tensor([len(child_first)])])

    @property
    def num_bytes(self) -> int:
        """Memory of the trie's tensors, in bytes."""
        tensors = [self.item_rows, self.item_places, self.leaf_ptr, *self.child_code, *self.child_ptr]
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device | str) -> "SidTrie":
        """
        The trie on another device.

        Args:
            device (`torch.device` or `str`):
                The device.

        Returns:
            [`SidTrie`]: a copy there.
        """
        moved = copy.copy(self)
        moved.item_rows, moved.item_places = self.item_rows.to(device), self.item_places.to(device)
        moved.leaf_ptr = self.leaf_ptr.to(device)
        moved.child_code = [tensor.to(device) for tensor in self.child_code]
        moved.child_ptr = [tensor.to(device) for tensor in self.child_ptr]
        return moved

    def first_place(self, level: int, nodes: torch.Tensor) -> torch.Tensor:
        """
        Where the run of places of each node begins.

        Args:
            level (`int`):
                Depth of the nodes.
            nodes (`torch.Tensor` of shape `(...)`):
                Node numbers; the number of nodes gives the end of the last run.

        Returns:
            `torch.Tensor` of shape `(...)`, int32: places; the run of node `n` ends where that of `n + 1` begins.
        """
        for pointer in self.child_ptr[level:]:
            nodes = pointer[nodes].long()
        return self.leaf_ptr[nodes]

    def children(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Children of nodes.

        Args:
            level (`int`):
                Depth `l` of the nodes, `0` for the root.
            nodes (`torch.Tensor` of shape `(...)`):
                Node numbers.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(..., F)`, `F` the widest fan-out of that depth: the children's
            codes (0 where there is none) and their node numbers (-1 where there is none).
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
            `torch.Tensor` of shape `(n,)`: node numbers of depth `level + 1`, -1 where the catalogue has no such
            prefix.
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
        self.removed = torch.zeros(len(self.codes), dtype=torch.bool) if removed is None else removed.bool().cpu()
        if self.removed.shape != self.codes.shape[:1] or self.removed.all():
            raise ValueError(
                f"removed hides {int(self.removed.sum())} of {len(self.removed)} rows, the catalogue has "
                f"{len(self.codes)}: one flag a row, and at least one item must stay."
            )
        self.num_items = len(self.codes) - int(self.removed.sum())
        self._max_code = int(self.codes.max())
        self._trie = SidTrie(self.codes, (~self.removed).nonzero()[:, 0])
        if self._trie.fan_out[-1] > 1 and not allow_collisions:
            leaf = int((self._trie.leaf_ptr.diff() > 1).nonzero()[0])
            first, second = self._trie.items(torch.tensor(leaf))[:2].tolist()
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
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    def trie(self, device: torch.device | str) -> SidTrie:
        """
        The catalogue's trie on a device, copied there once.

        Args:
            device (`torch.device` or `str`):
                Where the model lives.

        Returns:
            [`SidTrie`]: the trie.
        """
        if self._trie.item_rows.device != torch.device(device):
            self._trie = self._trie.to(device)
        return self._trie

    def add(self, codes, item_ids: Sequence[str]) -> "SidCatalog":
        """
        A catalogue with more items. Rows keep their numbers; an item that was removed returns to its old row.

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
        rows = torch.tensor(rows)
        is_new = rows < 0
        all_codes = torch.cat([self.codes, codes[is_new]])
        removed = torch.cat([self.removed, self.removed.new_zeros(int(is_new.sum()))])
        all_codes[rows[~is_new]] = codes[~is_new]
        removed[rows[~is_new]] = False
        new_ids = [item_id for item_id, new in zip(item_ids, is_new.tolist(), strict=True) if new]
        return SidCatalog(all_codes, self.item_ids + new_ids, self.allow_collisions, removed)

    def remove(self, item_ids: Sequence[str]) -> "SidCatalog":
        """
        A catalogue in which some rows are hidden. All rows keep their numbers.

        Args:
            item_ids (`list[str]`):
                Public ids of the items to hide.

        Returns:
            [`SidCatalog`]: the new catalogue; this one stays as it is.

        Raises:
            `ValueError`: if the catalogue does not hold an item, or none would be left.
        """
        removed = self.removed.clone()
        for item_id in map(str, item_ids):
            row = self.row_of.get(item_id, -1)
            if row < 0 or removed[row]:
                raise ValueError(f"The catalogue holds no item {item_id!r} that could be removed.")
            removed[row] = True
        return SidCatalog(self.codes, self.item_ids, self.allow_collisions, removed)

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
    return codes.to(torch.int32)


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
            items = torch.as_tensor(items, dtype=torch.long, device=self._trie.item_places.device)
            if items.ndim != 1 or ((items < 0) | (items >= num_rows)).any():
                raise ValueError(
                    f"The {name} list of row {row} must be one-dimensional and hold item rows of the catalogue, "
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
