"""Baselines: by hand, against slow counts, ties, exclusion of the history, tuning, and numbers on real data."""

import numpy as np
import pytest
from scipy import sparse

from lasar_hf.data import leave_one_out, read_lcrec, samples
from lasar_hf.data.splits import drawn
from lasar_hf.evaluation import (
    BASELINES,
    baseline_rankings,
    baselines,
    compare_exclusion,
    ease_matrix,
    ease_ranking,
    has_sasrec,
    item_knn_matrix,
    item_knn_ranking,
    markov_ranking,
    matrix_ranking,
    popularity_ranking,
    ranking_metrics,
    ranks,
    repeat_share,
    sasrec_ranking,
    tune,
)


TRAIN = [[0, 1, 2], [3, 1, 2], [3, 1, 4], [3, 0]]  # counts: 0:2 1:3 2:2 3:3 4:1 5:0
RANKINGS = [popularity_ranking, markov_ranking, item_knn_ranking, ease_ranking]


def random_sequences(seed: int, num_users: int, num_items: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(num_items, size=rng.integers(1, 12)).tolist() for _ in range(num_users)]


def test_popularity_by_hand():
    rankings = popularity_ranking(TRAIN, [[1], [2, 3]], num_items=6, top_k=8)
    assert rankings.tolist() == 2 * [[1, 3, 0, 2, 4, 5, -1, -1]]


def test_popularity_without_the_history():
    rankings = popularity_ranking(TRAIN, [[1], [2, 3], []], num_items=6, top_k=4, exclude_history=True)
    assert rankings.tolist() == [[3, 0, 2, 4], [1, 0, 4, 5], [1, 3, 0, 2]]


def test_markov_by_hand():
    rankings = markov_ranking(TRAIN, [[2, 1], [3], [5], [1]], num_items=6, top_k=4)
    assert rankings.tolist() == [
        [2, 4, 1, 3],  # 1 -> 2 twice, 1 -> 4 once, then by popularity, 1 itself included
        [1, 0, 3, 2],  # 3 -> 1 twice, 3 -> 0 once
        [1, 3, 0, 2],  # 5 has no successor
        [2, 4, 1, 3],
    ]


def test_markov_without_the_history():
    rankings = markov_ranking(TRAIN, [[2, 1], [0, 1, 3]], num_items=6, top_k=5, exclude_history=True)
    assert rankings.tolist() == [[4, 3, 0, 5, -1], [2, 4, 5, -1, -1]]


def test_markov_equals_a_slow_count():
    train = random_sequences(0, num_users=60, num_items=15)
    popularity = [sum(sequence.count(item) for sequence in train) for item in range(15)]
    pairs = [pair for sequence in train for pair in zip(sequence, sequence[1:], strict=False)]
    for context, ranking in enumerate(markov_ranking(train, [[item] for item in range(15)], num_items=15, top_k=6)):
        slow = sorted(range(15), key=lambda item: (-pairs.count((context, item)), -popularity[item], item))  # noqa: B023
        assert ranking.tolist() == slow[:6]


def test_item_knn_matrix_equals_its_formula():
    train, num_items = random_sequences(1, num_users=30, num_items=9), 10  # item 9 is in no sequence
    pairs, popularity = np.zeros((num_items, num_items)), np.zeros(num_items)
    for sequence in train:
        for place, item in enumerate(sequence):
            popularity[item] += 1
            for gap, other in enumerate(sequence[place + 1 : place + 4], start=1):
                pairs[item, other] += 0.9 ** (gap - 1)
    pairs = pairs + 0.25 * pairs.T
    scale = (popularity + 5.0) ** -0.5
    matrix = item_knn_matrix(train, num_items, window=3, gap_decay=0.9, mirror=0.25, shrinkage=5.0)
    assert sparse.issparse(matrix) and matrix.format == "csr" and (matrix.data > 0).all()
    assert np.allclose(matrix.toarray(), scale[:, None] * pairs * scale)


