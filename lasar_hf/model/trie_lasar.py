"""The trie of a catalogue's Semantic IDs as flat tensors, and filters of its items.

The trie is stored as compressed sparse rows (CSR) with children in code order, so a step of the constraint is a gather
and never a Python loop. Only the constructor sorts all items; changes insert into the tensors or delete from them.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn


def _lexicographic_order(codes: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`indices` `(n,)` sorted by their codes, level by level; equal codes keep the given order."""
    num_levels = codes.shape[1]
    bits = max(int(codes.max()).bit_length(), 1)
    if bits * num_levels <= 63:  # one integer holds a whole Semantic ID
        keys = torch.zeros(len(indices), dtype=torch.long, device=codes.device)
        for level in range(num_levels):
            keys = (keys << bits) | codes[indices, level]
        return indices[torch.sort(keys, stable=True).indices]
    for level in reversed(range(num_levels)):  # least significant level first
        indices = indices[torch.sort(codes[indices, level], stable=True).indices]
    return indices


def _code_type(codes: torch.Tensor) -> torch.dtype:
    return torch.int16 if int(codes.max()) < 2**15 else torch.int32


def _delete(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`values` `(n,)` without those at `positions`."""
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[positions] = False
    return values[keep]


def _insert(values: torch.Tensor, positions: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`values` `(n,)` with `new` `(a,)` inserted before the old values at the ascending `positions` `(a,)`."""
    joined = torch.cat([values, new])
    target = positions + torch.arange(len(positions), device=positions.device)
    is_old = torch.ones_like(joined, dtype=torch.bool)
    is_old[target] = False
    joined[is_old], joined[target] = values.to(joined.dtype), new.to(joined.dtype)
    return joined


def _lower_bound(
    values: torch.Tensor, first: torch.Tensor, end: torch.Tensor, target: torch.Tensor, max_length: int
) -> torch.Tensor:
    """
    First index `(...)` in each ascending run `values[first:end]`, of at most `max_length`, whose value is not below
    `target`, else `end`.
    """
    for _ in range(max_length.bit_length()):
        middle = (first + end) // 2
        is_below = (first < end) & (values[middle.clamp(max=len(values) - 1)] < target)
        first, end = torch.where(is_below, middle + 1, first), torch.where(is_below, end, middle)
    return first


class SidTrie:
    """
    Trie of a catalogue's Semantic IDs as flat tensors, about 20 bytes per item at 4 levels of 256 codes.

    The trie contains `I'` of the `I` items with `codes` `(I, M)`: those with the ascending `item_indices` `(I',)`, by
    default all. They are sorted by their codes, and the rank of an item in that order is its position.

    A node of depth `l` is a prefix of `l` codes, and all items below it form one run of positions. Node `n` of depth
    `l` has the children `child_ptr[l][n] … child_ptr[l][n + 1]` of depth `l + 1`, in ascending order of code. Leaf `n`
    has the items at the positions `leaf_ptr[n] … leaf_ptr[n + 1]`.
    """

    def __init__(self, codes: torch.Tensor, item_indices: torch.Tensor | None = None):
        self.num_levels = codes.shape[1]
        if item_indices is None:
            item_indices = torch.arange(len(codes), device=codes.device)
        order = _lexicographic_order(codes, item_indices)  # (I',)
        sorted_codes, num_items = codes[order], len(order)
        positions = torch.arange(num_items, dtype=torch.int32, device=codes.device)

        labels: list[torch.Tensor] = []
        pointers: list[torch.Tensor] = []
        code_type = _code_type(codes)
        first = positions[:1]  # first position of each node of the depth, here of the root
        is_first = positions == 0
        for level in range(self.num_levels):
            # A node of the next depth begins where the prefix changes.
            is_first[1:] |= sorted_codes[1:, level] != sorted_codes[:-1, level]
            child_first = positions[is_first]
            labels.append(sorted_codes[child_first, level].to(code_type))
            # The first child of a node is the first one that begins at or after it.
            starts = torch.searchsorted(child_first, first, out_int32=True)
            pointers.append(torch.cat([starts, starts.new_tensor([len(child_first)])]))
            first = child_first
        pointers.append(torch.cat([first, first.new_tensor([num_items])]))
        self._set([*labels, order.to(torch.int32)], pointers, len(codes))

    def _set(self, labels: list[torch.Tensor], pointers: list[torch.Tensor], catalog_size: int) -> "SidTrie":
        """Set the tensors, from the top of the trie to the items, and the sizes that follow from them."""
        # Codes of the nodes of depth 1 … M, and the item index at each position, (I',).
        *self.child_code, self.item_indices = labels
        # First child of each node of depth 0 … M - 1, and first position of each leaf.
        *self.child_ptr, self.leaf_ptr = pointers
        # Position of each item, (I,), and I' for items that are not in the trie.
        num_items, device = len(self.item_indices), self.item_indices.device
        self.item_positions = torch.full((catalog_size,), num_items, dtype=torch.int32, device=device)
        self.item_positions[self.item_indices.long()] = torch.arange(num_items, dtype=torch.int32, device=device)
        # Number of nodes of depth 0 … M, and the most children of a node of that depth (items of a leaf).
        self.num_nodes = [1] + [len(code) for code in self.child_code]
        self.fan_out = [int(pointer.diff().max()) for pointer in pointers]
        return self

    def without(self, item_indices: torch.Tensor) -> "SidTrie":
        """A new trie without the items `item_indices` `(A,)`, by deletion. At least one other item must remain."""
        labels: list[torch.Tensor] = []
        pointers: list[torch.Tensor] = []
        # From the bottom up: the items, then the leaves that lose their last item, then their parents.
        removed = self.item_positions[item_indices].sort().values
        for label, pointer in zip(
            [self.item_indices, *self.child_code[::-1]], [self.leaf_ptr, *self.child_ptr[::-1]], strict=True
        ):
            labels.insert(0, _delete(label, removed))
            # Each pointer decreases by the number of removed entries before it.
            pointer = pointer - torch.searchsorted(removed, pointer, out_int32=True)
            removed = (pointer[1:] == pointer[:-1]).nonzero()[:, 0].int()  # nodes without children
            pointers.insert(0, _delete(pointer, removed))
        return copy.copy(self)._set(labels, pointers, len(self.item_positions))

    def including(self, codes: torch.Tensor, item_indices: torch.Tensor, catalog_size: int) -> "SidTrie":
        """
        A new trie that also contains items with `codes` `(A, M)` and `item_indices` `(A,)`, by insertion. The
        catalogue then has `catalog_size` items, hidden ones included.
        """
        # 1. Sort the new items by codes, then by index. The path of an item is its M codes and its index.
        order = item_indices.argsort()
        order = order[_lexicographic_order(codes[order], torch.arange(len(order), device=order.device))]  # (A,)
        paths = [*codes[order].to(_code_type(codes)).unbind(dim=1), item_indices[order].to(torch.int32)]

        # 2. Walk down with all new items at once. For the prefix of each new item, all `(A,)`:
        exists = torch.ones_like(order, dtype=torch.bool)  # is it in the old trie?
        old_node = torch.zeros_like(order)  # its node in the old trie, or the node to insert it before
        new_node = torch.zeros_like(order)  # its node in the new trie
        is_first = new_node == torch.arange(len(order), device=order.device)  # first new item with this prefix?
        inserted = old_node[:0]  # where nodes of this depth were inserted

        labels: list[torch.Tensor] = []
        pointers: list[torch.Tensor] = []
        for label, pointer, target in zip(
            [*self.child_code, self.item_indices], [*self.child_ptr, self.leaf_ptr], paths, strict=True
        ):
            # a. Children of each node of the new trie, so far only the old children.
            num_children = _insert(pointer.diff(), inserted, torch.zeros_like(inserted))
            # b. Search each target among the children of its old node. A node that does not exist has no children.
            end = pointer[old_node + exists].long()
            first = pointer[old_node].long()
            old_node = _lower_bound(label, first, end, target, int((end - first).max()))
            exists = (old_node < end) & (label[old_node.clamp(max=len(label) - 1)] == target)
            # c. Insert each missing child once.
            is_first[1:] |= target[1:] != target[:-1]
            is_new = is_first & ~exists
            inserted = old_node[is_new]
            num_children.index_add_(0, new_node[is_new], torch.ones_like(inserted))
            pointers.append(nn.functional.pad(num_children.cumsum(dim=0), (1, 0)).to(torch.int32))
            labels.append(_insert(label, inserted, target[is_new]))
            # d. The number of a node grows by the nodes inserted before it.
            new_node = old_node + is_new.cumsum(dim=0) - (~exists).long()
        return copy.copy(self)._set(labels, pointers, catalog_size)

    @property
    def num_bytes(self) -> int:
        """Memory of the trie's tensors, in bytes."""
        tensors = [self.item_indices, self.item_positions, self.leaf_ptr, *self.child_code, *self.child_ptr]
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device | str) -> "SidTrie":
        """A copy of the trie on another device."""
        moved = copy.copy(self)
        moved.item_indices, moved.item_positions = self.item_indices.to(device), self.item_positions.to(device)
        moved.leaf_ptr = self.leaf_ptr.to(device)
        moved.child_code = [tensor.to(device) for tensor in self.child_code]
        moved.child_ptr = [tensor.to(device) for tensor in self.child_ptr]
        return moved

    def first_position(self, level: int, nodes: torch.Tensor) -> torch.Tensor:
        """First positions `(...)` of `nodes` `(...)` of depth `level`; the run of node `n` ends at that of `n + 1`."""
        for pointer in self.child_ptr[level:]:
            nodes = pointer[nodes].long()
        return self.leaf_ptr[nodes]

    def children(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and node numbers `(..., F)` of the children of `nodes` `(...)` of depth `level`; 0 and -1 pad."""
        pointer = self.child_ptr[level]
        start, end = pointer[nodes].long(), pointer[nodes + 1].long()
        child = start[..., None] + torch.arange(self.fan_out[level], device=nodes.device)  # (..., F)
        exists = child < end[..., None]
        codes = self.child_code[level][torch.where(exists, child, 0)].long()
        return torch.where(exists, codes, 0), torch.where(exists, child, -1)

    def descend(self, level: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The child `(...)` with the given code of each node of depth `level`; -1 if it does not exist or for -1."""
        pointer, labels = self.child_ptr[level], self.child_code[level]
        parents = nodes.clamp(min=0)
        end = pointer[parents + 1].long()
        child = _lower_bound(labels, pointer[parents].long(), end, codes, self.fan_out[level])
        exists = (nodes >= 0) & (child < end) & (labels[child.clamp(max=len(labels) - 1)] == codes)
        return torch.where(exists, child, -1)

    def leaves_in(self, tokens: torch.Tensor, codebook_size: int) -> torch.Tensor:
        """
        The leaf whose Semantic ID ends in each column of `tokens` `(B, L)`, -1 elsewhere. A token is
        `level · codebook_size + code`; all other tokens are outside `0 … M · codebook_size - 1`.
        """
        nodes = torch.zeros_like(tokens)  # of the codes that end in each column
        for level in range(self.num_levels):
            nodes = nn.functional.pad(nodes[:, :-1], (1, 0), value=-1) if level else nodes
            nodes = self.descend(level, nodes, tokens - level * codebook_size)
        return nodes

    def path_to(self, positions: torch.Tensor) -> torch.Tensor:
        """The nodes above `positions` `(...)`, from the root to the leaf, `(1 + M, ...)`."""
        nodes = positions
        path: list[torch.Tensor] = []
        for pointer in [self.leaf_ptr, *self.child_ptr[::-1]]:
            nodes = torch.searchsorted(pointer, nodes.to(pointer.dtype), right=True) - 1
            path.insert(0, nodes)
        return torch.stack(path)

    def items(self, leaves: torch.Tensor) -> torch.Tensor:
        """Ascending item indices `(..., C)` of `leaves` `(...)`, -1 pads; `C` is the most items of one leaf."""
        start, end = self.leaf_ptr[leaves].long(), self.leaf_ptr[leaves + 1].long()
        position = start[..., None] + torch.arange(self.fan_out[-1], device=leaves.device)  # (..., C)
        exists = position < end[..., None]
        return torch.where(exists, self.item_indices[torch.where(exists, position, 0)].long(), -1)


def _as_indices(items, device: torch.device) -> torch.Tensor | None:
    """Item indices as a tensor; `None` if `items` does not contain integers (a mask, floats, strings)."""
    try:
        indices = torch.as_tensor(items, device=device)
    except (TypeError, ValueError, RuntimeError):
        return None
    if indices.numel() and (indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex()):
        return None
    return indices.long()


def _listed_positions(trie: SidTrie, name: str, lists, batch_size: int) -> list[torch.Tensor | None]:
    """Ascending unique positions of the items of each list. Items that are not in the trie are left out."""
    if lists is None:
        return [None] * batch_size
    if len(lists) != batch_size:
        raise ValueError(
            f"{name} has {len(lists)} lists; expected a list or None for each of the {batch_size} prompts."
        )
    catalog_size = len(trie.item_positions)
    positions: list[torch.Tensor] = []
    for index, items in enumerate(lists):
        if items is None:
            positions.append(None)
            continue
        items = _as_indices(items, trie.item_positions.device)
        if items is None or items.ndim != 1 or ((items < 0) | (items >= catalog_size)).any():
            raise ValueError(
                f"The {name} list of prompt {index} is invalid; expected a one-dimensional list of item indices, "
                f"0 … {catalog_size - 1}."
            )
        unique = trie.item_positions[items].unique()
        positions.append(unique[unique < len(trie.item_indices)])
    return positions


class ItemFilter:
    """
    The items that each prompt of a batch may get.

    `listed` `(B, D)` are ascending positions of the trie, padded with the number of its items: the permitted ones
    where `is_allow` `(B,)` is true, else the excluded ones. A node is one run of positions, so two binary searches
    count the listed items below it. A prefix without any permitted item is pruned before it becomes a beam.
    """

    def __init__(self, trie: SidTrie, listed: torch.Tensor, is_allow: torch.Tensor):
        self._trie, self.listed, self.is_allow = trie, listed, is_allow

    @classmethod
    def from_lists(
        cls,
        trie: SidTrie,
        batch_size: int,
        allow: Sequence[torch.Tensor | None] | None = None,
        deny: Sequence[torch.Tensor | None] | None = None,
        allow_empty: bool = False,
    ) -> "ItemFilter":
        """
        The allow list of each prompt, if it has one, minus its deny list. Arguments as for
        [`~LasarForGenerativeRec.recommend`].
        """
        num_items, device = len(trie.item_indices), trie.item_indices.device
        allow = _listed_positions(trie, "allow", allow, batch_size)
        deny = _listed_positions(trie, "deny", deny, batch_size)
        # 1. One list per prompt: permitted positions if it has an allow list, else the denied positions.
        listed = []
        for allowed, denied in zip(allow, deny, strict=True):
            if allowed is None:
                listed.append(trie.item_positions[:0] if denied is None else denied)
            else:
                listed.append(allowed if denied is None else allowed[~torch.isin(allowed, denied)])
        is_allow = torch.tensor([allowed is not None for allowed in allow], device=device)  # (B,)
        # 2. Pad them after the last position, so that they stay sorted.
        listed = nn.utils.rnn.pad_sequence(listed, batch_first=True, padding_value=num_items)  # (B, D)
        # 3. Refuse prompts without any permitted item.
        counts = (listed < num_items).sum(dim=1)
        empty = torch.where(is_allow, counts == 0, counts == num_items)
        if not allow_empty and empty.any():
            raise ValueError(
                f"allow and deny permit no item for prompt {int(empty.nonzero()[0])}. Pass allow_empty=True to get an "
                "empty result for such prompts."
            )
        return cls(trie, listed, is_allow)

    @classmethod
    def without_leaves(cls, trie: SidTrie, leaves: torch.Tensor, kept: torch.Tensor | None = None) -> "ItemFilter":
        """
        Exclude the first item of each leaf in `leaves` `(B, D)`, -1 pads, except the leaves `kept` `(B,)`. A leaf of
        several items therefore stays, since it does not say which of them is meant. Leaves of all items of the
        catalogue exclude nothing.
        """
        num_items = len(trie.item_indices)
        listed = torch.where(leaves >= 0, trie.leaf_ptr[leaves.clamp(min=0)], num_items).sort(dim=1).values
        # Each position once.
        is_repeated = nn.functional.pad(listed[:, 1:] == listed[:, :-1], (1, 0))
        listed = listed.masked_fill(is_repeated, num_items)
        is_everything = (listed < num_items).sum(dim=1) == num_items  # (B,)
        is_dropped = is_everything[:, None]
        if kept is not None:
            is_dropped = is_dropped | (listed == torch.where(kept >= 0, trie.leaf_ptr[kept.clamp(min=0)], -1)[:, None])
        listed = listed.masked_fill(is_dropped, num_items).sort(dim=1).values
        return cls(trie, listed, torch.zeros_like(is_everything))

    def excludes_nodes(self, level: int, child: torch.Tensor) -> torch.Tensor:
        """
        Whether each child `(B, …, F)` of nodes of depth `level` leads to no permitted item of its prompt; undefined at
        padding.
        """
        # 1. The children of a parent are consecutive nodes: F runs of positions with F + 1 edges.
        edges = child[..., :1] + torch.arange(child.shape[-1] + 1, device=child.device)
        edges = edges.clamp(max=self._trie.num_nodes[level + 1])
        first = self._trie.first_position(level + 1, edges)  # (B, …, F + 1)
        # 2. Count the listed positions, and all positions, of each run.
        num_listed = torch.searchsorted(self.listed, first.flatten(1), out_int32=True).view_as(first).diff(dim=-1)
        is_allow = self.is_allow.view(-1, *[1] * (child.ndim - 1))
        return torch.where(is_allow, num_listed == 0, num_listed == first.diff(dim=-1))

    def excludes_items(self, items: torch.Tensor) -> torch.Tensor:
        """Whether each of the items `(B, n)` is not permitted for its prompt; undefined at padding."""
        position = self._trie.item_positions[items]
        padded = nn.functional.pad(self.listed, (0, 1), value=len(self._trie.item_indices))
        nearest = padded.gather(1, torch.searchsorted(self.listed, position))
        return (nearest == position) != self.is_allow[:, None]
