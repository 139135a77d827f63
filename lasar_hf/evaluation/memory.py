"""Building an [`ItemMemory`] from training sequences, and fitting its weight on validation samples."""

import copy
import itertools
from typing import Any

import numpy as np
import torch
from scipy import sparse

from ..data.prepared_data import PreparedData
from ..model.memory_lasar import ItemMemory, catalog_hash
from .memory_matrix import memory_matrix
from .metrics import ndcg_per_user, ranks
from .recommendations import Recommendations


WEIGHTS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the memory at its average strength
SLOPES = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)  # per unit of the strength's logarithm


def build_memory(
    data: PreparedData, max_neighbours: int = 200, history_decay: float = 0.7, **kwargs: Any
) -> ItemMemory:
    """
    The memory of the training sequences of a data set.

    Args:
        data ([`PreparedData`]):
            The data set.
        max_neighbours (`int`, *optional*, defaults to `200`):
            Neighbours to keep per item, those with the largest weights.
        history_decay (`float`, *optional*, defaults to `0.7`):
            Weight of an item of the history relative to the item after it.
        kwargs:
            Passed to [`memory_matrix`].

    Returns:
        [`ItemMemory`]: a memory with a weight of one half, see [`fit_gate`].
    """
    num_items = len(data.items)
    matrix = _largest(memory_matrix(data.split.train, num_items, **kwargs), max_neighbours)
    indptr, indices, weights = map(torch.from_numpy, (matrix.indptr, matrix.indices, matrix.data))
    return ItemMemory(indptr, indices, weights, catalog_hash(data.catalog), history_decay)


def _largest(matrix: sparse.csr_array, count: int) -> sparse.csr_array:
    """The `count` largest positive entries of each row."""
    matrix = matrix.tocoo()
    order = np.lexsort((-matrix.data, matrix.row))
    row = matrix.row[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    order = order[(rank < count) & (matrix.data[order] > 0)]
    kept = matrix.data[order], (matrix.row[order], matrix.col[order])
    return sparse.coo_array(kept, shape=matrix.shape).tocsr()


def fit_gate(
    memory: ItemMemory, recommendations: Recommendations, targets: list[int]
) -> tuple[ItemMemory, np.ndarray]:
    """
    The memory with the weight that gives the best NDCG@10 on validation samples, among 48 settings of its two numbers.
    Each setting ranks the same candidates, the best ones at a weight of one half.

    Args:
        memory ([`ItemMemory`]):
            A memory with any weight.
        recommendations ([`Recommendations`]):
            Candidates of the samples with both of their probabilities: [`recommend_samples`] with the memory and a
            `top_k` of far more than ten.
        targets (`list[int]`):
            Target of each sample.

    Returns:
        `tuple[ItemMemory, np.ndarray]`: the memory with that gate, and the lists `(U, 10)` that it leads to.
    """
    strength = recommendations.memory_strength
    has_memory = strength > 0  # (U,)
    logs = np.log(np.where(has_memory, strength, 1.0))  # (U,)
    mean = logs[has_memory].mean() if has_memory.any() else 0.0
    model, recalled = np.exp(recommendations.model_scores), np.exp(recommendations.memory_scores)  # (U, C)
    best_gate, best_lists, best = memory.gate, None, -1.0
    for weight, slope in itertools.product(WEIGHTS, SLOPES):
        gate = float(np.log(weight / (1 - weight)) - slope * mean), slope
        share = np.where(has_memory, 1 / (1 + np.exp(-(gate[0] + slope * logs))), 0.0)[:, None]  # (U, 1)
        mixed = (1 - share) * model + share * recalled
        order = np.argsort(-mixed, axis=1, kind="stable")[:, :10]
        lists = np.take_along_axis(recommendations.items, order, axis=1)
        ndcg = ndcg_per_user(ranks(lists, targets), 10).mean()
        if ndcg > best:
            best_gate, best_lists, best = gate, lists, ndcg
    fitted = copy.copy(memory)
    fitted.gate = best_gate
    return fitted, best_lists