def test_ease_matrix_is_the_ridge_regression():
    """Each column predicts its item from the others, by the normal equations without that item."""
    train, num_items = random_sequences(2, num_users=40, num_items=8), 8
    table = np.zeros((len(train), num_items))
    for user, sequence in enumerate(train):
        table[user, sequence] = 1.0
    weights = ease_matrix(train, num_items, regularization=3.0)
    for item in range(num_items):
        others = [other for other in range(num_items) if other != item]
        normal = table[:, others].T @ table[:, others] + 3.0 * np.eye(num_items - 1)
        expected = np.linalg.solve(normal, table[:, others].T @ table[:, item])
        assert np.allclose(weights[others, item], expected, atol=1e-4) and weights[item, item] == 0


def test_ease_refuses_large_catalogues():
    with pytest.raises(ValueError, match="20001 items"):
        ease_ranking(TRAIN, [[0]], num_items=20_001, top_k=2)


@pytest.mark.parametrize("to_scores", [sparse.csr_array, np.asarray])
@pytest.mark.parametrize("exclude", [False, True])
def test_matrix_ranking_equals_a_slow_ranking(monkeypatch, to_scores, exclude):
    """Scores from a set of three numbers, so that many tie, and blocks of few users."""
    monkeypatch.setattr(baselines, "BLOCK_SIZE", 30)
    rng, num_items = np.random.default_rng(3), 12
    train, histories = random_sequences(4, 20, num_items), random_sequences(5, 25, num_items)
    matrix = rng.integers(3, size=(num_items, num_items)).astype(float)
    popularity = np.bincount(np.concatenate(train), minlength=num_items)
    rankings = matrix_ranking(to_scores(matrix), train, histories, 10, 0.5, exclude)
    for history, ranking in zip(histories, rankings, strict=True):
        scores = sum(0.5**age * matrix[item] for age, item in enumerate(reversed(history)))
        items = [item for item in range(num_items) if not (exclude and item in history)]
        slow = sorted(items, key=lambda item: (-scores[item], -popularity[item], item))[:10]  # noqa: B023
        assert ranking.tolist() == slow + [-1] * (10 - len(slow))


@pytest.mark.parametrize("ranking", RANKINGS)
def test_no_history_item_is_in_a_list_that_excludes_them(ranking):
    train, histories = random_sequences(6, 40, 20), random_sequences(7, 15, 20)
    assert repeat_share(ranking(train, histories, 20, 10, exclude_history=True), histories) == 0
    assert repeat_share(ranking(train, histories, 20, 10), histories) > 0


@pytest.mark.parametrize("ranking", RANKINGS)
def test_items_outside_the_catalogue_are_refused(ranking):
    with pytest.raises(ValueError, match="train_sequences"):
        ranking(TRAIN, [[1]], num_items=4, top_k=2)
    with pytest.raises(ValueError, match="histories"):
        ranking(TRAIN, [[1], [-1]], num_items=6, top_k=2)


def test_tuning_finds_the_window():
    """Each item is followed two places later by its partner, so a window of 1 sees nothing."""
    rng = np.random.default_rng(8)
    train = [[item, int(rng.integers(20, 40)), (item + 1) % 20] for item in rng.integers(20, size=200).tolist()]
    histories = [[item, int(rng.integers(20, 40))] for item in range(20)]
    targets = [(item + 1) % 20 for item in range(20)]
    grid = {"window": (1, 2)}
    tuning = tune(item_knn_matrix, grid, train, histories, targets, 40, exclude_history=True)
    assert tuning.settings["window"] in (2, 8) and tuning.validation_ndcg > 0.5
    assert tuning.settings_tried == 3 * 3 and tuning.users == 20
    ranking = item_knn_ranking(train, histories, 40, 10, True, **tuning.settings)
    assert ranking_metrics(ranks(ranking, targets), ks=(10,))["NDCG@10"] == pytest.approx(tuning.validation_ndcg)


def test_tuning_measures_on_a_part_of_many_users():
    histories = random_sequences(9, 50, 10)
    tuning = tune(ease_matrix, {"regularization": (1.0,)}, histories, histories, [0] * 50, 10, False, max_users=7)
    assert tuning.users == 7


def test_exclusion_is_compared_on_users_who_are_drawn():
    """The first ten of twenty users take again what they have, the others something new."""
    train = [[user, 20 + user] for user in range(20)]
    histories = [[user, 20 + user] for user in range(20)]
    targets = [*range(10), *((user + 1) % 20 for user in range(10, 20))]
    users = drawn(20, 8)
    few = compare_exclusion(train, histories, targets, 40, max_users=8)
    parts = [([histories[i] for i in part], [targets[i] for i in part]) for part in (users, range(8))]
    expected, first = (compare_exclusion(train, *part, 40) for part in parts)
    assert few == expected != first


