"""Two processes train as one does: DDP, ZeRO-2, ZeRO-3 and FSDP2, every stage, with ranks whose depths differ."""

import importlib.util
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from lasar_hf.files import read_json
from tests import distributed_worker
from tests.distributed_worker import EXTRA, MATRIX, UNEVEN


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FSDP2 = ["stage2/fsdp2", "grpo/fsdp2"]
USERS = "stage2-users"
LAUNCHED = [f"{task}/trainer" for task in [*MATRIX, *UNEVEN, *EXTRA, USERS]] + FSDP2
TIMES = {"step_time"}
# A loop of our own logs these of TRL's metrics; ZeRO names its weights otherwise.
NAMES = {"loss", "grad_norm", "scores", "saved_scores"}


def launch(launcher: list[str], out: Path, runs: list[str]) -> dict[str, tuple[list[dict], dict]]:
    """Logs and weights of each run, by the processes of a launcher."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.distributed_worker", str(out), *runs],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    files = {name: str(out / name.replace("/", "-")) for name in runs}
    return {run: (read_json(f"{file}.json"), torch.load(f"{file}.pt")) for run, file in files.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Logs and weights of every run by two processes, which are started once."""
    return launch(TORCHRUN, tmp_path_factory.mktemp("two"), LAUNCHED)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Logs and weights of a task, trained by this process alone."""
    folder = tmp_path_factory.mktemp("one")
    return cache(lambda task: distributed_worker.run(task, "trainer", folder / task))


def assert_same_logs(got: list[dict], expected: list[dict], names: set[str] | None = None):
    """The same metrics (by default all) and, last, scores of recommendations by the trained and the saved weights."""
    assert distributed_worker.STEPS <= len(got) <= len(expected)  # a loop of our own saves nothing
    for step, (one, two) in enumerate(zip(expected, got, strict=False)):
        one, two = ({name: log[name] for name in log.keys() & (names or log.keys() - TIMES)} for log in (one, two))
        assert two.keys() == one.keys(), step
        for name in one:
            assert np.asarray(two[name]) == pytest.approx(np.asarray(one[name]), rel=1e-4, abs=1e-5), (step, name)


@pytest.mark.distributed
@pytest.mark.parametrize("task", MATRIX)
def test_two_processes_train_as_one_does(one_process, two_processes, task):
    logs, weights = two_processes[f"{task}/trainer"]
    expected_logs, expected_weights = one_process(task)
    assert_same_logs(logs, expected_logs)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_two_processes_share_the_batches_of_users(one_process, two_processes):
    """One process accumulates the two batches of each step."""
    logs, weights = two_processes[f"{USERS}/trainer"]
    expected_logs, expected_weights = one_process(USERS)
    assert_same_logs(logs, expected_logs, NAMES)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("run", FSDP2)
def test_sharded_processes_train_as_one_does(one_process, two_processes, run):
    assert_same_logs(two_processes[run][0], one_process(run.split("/")[0])[0], NAMES)


@pytest.mark.distributed
@pytest.mark.parametrize("task", UNEVEN)
def test_training_does_not_depend_on_how_the_batch_is_split(one_process, two_processes, task):
    """The sequences of the first process have no latent slots or anchors, so it adds nothing to some of the terms."""
    (logs, weights), (expected_logs, expected_weights) = two_processes[f"{task}/trainer"], one_process(task)
    steps = distributed_worker.STEPS
    assert_same_logs(logs[:steps], expected_logs[:steps])
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("task", EXTRA)
def test_each_loss_is_a_mean_over_all_processes(one_process, two_processes, task):
    """Also if they have other numbers of labels, of depths and of groups with a gradient."""
    (logs, weights), (expected_logs, expected_weights) = two_processes[f"{task}/trainer"], one_process(task)
    steps = distributed_worker.STEPS
    assert_same_logs(logs[:steps], expected_logs[:steps])
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    if task == "stage2-depths":
        assert logs[steps]["eval_loss"] == pytest.approx(expected_logs[steps]["eval_loss"], rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("task", UNEVEN)
def test_evaluation_of_an_incomplete_batch_logs_the_same_metrics(one_process, two_processes, task):
    """Their values differ: processes without examples at the end repeat some."""
    evaluated = distributed_worker.STEPS
    assert two_processes[f"{task}/trainer"][0][evaluated].keys() == one_process(task)[0][evaluated].keys()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process_does(one_process, tmp_path, stage):
    """With the recipe's configuration, except for the device and the number of processes."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip('deepspeed is not installed: pip install -e ".[deepspeed]"')
    config = yaml.safe_load((CONFIGS / f"zero{stage}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = [
        "accelerate.commands.launch",
        "--config_file",
        str(tmp_path / "config.yaml"),
        "--main_process_port",
        str(port),
    ]
    for run, (logs, _) in launch(launcher, tmp_path, ["stage2/trainer", "grpo/trainer"]).items():
        assert_same_logs(logs, one_process(run.split("/")[0])[0], NAMES)


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu", "NO", 1),
        ("single_gpu", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("zero2", "DEEPSPEED", 8),
        ("zero3", "DEEPSPEED", 8),
        ("fsdp2", "FSDP", 8),
    ],
)
def test_accelerate_reads_each_configuration(name, kind, processes):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert str(config.distributed_type).split(".")[-1] == kind
    assert config.num_processes == processes
    assert config.use_cpu == (name == "cpu")
    assert f"accelerate launch --config_file recipes/accelerate_configs/{name}.yaml" in path.read_text()
