"""
One SID an item. Items that share the first `M − 1` codes get different last codes by optimal assignment; where a
prefix has more items than codes below it, those that fit it worst move to the next-best code of the level above.

The levels are visited from the first to the last. Once no prefix of length `l` holds more items than the `K^(M−l)`
SIDs below it, its children have room for all of them together, so a surplus at the next level always finds a place.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from .quantizer import ResidualKMeans


def resolve_collisions(codes: np.ndarray, quantizer: ResidualKMeans, x: np.ndarray) -> np.ndarray:
    """
    Codes with which no two items share a SID.

    Items alone under their SID, in a prefix without collision, keep it; `(result != codes).any(axis=1).sum()` items
    were moved.

    Args:
        codes (`np.ndarray` of shape `(I, M)`):
            Codes of the items.
        quantizer ([`ResidualKMeans`]):
            The quantizer they come from: its distances say which moves cost least.
        x (`np.ndarray` of shape `(I, D)`):
            Vectors of the items.

    Returns:
        `np.ndarray` of shape `(I, M)`, int64, all rows different.

    Raises:
        `ValueError`: wrong shapes, a code outside `[0, K)`, or more items than the `K^M` SIDs that exist.
    """
    codes = _check(codes, "codes", quantizer)
    if len(codes) != len(x):
        raise ValueError(f"codes has {len(codes)} rows and x has {len(x)}: give one row an item in both.")
    return _place(codes, np.empty((0, codes.shape[1]), dtype=np.int64), quantizer, np.asarray(x))


def assign_new_items(existing_codes: np.ndarray, quantizer: ResidualKMeans, x_new: np.ndarray) -> np.ndarray:
    """
    Codes of new items that collide with nobody; the quantizer is not refitted and no old item moves.

    Args:
        existing_codes (`np.ndarray` of shape `(I, M)`):
            Codes of the items that have a SID, all different.
        quantizer ([`ResidualKMeans`]):
            The quantizer they come from.
        x_new (`np.ndarray` of shape `(N, D)`):
            Vectors of the new items, from the same embedding model; `N` may be 0.

    Returns:
        `np.ndarray` of shape `(N, M)`, int64.

    Raises:
        `ValueError`: wrong shapes, two existing items with one SID, or more items than the `K^M` SIDs that exist.
    """
    existing = _check(existing_codes, "existing_codes", quantizer)
    order = np.lexsort(existing.T)
    twice = np.flatnonzero((existing[order[1:]] == existing[order[:-1]]).all(axis=1))
    if twice.size:
        first, second = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise ValueError(
            f"existing_codes rows {first} and {second} share the SID {existing[first].tolist()}: resolve the "
            "collisions of the catalogue first."
        )
    if not len(x_new):
        return np.empty((0, quantizer.num_sid_levels), dtype=np.int64)
    return _place(quantizer.encode(x_new), existing, quantizer, np.asarray(x_new))


def _check(codes: np.ndarray, name: str, quantizer: ResidualKMeans) -> np.ndarray:
    codes = np.asarray(codes, dtype=np.int64)
    if codes.ndim != 2 or codes.shape[1] != quantizer.num_sid_levels:
        raise ValueError(f"{name} has shape {codes.shape}, expected (items, {quantizer.num_sid_levels}).")
    wrong = np.flatnonzero(((codes < 0) | (codes >= quantizer.codebook_size)).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"{name} row {wrong[0]} is {codes[wrong[0]].tolist()}, outside [0, {quantizer.codebook_size})."
        )
    return codes


def _place(codes: np.ndarray, fixed: np.ndarray, quantizer: ResidualKMeans, x: np.ndarray) -> np.ndarray:
    """Resolve `codes` `(N, M)` among themselves and against `fixed` `(F, M)`, whose rows stay as they are."""
    num_codes, num_levels = quantizer.codebook_size, quantizer.num_sid_levels
    if len(codes) + len(fixed) > num_codes**num_levels:
        raise ValueError(
            f"{len(codes) + len(fixed)} items do not fit into {num_levels} levels of {num_codes} codes "
            f"({num_codes**num_levels} SIDs): raise num_sid_levels or codebook_size."
        )
    codes = codes.copy()
    for level in range(num_levels - 1):
        _move_surplus(codes, fixed, level, quantizer, x)
    for rows, taken in _crowded(codes, fixed, num_levels - 1, capacity=1):
        free = np.setdiff1d(np.arange(num_codes), fixed[taken, -1])
        cost = quantizer.distances(x[rows], codes[rows, :-1])[:, free]
        codes[rows, -1] = free[linear_sum_assignment(cost)[1]]
    return codes


def _crowded(codes: np.ndarray, fixed: np.ndarray, length: int, capacity: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    The prefixes of `length` codes in which some next code has more than `capacity` items.

    Returns for each the row numbers of all its items, `(of codes, of fixed)`.
    """
    both = np.concatenate([codes, fixed])
    prefix = np.zeros(len(both), dtype=np.int64)
    for level in range(length):  # numbered anew at each level: K^M may not fit an integer, items times K does
        prefix = np.unique(prefix * (both[:, level].max() + 1) + both[:, level], return_inverse=True)[1]
    _, child, load = np.unique(
        prefix * (both[:, length].max() + 1) + both[:, length], return_inverse=True, return_counts=True
    )
    crowded = np.flatnonzero(np.isin(prefix, prefix[load[child] > capacity]))
    order = crowded[np.argsort(prefix[crowded], kind="stable")]
    groups = []
    for members in np.split(order, np.flatnonzero(np.diff(prefix[order])) + 1):
        own = np.searchsorted(members, len(codes))  # rows of `codes` come first
        if own:
            groups.append((members[:own], members[own:] - len(codes)))
    return groups


def _move_surplus(codes: np.ndarray, fixed: np.ndarray, level: int, quantizer: ResidualKMeans, x: np.ndarray) -> None:
    """
    Change codes, in place, until no prefix of length `level + 1` holds more items than there are SIDs below it.

    From an overfull prefix the items with the largest distance at `level` go, each to the nearest code with room, and
    their later codes are chosen anew.
    """
    num_codes = quantizer.codebook_size
    capacity = num_codes ** (quantizer.num_sid_levels - level - 1)
    for rows, taken in _crowded(codes, fixed, level, capacity):
        load = np.bincount(codes[rows, level], minlength=num_codes)
        room = [capacity - int(count) for count in load + np.bincount(fixed[taken, level], minlength=num_codes)]
        overfull = [code for code in range(num_codes) if room[code] < 0]
        candidates = rows[np.isin(codes[rows, level], overfull)]
        distance = quantizer.distances(x[candidates], codes[candidates, :level])
        own = codes[candidates, level]
        worst_first = np.argsort(-distance[np.arange(len(own)), own], kind="stable")
        moved = []
        for place in worst_first:
            if room[own[place]] >= 0:
                continue
            target = next(code for code in np.argsort(distance[place], kind="stable") if room[code] > 0)
            room[own[place]] += 1
            room[target] -= 1
            codes[candidates[place], level] = target
            moved.append(candidates[place])
        codes[moved] = quantizer.encode(x[moved], codes[moved, : level + 1])
