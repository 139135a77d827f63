"""
Targets from the item memory, to distil it into the weights of a model (not in the paper).

The neighbours of a training sample must not know its target: its user's own sequence is taken out of the counts, so
the sample sees what the memory would say about it if the user were held out.
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from .baselines import item_knn_counts
from .memory_matrix import text_steps


def neighbour_draws(
    train_sequences: Sequence[Sequence[int]],
    num_items: int,
    similar: sparse.csr_array | None = None,
    num_draws: int = 32,
    window: int = 8,
    gap_decay: float = 0.8,
    mirror: float = 0.25,
    shrinkage: float = 50.0,
    text_weight: float = 2.0,
    temperature: float = 0.1,
    history_decay: float = 0.7,
    exclude_history: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """
    Draw items for each training sample from the memory of all other users.

    An item is drawn with a probability proportional to its score `Σ_k history_decay^k S[h_k, item]` for the history
    `h` of the sample, where `S` is [`memory_matrix`] without the sequence of the sample's user.

    Args:
        train_sequences, num_items, similar, window, gap_decay, mirror, shrinkage, text_weight, temperature:
            As for [`memory_matrix`].
        num_draws (`int`, *optional*, defaults to `32`):
            Number of draws `R` per sample, with replacement.
        history_decay (`float`, *optional*, defaults to `0.7`):
            Weight of an item of the history relative to the item after it.
        exclude_history (`bool`, *optional*, defaults to `True`):
            Never draw items of the history.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `np.ndarray` of shape `(S, R)`, int64: item indices, for each item of each sequence from the second on, in
        order, as in the training samples. A row is -1 if no item has a score.

    Example:

    ```python
    >>> neighbour_draws([[0, 1], [0, 1], [0, 2]], num_items=3, num_draws=4)  # the third user's 2 is unknown to others
    array([[2, 1, 1, 1],
           [2, 2, 2, 2],
           [1, 1, 1, 1]])
    ```
    """
    pairs, popularity = item_knn_counts(train_sequences, num_items, window, gap_decay, mirror)
    if similar is not None:
        pairs = (pairs + text_steps(similar, text_weight, temperature)).tocsr()
    rng, draws = np.random.default_rng(seed), [np.empty((0, num_draws), dtype=np.int64)]
    for sequence in train_sequences:
        # 1. The rows of the user's n items, without the user; only the C columns with an entry count.
        items, own = np.unique(np.asarray(sequence, dtype=np.int64), return_inverse=True)  # (n,), (L,)
        rows = pairs[items]
        columns = np.union1d(rows.indices, items)  # (C,)
        own_columns = np.searchsorted(columns, items)  # (n,)
        counts = rows[:, columns].toarray()  # (n, C)
        own_pairs, own_popularity = item_knn_counts([own], len(items), window, gap_decay, mirror)  # type: ignore[list-item]
        counts[:, own_columns] -= own_pairs.toarray()
        similarity = np.maximum(counts, 0) / (popularity[items] - own_popularity + shrinkage)[:, None]  # (n, C)
        similarity[similarity < 1e-9] = 0  # rounding of counts that cancel

        # 2. The scores of each prefix of the sequence.
        scores = np.zeros((max(len(sequence) - 1, 0), len(columns)))  # (L - 1, C)
        state = np.zeros(len(columns))
        for place, item in enumerate(own[:-1]):
            state = history_decay * state + similarity[item]
            scores[place] = state
            if exclude_history:
                scores[place, own_columns[own[: place + 1]]] = 0

        # 3. Draw.
        for row in scores.cumsum(axis=1):  # (C,)
            points = rng.random(num_draws) * row[-1]
            drawn = columns[np.searchsorted(row, points, side="right").clip(max=len(columns) - 1)]
            draws.append(np.where(row[-1] > 0, drawn, -1)[None])
    return np.concatenate(draws)
