"""
Kill every command, start it again, and compare its files with those of a run that nothing disturbed.

    python -m tests.faults --stage prepare sft1 sft2 anchors grpo evaluate recommend add_items --kills 100 --seed 0
    python -m tests.faults --signal INT --kills 20        Ctrl-C instead of a kill
    python -m tests.faults --processes 2 --kills 4        torchrun's agent with two processes, of which one is killed

One process imports the libraries and forks for each run, so a kill costs about a second. The faults are drawn from
`--seed`, by turns. A run dies at a random moment; before one of its file operations in its folder (open for writing,
rename, delete, make or remove a folder); or, at the first write beyond a random size after such an operation, in the
middle of a file, also one that Rust or C++ writes (RLIMIT_FSIZE, whose SIGXFSZ ends a process as SIGKILL does). The
last two are inside a save. After a third of the kills the second run is killed too. Of two processes the second is
killed at a random moment, or the first inside a save; `--signal INT` goes to the launcher.

What must hold, or the command ends with 1:

    after a fault   the processes are gone within a minute, with an error. A reader of the files refuses them, or finds
                    what an undisturbed run wrote or what was there before: no half-written file is taken for whole.
    after a rerun   the same command succeeds, and leaves the same files with the same bytes and no temporary ones.

All files below the folder of the command are compared. What depends on the clock is left out: see `without_times`.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lasar_hf import LasarForGenerativeRec, LasarProcessor, SidCatalog
from lasar_hf.commands import add_items, evaluate, grpo, prepare, recommend, sft
from lasar_hf.data import PreparedData
from lasar_hf.reasoning import AnchorStore, checkpoint_hash, encode_anchors


BACKBONE = {
    "model_type": "gpt_neox",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "hidden_dropout": 0.1,
}
logger = logging.getLogger(__name__)

TRAINING = [
    *"--data_dir ../inputs/data --output_dir out --max_steps 4 --save_steps 2 --logging_steps 1".split(),
    *"--per_device_train_batch_size 4 --gradient_checkpointing false --bf16 false --use_cpu true".split(),
    *"--report_to none --disable_tqdm true".split(),
]
GLOO = ["--ddp_backend", "gloo"]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
TIMES = re.compile(r"ms_per_user|.*runtime|.*_per_second|step_time|num_tokens")


# ---------------------------------------------------------------------------------------------------------------------
# The commands, and what the readers of their files see


def encode() -> None:
    """The anchors of stage 2 by themselves, in many small shards."""
    sys.modules[encode_anchors.__module__].SHARD_SIZE = 8
    model = LasarForGenerativeRec.from_pretrained("../inputs/stage1")
    processor, data = LasarProcessor.from_pretrained("../inputs/stage1"), PreparedData.load("../inputs/data")
    encode_anchors(model, processor, data.samples["train"]["segments"], folder="out", batch_size=8)


def write_tables() -> None:
    """Histories to recommend for, and new items."""
    data = PreparedData.load("data")
    items = data.catalog.item_ids
    rows = [
        {"user_id": user, "history": [items[item] for item in history]}
        for user, history in zip(data.split.user_ids, data.split.train, strict=True)
    ]
    new = [{"item_id": f"new-{number}", "title": title} for number, title in enumerate(data.catalog.titles[::6])]
    for name, table in {"histories": rows, "new": new}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def read_anchors() -> list:
    store = AnchorStore.load("out", checkpoint_hash(LasarForGenerativeRec.from_pretrained("../inputs/stage1")))
    return [[np.asarray(part).tobytes() for part in (store.vectors, store.index, store.offsets)]]


def read_checkpoint() -> list:
    model, processor = LasarForGenerativeRec.from_pretrained("out"), LasarProcessor.from_pretrained("out")
    return [(checkpoint_hash(model), processor.catalog.item_ids, processor.instruction, len(processor.tokenizer))]


def read_catalog() -> list:
    catalog = SidCatalog.from_pretrained("model")
    return [(catalog.item_ids, catalog.codes.tolist(), catalog.titles)]


def read_prepared() -> list:
    data = PreparedData.load("out")
    return [(data.interactions, data.split, {name: part.to_list() for name, part in data.samples.items()})]


def read_report() -> list:
    found = []
    if Path("out/lists.npz").exists():
        found.append([(name, array.tobytes()) for name, array in np.load("out/lists.npz").items()])
    paths = [Path("out", name) for name in ("report.json", "report.md")]
    return found + [without_times(path) for path in paths if path.exists()]


def read_shards() -> list:
    return [(path.name, pq.read_table(path).to_pylist()) for path in sorted(Path("out").glob("part-*.parquet"))]


@dataclass(frozen=True)
class Stage:
    """
    A command with its arguments, and the parts that a reader of its files gets (each is whole or not there). It runs
    in a folder of its own, beside the folder `inputs`; `model` is a checkpoint of the inputs that it changes. The
    commands in `after` make the files of `inputs`.
    """

    run: Callable[[], None]
    read: Callable[[], list]
    arguments: list[str] = field(default_factory=list)
    model: str | None = None
    after: tuple[str, ...] = ("prepare", "sft1", "sft2")
    is_distributed: bool = True


STAGES = {
    "prepare": Stage(
        prepare.run,
        read_prepared,
        [
            *"--source toy --output_dir out --codebook_size 8 --text_dim 8 --collaborative_dim 4".split(),
            *"--max_latent_steps 4 --tokenizer_size 300 --source_args".split(),
            '{"num_users": 24, "num_items": 48}',
        ],
        after=(),
        is_distributed=False,
    ),
    "sft1": Stage(
        sft.run,
        read_checkpoint,
        [*TRAINING, *"--stage 1 --max_latent_steps 4 --backbone_config".split(), json.dumps(BACKBONE)],
        after=("prepare",),
    ),
    "sft2": Stage(
        sft.run,
        read_checkpoint,
        [*TRAINING, *"--stage 2 --policy_weight 0.1 --model_name_or_path ../inputs/stage1".split()],
        after=("prepare", "sft1"),
    ),
    "anchors": Stage(encode, read_anchors, after=("prepare", "sft1"), is_distributed=False),
    "grpo": Stage(
        grpo.run,
        read_checkpoint,
        [
            *TRAINING,
            *"--model_name_or_path ../inputs/stage2 --stage1_model ../inputs/stage1 --num_generations 2".split(),
            *"--anchors_dir ../inputs/stage2/anchors".split(),
        ],
    ),
    "evaluate": Stage(
        evaluate.run,
        read_report,
        "--data_dir ../inputs/data --output_dir out --models lasar=model --num_beams 20".split(),
        model="stage2",
    ),
    "recommend": Stage(
        recommend.run,
        read_shards,
        [
            *"--model ../inputs/stage2 --histories ../inputs/histories.jsonl --output_dir out".split(),
            *"--data_dir ../inputs/data --num_beams 10 --shard_size 4".split(),
        ],
    ),
    "add_items": Stage(
        add_items.run,
        read_catalog,
        "--items ../inputs/new.jsonl --data_dir ../inputs/data --checkpoint model".split(),
        model="stage2",
        is_distributed=False,
    ),
}
NAMES = {"prepare": "data", "sft1": "stage1", "sft2": "stage2"}  # of the results that other commands read


# ---------------------------------------------------------------------------------------------------------------------
# Files


def without_times(path: Path) -> bytes:
    """
    Content of a file without what depends on the clock: milliseconds per user in a report, run times in the log of a
    trainer's state; nor with `num_tokens` there, TRL's count of the tokens since the start of a process.
    """
    content = path.read_bytes()
    if path.name in ("trainer_state.json", "report.json"):

        def clean(value):
            if isinstance(value, dict):
                return {name: clean(part) for name, part in value.items() if not TIMES.fullmatch(name)}
            return [clean(part) for part in value] if isinstance(value, list) else value

        return json.dumps(clean(json.loads(content))).encode()
    if path.name == "report.md":  # the last column of the first table
        return re.sub(r"\| [\d.–]+ \|$", "", content.decode(), flags=re.MULTILINE).encode()
    return content


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder without its times, by its name."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hashlib.sha256(without_times(path)).hexdigest() for name, path in files.items()}


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of the files that are missing, left over or different."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Fault:
    """
    What ends a run: a signal after some seconds, or before a numbered file operation; or, with `size`, the first write
    beyond so many bytes of a file after the operation. The signal goes to the process with this `rank`, or to the
    launcher.
    """

    signal: int = signal.SIGKILL
    seconds: float | None = None
    operation: int | None = None
    size: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, its file operations, its seconds, and those that followed a signal."""

    code: int
    operations: int
    seconds: float
    after: float


