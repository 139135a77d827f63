"""recipes/eval.py: one process and two write the same report."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from lasar_hf.data import PreparedData
from tests.tiny import tiny_catalog, tiny_model


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("evaluate_recipe", ROOT / "recipes" / "eval.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and data of 23 users whose histories differ in length."""
    folder = tmp_path_factory.mktemp("evaluate")
    catalog = tiny_catalog()
    for part in (*tiny_model(), catalog):
        part.save_pretrained(folder / "checkpoint")
    rows = [
        {"user_id": f"user-{u}", "history": [(3 * u + step) % 20 for step in range(1 + u % 7)], "target": 5 * u % 20}
        for u in range(23)
    ]
    items = Dataset.from_dict({"item_id": catalog.item_ids, "codes": catalog.codes.tolist()})
    held_out = Dataset.from_list(rows)
    PreparedData(items, DatasetDict(train=held_out, validation=held_out, test=held_out), 4).save(folder / "data")
    return folder


def arguments(folder: Path, out: Path) -> dict:
    models = [f"direct={folder / 'checkpoint'}@0", f"policy={folder / 'checkpoint'}"]
    return dict(data_dir=str(folder / "data"), output_dir=str(out), models=models, batch_size=3, num_beams=8)


def report(out: Path) -> dict:
    """What the report says, but for the time it took and where it lies."""
    read = json.loads((out / "report.json").read_text())
    del read["details"]["arguments"]["output_dir"]
    for row in read["results"].values():
        row.pop("ms_per_user", None)
    return read


def test_processes_share_the_batches(recipe, folder, tmp_path, monkeypatch):
    """Two processes, one after the other, each recommend for some users, in the batches of one, whose work it is."""
    args = recipe.EvaluateArguments(**arguments(folder, tmp_path))
    data, batches = PreparedData.load(args.data_dir), []
    plain = recipe.LasarForGenerativeRec.recommend
    monkeypatch.setattr(
        recipe.LasarForGenerativeRec, "recommend",
        lambda self, ids, *rest, **named: (batches.append(ids.tolist()), plain(self, ids, *rest, **named))[1],
    )

    def evaluate(index: int, count: int) -> tuple[np.ndarray, list]:
        state = SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0, device="cpu")
        monkeypatch.setattr(recipe, "PartialState", lambda: state)
        batches.clear()
        items, _ = recipe.evaluate_model(args, data, data.samples["test"], str(folder / "checkpoint"), None)
        return items, batches[1:]  # the first one warms up

    (one, all_batches), (first, some), (second, others) = evaluate(0, 1), evaluate(0, 2), evaluate(1, 2)
    assert [len(batch) for batch in all_batches] == [3] * 7 + [2]
    assert (some, others) == (all_batches[::2], all_batches[1::2])
    assert (first[:, 0] >= 0).sum() == 12 and np.array_equal(np.maximum(first, second), one)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_report_what_one_reports(recipe, folder, tmp_path):
    args = arguments(folder, tmp_path / "one")
    recipe.main(recipe.EvaluateArguments(**args))
    options = ["--models", *args.pop("models")]
    args["output_dir"] = str(tmp_path / "two")
    options += [part for name, value in args.items() for part in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, "recipes/eval.py", *options], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| policy |") == 1  # each process alone would evaluate everyone, and print it
    assert report(tmp_path / "two") == report(tmp_path / "one")
