"""Popularity and first-order Markov: the two rankings every result is shown beside.

Both learn from the training sequences alone, at test time too: with leave-one-out, the validation item is the context
of a test prediction (not the last training item) but adds no transition and no popularity. Items the user already has
stay in the ranking, the context itself included. Popularity counts every training item of every user, the first of a
sequence too. Ties go to the smaller item row.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse


def popularity_ranking(train_sequences: Sequence[Sequence[int]], num_items: int, top_k: int) -> np.ndarray:
    """
    The items that occur most often in the training sequences; one ranking for all users.

    Args:
        train_sequences (`Sequence[Sequence[int]]`): item rows of each user, oldest first.
        num_items (`int`): size of the catalogue.
        top_k (`int`): length of the ranking.

    Returns:
        `np.ndarray` of shape `(top_k,)`, int64: item rows, best first, `-1` pads if the catalogue has fewer.

    Raises:
        `ValueError`: an item row outside the catalogue.
    """
    return _padded(_popularity_order(train_sequences, num_items)[:top_k], top_k)


def markov_ranking(
    train_sequences: Sequence[Sequence[int]], contexts: Sequence[int] | np.ndarray, num_items: int, top_k: int
) -> np.ndarray:
    """
    The items that most often came right after the context in the training sequences.

    Equal counts are ordered by popularity, then by item row; items that never came after it follow by popularity.

    Args:
        train_sequences (`Sequence[Sequence[int]]`): item rows of each user, oldest first.
        contexts (`(U,)` int): the newest item of each history: the last training item for validation, the validation
            item for test.
        num_items (`int`): size of the catalogue.
        top_k (`int`): length of the rankings.

    Returns:
        `np.ndarray` of shape `(U, top_k)`, int64: item rows, best first, `-1` pads if the catalogue has fewer.

    Raises:
        `ValueError`: an item row outside the catalogue.
    """
    contexts = np.asarray(contexts, dtype=np.int64)
    _check_rows("contexts", contexts, num_items)
    popular = _popularity_order(train_sequences, num_items)
    counts = _transition_counts(train_sequences, num_items)
    place = np.empty(num_items, dtype=np.int64)
    place[popular] = np.arange(num_items)

    # Many users share their newest item: rank once for each distinct one.
    distinct, which = np.unique(contexts, return_inverse=True)
    rankings = np.empty((len(distinct), top_k), dtype=np.int64)
    for row, context in enumerate(distinct):
        here = slice(counts.indptr[context], counts.indptr[context + 1])
        successors = counts.indices[here]
        successors = successors[np.lexsort((place[successors], -counts.data[here]))]
        rest = popular[:top_k]
        rest = rest[~np.isin(rest, successors)]
        rankings[row] = _padded(np.concatenate([successors, rest])[:top_k], top_k)
    return rankings[which]


def _popularity_order(train_sequences: Sequence[Sequence[int]], num_items: int) -> np.ndarray:
    """All item rows `(num_items,)`, the most frequent first, ties by row."""
    items = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in train_sequences])
    _check_rows("train_sequences", items, num_items)
    return np.argsort(-np.bincount(items, minlength=num_items), kind="stable")


def _transition_counts(train_sequences: Sequence[Sequence[int]], num_items: int) -> sparse.csr_array:
    """`(num_items, num_items)`: how often the column's item came right after the row's."""
    before = np.concatenate([np.asarray(sequence[:-1], dtype=np.int64) for sequence in train_sequences])
    after = np.concatenate([np.asarray(sequence[1:], dtype=np.int64) for sequence in train_sequences])
    counts = sparse.coo_array((np.ones(len(before), dtype=np.int64), (before, after)), shape=(num_items, num_items))
    return counts.tocsr()  # adds up equal pairs


def _padded(ranking: np.ndarray, top_k: int) -> np.ndarray:
    return np.pad(ranking, (0, top_k - len(ranking)), constant_values=-1)


def _check_rows(name: str, items: np.ndarray, num_items: int) -> None:
    outside = (items < 0) | (items >= num_items)
    if outside.any():
        raise ValueError(f"{name} has item row {items[outside.argmax()]}, but the catalogue has {num_items} items")