def watch(folder: Path, fault: Fault, log: int) -> None:
    """Count the file operations of the main process in a folder with a byte each in `log`, and die at one of them."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in OPERATIONS or isinstance(arguments[0], int) or os.environ.get("RANK", "0") != "0":
            return
        if event == "open" and not (arguments[2] or 0) & WRITES:
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(f"{folder}{os.sep}"):
            return
        count += 1
        os.write(log, b".")
        if fault.operation is None or count != fault.operation + 1:
            return
        if fault.size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
            return
        os.write(log, f"#{time.monotonic()}#".encode())
        os.kill(os.getpid(), fault.signal)

    if fault.size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(hook)


def child(function: Callable[[], None], folder: Path, output: Path, fault: Fault, log: int) -> None:
    """Call a function in this forked process, and end it."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        # The limit of a file's size holds for the output too.
        file = os.open(output if fault.size is None else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        watch(folder, fault, log)
        function()
        code = 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork(function: Callable[[], None], folder: Path, output: Path, fault: Fault = Fault()) -> Ended:
    """Call a function in a child process that works in a folder and dies of a fault."""
    reader, writer = os.pipe()
    begin, killed = time.monotonic(), None
    pid = os.fork()
    if pid == 0:
        child(function, folder, output, fault, writer)
    os.close(writer)
    if fault.seconds is not None:
        time.sleep(fault.seconds)
        victim = pid if fault.rank is None else worker_pid(folder, fault.rank)
        killed = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # a child that has ended is a zombie until it is waited for
            os.kill(victim, fault.signal)
    _, status = os.waitpid(pid, 0)
    wait_for_workers(folder)
    end = time.monotonic()
    with os.fdopen(reader, "rb") as file:
        operations, _, moment = file.read().partition(b"#")
    if moment:
        killed = float(moment.partition(b"#")[0])
    after = 0.0 if killed is None else end - killed
    return Ended(os.waitstatus_to_exitcode(status), len(operations), end - begin, after)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


def launched(function: Callable[[], None], processes: int) -> Callable[[], None]:
    """The function as torchrun calls it in several processes: the same agent, whose workers are forks."""

    def work() -> None:
        # A fork has the handlers of the launcher, unlike the new processes of torchrun.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Path(f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
        function()

    def launch() -> None:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=str(os.getpid()),
            max_restarts=0,
            start_method="fork",
        )
        elastic_launch(config, work)()

    return function if processes == 1 else launch


