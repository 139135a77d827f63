"""
Recommenders without a language model, the baselines of every results table: popularity, first-order Markov, item-kNN
and EASE.

All learn from the training sequences only. The validation item is part of the history of a test prediction, but it is
not counted. Equal scores are ordered by popularity, then by item index, and never by the target. An item without a
score counts as 0, so a list that is not full goes on with popular items. Users are ranked in blocks: a matrix of all
users by all items never exists.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from scipy import linalg, sparse

from ..data.prepared_data import PreparedData
from ..model.catalog_lasar import SidCatalog


EASE_MAX_ITEMS = 20_000  # a float32 matrix of items x items then has 1.6 GB; EASE needs about five at a time
BLOCK_SIZE = 2**22  # scores per block of users


def popularity_ranking(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool = False,
) -> np.ndarray:
    """
    Most frequent items of the training sequences.

    Args:
        train_sequences (`Sequence[Sequence[int]]`):
            Training items of each user (item indices), oldest first.
        histories (`Sequence[Sequence[int]]` of length `U`):
            Items of each user to recommend for, oldest first.
        num_items, top_k (`int`):
            Size of the catalogue, and length `k` of a ranking.
        exclude_history (`bool`, *optional*, defaults to `False`):
            Leave the items of a user's history out of the ranking.

    Returns:
        `np.ndarray` of shape `(U, k)`, int64: item indices, best first; -1 pads if there are fewer items.
    """
    scores = sparse.csr_array((num_items, num_items))
    return matrix_ranking(scores, train_sequences, histories, top_k, 0.0, exclude_history)


def popular_items(data: PreparedData, catalog: SidCatalog, top_k: int) -> list[str]:
    """Ids of the most frequent training items of `data` that `catalog` can recommend, for users without history."""
    available = {item for item, is_removed in zip(catalog.item_ids, catalog.removed, strict=True) if not is_removed}
    ranking = _popularity_order(data.split.train, len(data.items))
    item_ids = [data.catalog.item_ids[item] for item in ranking]
    return [item for item in item_ids if item in available][:top_k]


def markov_ranking(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool = False,
) -> np.ndarray:
    """
    Items that most often directly follow the newest item of the history in the training sequences.

    Arguments and return value are those of [`popularity_ranking`].
    """
    users, items, _ = flat_sequences(train_sequences)
    _check_items("train_sequences", items, num_items)
    counts = _pair_counts(users, items, num_items, gap=1)
    return matrix_ranking(counts, train_sequences, histories, top_k, 0.0, exclude_history)


def item_knn_ranking(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool = False,
    window: int = 8,
    gap_decay: float = 0.8,
    mirror: float = 0.5,
    shrinkage: float = 50.0,
    history_decay: float = 0.7,
) -> np.ndarray:
    """
    Neighbours of the items of the history: item `j` scores `Σ_k history_decay^k S[h_k, j]`, `h_0` the newest item.

    Args:
        train_sequences, histories, num_items, top_k, exclude_history:
            As for [`popularity_ranking`].
        window, gap_decay, mirror, shrinkage:
            As for [`item_knn_matrix`], which gives `S`.
        history_decay (`float`, *optional*, defaults to `0.7`):
            Weight of an item of the history relative to the item after it.
    """
    scores = item_knn_matrix(train_sequences, num_items, window, gap_decay, mirror, shrinkage)
    return matrix_ranking(scores, train_sequences, histories, top_k, history_decay, exclude_history)


def ease_ranking(
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool = False,
    regularization: float = 100.0,
    history_decay: float = 0.7,
) -> np.ndarray:
    """
    EASE (Steck, 2019): item `j` scores `Σ_k history_decay^k B[h_k, j]`, `h_0` the newest item.

    Args:
        train_sequences, histories, num_items, top_k, exclude_history:
            As for [`popularity_ranking`].
        regularization (`float`, *optional*, defaults to `100.0`):
            As for [`ease_matrix`], which gives `B`.
        history_decay (`float`, *optional*, defaults to `0.7`):
            Weight of an item of the history relative to the item after it.

    Raises:
        `ValueError`: as [`ease_matrix`].
    """
    scores = ease_matrix(train_sequences, num_items, regularization)
    return matrix_ranking(scores, train_sequences, histories, top_k, history_decay, exclude_history)


def item_knn_matrix(
    train_sequences: Sequence[Sequence[int]],
    num_items: int,
    window: int = 8,
    gap_decay: float = 0.8,
    mirror: float = 0.5,
    shrinkage: float = 50.0,
) -> sparse.csr_array:
    """
    Similarity of items that stand near each other in the training sequences.

    With `C_g[i, j]` the number of times that `j` comes `g` places after `i`:

        W = Σ_{g=1..window} gap_decay^(g-1) C_g
        W ← W + mirror · Wᵀ
        S = D W D  with  D = diag(popularity + shrinkage)^(-1/2)

    Args:
        train_sequences, num_items:
            As for [`popularity_ranking`].
        window (`int`, *optional*, defaults to `8`):
            Largest gap between two items that counts as a pair.
        gap_decay (`float`, *optional*, defaults to `0.8`):
            Weight of a gap relative to the next smaller one.
        mirror (`float`, *optional*, defaults to `0.5`):
            Weight of pairs in the opposite order.
        shrinkage (`float`, *optional*, defaults to `50.0`):
            Added to popularity; the larger, the less rare items gain. Not negative.

    Returns:
        `scipy.sparse.csr_array` of shape `(num_items, num_items)`, float64: `S`, with the neighbours of item `i` in
        row `i`.
    """
    if shrinkage < 0:
        raise ValueError(f"shrinkage is {shrinkage}; expected at least 0.")
    pairs, popularity = item_knn_counts(train_sequences, num_items, window, gap_decay, mirror)
    # An item without popularity is in no pair: its weight does not matter, but it must be finite.
    scale = sparse.diags_array(np.maximum(popularity + shrinkage, 1e-9) ** -0.5)
    similarity = (scale @ pairs @ scale).tocsr()
    similarity.eliminate_zeros()
    return similarity


def item_knn_counts(
    train_sequences: Sequence[Sequence[int]], num_items: int, window: int, gap_decay: float, mirror: float
) -> tuple[sparse.csr_array, np.ndarray]:
    """The weighted pairs `W` `(I, I)` with those in the opposite order, and the popularity `(I,)`: the sums over users
    from which [`item_knn_matrix`] is made, whose arguments these are."""
    if window < 1:
        raise ValueError(f"window is {window}; expected at least 1.")
    users, items, _ = flat_sequences(train_sequences)
    _check_items("train_sequences", items, num_items)
    pairs = sum(gap_decay ** (gap - 1) * _pair_counts(users, items, num_items, gap) for gap in range(1, window + 1))
    return (pairs + mirror * pairs.T).tocsr(), np.bincount(items, minlength=num_items)


def ease_matrix(train_sequences: Sequence[Sequence[int]], num_items: int, regularization: float = 100.0) -> np.ndarray:
    """
    Item weights of EASE: the ridge regression of the user-item matrix `X` on itself with a diagonal of zeros.

    With `P = (XᵀX + regularization · I)^(-1)` the weights are `B[i, j] = -P[i, j] / P[j, j]` off the diagonal.

    Args:
        train_sequences, num_items:
            As for [`popularity_ranking`]. An item that a user has several times counts once.
        regularization (`float`, *optional*, defaults to `100.0`):
            Weight of the ridge penalty, positive.

    Returns:
        `np.ndarray` of shape `(num_items, num_items)`, float32.

    Raises:
        `ValueError`: if the catalogue has more than `EASE_MAX_ITEMS` (20,000) items; the inverse would not fit.
    """
    if num_items > EASE_MAX_ITEMS:
        raise ValueError(
            f"EASE inverts a matrix of items x items; the catalogue has {num_items} items, expected at most "
            f"{EASE_MAX_ITEMS}. Leave EASE out and use item_knn_ranking, whose matrix is sparse."
        )
    if regularization <= 0:
        raise ValueError(f"regularization is {regularization}; expected a positive number.")
    users, items, _ = flat_sequences(train_sequences)
    _check_items("train_sequences", items, num_items)
    ones = np.ones(len(items), dtype=np.float32)
    interactions = sparse.csr_array((ones, (users, items)), shape=(len(train_sequences), num_items))
    interactions.data[:] = 1.0
    gram = (interactions.T @ interactions).toarray()
    gram[np.diag_indices(num_items)] += np.float32(regularization)
    # By Cholesky, a fifth of the time of np.linalg.inv. LAPACK fills the upper triangle only.
    factor, failed = linalg.lapack.spotrf(gram.T, overwrite_a=True)
    if failed:
        raise ValueError(f"regularization is {regularization}, too small for float32; use a larger one.")
    inverse, _ = linalg.lapack.spotri(factor, overwrite_c=True)
    inverse = np.triu(inverse) + np.triu(inverse, 1).T
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def matrix_ranking(
    scores: sparse.csr_array | np.ndarray,
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    top_k: int,
    history_decay: float,
    exclude_history: bool = False,
) -> np.ndarray:
    """
    Rank by an item-to-item matrix: item `j` scores `Σ_k history_decay^k scores[h_k, j]`, `h_0` the newest item.

    Args:
        scores (`scipy.sparse.csr_array` or `np.ndarray` of shape `(num_items, num_items)`):
            Score of the item of the column for a history with the item of the row. A sparse one has no negative entry.
        train_sequences, histories, top_k, exclude_history:
            As for [`popularity_ranking`]; the sequences give the popularity, which orders equal scores.
        history_decay (`float`):
            Weight of an item of the history relative to the item after it; with 0 only the newest item counts.

    Returns:
        `np.ndarray` of shape `(U, k)`, int64, as [`popularity_ranking`].
    """
    num_items = scores.shape[0]
    users, items, places = flat_sequences(histories)
    _check_items("histories", items, num_items)
    decays = np.power(float(history_decay), places).astype(scores.dtype)
    weights = sparse.csr_array((decays, (users, items)), shape=(len(histories), num_items))
    weights.eliminate_zeros()
    # Numbers that a user needs: at most what a sparse matrix stores for the items of the history, or all items.
    row_sizes = np.diff(scores.indptr) if sparse.issparse(scores) else np.full(num_items, num_items)
    room = np.minimum(np.bincount(users, row_sizes[items], minlength=len(histories)), num_items)
    rows = (row for block in _blocks(room) for row in _rows(weights[block] @ scores))
    return rank_rows(rows, train_sequences, histories, num_items, top_k, exclude_history)


def rank_rows(
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    train_sequences: Sequence[Sequence[int]],
    histories: Sequence[Sequence[int]],
    num_items: int,
    top_k: int,
    exclude_history: bool = False,
) -> np.ndarray:
    """
    The tie rule, the exclusion and the padding of all baselines.

    Args:
        rows (`Iterable[tuple[np.ndarray, np.ndarray]]`):
            For each user the items that have a score, and their scores. Popular items come after them.
        train_sequences, histories, num_items, top_k, exclude_history:
            As for [`popularity_ranking`], as is the return value.
    """
    popular = _popularity_order(train_sequences, num_items)
    popularity_rank = np.argsort(popular)  # (I,)
    rankings = np.full((len(histories), top_k), -1)
    for ranking, history, (items, scores) in zip(rankings, histories, rows, strict=True):
        excluded = np.unique(np.asarray(history if exclude_history else [], dtype=np.int64))
        best = _best_items(items, scores, excluded, popular, popularity_rank, top_k)
        ranking[: len(best)] = best
    return rankings


def _best_items(
    items: np.ndarray,
    scores: np.ndarray,
    excluded: np.ndarray,
    popular: np.ndarray,
    popularity_rank: np.ndarray,
    top_k: int,
) -> np.ndarray:
    """The best items of one user without the excluded ones; after those with a score come popular ones."""
    is_wanted = ~np.isin(items, excluded)
    items, scores = items[is_wanted], scores[is_wanted]
    if len(items) > top_k:  # sort only what can be among the best, with all that tie
        is_high = scores >= np.partition(scores, -top_k)[-top_k]
        items, scores = items[is_high], scores[is_high]
    best = items[np.lexsort((popularity_rank[items], -scores))][:top_k]
    if len(best) == top_k:
        return best
    known = np.concatenate([best, excluded])
    others = popular[: top_k + len(known)]
    return np.concatenate([best, others[~np.isin(others, known)]])[:top_k]


def _rows(scores: sparse.csr_array | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Items with a score, and their scores, of each user of a block."""
    if not sparse.issparse(scores):
        all_items = np.arange(scores.shape[1])
        yield from ((all_items, row) for row in scores)
        return
    scores.eliminate_zeros()
    for first, last in zip(scores.indptr[:-1], scores.indptr[1:], strict=True):
        yield scores.indices[first:last], scores.data[first:last]  # type: ignore[misc]