def test_baselines_say_how_they_were_tuned(monkeypatch):
    train = random_sequences(10, 30, 12)
    validation = {"history": train, "target": [0] * 30}
    rankings, notes = baseline_rankings(train, train[:4], 12, 10, True, validation)
    names = [name for name in BASELINES if name != "memory alone"]  # which needs the texts of the items
    assert list(rankings) == names[: 4 + has_sasrec()] and list(notes) == names
    assert notes["item-kNN"]["settings_tried"] == 27
    monkeypatch.setattr("lasar_hf.evaluation.tuning.EASE_MAX_ITEMS", 11)
    rankings, notes = baseline_rankings(train, train[:4], 12, 10, True, validation)
    assert "EASE" not in rankings and "12 > 11 items" in notes["EASE"]


def test_sasrec_names_its_package(monkeypatch):
    monkeypatch.setattr("lasar_hf.evaluation.sasrec.has_sasrec", lambda: False)
    with pytest.raises(ImportError, match="cornac"):
        sasrec_ranking(TRAIN, [[0]], num_items=6, top_k=2)


@pytest.mark.slow
@pytest.mark.skipif(not has_sasrec(), reason="cornac is not installed")
def test_sasrec_keeps_the_best_epoch_on_validation():
    train = [[(start + step) % 10 for step in range(6)] for start in range(10)] * 30
    histories = [[item, (item + 1) % 10] for item in range(10)]
    next_items = [*range(2, 10), 0, 1]
    follows = {"history": [*histories, [1, 2]], "target": [*next_items, 10]}  # item 10 is unknown
    backwards = {"history": histories, "target": [(item - 1) % 10 for item in range(10)]}
    runs = [sasrec_ranking(train, histories, 11, 10, validation=part) for part in (None, follows, backwards)]
    assert [ranking[0] for ranking in runs[1]] == next_items
    # Where the validation targets come first is worse for the next items: an early epoch is kept.
    places = [
        np.mean([list(ranking).index(item) for ranking, item in zip(run, next_items, strict=True)]) for run in runs
    ]
    assert places[2] > places[1] == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_sasrec(), reason="cornac is not installed")
def test_sasrec_learns_who_follows_whom():
    train = [[(start + step) % 10 for step in range(6)] for start in range(10)] * 30
    histories = [[item, (item + 1) % 10] for item in range(10)]
    rankings = sasrec_ranking(train, histories, 11, 11, exclude_history=True, num_epochs=15)
    assert [ranking[0] for ranking in rankings] == [(item + 2) % 10 for item in range(10)]
    assert (rankings[:, 8] == 10).all() and (rankings[:, 9:] == -1).all()  # item 10 is in no sequence


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
    ranking = {"popularity": popularity_ranking, "markov": markov_ranking}[model]
    rankings = ranking(split.train, users["history"], num_items, top_k=20)
    assert list(ranking_metrics(ranks(rankings, users["target"])).values()) == pytest.approx(reference, abs=6e-5)


@pytest.mark.parametrize(
    ("part", "ranking", "reference"),
    [
        ("validation", markov_ranking, [0.1124, 0.0822]),
        ("validation", item_knn_ranking, [0.1375, 0.0977]),
        ("test", markov_ranking, [0.0903, 0.0684]),
        ("test", item_knn_ranking, [0.1186, 0.0862]),
        pytest.param("test", ease_ranking, [0.1117, 0.0773], marks=pytest.mark.slow),
    ],
)
def test_reference_numbers_without_the_history(shared_data, part, ranking, reference):
    interactions = read_lcrec(shared_data / "scientific")
    split = leave_one_out(interactions)
    users = samples(split, part)
    rankings = ranking(split.train, users["history"], len(interactions.items), 10, exclude_history=True)
    metrics = ranking_metrics(ranks(rankings, users["target"]), ks=(10,))
    assert list(metrics.values()) == pytest.approx(reference, abs=2e-4)
