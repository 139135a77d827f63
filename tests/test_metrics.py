"""Ranking metrics: against an independent implementation, by hand, and their errors."""

import json

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar_hf.evaluation import (
    RankingMetrics,
    comparison_table,
    evaluate_recommendations,
    hits_per_user,
    ndcg_per_user,
    ranking_metrics,
    ranks,
    repeat_share,
    save_report,
    score_predictions,
    slice_report,
    slices,
)


NUM_ITEMS = 12


def random_lists(seed: int, num_users: int, top_k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    predictions = np.stack([rng.permutation(NUM_ITEMS)[:top_k] for _ in range(num_users)])
    return predictions, rng.integers(NUM_ITEMS, size=num_users)


def test_ranks_by_hand():
    predictions = torch.tensor([[3, 1, 2], [3, 1, 2], [0, -1, -1], [-2, -2, 5]])
    assert ranks(predictions, torch.tensor([3, 2, 4, 5])).tolist() == [1.0, 3.0, np.inf, 3.0]


def test_metrics_by_hand():
    metrics = ranking_metrics(np.array([1.0, 3.0, 7.0, np.inf]), ks=(1, 5))
    assert metrics == pytest.approx({"HR@1": 0.25, "HR@5": 0.5, "NDCG@1": 0.25, "NDCG@5": (1 + 0.5) / 4})


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 10))
def test_metrics_equal_ir_measures(seed, k):
    predictions, references = random_lists(seed, num_users=7)
    judged = [ir_measures.Qrel(str(user), str(item), 1) for user, item in enumerate(references)]
    run = [
        ir_measures.ScoredDoc(str(user), str(item), -float(position))
        for user, items in enumerate(predictions)
        for position, item in enumerate(items)
    ]
    oracle = ir_measures.calc_aggregate([ir_measures.Success @ k, ir_measures.nDCG @ k], judged, run)
    ours = ranking_metrics(ranks(predictions, references), ks=(k,))
    assert ours[f"HR@{k}"] == pytest.approx(oracle[ir_measures.Success @ k])
    assert ours[f"NDCG@{k}"] == pytest.approx(oracle[ir_measures.nDCG @ k])


def test_means_of_per_user_values_are_the_metrics():
    target_ranks = ranks(*random_lists(0, num_users=50))
    metrics = ranking_metrics(target_ranks, ks=(5,))
    assert metrics == {"HR@5": hits_per_user(target_ranks, 5).mean(), "NDCG@5": ndcg_per_user(target_ranks, 5).mean()}


def test_invalid_entries_and_padding_are_counted_separately():
    row = score_predictions([[0, NUM_ITEMS, -2, -2], [1, -1, -1, -1]], [0, 2], NUM_ITEMS, ks=(1,))
    assert row == {"HR@1": 0.5, "NDCG@1": 0.5, "invalid_rate": 3 / 5, "pad_rate": 3 / 8, "n": 2}


@pytest.mark.parametrize(
    ("predictions", "references", "name"),
    [
        ([[0, 1], [4, 4]], [0, 1], r"predictions\[1\]"),  # the same item twice
        ([[0, 1], [4, -1]], [0, -1], r"references\[1\]"),
        ([[0, 1]], [NUM_ITEMS], r"references\[0\]"),
        ([[0, 1]], [0, 1], "references"),  # two targets for one list
        ([[0, 1], [2]], [0, 1], "predictions"),  # lists of different lengths
        ([[0.5, 1.0]], [0], "predictions"),
        ([0, 1], [0, 1], "predictions"),
        (np.zeros((0, 2), dtype=int), np.zeros(0, dtype=int), "predictions"),  # no users
        ([[0]], [0], "predictions"),  # shorter than the cut-off of 2
    ],
)
def test_wrong_input_is_named(predictions, references, name):
    with pytest.raises(ValueError, match=name):
        score_predictions(predictions, references, NUM_ITEMS, ks=(1, 2))


def test_metric_class_equals_function_over_batches_and_rounds(tmp_path):
    metric = RankingMetrics(NUM_ITEMS, ks=(5, 10), cache_dir=str(tmp_path))
    for seed in (0, 1):  # the second round must not see the first
        predictions, references = random_lists(seed, num_users=9)
        metric.add_batch(predictions=torch.tensor(predictions[:4]), references=torch.tensor(references[:4]))
        metric.add_batch(predictions=predictions[4:].tolist(), references=references[4:].tolist())
        assert metric.compute() == score_predictions(predictions, references, NUM_ITEMS, ks=(5, 10))


