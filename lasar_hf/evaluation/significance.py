"""Is the difference between two recommenders more than chance? Paired bootstrap over users (METHOD, protocol)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class BootstrapResult:
    """
    Outcome of [`paired_bootstrap`].

    Args:
        difference (`float`): mean of `a` minus mean of `b`.
        low (`float`): lower end of the confidence interval of the difference.
        high (`float`): upper end of the confidence interval of the difference.
        p_value (`float`): two-sided.
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    values_a: Sequence[float] | np.ndarray,
    values_b: Sequence[float] | np.ndarray,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence_level: float = 0.95,
) -> BootstrapResult:
    """
    Percentile bootstrap of the mean difference between two recommenders on the same users.

    Users are drawn with replacement, each with both of its values (Efron and Tibshirani, 1993). The p-value inverts
    the interval: it is below `1 - confidence_level` where the interval excludes 0, but never below
    `2 / (num_resamples + 1)`.

    Args:
        values_a (`(U,)` float): a metric for each user, [`ndcg_per_user`] say.
        values_b (`(U,)` float): the same metric of the other recommender, users in the same order.
        num_resamples (`int`, *optional*, defaults to `10000`): bootstrap samples.
        seed (`int`, *optional*, defaults to `0`): of the resampling.
        confidence_level (`float`, *optional*, defaults to `0.95`): of the interval.

    Raises:
        `ValueError`: arrays of different length, fewer than two users, or a value that is not finite.
    """
    values_a, values_b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if values_a.ndim != 1 or values_a.shape != values_b.shape:
        raise ValueError(f"values_a {values_a.shape} and values_b {values_b.shape} must be one value per user each")
    if len(values_a) < 2:
        raise ValueError(f"a bootstrap over users needs at least 2 users, not {len(values_a)}")
    differences = values_a - values_b
    if not np.isfinite(differences).all():
        raise ValueError(f"user {int((~np.isfinite(differences)).argmax())} has a value that is not finite")

    result = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, 2**22 // len(differences)),  # 32 MB at a time
        confidence_level=confidence_level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    means = result.bootstrap_distribution
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return BootstrapResult(
        difference=float(differences.mean()),
        low=float(result.confidence_interval.low),
        high=float(result.confidence_interval.high),
        p_value=float(min(1.0, 2 * (tail + 1) / (num_resamples + 1))),
    )
