"""The load test of the server on a tiny model: every answer is the recommender's, and others are noticed."""

import json
import runpy
from pathlib import Path

import pytest


BENCHMARK = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks" / "serve.py"


def answer(*items: tuple[str, float], latent_steps: int = 2) -> dict:
    return {"items": [{"item_id": item, "score": score} for item, score in items], "latent_steps": latent_steps}


@pytest.mark.parametrize(
    "other, is_different",
    [
        (answer(("a", -1.0), ("b", -1.1), ("c", -2.0)), False),
        (answer(("b", -1.0), ("a", -1.1), ("c", -2.0)), False),  # two items have changed places
        (answer(("b", -1.0), ("c", -1.1), ("a", -2.0)), True),
        (answer(("a", -1.0), ("b", -1.1), ("c", -2.1)), True),
        (answer(("a", -1.0), ("b", -1.1), ("c", -2.0), latent_steps=3), True),
    ],
)
def test_answers_of_another_user_are_noticed(other, is_different):
    expected = answer(("a", -1.0), ("b", -1.1), ("c", -2.0))
    assert runpy.run_path(str(BENCHMARK))["is_different"](other, expected) == is_different


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up(capsys):
    sizes = "--device cpu --items 50 --hidden_size 16 --clients 3 --requests 24"
    runpy.run_path(str(BENCHMARK))["main"](f"{sizes} --json".split())
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [report[name]["requests"] for name in ("1_clients", "3_clients")] == [6, 24]
    assert all(report[name]["wrong"] == 0 and report[name]["p95_ms"] > 0 for name in ("1_clients", "3_clients"))
    assert report["1_clients"]["users_per_batch"] == 1 < report["3_clients"]["users_per_batch"]
