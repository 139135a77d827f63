"""The benchmark of the quantizer on few points: measures, ratios, points, and a missing faiss."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest


BENCHMARK = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks" / "quantize.py"
SMALL = ["--points", "300", "--dim", "8", "--levels", "3", "--codes", "4"]


class FakeQuantizer:
    """Replaces `faiss.ResidualQuantizer`: its codes are row numbers, and each coordinate is off by `1 / beam`."""

    def __init__(self, width, levels, bits):
        assert (width, levels, 2**bits) == (8, 3, 4)
        self.max_beam_size = 5

    def train(self, points):
        self.points = points

    def compute_codes(self, points):
        return np.arange(len(points))

    def decode(self, codes):
        return self.points[codes] + 1 / self.max_beam_size


def test_measures_and_ratios(monkeypatch, capsys):
    threads = []
    stand_in = types.SimpleNamespace(
        ResidualQuantizer=FakeQuantizer, omp_set_num_threads=threads.append, __version__="0"
    )
    monkeypatch.setitem(sys.modules, "faiss", stand_in)
    runpy.run_path(str(BENCHMARK))["main"]([*SMALL, "--collisions", "40", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert set(threads) == {result["threads"]}
    assert result["error_faiss"] == pytest.approx(8 / 25)
    assert result["error_faiss_greedy"] == pytest.approx(8)
    for name in ("faiss", "faiss_greedy"):
        assert result[f"error_over_{name}"] == pytest.approx(result["error_ours"] / result[f"error_{name}"])
        assert result[f"time_over_{name}"] == pytest.approx(result["seconds_ours"] / result[f"seconds_{name}"])
    assert result["collisions_before"] > result["collisions_after"] == 0
    assert result["collisions_moved"] > 0
    assert result["collisions_peak_gib"] > 0.05


def test_points(tmp_path):
    make_points = runpy.run_path(str(BENCHMARK))["make_points"]
    mixture, gaussian = (make_points(data, 200, 8, seed=0) for data in ("mixture", "gaussian"))
    np.testing.assert_array_equal(mixture, make_points("mixture", 200, 8, seed=0))
    np.testing.assert_allclose(np.linalg.norm(mixture, axis=1), 1, rtol=1e-5)
    assert abs(gaussian.std() - 1) < 0.1
    assert gaussian.dtype == mixture.dtype == np.float32
    np.save(tmp_path / "x.npy", gaussian.astype(np.float64))
    np.testing.assert_array_equal(make_points(str(tmp_path / "x.npy"), 0, 0, 0), gaussian)


def test_codes_must_be_a_power_of_two(capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(BENCHMARK))["main"](["--codes", "300"])
    assert "--codes is 300" in capsys.readouterr().err


def test_missing_faiss_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SystemExit, match=r"faiss.*lasar_hf\[embed\]"):
        runpy.run_path(str(BENCHMARK))["main"](SMALL)
