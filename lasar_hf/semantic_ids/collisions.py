"""
One Semantic ID per item.

Items that share the first `M − 1` codes get different last codes by optimal assignment. If a prefix has more items
than there are Semantic IDs below it, the items that fit it worst first move to the next-best code of the level above.

Levels are processed from the first to the last. Once no prefix of length `l` holds more items than the `K^(M−l)`
Semantic IDs below it, its children together have room for all of them, so every item that must move finds a code.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from .quantizer import Quantizer, check_codes


def resolve_collisions(codes: np.ndarray, quantizer: Quantizer, x: np.ndarray) -> np.ndarray:
    """
    Change as few codes as needed so that no two items share a Semantic ID.

    An item with a Semantic ID of its own keeps it if no collision occurs under its prefix. The number of items that
    moved is `(result != codes).any(axis=1).sum()`.

    Args:
        codes (`np.ndarray` of shape `(I, M)`):
            Codes of the items.
        quantizer ([`Quantizer`]):
            The quantizer of the codes. Its distances decide which moves cost least.
        x (`np.ndarray` of shape `(I, D)`):
            Vectors of the items.

    Returns:
        `np.ndarray` of shape `(I, M)`, int64: codes without duplicate rows.

    Raises:
        `ValueError`: wrong shapes, a code outside `[0, K)`, or more items than the `K^M` Semantic IDs.
    """
    codes = check_codes(codes, "codes", quantizer, min_length=quantizer.num_sid_levels)
    if len(codes) != len(x):
        raise ValueError(f"codes has {len(codes)} rows and x has {len(x)}; expected one row per item in both.")
    return separate(codes, np.empty((0, codes.shape[1]), dtype=np.int64), quantizer, np.asarray(x))


def separate(codes: np.ndarray, fixed: np.ndarray, quantizer: Quantizer, x: np.ndarray) -> np.ndarray:
    """Change `codes` `(N, M)` so that their rows differ from each other and from those of `fixed` `(F, M)`."""
    num_codes, num_levels, num_items = quantizer.codebook_size, quantizer.num_sid_levels, len(codes) + len(fixed)
    if num_items > num_codes**num_levels:
        raise ValueError(
            f"{num_items} items do not fit into {num_levels} levels of {num_codes} codes ({num_codes**num_levels} "
            "Semantic IDs); raise num_sid_levels or codebook_size."
        )
    codes = codes.copy()
    # 1. No prefix may hold more items than there are Semantic IDs below it.
    for level in range(num_levels - 1):
        _move_surplus(codes, fixed, level, quantizer, x)
    # 2. Under each prefix with a collision, assign the free last codes at the least total distance.
    for members, fixed_members in _crowded_prefixes(codes, fixed, num_levels - 1, capacity=1):
        free = np.setdiff1d(np.arange(num_codes), fixed[fixed_members, -1])
        cost = quantizer.distances(x[members], codes[members, :-1])[:, free]  # (members, free)
        codes[members, -1] = free[linear_sum_assignment(cost)[1]]
    return codes


def _crowded_prefixes(
    codes: np.ndarray, fixed: np.ndarray, length: int, capacity: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices in `codes` and `fixed` of the items of each prefix under which a code has more than `capacity` items."""
    both = np.concatenate([codes, fixed])  # (N + F, M)
    # 1. Number the prefixes. Renumbering at each level keeps the numbers below items * K; K^M may overflow.
    prefix = np.zeros(len(both), dtype=np.int64)
    for level in range(length):
        prefix = np.unique(prefix * (both[:, level].max() + 1) + both[:, level], return_inverse=True)[1]
    # 2. Count the items of each next code.
    child = prefix * (both[:, length].max() + 1) + both[:, length]
    _, child, count = np.unique(child, return_inverse=True, return_counts=True)
    # 3. Collect the items of the crowded prefixes.
    crowded = np.flatnonzero(np.isin(prefix, prefix[count[child] > capacity]))
    order = crowded[np.argsort(prefix[crowded], kind="stable")]
    groups = []
    for members in np.split(order, np.flatnonzero(np.diff(prefix[order])) + 1):
        num_movable = np.searchsorted(members, len(codes))  # items of `codes` come before those of `fixed`
        if num_movable:
            groups.append((members[:num_movable], members[num_movable:] - len(codes)))
    return groups


def _move_surplus(codes: np.ndarray, fixed: np.ndarray, level: int, quantizer: Quantizer, x: np.ndarray) -> None:
    """Move the items that fit worst until no prefix of `level + 1` codes has more items than Semantic IDs below it."""
    num_codes = quantizer.codebook_size
    capacity = num_codes ** (quantizer.num_sid_levels - level - 1)  # a Python integer, which cannot overflow
    for members, fixed_members in _crowded_prefixes(codes, fixed, level, capacity):
        # 1. The room under each code; negative if the code is overfull.
        load = np.bincount(codes[members, level], minlength=num_codes)
        load += np.bincount(fixed[fixed_members, level], minlength=num_codes)
        room = [capacity - count for count in load.tolist()]
        # 2. The items of overfull codes, worst fit first.
        overfull = [code for code in range(num_codes) if room[code] < 0]
        candidates = members[np.isin(codes[members, level], overfull)]
        distance = quantizer.distances(x[candidates], codes[candidates, :level])  # (candidates, K)
        current = codes[candidates, level]
        worst_first = np.argsort(-distance[np.arange(len(current)), current], kind="stable")
        # 3. Move items to the nearest code with room until their code is no longer overfull.
        moved = []
        for index in worst_first:
            if room[current[index]] >= 0:
                continue
            target = next(code for code in np.argsort(distance[index], kind="stable") if room[code] > 0)
            room[current[index]] += 1
            room[target] -= 1
            codes[candidates[index], level] = target
            moved.append(candidates[index])
        # 4. Encode their later codes again.
        codes[moved] = quantizer.encode(x[moved], codes[moved, : level + 1])
