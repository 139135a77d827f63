"""
Popularity and first-order Markov, the baselines of every results table.

Both count in the training sequences only. The validation item is the context of a test prediction, but it is not
counted. Items of the user's history stay in the ranking. Ties go to the smaller item index.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from ..data.prepared_data import PreparedData
from ..model.catalog_lasar import SidCatalog


def popularity_ranking(train_sequences: Sequence[Sequence[int]], num_items: int, top_k: int) -> np.ndarray:
    """
    Most frequent items of the training sequences: one ranking for all users.

    Args:
        train_sequences (`Sequence[Sequence[int]]`):
            Item indices of each user, oldest first.
        num_items, top_k (`int`):
            Size of the catalogue, and length `k` of the ranking.

    Returns:
        `np.ndarray` of shape `(k,)`, int64: item indices, best first; -1 pads if the catalogue has fewer items.
    """
    ranking = _popularity_order(train_sequences, num_items)[:top_k]
    return np.pad(ranking, (0, top_k - len(ranking)), constant_values=-1)


def popular_items(data: PreparedData, catalog: SidCatalog, top_k: int) -> list[str]:
    """Ids of the most frequent training items of `data` that `catalog` can recommend, for users without history."""
    available = {item for item, is_removed in zip(catalog.item_ids, catalog.removed, strict=True) if not is_removed}
    ranking = _popularity_order(data.split.train, len(data.items))
    item_ids = [data.catalog.item_ids[item] for item in ranking]
    return [item for item in item_ids if item in available][:top_k]


def markov_ranking(
    train_sequences: Sequence[Sequence[int]], contexts: Sequence[int] | np.ndarray, num_items: int, top_k: int
) -> np.ndarray:
    """
    Items that most often directly follow the context item in the training sequences.

    Ties are ordered by popularity, then by item index. Items that never follow the context come last, by popularity.

    Args:
        train_sequences, num_items, top_k:
            As for [`popularity_ranking`].
        contexts (`Sequence[int]` of length `U`):
            Newest item of each history.

    Returns:
        `np.ndarray` of shape `(U, k)`, int64: item indices, best first, padded with -1.
    """
    contexts = np.asarray(contexts, dtype=np.int64)
    _check_items("contexts", contexts, num_items)
    popular = _popularity_order(train_sequences, num_items)
    popularity_rank = np.argsort(popular)  # (I,)
    # How often the item of the column directly follows the item of the row; `tocsr` sums equal pairs.
    before = np.concatenate([np.asarray(sequence[:-1], dtype=np.int64) for sequence in train_sequences])
    after = np.concatenate([np.asarray(sequence[1:], dtype=np.int64) for sequence in train_sequences])
    ones = np.ones(len(before), dtype=np.int64)
    counts = sparse.coo_array((ones, (before, after)), shape=(num_items, num_items)).tocsr()  # (I, I)

    # Users share contexts: rank once for each distinct one.
    distinct, context_index = np.unique(contexts, return_inverse=True)
    rankings = np.full((len(distinct), top_k), -1)
    for index, context in enumerate(distinct):
        stored = slice(counts.indptr[context], counts.indptr[context + 1])
        successors = counts.indices[stored]
        successors = successors[np.lexsort((popularity_rank[successors], -counts.data[stored]))]
        others = popular[:top_k][~np.isin(popular[:top_k], successors)]
        ranking = np.concatenate([successors, others])[:top_k]
        rankings[index, : len(ranking)] = ranking
    return rankings[context_index]


def _popularity_order(train_sequences: Sequence[Sequence[int]], num_items: int) -> np.ndarray:
    """All item indices `(I,)`, the most frequent first."""
    items = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in train_sequences])
    _check_items("train_sequences", items, num_items)
    return np.argsort(-np.bincount(items, minlength=num_items), kind="stable")


def _check_items(name: str, items: np.ndarray, num_items: int) -> None:
    is_outside = (items < 0) | (items >= num_items)
    if is_outside.any():
        raise ValueError(f"{name} has item index {items[is_outside.argmax()]}; the catalogue has {num_items} items.")
