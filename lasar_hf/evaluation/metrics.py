"""Full-catalogue ranking metrics at item level: HR@k, NDCG@k and the share of returned entries that are no item."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


DEFAULT_KS = (5, 10, 20)


def ranks(predictions: Any, references: Any) -> np.ndarray:
    """
    Rank of each user's target in the list returned for that user.

    A rank is the position in the list, so an entry that is no item still takes up its place.

    Args:
        predictions (`Tensor`, `np.ndarray` or `list[list[int]]` of shape `(U, k)`):
            Item rows, best first; `-1` pads. Any other number that is no item row (`-2`, say) may repeat, an item may
            not.
        references (`Tensor`, `np.ndarray` or `list[int]` of shape `(U,)`):
            The target's item row. An item is a hit only if it is this very row, whatever SID it has.

    Returns:
        `np.ndarray` of shape `(U,)`, float64: ranks from 1; `inf` where the target was not returned.

    Raises:
        `ValueError`: shapes that do not fit or no users, entries that are not integers, a negative target, or an item
            that is twice in one row.
    """
    predictions, references = _integers("predictions", predictions, 2), _integers("references", references, 1)
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} rows of predictions for {len(references)} references: give one per user")
    if len(references) == 0:
        raise ValueError("no users to evaluate: predictions and references are empty")
    _refuse_rows("references", references < 0, references, "a target must be an item row, 0 or more")
    in_order = np.sort(predictions, axis=1)
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    _refuse_rows("predictions", twice.any(axis=1), predictions, "an item may be returned once only")

    hits = predictions == references[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)


def hits_per_user(ranks: np.ndarray, k: int) -> np.ndarray:
    """`(U,)` float64: 1 where the target is among the first `k`, else 0. Their mean is HR@k."""
    return (np.asarray(ranks) <= k).astype(np.float64)


def ndcg_per_user(ranks: np.ndarray, k: int) -> np.ndarray:
    """
    `(U,)` float64: `1 / log2(rank + 1)` where the target is among the first `k`, else 0.

    With one relevant item the ideal gain is 1, so this is NDCG@k (Järvelin and Kekäläinen, 2002).
    """
    return hits_per_user(ranks, k) / np.log2(np.asarray(ranks) + 1.0)


def ranking_metrics(ranks: np.ndarray, ks: Sequence[int] = DEFAULT_KS) -> dict[str, float]:
    """
    Means over users of HR@k and NDCG@k.

    Args:
        ranks (`np.ndarray` of shape `(U,)`): ranks from 1, `inf` where the target was not returned; see [`ranks`].
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`): cut-offs.

    Returns:
        `dict[str, float]` with keys `HR@k` for every `k`, then `NDCG@k`.
    """
    hit_rates = {f"HR@{k}": float(hits_per_user(ranks, k).mean()) for k in ks}
    return hit_rates | {f"NDCG@{k}": float(ndcg_per_user(ranks, k).mean()) for k in ks}


def score_predictions(
    predictions: Any, references: Any, num_items: int, ks: Sequence[int] = DEFAULT_KS
) -> dict[str, float | int]:
    """
    Ranking metrics and the share of entries that are no item.

    Args:
        predictions (of shape `(U, k)`): item rows, best first, `-1` pads; see [`ranks`].
        references (of shape `(U,)`): target rows; see [`ranks`].
        num_items (`int`): size of the catalogue; item rows are `0 … num_items - 1`.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`): cut-offs.

    Returns:
        `dict` with `HR@k` and `NDCG@k`, `invalid_rate` (of the entries that are not pads, the share that are no item),
        `pad_rate` (of all entries, the share that are pads) and `n` (users).

    Raises:
        `ValueError`: as [`ranks`]; a target outside the catalogue; lists shorter than the largest cut-off, whose
            metric would silently be that of a smaller one.
    """
    target_ranks = ranks(predictions, references)
    predictions, references = np.asarray(predictions), np.asarray(references)
    _refuse_rows("references", references >= num_items, references, f"the catalogue has {num_items} items")
    if predictions.shape[1] < max(ks):
        raise ValueError(
            f"lists of {predictions.shape[1]} items are too short for a cut-off of {max(ks)}: return more items "
            "(-1 pads where the catalogue has fewer) or give smaller ks"
        )
    returned = predictions != -1
    invalid = returned & ((predictions < 0) | (predictions >= num_items))
    return ranking_metrics(target_ranks, ks) | {
        "invalid_rate": float(invalid.sum() / max(returned.sum(), 1)),
        "pad_rate": float(1.0 - returned.mean()),
        "n": len(references),
    }


class RankingMetrics(evaluate.Metric):
    """
    [`score_predictions`] as an `evaluate.Metric`: add batches as they come, then compute.

    Made by class, not by `evaluate.load`, which asks the network. Under several processes every process adds its own
    users (each user in one process only) and calls `compute`; process 0 gets the result, the others `None`. The
    processes meet through files in `cache_dir`, so it must be one file system for all of them.

    Beyond the base class: every `compute` closes a round and the next one uses other files, since a fast process that
    starts its next round would otherwise overwrite rows that process 0 has not read; a process without users takes
    part with no rows; and `experiment_id` must be given, since two jobs under the default one would mix their rows.

    Args:
        num_items (`int`): size of the catalogue.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10, 20)`): cut-offs.
        num_process (`int`, *optional*, defaults to `1`): number of processes.
        experiment_id (`str`, *optional*): name of this evaluation, the same in all its processes and used by no other
            job at the same time; required when `num_process > 1`.
        **kwargs: `process_id`, `cache_dir`, `timeout` (seconds), … of `evaluate.Metric`.

    Raises:
        `ValueError`: several processes without `experiment_id`; otherwise as [`score_predictions`], where a row is
            counted within its batch.

    Example:

    ```python
    >>> metric = RankingMetrics(num_items=4, ks=(1, 2))
    >>> metric.add_batch(predictions=[[3, 0], [1, 2]], references=[0, 1])
    >>> metric.compute()
    {'HR@1': 0.5, 'HR@2': 1.0, 'NDCG@1': 0.5, 'NDCG@2': 0.815..., 'invalid_rate': 0.0, 'pad_rate': 0.0, 'n': 2}
    ```
    """

    def __init__(
        self,
        num_items: int,
        ks: Sequence[int] = DEFAULT_KS,
        num_process: int = 1,
        experiment_id: str | None = None,
        **kwargs: Any,
    ):
        if num_process > 1 and experiment_id is None:
            raise ValueError("RankingMetrics under several processes needs an experiment_id that all of them share")
        self.num_items, self.ks = num_items, tuple(ks)
        super().__init__(num_process=num_process, experiment_id=experiment_id, **kwargs)
        self._base_experiment_id, self._round = self.experiment_id, 0

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="HR@k and NDCG@k of ranked item rows against one target row per user.",
            citation="",
            inputs_description="predictions `(U, k)`: item rows, best first, -1 pads; references `(U,)`: target rows",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Adds a batch of users; an invalid row is refused here, before anything of the batch is stored."""
        score_predictions(predictions, references, self.num_items, self.ks)
        super().add_batch(predictions=np.asarray(predictions), references=np.asarray(references))

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, float | int] | None:
        """Metrics of all users added since the last call, of all processes; `None` in processes other than 0."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.num_process > 1 and len(self) == 0:
            super().add_batch(predictions=[], references=[])
        result = super().compute()
        self._round += 1
        self._module_info.experiment_id = f"{self._base_experiment_id}-round{self._round}"
        return result

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float | int]:
        return score_predictions(predictions, references, self.num_items, self.ks)


def _integers(name: str, values: Any, ndim: int) -> np.ndarray:
    """`values` as an integer array of `ndim` axes, or an error that names the argument."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"rows of {name} differ in length: pad them with -1") from None
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, not shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integer item rows, not {array.dtype}")
    return array


def _refuse_rows(name: str, bad: np.ndarray, values: np.ndarray, reason: str) -> None:
    """Raises an error that names the first bad row, if there is one. `bad`: `(U,)` bool."""
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"row {row} of {name} is {values[row].tolist()}: {reason}")
