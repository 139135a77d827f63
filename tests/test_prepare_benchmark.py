"""The benchmark of preparation, on a tiny shop."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.preparing import ALL


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_is_measured_by_itself(benchmark, tmp_path):
    benchmark.write_shop(tmp_path, 2000, seed=0)
    assert len((tmp_path / "interactions.csv").read_text().splitlines()) == 2001
    measured = benchmark.measure(tmp_path, "interactions")
    assert measured["step"] == "interactions" and measured["seconds"] > 0 and 0.05 < measured["peak_gib"] < 8
    assert (tmp_path / "data" / "interactions" / "items.parquet").exists()
    with pytest.raises(SystemExit, match="Step samples failed"):
        benchmark.measure(tmp_path, "samples")


@pytest.mark.slow
def test_every_step_is_measured(benchmark, capsys):
    benchmark.main(["--rows", "20000", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in report["steps"]] == ALL
    assert report["peak_gib"] == max(step["peak_gib"] for step in report["steps"])
    assert 10_000 < report["interactions"] <= report["rows"] == 20_000 and report["train_samples"] > 1000