def worker_pid(folder: Path, rank: int) -> int:
    """Process id of a worker, once it has started."""
    path = folder / f"rank-{rank}"
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    return int(path.read_text())


def wait_for_workers(folder: Path, seconds: float = 60.0) -> None:
    """Wait until the workers of a launcher that has ended are gone too. Raises `TimeoutError` if they are not."""
    end = time.monotonic() + seconds
    for path in folder.glob("rank-*"):
        pid = int(path.read_text())
        while Path("/proc", str(pid)).exists():
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{path.name} runs {seconds:.0f} s after its launcher has ended.")
            time.sleep(0.01)
        path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


class Bench:
    """
    The folder of the inputs and of the runs.

    Args:
        root (`Path`):
            Folder that does not exist yet, without symbolic links in its path.
        processes (`int`, *optional*, defaults to `1`):
            Number of processes of a run.
    """

    def __init__(self, root: Path, processes: int = 1):
        self.root, self.processes = root, processes  # inputs are made by one
        self.log = root / "log"
        self.made: set[str] = set()
        (root / "inputs").mkdir(parents=True)

    def run(self, name: str, folder: Path, fault: Fault = Fault(), processes: int = 1) -> Ended:
        """Run a command in a folder."""
        stage = STAGES[name]

        def call() -> None:
            is_training = stage.arguments[: len(TRAINING)] == TRAINING
            sys.argv = [name, *stage.arguments, *(GLOO if processes > 1 and is_training else [])]
            stage.run()

        return fork(launched(call, processes), folder, self.log, fault)

    def run_whole(self, name: str, folder: Path, processes: int = 1) -> Ended:
        """Run a command that must succeed."""
        ended = self.run(name, folder, processes=processes)
        if ended.code:
            raise RuntimeError(f"{name} failed:\n{self.log.read_text()}")
        return ended

    def make_inputs(self, names: tuple[str, ...]) -> None:
        """Run the commands whose results a stage reads."""
        for name in names:
            if name in self.made:
                continue
            folder = self.folder(name)
            self.run_whole(name, folder)
            os.replace(folder / "out", self.root / "inputs" / NAMES[name])
            self.made.add(name)
            if name == "prepare" and fork(write_tables, self.root / "inputs", self.log).code:
                raise RuntimeError(self.log.read_text())

    def folder(self, name: str) -> Path:
        """A fresh folder for a run."""
        folder = self.root / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if STAGES[name].model:
            shutil.copytree(self.root / "inputs" / STAGES[name].model, folder / "model")
        return folder

    def read(self, name: str, folder: Path) -> set[str]:
        """Hashes of the parts that a reader of the files gets; none if it refuses them."""
        path = self.root / "read"
        path.write_text("")

        def call() -> None:
            parts = [hashlib.sha256(repr(part).encode()).hexdigest() for part in STAGES[name].read()]
            path.write_text("\n".join(parts))

        fork(call, folder, self.root / "log.read")
        return set(path.read_text().split())

    def import_parts(self, name: str) -> None:
        """Import what libraries import when a command needs it, so that its runs do not have to."""
        names = self.root / "modules"

        def call() -> None:
            sys.argv = [name, *STAGES[name].arguments]
            with contextlib.suppress(Exception):  # the runs to come will show it
                STAGES[name].run()
            names.write_text("\n".join(sys.modules))

        fork(call, self.folder(name), self.log)
        for module in sorted(set(names.read_text().split()) - sys.modules.keys()):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        gc.collect()
        gc.freeze()


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@dataclass
class Outcome:
    """What happened to the runs of a command."""

    kills: int = 0
    in_save: int = 0
    in_file: int = 0  # of these, in the middle of a file
    missed: int = 0  # runs that ended before their fault
    reruns: int = 0
    same: int = 0  # reruns with the same bytes
    half: int = 0  # half-written files that a reader took for whole
    failures: list[str] = field(default_factory=list)
    operations: int = 0  # of a run
    after: float = 0.0  # seconds until all processes were gone, at most
    seconds: float = 0.0  # of all runs
    cpu_seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.in_save} inside a save, {self.in_file} of these in a file), {self.same} of "
            f"{self.reruns} reruns with the same bytes, {self.half} half-written files taken for whole, gone within "
            f"{self.after:.1f} s; {self.operations} file operations a run; a kill takes "
            f"{self.seconds / self.kills:.2f} s, {self.cpu_seconds / self.kills:.2f} s of CPU time"
        )


