"""The benchmark of training, on a tiny model: its keys, and that both paths compute the same."""

import json
import runpy
from pathlib import Path


BENCHMARK = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks" / "train.py"


def test_one_run_measures_everything_and_the_paths_agree(capsys):
    sizes = "--layers 1 --hidden_size 64 --vocab_size 50 --prompt_length 24 --examples 2 --prompts 1 --candidates 2"
    runpy.run_path(str(BENCHMARK))["main"](f"{sizes} --depths 0 2 --repeats 1 --json".split())
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    speedups = {"grpo_speedup_vs_unshared", "grpo_speedup_vs_stock_trl"}
    assert all(report[name] > 0 for name in speedups | {"stage2_over_stage1_n0", "stage2_over_stage1_n2"})
    assert report["loss_difference"] <= 1e-5 and report["grad_difference"] <= 1e-5
