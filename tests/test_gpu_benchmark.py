"""recipes/benchmarks/gpu.py on a tiny model and a CPU: the keys of its report, and that both passes agree."""

import json
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks"


@pytest.fixture(scope="module")
def report():
    arguments = (
        "--size tiny --device cpu --backend eager --dtype float32 --prompt_length 9 --num_beams 6 --items 500 "
        "--users 2 --history_length 6 --prompts 2 --candidates 2 --rounds 1 --batch_sizes 1 3 --json"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in ("gpu", "decode", "train"):
            patch.delitem(sys.modules, name, raising=False)
        import gpu

        printed = []
        patch.setattr("builtins.print", printed.append)
        gpu.main(arguments.split())
        for name in ("gpu", "decode", "train"):
            del sys.modules[name]
    return json.loads(printed[-1])


def test_the_bandwidth_is_measured(report):
    assert report["bandwidth_gb_per_s"] > 0.1


@pytest.mark.parametrize("batch", ["batch_1", "batch_3"])
def test_latency_is_compared_with_the_roofline(report, batch):
    serving = report["sizes"]["tiny"]["serving"][batch]
    assert serving["compiled_over_roofline"] == pytest.approx(serving["compiled_ms"] / serving["roofline_ms"])
    # The prompt, two latent steps, the last one with <|latent_end|>, and at most three levels of beams.
    assert 4 <= serving["passes"] <= 7


@pytest.mark.parametrize("batch", ["batch_1", "batch_3"])
def test_compiled_scores_are_those_of_eager(report, batch):
    assert report["sizes"]["tiny"]["serving"][batch]["largest_score_difference"] <= 1e-5


@pytest.mark.parametrize("stage", ["stage1", "stage2", "grpo"])
def test_training_speed_and_memory_are_reported(report, stage):
    training = report["sizes"]["tiny"]["training"][stage]
    assert set(training) == {"step_ms", "tokens_per_second", "samples_per_second", "peak_gib"}
    assert min(training.values()) > 0


def test_every_sample_of_the_users_is_trained_on(report):
    training = report["sizes"]["tiny"]["training"]
    samples = training["stage2"]["samples_per_second"] * training["stage2"]["step_ms"] / 1000
    assert samples == pytest.approx(2 * 5)
