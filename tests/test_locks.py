"""One run, one folder: the second start is told who holds it, and a killed holder leaves nothing behind."""

import errno
import fcntl
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from lasar_hf.locks import locked
from lasar_hf.processes import locked_for_all
from tests.recipes import ROOT, save_checkpoint, save_prepared


# In the folder of the module, which needs no other: importing the package takes seconds.
HOLD = "import sys, time; from locks import locked\nwith locked(sys.argv[1]): print('held', flush=True); {}"
SLEEP = "time.sleep(600)"


@contextmanager
def holder(folder, body=SLEEP):
    """Another process that holds a folder."""
    command = [sys.executable, "-c", HOLD.format(body), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT / "lasar_hf", stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    with holder(tmp_path) as process:
        message = f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()},.* another folder"
        for _ in range(2):  # the first attempt does not erase the name
            with pytest.raises(RuntimeError, match=message), locked(tmp_path):
                pass


def test_a_killed_holder_leaves_no_stale_lock(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert str(process.pid) in (tmp_path / ".lock").read_text()
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_a_killed_holder_are_deleted(tmp_path):
    (tmp_path / ".report.1.tmp.json").write_text("{")
    with locked_for_all(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_released_folder_has_no_lock(tmp_path):
    folder = tmp_path / "new" / "folder"
    with pytest.raises(KeyError), locked(folder):
        raise KeyError
    assert list(folder.iterdir()) == []


def test_a_process_that_inherits_the_file_holds_the_folder_on(tmp_path):
    """As a stage of `lasar train` does, which is killed alone."""
    body = "import subprocess; print(subprocess.Popen(['sleep', '60'], pass_fds=[lock.fileno()]).pid, flush=True)"
    code = HOLD.format(body + "; time.sleep(60)").replace("]):", "]) as lock:")
    parent = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT / "lasar_hf", stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "held\n"
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    with pytest.raises(RuntimeError, match="or by a process that it started"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    for _ in range(100):
        try:
            with locked(tmp_path):
                return
        except RuntimeError:
            continue
    pytest.fail("The folder is still held.")


def count(folder, rounds, starts):
    starts.wait()
    for _ in range(rounds):
        while True:
            try:
                with locked(folder):
                    number = int((folder / "number").read_text())
                    (folder / "number").write_text(str(number + 1))
                break
            except RuntimeError:
                continue


def test_only_one_process_holds_a_folder_at_a_time(tmp_path):
    """The file is deleted at each release, so processes may hold files that are there no more."""
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    starts = context.Barrier(3)
    processes = [context.Process(target=count, args=(tmp_path, 50, starts)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "number").read_text() == "150"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"\.lock cannot be locked.*no second run"), locked(tmp_path):
        pass


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Each command that writes a folder: its module, its arguments, and the folder."""
    folder = tmp_path_factory.mktemp("commands")
    save_checkpoint(folder / "model")
    save_prepared(folder / "data")
    (folder / "histories.jsonl").write_text('{"user_id": "a", "history": ["item-1"]}\n')
    (folder / "new.jsonl").write_text('{"item_id": "new"}\n')
    data, model, out = (str(folder / name) for name in ("data", "model", "out"))
    trained = ["--data_dir", data, "--model_name_or_path", model, "--output_dir", out, "--use_cpu", "--bf16", "false"]
    return {
        "prepare": (["--output_dir", out, "--source", "toy"], out),
        "sft": ([*trained, "--stage", "2"], out),
        "grpo": ([*trained, "--num_generations", "4"], out),
        "evaluate": (["--data_dir", data, "--output_dir", out], out),
        "recommend": (["--model", model, "--histories", str(folder / "histories.jsonl"), "--output_dir", out], out),
        "memory": (["--data_dir", data, "--models", f"{model}@0"], model),
        "add_items": (["--items", str(folder / "new.jsonl"), "--data_dir", data, "--checkpoint", model], model),
        "depth": (["--data_dir", data, "--model", model, "--output_dir", out], out),
    }


@pytest.fixture
def start(commands, monkeypatch):
    """Runs a script with its arguments."""

    def run(name, arguments):
        script = ROOT / "recipes" / ("eval.py" if name == "evaluate" else f"{name}.py")
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    return run


@pytest.mark.parametrize("name", ["prepare", "sft", "grpo", "evaluate", "recommend", "memory", "add_items", "depth"])
def test_no_command_writes_to_a_folder_in_use(commands, start, name):
    arguments, folder = commands[name]
    with holder(folder) as process:
        before = sorted(os.listdir(folder))
        with pytest.raises(RuntimeError, match=f"^{folder} is in use by process {process.pid} on "):
            start(name, arguments)
        assert sorted(os.listdir(folder)) == before


def test_a_command_goes_on_where_a_killed_one_was(commands, start, tmp_path):
    arguments, _ = commands["recommend"]
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        start("recommend", [*arguments[:-1], str(tmp_path)])
    assert sorted(os.listdir(tmp_path)) == ["part-00000.parquet", "request.json"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["sft", "recommend"])
def test_a_refusal_ends_all_processes(commands, name):
    arguments, folder = commands[name]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", f"lasar_hf.commands.{name}", *arguments]
    if name == "sft":
        command += ["--ddp_backend", "gloo"]
    with holder(folder) as process:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode != 0
    assert done.stderr.count(f"RuntimeError: {folder} is in use by process {process.pid} on ") >= 1, done.stderr
