"""Paired bootstrap over users: is the difference between two recommenders larger than chance?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
    num_resamples: int = 10_000,
    seed: int = 0,
) -> BootstrapResult:
    """
    Percentile bootstrap of the mean difference between two recommenders on the same users.

    Users are drawn with replacement, each with both values (Efron and Tibshirani, 1993). The p-value inverts the 95 %
    interval; the smallest possible one is `2 / (num_resamples + 1)`.

    Args:
        values_a, values_b (`Sequence[float]` of length `U`):
            A metric of the same two or more users under two recommenders, such as [`ndcg_per_user`].
        num_resamples, seed (`int`, *optional*, default to `10000` and `0`):
            Number of bootstrap samples and their seed.
    """
    values_a, values_b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if values_a.ndim != 1 or values_a.shape != values_b.shape:
        raise ValueError(f"values_a {values_a.shape} and values_b {values_b.shape} must have one value per user.")
    if len(values_a) < 2:
        raise ValueError(f"values_a has {len(values_a)} users; expected at least 2.")
    differences = values_a - values_b
    if not np.isfinite(differences).all():
        user = int((~np.isfinite(differences)).argmax())
        raise ValueError(f"values_a[{user}] or values_b[{user}] is not finite.")

    result = stats.bootstrap(  # 95 % is its default
        (differences,), np.mean, n_resamples=num_resamples, method="percentile", rng=np.random.default_rng(seed),
        batch=max(1, 2**22 // len(differences)),  # at most 32 MB at a time
    )
    means = result.bootstrap_distribution
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (tail + 1) / (num_resamples + 1))
    interval = result.confidence_interval
    return BootstrapResult(float(differences.mean()), float(interval.low), float(interval.high), float(p_value))
