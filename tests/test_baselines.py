"""Popularity and Markov: by hand, against a slow count, and against reference numbers on real data."""

import numpy as np
import pytest

from lasar_hf.data import leave_one_out, read_lcrec, samples
from lasar_hf.evaluation import markov_ranking, popularity_ranking, ranking_metrics, ranks


TRAIN = [[0, 1, 2], [3, 1, 2], [3, 1, 4], [3, 0]]  # counts: 0:2 1:3 2:2 3:3 4:1 5:0


def test_popularity_by_hand():
    assert popularity_ranking(TRAIN, num_items=6, top_k=8).tolist() == [1, 3, 0, 2, 4, 5, -1, -1]
    assert popularity_ranking(TRAIN, num_items=6, top_k=2).tolist() == [1, 3]


def test_markov_by_hand():
    rankings = markov_ranking(TRAIN, contexts=[1, 3, 5, 1], num_items=6, top_k=4)
    assert rankings.tolist() == [
        [2, 4, 1, 3],  # 1 -> 2 twice, 1 -> 4 once, then by popularity, 1 itself included
        [1, 0, 3, 2],  # 3 -> 1 twice, 3 -> 0 once
        [1, 3, 0, 2],  # 5 has no successor
        [2, 4, 1, 3],
    ]


def test_markov_pads_beyond_the_catalogue():
    assert markov_ranking(TRAIN, [1], num_items=6, top_k=8).tolist() == [[2, 4, 1, 3, 0, 5, -1, -1]]


def test_markov_equals_a_slow_count():
    rng = np.random.default_rng(0)
    train = [rng.integers(15, size=rng.integers(1, 12)).tolist() for _ in range(60)]
    popularity = [sum(sequence.count(item) for sequence in train) for item in range(15)]
    for context, ranking in enumerate(markov_ranking(train, range(15), num_items=15, top_k=6)):
        pairs = [pair for sequence in train for pair in zip(sequence, sequence[1:], strict=False)]
        slow = sorted(range(15), key=lambda item: (-pairs.count((context, item)), -popularity[item], item))  # noqa: B023
        assert ranking.tolist() == slow[:6]


def test_training_items_outside_the_catalogue_are_refused():
    with pytest.raises(ValueError, match="train_sequences"):
        popularity_ranking(TRAIN, num_items=4, top_k=2)


def test_contexts_outside_the_catalogue_are_refused():
    with pytest.raises(ValueError, match="contexts"):
        markov_ranking(TRAIN, contexts=[1, -1], num_items=6, top_k=2)


@pytest.mark.parametrize(
    ("name", "part", "model", "reference"),
    [
        ("scientific", "test", "popularity", [0.0158, 0.0231, 0.0380, 0.0139, 0.0162, 0.0200]),
        ("scientific", "test", "markov", [0.0760, 0.0898, 0.1066, 0.0633, 0.0678, 0.0720]),
        ("scientific", "validation", "markov", [0.0920, 0.1116, 0.1324, 0.0751, 0.0814, 0.0867]),
        ("beauty", "test", "popularity", [0.0072, 0.0114, 0.0195, 0.0040, 0.0053, 0.0073]),
        ("beauty", "test", "markov", [0.0504, 0.0659, 0.0819, 0.0377, 0.0427, 0.0468]),
        ("instruments", "test", "popularity", [0.0277, 0.0468, 0.0722, 0.0162, 0.0223, 0.0286]),
        ("instruments", "test", "markov", [0.0669, 0.0801, 0.0982, 0.0545, 0.0588, 0.0633]),
    ],
)
def test_reference_numbers(shared_data, name, part, model, reference):
    interactions = read_lcrec(shared_data / name)
    split, num_items = leave_one_out(interactions), len(interactions.items)
    users = samples(split, part)
    if model == "popularity":
        rankings = np.tile(popularity_ranking(split.train, num_items, top_k=20), (len(users), 1))
    else:
        rankings = markov_ranking(split.train, [history[-1] for history in users["history"]], num_items, top_k=20)
    assert list(ranking_metrics(ranks(rankings, users["target"])).values()) == pytest.approx(reference, abs=6e-5)
