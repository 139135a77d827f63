"""Ranking metrics: against an independent implementation, by hand, under two processes, and their errors."""

import json
import subprocess
import sys
import time
from pathlib import Path

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
    save_report,
    score_predictions,
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
        ir_measures.ScoredDoc(str(user), str(item), -float(place))
        for user, row in enumerate(predictions)
        for place, item in enumerate(row)
    ]
    oracle = ir_measures.calc_aggregate([ir_measures.Success @ k, ir_measures.nDCG @ k], judged, run)
    ours = ranking_metrics(ranks(predictions, references), ks=(k,))
    assert ours[f"HR@{k}"] == pytest.approx(oracle[ir_measures.Success @ k])
    assert ours[f"NDCG@{k}"] == pytest.approx(oracle[ir_measures.nDCG @ k])


def test_means_of_per_user_values_are_the_metrics():
    target_ranks = ranks(*random_lists(0, num_users=50))
    metrics = ranking_metrics(target_ranks, ks=(5,))
    assert metrics == {"HR@5": hits_per_user(target_ranks, 5).mean(), "NDCG@5": ndcg_per_user(target_ranks, 5).mean()}


def test_entries_that_are_no_item_and_pads_are_counted_apart():
    row = score_predictions([[0, NUM_ITEMS, -2, -2], [1, -1, -1, -1]], [0, 2], NUM_ITEMS, ks=(1,))
    assert row == {"HR@1": 0.5, "NDCG@1": 0.5, "invalid_rate": 3 / 5, "pad_rate": 3 / 8, "n": 2}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[0, 1], [4, 4]], [0, 1], r"row 1 of predictions is \[4, 4\]: an item may be returned once only"),
        ([[0, 1], [4, -1]], [0, -1], "row 1 of references is -1"),
        ([[0, 1]], [NUM_ITEMS], f"row 0 of references is {NUM_ITEMS}: the catalogue has {NUM_ITEMS} items"),
        ([[0, 1]], [0, 1], "1 rows of predictions for 2 references"),
        ([[0, 1], [2]], [0, 1], "rows of predictions differ in length"),
        ([[0.5, 1.0]], [0], "predictions must be integer item rows, not float64"),
        ([0, 1], [0, 1], "predictions must have 2 axes"),
        (np.zeros((0, 2), dtype=int), np.zeros(0, dtype=int), "no users to evaluate"),
        ([[0]], [0], "lists of 1 items are too short for a cut-off of 2"),
    ],
)
def test_wrong_input_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score_predictions(predictions, references, NUM_ITEMS, ks=(1, 2))


def test_metric_class_equals_function_over_batches_and_rounds(tmp_path):
    metric = RankingMetrics(NUM_ITEMS, ks=(5, 10), cache_dir=str(tmp_path))
    for seed in (0, 1):  # the second round must not see the first
        predictions, references = random_lists(seed, num_users=9)
        metric.add_batch(predictions=torch.tensor(predictions[:4]), references=torch.tensor(references[:4]))
        metric.add_batch(predictions=predictions[4:].tolist(), references=references[4:].tolist())
        assert metric.compute() == score_predictions(predictions, references, NUM_ITEMS, ks=(5, 10))
    assert metric.compute(predictions=predictions, references=references)["n"] == 9


def test_metric_class_stores_nothing_of_a_refused_batch(tmp_path):
    metric = RankingMetrics(NUM_ITEMS, ks=(2,), cache_dir=str(tmp_path))
    metric.add_batch(predictions=[[0, 1]], references=[0])
    with pytest.raises(ValueError, match="row 1 of predictions"):
        metric.add_batch(predictions=[[0, 1], [3, 3]], references=[0, 0])
    assert metric.compute()["n"] == 1


def test_several_processes_need_a_name():
    with pytest.raises(ValueError, match="experiment_id"):
        RankingMetrics(NUM_ITEMS, num_process=2, process_id=0)


def take_part(process: int, cache: str, rounds: list) -> list:
    """What one of two processes does: its batches of each round, then compute."""
    metric = RankingMetrics(
        NUM_ITEMS, ks=(5, 10), num_process=2, process_id=process, experiment_id="two", cache_dir=cache
    )
    results = []
    for parts in rounds:
        for predictions, references in parts[process]:
            metric.add_batch(predictions=predictions, references=references)
        time.sleep(0.3 * (process == 0))  # process 1 runs ahead into the next round
        results.append(metric.compute())
    return results


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path):
    batches = [[part.tolist() for part in random_lists(seed, num_users=5 + seed)] for seed in range(5)]
    # In the second round process 1 has no users, in the third process 0 has none.
    rounds = [(batches[:2], batches[2:3]), (batches[3:4], []), ([], batches[4:])]
    call = f"from tests.test_metrics import take_part; print(take_part(1, {str(tmp_path)!r}, {rounds!r}))"
    root = Path(__file__).resolve().parents[1]
    other = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        results = take_part(0, str(tmp_path), rounds)
        assert other.communicate(timeout=100)[0].splitlines()[-1] == "[None, None, None]"
    finally:
        other.kill()
    for result, parts in zip(results, rounds, strict=True):
        together = [batch for part in parts for batch in part]
        predictions = np.concatenate([batch[0] for batch in together])
        references = np.concatenate([batch[1] for batch in together])
        assert result == pytest.approx(score_predictions(predictions, references, NUM_ITEMS, ks=(5, 10)))


def test_report_row_has_depth_and_time_only_where_given():
    predictions, references = random_lists(0, num_users=4)
    plain = evaluate_recommendations(predictions, references, NUM_ITEMS, ks=(5,))
    assert plain == score_predictions(predictions, references, NUM_ITEMS, ks=(5,))
    full = evaluate_recommendations(
        predictions, references, NUM_ITEMS, latent_steps=torch.tensor([1, 2, 2, 8]), seconds=0.5, ks=(5,)
    )
    assert full == plain | {"mean_depth": 3.25, "ms_per_user": 125.0}
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


def test_save_report_writes_both_files_or_neither(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_report(folder, {"x": {"HR@10": float("nan")}})
    assert not folder.exists()
    rows = {"x": {"HR@10": 0.25, "n": 4}}
    save_report(folder, rows, details={"seed": 0})
    assert json.loads((folder / "report.json").read_text()) == {"results": rows, "details": {"seed": 0}}
    assert (folder / "report.md").read_text(encoding="utf-8") == comparison_table(rows)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md"]
