"""Every block of README.md: what a newcomer copies must run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lasar_hf.data import toy_shop


ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "bash"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the quickstart ran, with a table of interactions."""
    folder = tmp_path_factory.mktemp("readme")
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py")], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"^\[ *\d+ s\]", run.stdout, re.M)) <= 7 and "{'loss'" not in run.stdout
    assert "Warning" not in run.stderr
    for name in ("model/README.md", "model/sid_catalog.json", "quickstart.png", "report.json"):
        assert (folder / "outputs" / "quickstart" / name).exists()
    shop = toy_shop(num_users=60, num_items=48, seed=3)
    rows = [f"{user},item{item},{time}" for user, history in zip(shop.user_ids, shop.histories, strict=True)
            for time, item in enumerate(history, start=10)]  # fmt: skip
    (folder / "ratings.csv").write_text("\n".join(["user,item,time", *rows]) + "\n")
    titles = [f'item{item},"{part["title"]}"' for item, part in enumerate(shop.items)]
    (folder / "items.csv").write_text("\n".join(["item,title", *titles]) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(folder, number):
    run = subprocess.run([sys.executable, "-c", PYTHON[number]], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_own_data_in_three_commands(folder):
    (block,) = [text for text in SHELL if "lasar prepare" in text]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    run = subprocess.run(["bash", "-e", "-c", block], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("Volume") == 10


def test_every_block_is_known():
    # Installing and the tests themselves are the work of .ci/run.
    assert len(PYTHON) == 2 and len(SHELL) == 2