def test_metric_class_refuses_repeated_items(tmp_path):
    metric = RankingMetrics(NUM_ITEMS, ks=(2,), cache_dir=str(tmp_path))
    metric.add_batch(predictions=[[0, 1], [3, 3]], references=[0, 0])
    with pytest.raises(ValueError, match=r"predictions\[1\]"):
        metric.compute()


def test_report_row_has_depth_and_time_where_given():
    predictions, references = random_lists(0, num_users=4)
    plain = score_predictions(predictions, references, NUM_ITEMS, ks=(5,))
    row = evaluate_recommendations(
        predictions, references, NUM_ITEMS, latent_steps=torch.tensor([1, 2, 2, 8]), seconds=0.5, ks=(5,)
    )
    assert row == plain | {"mean_depth": 3.25, "ms_per_user": 125.0}


def test_report_row_without_depth_and_time():
    predictions, references = random_lists(0, num_users=4)
    row = evaluate_recommendations(predictions, references, NUM_ITEMS, ks=(5,))
    assert row == score_predictions(predictions, references, NUM_ITEMS, ks=(5,))


def test_repeats_by_hand():
    """The second list has padding, and the history item of the third is beyond the first two entries."""
    predictions, histories = [[0, 1, 2], [4, -1, -1], [5, 6, 7]], [[1, 9], [4], [7]]
    assert repeat_share(predictions, histories, k=2) == 2 / 5
    row = evaluate_recommendations(predictions, [0, 4, 1], NUM_ITEMS, ks=(1,), histories=histories)
    assert row["repeats"] == 3 / 7


def test_slices_by_hand():
    samples = {"history": [[0], [5, 1], [2, 0, 1], [7, 7, 7, 9]], "target": [1, 2, 0, 9]}
    parts = {name: users.tolist() for name, users in slices(samples, train=[[0, 1, 2], [1, 1, 1], [9]]).items()}
    assert parts == {
        "pair seen": [True, True, False, False],
        "pair unseen": [False, False, True, True],
        "history <= 2.5 items": [True, True, False, False],
        "history > 2.5 items": [False, False, True, True],
        "target <= 1 times": [False, True, True, True],
        "target > 1 times": [True, False, False, False],
    }


def test_slice_report_by_hand(tmp_path):
    parts = {"first": np.array([True, False]), "nobody": np.array([False, False])}
    report = slice_report({"x": [[3, 1], [2, 0]]}, [3, 0], parts)
    assert report["first"] == {"n": 1, "results": {"x": {"HR@10": 1.0, "NDCG@10": 1.0}}}
    assert report["all"]["results"]["x"]["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert report["nobody"] == {"n": 0}
    save_report(tmp_path, {"x": {"HR@10": 1.0}}, slices=report, notes=["One line."])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| first | 1 | 1.0000 / 1.0000 |" in text and "| nobody | 0 | – |" in text
    assert "* One line.\n" in text
    assert json.loads((tmp_path / "report.json").read_text())["slices"] == report


def test_latent_steps_must_be_one_per_user():
    predictions, references = random_lists(0, num_users=4)
    with pytest.raises(ValueError, match="latent_steps"):
        evaluate_recommendations(predictions, references, NUM_ITEMS, latent_steps=[1], ks=(5,))


def test_comparison_table_by_hand():
    rows = {"Markov": {"HR@10": 0.08976, "n": 5}, "a|b": {"HR@10": 0.5, "mean_depth": 2.0, "n": 5}}
    assert comparison_table(rows).splitlines() == [
        "| model | HR@10 | n | mean_depth |",
        "|---|---:|---:|---:|",
        "| Markov | 0.0898 | 5 | – |",
        r"| a\|b | 0.5000 | 5 | 2.00 |",
    ]


def test_save_report_writes_json_and_markdown(tmp_path):
    rows = {"x": {"HR@10": 0.25, "n": 4}}
    save_report(tmp_path / "new", rows, details={"seed": 0})
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == {"results": rows, "details": {"seed": 0}}
    assert (tmp_path / "new" / "report.md").read_text(encoding="utf-8") == comparison_table(rows)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]


def test_save_report_writes_nothing_for_nan(tmp_path):
    with pytest.raises(ValueError):
        save_report(tmp_path / "new", {"x": {"HR@10": float("nan")}})
    assert not (tmp_path / "new").exists()
