"""Full-catalogue ranking metrics: HR@k, NDCG@k and the share of recommended entries that are not items."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


DEFAULT_KS = (5, 10, 20)


def ranks(predictions: Any, references: Any) -> np.ndarray:
    """
    Rank of each user's target item in the list recommended to that user, where each entry counts, also invalid ones.

    Args:
        predictions (`Tensor`, `np.ndarray` or `list[list[int]]` of shape `(U, k)`):
            Item indices, best first; -1 pads. Negative numbers may repeat, items may not.
        references (`Tensor`, `np.ndarray` or `list[int]` of shape `(U,)`):
            Item index of each user's target.

    Returns:
        `np.ndarray` of shape `(U,)`, float64: ranks from 1; `inf` where the target was not recommended.

    Raises:
        `ValueError`: if shapes or types do not fit, a target is negative, or a list contains an item twice.

    Example:

    ```python
    >>> ranks([[3, 1, 2], [0, -1, -1]], references=[2, 4])
    array([ 3., inf])
    ```
    """
    predictions, references = _integers("predictions", predictions, 2), _integers("references", references, 1)
    if len(predictions) != len(references):
        raise ValueError(f"predictions has {len(predictions)} lists, references {len(references)} items.")
    if len(references) == 0:
        raise ValueError("predictions and references are empty; expected at least one user.")
    _refuse("references", references < 0, references, "a target must be an item index, 0 or more")
    ordered = np.sort(predictions, axis=1)
    is_repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _refuse("predictions", is_repeated.any(axis=1), predictions, "an item may be recommended only once")

    hits = predictions == references[:, None]  # (U, k)
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)


def hits_per_user(ranks: np.ndarray, k: int) -> np.ndarray:
    """`(U,)` float64: 1 where the target is among the first `k`, else 0. Their mean is HR@k."""
    return (np.asarray(ranks) <= k).astype(np.float64)


def ndcg_per_user(ranks: np.ndarray, k: int) -> np.ndarray:
    """`(U,)` float64: `1 / log2(rank + 1)` where the target is among the first `k`, else 0. Their mean is NDCG@k."""
    return hits_per_user(ranks, k) / np.log2(np.asarray(ranks) + 1.0)


def ranking_metrics(ranks: np.ndarray, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """`HR@k` and `NDCG@k` for each cut-off `k`, averaged over users; `ranks` `(U,)` as returned by [`ranks`]."""
    hit_rates = {f"HR@{k}": float(hits_per_user(ranks, k).mean()) for k in ks}
    return hit_rates | {f"NDCG@{k}": float(ndcg_per_user(ranks, k).mean()) for k in ks}


def score_predictions(
    predictions: Any, references: Any, num_items: int, ks: Sequence[int] = DEFAULT_KS
) -> dict[str, float | int]:
    """
    HR@k, NDCG@k and the share of entries that are not items.

    Args:
        predictions, references:
            As for [`ranks`].
        num_items (`int`):
            Size of the catalogue `I`; item indices are `0 … I - 1`.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`):
            Cut-offs.

    Returns:
        `dict`: `HR@k`, `NDCG@k`, `invalid_rate` (share of entries that are not items, without padding), `pad_rate`
        (share of padding among all entries) and `n` (number of users).

    Raises:
        `ValueError`: as [`ranks`], and for targets outside the catalogue or lists shorter than the largest cut-off.
    """
    target_ranks = ranks(predictions, references)
    predictions, references = np.asarray(predictions), np.asarray(references)
    _refuse("references", references >= num_items, references, f"the catalogue has {num_items} items")
    if predictions.shape[1] < max(ks):
        raise ValueError(
            f"predictions has lists of {predictions.shape[1]} items for a cut-off of {max(ks)}. Recommend more items "
            "(-1 pads where the catalogue has fewer), or use smaller ks."
        )
    is_entry = predictions != -1
    is_invalid = is_entry & ((predictions < 0) | (predictions >= num_items))
    return ranking_metrics(target_ranks, ks) | {
        "invalid_rate": float(is_invalid.sum() / max(is_entry.sum(), 1)),
        "pad_rate": float(1.0 - is_entry.mean()),
        "n": len(references),
    }


def repeat_share(predictions: Any, histories: Sequence[Sequence[int]], k: int = 10) -> float:
    """
    Share of the first `k` recommended entries, without padding, that are in the history of their user.

    Args:
        predictions (of shape `(U, k)` or wider):
            As for [`ranks`].
        histories (`Sequence[Sequence[int]]` of length `U`):
            Items of each user.
    """
    predictions = _integers("predictions", predictions, 2)[:, :k]
    if len(predictions) != len(histories):
        raise ValueError(f"predictions has {len(predictions)} lists, histories {len(histories)} users.")
    num_repeats = sum(np.isin(items, history).sum() for items, history in zip(predictions, histories, strict=True))
    return float(num_repeats / max((predictions >= 0).sum(), 1))


class RankingMetrics(evaluate.Metric):
    """
    [`score_predictions`] as an `evaluate.Metric`, which collects batches. `kwargs` are those of `evaluate.Metric`.

    Example:

    ```python
    >>> metric = RankingMetrics(num_items=4, ks=(1, 2))
    >>> metric.add_batch(predictions=[[3, 0], [1, 2]], references=[0, 1])
    >>> metric.compute()
    {'HR@1': 0.5, 'HR@2': 1.0, 'NDCG@1': 0.5, 'NDCG@2': 0.815…, 'invalid_rate': 0.0, 'pad_rate': 0.0, 'n': 2}
    ```
    """

    def __init__(self, num_items: int, ks: Sequence[int] = DEFAULT_KS, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_items, self.ks = num_items, tuple(ks)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": [datasets.Value("int64")], "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float | int]:
        return score_predictions(predictions, references, self.num_items, self.ks)


def _integers(name: str, values: Any, ndim: int) -> np.ndarray:
    """`values` as an integer array with `ndim` axes."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} has lists of different lengths; pad them with -1.") from None
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; expected {ndim} axes.")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has data type {array.dtype}; expected integer item indices.")
    return array


def _refuse(name: str, is_bad: np.ndarray, values: np.ndarray, reason: str) -> None:
    """Raise an error that names the first bad user, `is_bad` `(U,)`."""
    if is_bad.any():
        user = int(is_bad.argmax())
        raise ValueError(f"{name}[{user}] is {values[user].tolist()}; {reason}.")
