"""The trie of a catalogue's Semantic IDs as flat tensors.

It is held as compressed rows with the children in code order, so that a step of the constraint is a gather, never a
Python loop. Items come and go by moving what stands behind them: only the constructor sorts. Small catalogues have no
other form: a dense table of children is larger and slower, as its steps normalise over all codes, and not over as many
as the widest node has.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn


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


def _code_type(codes: torch.Tensor) -> torch.dtype:
    """The smallest type that holds the codes."""
    return torch.int16 if int(codes.max()) < 2**15 else torch.int32


def _delete(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`values` `(n,)` without those at `places`."""
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[places] = False
    return values[keep]


def _insert(values: torch.Tensor, places: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`values` `(n,)` with each of `new` `(a,)` in front of what stood at its place; `places` ascend."""
    joined = torch.cat([values, new])
    target = places + torch.arange(len(places), device=places.device)
    is_old = torch.ones_like(joined, dtype=torch.bool)
    is_old[target] = False
    joined[is_old], joined[target] = values.to(joined.dtype), new.to(joined.dtype)
    return joined


def _lower_bound(values: torch.Tensor, first: torch.Tensor, end: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each ascending run `first … end` `(a,)` of `values`, the place of its first that is not below `wanted`."""
    for _ in range(int((end - first).max()).bit_length()):
        middle = (first + end) // 2
        is_below = (first < end) & (values[middle.clamp(max=len(values) - 1)] < wanted)
        first, end = torch.where(is_below, middle + 1, first), torch.where(is_below, end, middle)
    return first


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

        labels, pointers = [], []
        code_type = _code_type(codes)
        first = places[:1]  # first place of each node, here of the root
        is_first = places == 0
        for level in range(self.num_levels):
            is_first[1:] |= ordered[1:, level] != ordered[:-1, level]
            child_first = places[is_first]
            labels.append(ordered[child_first, level].to(code_type))
            pointers.append(self._pointers(first, child_first))
            first = child_first
        pointers.append(torch.cat([first, first.new_tensor([num_items])]))
        self._hold([*labels, order.to(torch.int32)], pointers, len(codes))

    def _hold(self, labels: list[torch.Tensor], pointers: list[torch.Tensor], num_rows: int) -> "SidTrie":
        """Take over what the children of each depth are called, items by their rows, and where each node's begin."""
        *self.child_code, self.item_indices = labels
        *self.child_ptr, self.leaf_ptr = pointers
        num_items, device = len(self.item_indices), self.item_indices.device
        # Place of each row's item, `I'` of a row that is not held.
        self.item_positions = torch.full((num_rows,), num_items, dtype=torch.int32, device=device)
        self.item_positions[self.item_indices.long()] = torch.arange(num_items, dtype=torch.int32, device=device)
        self.num_nodes = [1] + [len(code) for code in self.child_code]
        # Widest fan-out a level, and most items that share one Semantic ID: the shapes of every later gather.
        self.fan_out = [int((pointer[1:] - pointer[:-1]).max()) for pointer in pointers]
        return self

    @staticmethod
    def _pointers(first: torch.Tensor, child_first: torch.Tensor) -> torch.Tensor:
        starts = torch.searchsorted(child_first, first, out_int32=True)
        return torch.cat([starts, starts.new_tensor([len(child_first)])])

    def without(self, rows: torch.Tensor) -> "SidTrie":
        """
        The trie without some items: nothing is sorted again, what stays moves up.

        Args:
            rows (`torch.Tensor` of shape `(A,)`):
                Rows of the items, which the trie holds; at least one other must stay.

        Returns:
            [`SidTrie`]: the new trie; this one stays as it is.
        """
        labels, pointers = [], []
        # Items, then the leaves that lose their last item, then their parents.
        gone = self.item_positions[rows].sort().values
        for label, pointer in zip(
            [self.item_indices, *self.child_code[::-1]], [self.leaf_ptr, *self.child_ptr[::-1]], strict=True
        ):
            labels.insert(0, _delete(label, gone))
            pointer = pointer - torch.searchsorted(gone, pointer, out_int32=True)
            gone = (pointer[1:] == pointer[:-1]).nonzero()[:, 0].int()
            pointers.insert(0, _delete(pointer, gone))
        return copy.copy(self)._hold(labels, pointers, len(self.item_positions))

    def including(self, codes: torch.Tensor, rows: torch.Tensor, num_rows: int) -> "SidTrie":
        """
        The trie with more items: only they are sorted, what is there moves down.

        Args:
            codes (`torch.Tensor` of shape `(A, M)`):
                Codes of the items.
            rows (`torch.Tensor` of shape `(A,)`):
                Their row numbers, none of which the trie holds.
            num_rows (`int`):
                Rows of the catalogue afterwards.

        Returns:
            [`SidTrie`]: the new trie; this one stays as it is.
        """
        order = rows.argsort()
        order = order[_lexicographic_order(codes[order], torch.arange(len(rows), device=rows.device))]
        paths = [*codes[order].to(_code_type(codes)).unbind(dim=1), rows[order].to(torch.int32)]
        labels, pointers = [], []
        # Each new item's prefix: is it here, its number (or that of the node it goes in front of), its number there.
        is_known = torch.ones_like(order, dtype=torch.bool)
        here = there = torch.zeros_like(order)
        begins = there == torch.arange(len(order), device=order.device)  # first of the new items with that prefix
        inserted = here[:0]
        for label, pointer, wanted in zip(
            [*self.child_code, self.item_indices], [*self.child_ptr, self.leaf_ptr], paths, strict=True
        ):
            counts = _insert(pointer.diff(), inserted, torch.zeros_like(inserted))
            end = pointer[here + is_known].long()
            here = _lower_bound(label, pointer[here].long(), end, wanted)
            is_known = (here < end) & (label[here.clamp(max=len(label) - 1)] == wanted)
            begins[1:] |= wanted[1:] != wanted[:-1]
            is_new = begins & ~is_known
            inserted = here[is_new]
            counts.index_add_(0, there[is_new], torch.ones_like(inserted))
            pointers.append(nn.functional.pad(counts.cumsum(dim=0), (1, 0)).to(torch.int32))
            labels.append(_insert(label, inserted, wanted[is_new]))
            there = here + is_new.cumsum(dim=0) - (~is_known).long()
        return copy.copy(self)._hold(labels, pointers, num_rows)

    @property
    def num_bytes(self) -> int:
        """Memory of the trie's tensors, in bytes."""
        tensors = [self.item_indices, self.item_positions, self.leaf_ptr, *self.child_code, *self.child_ptr]
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
        moved.item_indices, moved.item_positions = self.item_indices.to(device), self.item_positions.to(device)
        moved.leaf_ptr = self.leaf_ptr.to(device)
        moved.child_code = [tensor.to(device) for tensor in self.child_code]
        moved.child_ptr = [tensor.to(device) for tensor in self.child_ptr]
        return moved

    def first_position(self, level: int, nodes: torch.Tensor) -> torch.Tensor:
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
        return torch.where(exists, self.item_indices[torch.where(exists, place, 0)].long(), -1)


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
        num_items, device = len(trie.item_indices), trie.item_indices.device
        allow = self._places("allow", allow, batch_size)
        deny = self._places("deny", deny, batch_size)
        listed = []
        for allowed, denied in zip(allow, deny, strict=True):
            if allowed is None:
                listed.append(trie.item_positions[:0] if denied is None else denied)
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
        num_rows, places = len(self._trie.item_positions), []
        for row, items in enumerate(lists):
            if items is None:
                places.append(None)
                continue
            items = _as_rows(items, self._trie.item_positions.device)
            if items is None or items.ndim != 1 or ((items < 0) | (items >= num_rows)).any():
                raise ValueError(
                    f"The {name} list of row {row} must be one-dimensional and hold row numbers of the catalogue, "
                    f"0 … {num_rows - 1}."
                )
            found = self._trie.item_positions[items].unique()
            places.append(found[found < len(self._trie.item_indices)])
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
        first = self._trie.first_position(level + 1, edges)
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
        place = self._trie.item_positions[items]
        padded = nn.functional.pad(self.listed, (0, 1), value=len(self._trie.item_indices))
        found = padded.gather(1, torch.searchsorted(self.listed, place))
        return (found == place) != self.is_allow[:, None]