def _blocks(room: np.ndarray) -> Iterator[slice]:
    """Cut users into blocks that need about `BLOCK_SIZE` numbers, given how many each needs `(U,)`."""
    edges = np.flatnonzero(np.diff(np.cumsum(room) // BLOCK_SIZE)) + 1
    for first, last in zip([0, *edges], [*edges, len(room)], strict=True):
        yield slice(first, last)


def flat_sequences(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All items of sequences in one array `(N,)`: the sequence, the item and the place, counted from the newest."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    owners = np.repeat(np.arange(len(sequences)), lengths)
    items = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=lengths.sum())
    return owners, items, np.cumsum(lengths)[owners] - 1 - np.arange(len(items))


def _pair_counts(users: np.ndarray, items: np.ndarray, num_items: int, gap: int) -> sparse.csr_array:
    """`(I, I)`: how often the item of the column comes `gap` places after the item of the row."""
    is_pair = users[:-gap] == users[gap:]
    before, after = items[:-gap][is_pair], items[gap:][is_pair]
    return sparse.coo_array((np.ones(len(before)), (before, after)), shape=(num_items, num_items)).tocsr()


def _popularity_order(train_sequences: Sequence[Sequence[int]], num_items: int) -> np.ndarray:
    """All item indices `(I,)`, the most frequent first."""
    _, items, _ = flat_sequences(train_sequences)
    _check_items("train_sequences", items, num_items)
    return np.argsort(-np.bincount(items, minlength=num_items), kind="stable")


def _check_items(name: str, items: np.ndarray, num_items: int) -> None:
    is_outside = (items < 0) | (items >= num_items)
    if is_outside.any():
        raise ValueError(f"{name} has item index {items[is_outside.argmax()]}; the catalogue has {num_items} items.")
