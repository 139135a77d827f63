"""Paired bootstrap over users: is the difference between two recommenders larger than chance?"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class BootstrapResult:
    """Mean of `values_a` minus mean of `values_b`, its 95 % interval `low … high` and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    values_a: Sequence[float] | np.ndarray,
    values_b: Sequence[float] | np.ndarray,
    user_ids: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> BootstrapResult:
    """
    Percentile bootstrap of the mean difference between two recommenders on the same samples.

    Users are drawn with replacement, each with both values of all its samples (Efron and Tibshirani, 1993), since the
    samples of one user are not independent. The p-value inverts the 95 % interval; the smallest possible one is
    `2 / (num_resamples + 1)`.

    Args:
        values_a, values_b (`Sequence[float]` of length `S`):
            A metric of the same samples under two recommenders, such as [`ndcg_per_user`].
        user_ids (`Sequence[Hashable]` of length `S`, *optional*):
            User of each sample, two or more different ones. By default each sample has a user of its own, as with a
            leave-one-out split.
        num_resamples, seed (`int`, *optional*, default to `10000` and `0`):
            Number of bootstrap samples and their seed.
    """
    values_a, values_b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if values_a.ndim != 1 or values_a.shape != values_b.shape:
        raise ValueError(f"values_a {values_a.shape} and values_b {values_b.shape} must have one value per sample.")
    differences = values_a - values_b
    if not np.isfinite(differences).all():
        sample = int((~np.isfinite(differences)).argmax())
        raise ValueError(f"values_a[{sample}] or values_b[{sample}] is not finite.")
    user_ids = range(len(differences)) if user_ids is None else user_ids
    if len(user_ids) != len(differences):
        raise ValueError(f"user_ids has {len(user_ids)} users; expected {len(differences)}, one per value.")

    # The sum of each user's differences (U,) and its number of samples (U,), users in the order of their first sample.
    users = pd.factorize(np.asarray(user_ids))[0]
    sums, counts = np.bincount(users, weights=differences), np.bincount(users)
    if len(sums) < 2:
        raise ValueError(f"values_a has {len(sums)} users; expected at least 2.")

    def mean(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis) / counts.sum(axis)

    result = stats.bootstrap(  # 95 % is its default
        (sums, counts),
        mean,
        paired=True,
        n_resamples=num_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, 2**21 // len(sums)),  # at most 48 MB at a time
    )
    means = result.bootstrap_distribution
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (tail + 1) / (num_resamples + 1))
    interval = result.confidence_interval
    return BootstrapResult(float(differences.mean()), float(interval.low), float(interval.high), float(p_value))


def mean_interval(
    values: Sequence[float] | np.ndarray,
    user_ids: Sequence[Hashable] | None = None,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> list[float]:
    """
    The 95 % interval `[low, high]` of the mean of a recommender. Arguments as for [`paired_bootstrap`]; an interval
    needs fewer resamples than a small p-value.
    """
    result = paired_bootstrap(values, np.zeros(len(values)), user_ids, num_resamples, seed)
    return [result.low, result.high]
