"""Two processes train as one does: DDP, ZeRO-2, ZeRO-3 and FSDP2, with ranks whose depths differ."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests import distributed_worker
from tests.distributed_worker import PLAIN_TASKS, TASKS


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
NAMES = {
    "loss", "grad_norm", "mean_depth", "align_loss", "policy_loss", "kl", "reward", "depth_loss", "terminal_loss",
    "scores", "saved_scores",
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Logs of each task, trained by this process alone."""
    folder = tmp_path_factory.mktemp("one")
    return {task: distributed_worker.run(task, "trainer", folder / task) for task in TASKS}


def two_processes(launcher: list[str], out: Path, *ways: str, tasks=TASKS) -> dict[tuple[str, str], list[dict]]:
    """Logs of each task and way of training, by the processes of a launcher."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "tests.distributed_worker", str(out), ",".join(tasks), *ways],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {(task, way): json.loads((out / f"{task}-{way}.json").read_text()) for task in tasks for way in ways}


def assert_same_series(got: list[dict], expected: list[dict]):
    """Losses and their terms per step, then the scores of recommendations, by the trained and by the saved weights."""
    assert distributed_worker.STEPS <= len(got) <= len(expected)  # a loop of our own saves nothing
    for step, (one, two) in enumerate(zip(expected, got, strict=False)):
        assert two.keys() >= ({"loss", "grad_norm"} if step < distributed_worker.STEPS else one.keys())
        for name in NAMES & one.keys() & two.keys():
            assert np.asarray(two[name]) == pytest.approx(np.asarray(one[name]), rel=1e-4, abs=1e-5), (step, name)


@pytest.mark.distributed
def test_ddp_and_fsdp2_train_as_one_process_does(one_process, tmp_path):
    logs = two_processes(TORCHRUN, tmp_path, "trainer", "fsdp2")
    for (task, _), series in logs.items():
        assert_same_series(series, one_process[task])


@pytest.mark.distributed
def test_ddp_without_checkpointing_trains_as_one_process_does(tmp_path):
    logs = two_processes(TORCHRUN, tmp_path, "trainer", tasks=PLAIN_TASKS)
    for (task, _), series in logs.items():
        assert_same_series(series, distributed_worker.run(task, "trainer", tmp_path / f"one-{task}"))


@pytest.mark.distributed
def test_logs_do_not_depend_on_how_the_batch_is_split(tmp_path):
    """The sequences of the first process have no latent slots, so it has nothing to add to most of the metrics."""
    (expected, *_) = distributed_worker.run("uneven", "trainer", tmp_path / "one")
    (logs, *_) = two_processes(TORCHRUN, tmp_path, "trainer", tasks=["uneven"])["uneven", "trainer"]
    names = {"mean_depth", "depth_entropy", "latent_norm_ratio", "align_loss", "policy_loss", "depth_accuracy"}
    assert {name: logs[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-4)


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
        "accelerate.commands.launch", "--config_file", str(tmp_path / "config.yaml"), "--main_process_port", str(port)
    ]
    logs = two_processes(launcher, tmp_path, "trainer")
    for (task, _), series in logs.items():
        assert_same_series(series, one_process[task])


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("cpu", "NO", 1), ("single_gpu", "NO", 1), ("ddp", "MULTI_GPU", 8), ("zero2", "DEEPSPEED", 8),
     ("zero3", "DEEPSPEED", 8), ("fsdp2", "FSDP", 8)],
)
def test_accelerate_reads_each_configuration(name, kind, processes):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert str(config.distributed_type).split(".")[-1] == kind
    assert config.num_processes == processes
    assert config.use_cpu == (name == "cpu")
    assert f"accelerate launch --config_file recipes/accelerate_configs/{name}.yaml" in path.read_text()