def cpu_seconds() -> float:
    """CPU time of this process and of those that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def faults(rng: random.Random, whole: Ended, kind: int, processes: int) -> Iterator[Fault]:
    """Endless faults, by turns at a random moment, at a file operation and in the middle of a file."""
    while True:
        moment = Fault(kind, seconds=rng.uniform(0, whole.seconds))
        operation = Fault(kind, operation=rng.randrange(whole.operations))
        in_file = replace(operation, operation=rng.randrange(whole.operations), size=int(2 ** rng.uniform(0, 14)))
        if processes > 1:
            yield from [moment] if kind == signal.SIGINT else [replace(moment, rank=1), operation]
        else:  # an interrupted process handles the signal itself, and a write that fails is another fault
            yield from [moment, operation] if kind == signal.SIGINT else [moment, operation, in_file]


class Trials:
    """
    Faults of one command.

    Args:
        bench ([`Bench`]), name (`str`):
            Where it runs, and its name in `STAGES`.
        seed, kind (`int`):
            Seed of the faults, and their signal.
        keep (`str`, *optional*):
            Existing folder to which the files of failed runs are copied.
    """

    def __init__(self, bench: Bench, name: str, seed: int, kind: int = signal.SIGKILL, keep: str | None = None):
        self.bench, self.name, self.keep, self.outcome = bench, name, keep, Outcome()
        self.rng = random.Random(f"{name} {seed}")
        self.codes: tuple[int, ...] = (128 + kind,) if kind == signal.SIGINT else (-kind, -signal.SIGXFSZ)
        self.codes += (1,) if bench.processes > 1 else ()  # the launcher's, once it has started its processes
        bench.make_inputs(STAGES[name].after)
        bench.import_parts(name)
        folder = bench.folder(name)
        before = bench.read(name, folder)
        whole = bench.run_whole(name, folder, bench.processes)
        self.outcome.operations = whole.operations
        self.expected, after = contents(folder), bench.read(name, folder)
        if not after:
            raise RuntimeError(f"{name} left files that cannot be read:\n{(bench.root / 'log.read').read_text()}")
        self.readable = before | after
        self.faults = faults(self.rng, whole, kind, bench.processes)

    def run(self, kills: int) -> Outcome:
        """Kill the command so many times."""
        begin, cpu_begin, outcome = time.perf_counter(), cpu_seconds(), self.outcome
        while outcome.kills < kills:
            folder, history = self.bench.folder(self.name), []
            while outcome.kills < kills and self.kill(folder, history) and self.rng.random() < 1 / 3:
                pass
            self.run_again(folder, history)
        outcome.seconds, outcome.cpu_seconds = time.perf_counter() - begin, cpu_seconds() - cpu_begin
        return outcome

    def kill(self, folder: Path, history: list[Fault]) -> bool:
        """Run until the next fault, which is added to those of the folder. Returns whether it came in time."""
        fault, outcome = next(self.faults), self.outcome
        ended = self.bench.run(self.name, folder, fault, self.bench.processes)
        if ended.code == 0:
            outcome.missed += 1
            return False
        history.append(fault)
        outcome.kills += 1
        outcome.in_save += fault.operation is not None
        outcome.in_file += ended.code == -signal.SIGXFSZ
        outcome.after = max(outcome.after, ended.after)
        if ended.code not in self.codes:
            self.fail(folder, f"{history}: exit code {ended.code}\n{self.bench.log.read_text()[-3000:]}")
        if not self.bench.read(self.name, folder) <= self.readable:
            outcome.half += 1
            self.fail(folder, f"{history}: a half-written file was read")
        if fault.signal == signal.SIGINT and (left := list(folder.rglob(".*tmp*"))):
            self.fail(folder, f"{history}: left {left}")
        return True

    def run_again(self, folder: Path, history: list[Fault]) -> None:
        """Run the command to its end, and compare its files."""
        ended = self.bench.run(self.name, folder, processes=self.bench.processes)
        changed = differences(contents(folder), self.expected)
        self.outcome.reruns += 1
        self.outcome.same += not ended.code and not changed
        if ended.code:
            self.fail(folder, f"{history}: the rerun failed\n{self.bench.log.read_text()[-3000:]}")
        elif changed:
            self.fail(folder, f"{history}: other files {changed}")

    def fail(self, folder: Path, message: str) -> None:
        """Note a failure."""
        self.outcome.failures.append(message)
        if self.keep:
            shutil.copytree(folder, Path(self.keep, f"{self.name}-{len(self.outcome.failures)}"), dirs_exist_ok=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), help="commands, by default all")
    parser.add_argument("--kills", type=int, default=100, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "INT"], default="KILL")
    parser.add_argument("--processes", type=int, choices=[1, 2], default=1)
    parser.add_argument("--keep", help="existing folder for the files of failed runs")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    names = args.stage or [name for name in STAGES if args.processes == 1 or STAGES[name].is_distributed]
    failed = False
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root, "bench").resolve(), args.processes)
        for name in names:
            outcome = Trials(bench, name, args.seed, signal.Signals[f"SIG{args.signal}"], args.keep).run(args.kills)
            logger.info("\n    ".join([f"{name}: {outcome}", *outcome.failures]))
            failed |= bool(outcome.failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
