"""The benchmark of the preparation, on a tiny shop."""

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


@pytest.fixture
def shop(benchmark, tmp_path):
    benchmark.write_shop(tmp_path, 2000, seed=0)
    return tmp_path


def test_the_shop_has_the_number_of_rows(shop):
    assert len((shop / "interactions.csv").read_text().splitlines()) == 2001


def test_a_step_is_measured_alone(benchmark, shop):
    measured = benchmark.measure(shop, "interactions")
    assert measured["step"] == "interactions"
    assert measured["seconds"] > 0
    assert 0.05 < measured["peak_gib"] < 8
    assert (shop / "data" / "items").exists()


def test_a_failing_step_is_named(benchmark, shop):
    with pytest.raises(SystemExit, match="samples"):
        benchmark.measure(shop, "samples")


@pytest.mark.slow
def test_every_step_is_measured(benchmark, capsys):
    benchmark.main(["--rows", "20000", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in report["steps"]] == ALL
    assert report["peak_gib"] == max(step["peak_gib"] for step in report["steps"])
    assert report["rows"] == 20_000
    assert 10_000 < report["interactions"] <= 20_000
    assert report["train_samples"] > 1000
