"""The item-to-item matrix of an [`ItemMemory`]: steps of the training sequences, and items with similar text."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from scipy import sparse

from ..data.prepared_data import PreparedData
from .baselines import item_knn_counts
from .tuning import Tuning, tune


MEMORY_GRID = {
    "mirror": [0.0, 0.25, 0.5], "shrinkage": [20.0, 50.0, 100.0], "text_weight": [1.0, 2.0, 3.0],
    "temperature": [0.07, 0.1, 0.15],
}  # fmt: skip
NUM_SIMILAR = 50  # items with similar text, of each item
BLOCK = 1024  # items whose cosines are computed at once


def similar_items(vectors: np.ndarray | None, count: int = NUM_SIMILAR) -> sparse.csr_array | None:
    """
    Items with the most similar text.

    Args:
        vectors (`np.ndarray` of shape `(I, D)`, *optional*):
            A vector of each item's text, such as `PreparedData.text_vectors`; zeros for an item without text.
        count (`int`, *optional*, defaults to `50`):
            Similar items of each item.

    Returns:
        `scipy.sparse.csr_array` of shape `(I, I)`, float64: the `count` largest positive cosines of each row, without
        the item itself. `None` without vectors.
    """
    if vectors is None:
        return None
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, norms, out=np.zeros(vectors.shape, dtype=np.float32), where=norms > 0)  # (I, D)
    count, blocks = min(count, len(vectors)), []
    for start in range(0, len(vectors), BLOCK):
        cosines = vectors[start : start + BLOCK] @ vectors.T  # (BLOCK, I)
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = 0.0
        columns = np.argpartition(-cosines, count - 1, axis=1)[:, :count]  # (BLOCK, count)
        values = np.take_along_axis(cosines, columns, axis=1).clip(0.0, 1.0).astype(np.float64)
        entries = values.ravel(), (np.repeat(rows, count), columns.ravel())
        blocks.append(sparse.coo_array(entries, shape=cosines.shape))
    nearest = sparse.vstack(blocks, format="csr")
    nearest.eliminate_zeros()
    return nearest


def text_steps(similar: sparse.csr_array, text_weight: float = 2.0, temperature: float = 0.1) -> sparse.csr_array:
    """`text_weight · exp((c - 1) / temperature)` for the cosines `c` of [`similar_items`], see [`memory_matrix`]."""
    if text_weight < 0 or temperature <= 0:
        raise ValueError(
            f"text_weight is {text_weight} and temperature {temperature}; expected at least 0 and above 0."
        )
    steps = similar.copy()
    steps.data = text_weight * np.exp((steps.data - 1) / temperature)
    return steps


def memory_matrix(
    train_sequences: Sequence[Sequence[int]],
    num_items: int,
    similar: sparse.csr_array | None = None,
    window: int = 8,
    gap_decay: float = 0.8,
    mirror: float = 0.25,
    shrinkage: float = 50.0,
    text_weight: float = 2.0,
    temperature: float = 0.1,
) -> sparse.csr_array:
    """
    Steps of the training sequences and, as if they were further steps, items with similar text (not in the paper).

    With the counts `W` of [`item_knn_matrix`] and the cosine `c[i, j]` of the texts of two items:

        S[i, j] = (W[i, j] + text_weight · exp((c[i, j] - 1) / temperature)) / (popularity[i] + shrinkage)

    The text decides for items that were rarely seen, and the counts for the others.

    Args:
        train_sequences, num_items, window, gap_decay, mirror:
            As for [`item_knn_matrix`].
        similar (`scipy.sparse.csr_array` of shape `(I, I)`, *optional*):
            The cosines of [`similar_items`]; other pairs have no text term.
        shrinkage (`float`, *optional*, defaults to `50.0`):
            Added to the popularity; the larger, the less rare items of a history count.
        text_weight (`float`, *optional*, defaults to `2.0`):
            Number of steps that equal text counts for.
        temperature (`float`, *optional*, defaults to `0.1`):
            The smaller, the more similar texts must be.

    Returns:
        `scipy.sparse.csr_array` of shape `(I, I)`, float64: `S`.
    """
    if shrinkage <= 0:
        raise ValueError(f"shrinkage is {shrinkage}; expected a positive number.")
    steps, popularity = item_knn_counts(train_sequences, num_items, window, gap_decay, mirror)
    if similar is not None:
        steps = steps + text_steps(similar, text_weight, temperature)
    matrix = (sparse.diags_array(1 / (popularity + shrinkage)) @ steps).tocsr()
    matrix.eliminate_zeros()
    return matrix


def tune_memory(data: PreparedData, similar: sparse.csr_array | None) -> Tuning:
    """[`tune`] for [`memory_matrix`] on the validation samples of a data set, with the cosines of its texts."""
    names = MEMORY_GRID if similar is not None else ("mirror", "shrinkage")
    validation = data.samples["validation"]
    return tune(
        partial(memory_matrix, similar=similar),
        {name: MEMORY_GRID[name] for name in names},
        data.split.train,
        list(validation["history"]),
        list(validation["target"]),
        len(data.items),
        data.exclude_history,
    )
