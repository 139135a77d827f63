"""Paired bootstrap: finds a real difference, not one by chance, and uses the pairing."""

import numpy as np
import pytest

from lasar_hf.evaluation import mean_interval, paired_bootstrap


def test_interval_matches_the_normal_one():
    rng = np.random.default_rng(0)
    base = rng.random(400)
    better = base + 0.02 + 0.1 * rng.standard_normal(400)
    result = paired_bootstrap(better, base, num_resamples=2000)
    spread = 1.96 * (better - base).std() / 20
    assert result.difference == pytest.approx((better - base).mean())
    assert [result.low, result.high] == pytest.approx(
        [result.difference - spread, result.difference + spread], abs=0.1 * spread
    )
    assert result.p_value < 0.01


def test_pairing_finds_what_unpaired_values_hide():
    base = np.linspace(0.0, 1.0, 100)
    result = paired_bootstrap(base + 0.01 * (1 + np.arange(100) % 2), base, num_resamples=500)
    assert 0.01 < result.low < result.high < 0.02
    assert result.p_value == pytest.approx(2 / 501)


def test_equal_recommenders_have_a_p_value_of_one():
    values = np.random.default_rng(0).random(50)
    same = paired_bootstrap(values, values, num_resamples=200)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_swapping_changes_the_sign():
    values = np.random.default_rng(0).random(50)
    result = paired_bootstrap(values, values[::-1] ** 2, num_resamples=200)
    swapped = paired_bootstrap(values[::-1] ** 2, values, num_resamples=200)
    assert (result.low, result.high, result.p_value) == pytest.approx((-swapped.high, -swapped.low, swapped.p_value))


def test_false_alarms_are_as_rare_as_promised():
    rng = np.random.default_rng(1)
    p_values = [paired_bootstrap(*rng.random((2, 60)), num_resamples=400, seed=seed).p_value for seed in range(200)]
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.10


def null_rows(rng, num_users=100):
    """Two equal recommenders on users with one to nine rows each; the rows of a user are alike."""
    users = np.repeat([f"u{user}" for user in range(num_users)], 1 + np.arange(num_users) % 9)
    _, user_index = np.unique(users, return_inverse=True)
    values = rng.standard_normal((2, num_users))[:, user_index] + 0.3 * rng.standard_normal((2, len(users)))
    return users, values


@pytest.mark.parametrize(("by_user", "low", "high"), [(True, 0.02, 0.09), (False, 0.2, 1.0)])
def test_false_alarms_are_rare_only_if_users_are_drawn(by_user, low, high):
    rng = np.random.default_rng(2)
    p_values = []
    for seed in range(200):
        users, values = null_rows(rng)
        p_values.append(paired_bootstrap(*values, users if by_user else None, num_resamples=400, seed=seed).p_value)
    assert low < np.mean(np.array(p_values) < 0.05) < high


def test_the_difference_is_a_mean_over_rows():
    assert paired_bootstrap([3.0, 0.0, 0.0], [0.0, 0.0, 0.0], ["a", "b", "b"], num_resamples=50).difference == 1.0


def test_the_interval_is_that_of_a_mean_over_rows():
    """50 users with one row of 1, and 50 users with nine rows of 0."""
    values, users = np.repeat([1.0, 0.0], [50, 450]), [*range(50), *np.repeat(range(50, 100), 9)]
    result = paired_bootstrap(values, np.zeros(500), users, num_resamples=200)
    assert 0.05 < result.low < 0.1 < result.high < 0.15


@pytest.mark.parametrize("num_users", [30, 500])
def test_one_row_per_user_gives_the_numbers_of_rows(num_users):
    rng = np.random.default_rng(4)
    values, users = rng.random((2, num_users)), rng.permutation(num_users).astype(str)
    assert paired_bootstrap(*values, users, num_resamples=200) == paired_bootstrap(*values, num_resamples=200)


def test_one_row_per_user_gives_the_numbers_of_earlier_versions():
    rng = np.random.default_rng(3)
    values = [(rng.random(30) < share).astype(float) for share in (0.1, 0.12)]
    result = paired_bootstrap(*values, range(30), num_resamples=500)
    assert (result.low, result.high, result.p_value) == (-0.1, 0.23333333333333334, 0.5828343313373253)


@pytest.mark.parametrize("users", [["a", "a", "a"], ["a", "b"]], ids=["one user", "too few"])
def test_wrong_users_are_refused(users):
    with pytest.raises(ValueError, match="user"):
        paired_bootstrap([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], users)


def test_equal_seeds_give_equal_results():
    values = np.random.default_rng(0).random((2, 30))
    assert paired_bootstrap(*values, num_resamples=100) == paired_bootstrap(*values, num_resamples=100)


def test_other_seeds_give_other_results():
    values = np.random.default_rng(0).random((2, 30))
    assert paired_bootstrap(*values, num_resamples=100) != paired_bootstrap(*values, num_resamples=100, seed=1)


@pytest.mark.parametrize(("values_a", "values_b"), [([1.0, 2.0], [1.0]), ([1.0], [1.0]), ([1.0, 2.0], [1.0, np.nan])])
def test_wrong_input_is_refused(values_a, values_b):
    with pytest.raises(ValueError, match="values_a"):
        paired_bootstrap(values_a, values_b)


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
