"""
Kill every command, start it again, and compare its files with those of a run that nothing disturbed.

    python -m tests.faults --stage prepare sft1 sft2 anchors grpo evaluate recommend add_items --kills 100 --seed 0

One process imports the libraries and forks for each run, so a kill costs a second or two. A run dies in one of three
ways, drawn from `--seed`: at a random moment (half of the kills); before one of its file operations in the folder that
it writes (open for writing, rename, delete, make or remove a folder); or in the middle of a file, at the first write
beyond a random size that follows such an operation, also from Rust and C++ (RLIMIT_FSIZE). The last two are inside a
save. After a third of the kills the second run is killed too. `--signal INT` interrupts (Ctrl-C) instead.

After a kill the reader of the command's files must refuse them, or find what an undisturbed run wrote or what was there
before; otherwise a half-written file was taken for whole. Then the same command runs to its end. It must succeed, and
leave the same files with the same bytes, no temporary ones among them. Left out of the comparison are times: see
`without_times`.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers.trainer_pt_utils import LabelSmoother  # noqa: F401  (transformers imports its trainer lazily)

from lasar_hf import LasarForGenerativeRec, LasarProcessor, SidCatalog
from lasar_hf.commands import add_items, evaluate, grpo, prepare, recommend, sft
from lasar_hf.data import PreparedData
from lasar_hf.files import read_json
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
TRAINING = [
    *"--data_dir ../inputs/data --output_dir out --max_steps 4 --save_steps 2 --logging_steps 1".split(),
    *"--per_device_train_batch_size 4 --gradient_checkpointing false --bf16 false --use_cpu true".split(),
    *"--report_to none --disable_tqdm true".split(),
]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
TIMES = re.compile(r"(ms_per_user|runtime|_per_second|step_time|^train_at|seconds)$")


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
    "anchors": Stage(encode, read_anchors, after=("prepare", "sft1")),
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
    ),
}
NAMES = {"prepare": "data", "sft1": "stage1", "sft2": "stage2"}  # of the results that other commands read


# ---------------------------------------------------------------------------------------------------------------------
# Files


def without_times(path: Path) -> bytes:
    """
    Content of a file without what depends on the clock: milliseconds per user in a report, run times in the log of a
    trainer's state.
    """
    content = path.read_bytes()
    if path.name in ("trainer_state.json", "report.json"):

        def clean(value):
            if isinstance(value, dict):
                return {name: clean(part) for name, part in value.items() if not TIMES.search(name)}
            return [clean(part) for part in value] if isinstance(value, list) else value

        return json.dumps(clean(json.loads(content))).encode()
    if path.name == "report.md":  # the last column of the first table
        return re.sub(rb"\| [\d.–]+ \|$", b"", content, flags=re.MULTILINE)
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
    What ends a run: a signal after some seconds, or before a numbered file operation, or (with `size`) the first write
    beyond `size` bytes that follows the operation.
    """

    signal: int = signal.SIGKILL
    seconds: float | None = None
    operation: int | None = None
    size: int | None = None

    @property
    def in_save(self) -> bool:
        return self.operation is not None


def watch(folder: Path, fault: Fault, log: int) -> None:
    """Count the file operations of this process in a folder, write a byte to `log` for each, and die at one of them."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in OPERATIONS or isinstance(arguments[0], int):
            return
        if event == "open" and not (arguments[2] or 0) & WRITES:
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(f"{folder}{os.sep}"):
            return
        count += 1
        os.write(log, b".")
        if fault.operation is None or count <= fault.operation:
            return
        if fault.size is None or count > fault.operation + 1:
            os.kill(os.getpid(), fault.signal)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))

    if fault.size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(hook)


def fork(function: Callable[[], None], folder: Path, output: Path, fault: Fault = Fault()) -> tuple[int, int, float]:
    """
    Call a function in a child process that works in a folder. Returns its exit code (negative: the signal that ended
    it), the number of its file operations and its seconds.
    """
    reader, writer = os.pipe()
    begin = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            watch(folder, fault, writer)
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    if fault.seconds is not None:
        time.sleep(fault.seconds)
        os.kill(pid, fault.signal)  # not waited for yet, so the process id is still its own
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - begin
    with os.fdopen(reader, "rb") as file:
        operations = len(file.read())
    return os.waitstatus_to_exitcode(status), operations, seconds


def command(stage: Stage) -> Callable[[], None]:
    """The command as a function without arguments."""

    def call() -> None:
        sys.argv = ["command", *stage.arguments]
        stage.run()

    return call


@dataclass
class Outcome:
    """What happened to the runs of a stage."""

    kills: int = 0
    in_save: int = 0
    missed: int = 0  # runs that ended before their signal
    reruns: int = 0
    same: int = 0  # reruns with the same bytes
    half: list[str] = field(default_factory=list)  # half-written files that a reader took for whole
    failures: list[str] = field(default_factory=list)
    operations: int = 0  # of a run
    seconds: float = 0.0  # of all runs
    cpu_seconds: float = 0.0


class Bench:
    """
    The folder of the inputs and of the runs.

    Args:
        root (`Path`):
            An empty folder.
        keep (`bool`):
            Whether the folders of failed runs are kept.
    """

    def __init__(self, root: Path):
        self.root = root
        self.made: set[str] = set()
        (root / "inputs").mkdir(parents=True)

    def make_inputs(self, names: tuple[str, ...]) -> None:
        """Run the commands whose results a stage reads."""
        inputs = self.root / "inputs"
        for name in names:
            if name in self.made:
                continue
            folder = self.folder(STAGES[name], "input")
            code, _, _ = fork(command(STAGES[name]), folder, self.root / "log")
            if code:
                raise RuntimeError(f"{name} failed:\n{(self.root / 'log').read_text()}")
            os.replace(folder / "out", inputs / NAMES[name])
            self.made.add(name)
            if name == "prepare" and fork(write_tables, inputs, self.root / "log")[0]:
                raise RuntimeError(f"no tables:\n{(self.root / 'log').read_text()}")

    def folder(self, stage: Stage, name: str) -> Path:
        """A fresh folder for a run."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if stage.model:
            shutil.copytree(self.root / "inputs" / stage.model, folder / "model")
        return folder

    def read(self, stage: Stage, folder: Path) -> set[str]:
        """Hashes of the parts that a reader of the files gets; none if it refuses them."""
        path = self.root / "read"
        path.write_text("")

        def call() -> None:
            path.write_text("\n".join(hashlib.sha256(repr(part).encode()).hexdigest() for part in stage.read()))

        fork(call, folder, self.root / "log.read")
        return set(path.read_text().split())


def cpu_seconds() -> float:
    """CPU time of this process and of those that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def faults(rng: random.Random, operations: int, seconds: float, kind: int) -> Iterator[Fault]:
    """Endless faults: at a random moment and inside a save by turns, the latter half of them within a file."""
    while True:
        yield Fault(kind, seconds=rng.uniform(0, seconds))
        yield Fault(kind, operation=rng.randrange(operations))
        yield Fault(kind, seconds=rng.uniform(0, seconds))
        # An interrupted process handles the signal itself, and a write that fails is another fault.
        size = int(2 ** rng.uniform(0, 16)) if kind == signal.SIGKILL else None
        yield Fault(kind, operation=rng.randrange(operations), size=size)


def survive(bench: Bench, name: str, kills: int, seed: int, kind: int = signal.SIGKILL, verbose=False) -> Outcome:
    """Kill a command so many times, and compare what it leaves after it ran again."""
    stage, rng, outcome = STAGES[name], random.Random(f"{name} {seed}"), Outcome()
    bench.make_inputs(stage.after)
    run, log = command(stage), bench.root / "log"
    begin, cpu_begin = time.perf_counter(), cpu_seconds()

    # 1. The run that nothing disturbs.
    folder = bench.folder(stage, "run")
    whole = bench.read(stage, folder)
    code, outcome.operations, seconds = fork(run, folder, log)
    if code:
        raise RuntimeError(f"{name} failed:\n{log.read_text()}")
    expected = contents(folder)
    complete = bench.read(stage, folder)
    if not complete:
        raise RuntimeError(f"{name} left files that cannot be read:\n{(bench.root / 'log.read').read_text()}")
    whole |= complete

    draws = faults(rng, outcome.operations, seconds, kind)
    while outcome.kills < kills:
        # 2. Kill it, and perhaps the next run too.
        folder, history = bench.folder(stage, "run"), []
        while outcome.kills < kills:
            fault = next(draws)
            code, _, _ = fork(run, folder, log, fault)
            if code == 0:
                outcome.missed += 1
                break
            if fault.signal == signal.SIGKILL and code not in (-signal.SIGKILL, -signal.SIGXFSZ):
                outcome.failures.append(f"{history} {fault}: exit code {code}\n{log.read_text()[-2000:]}")
                break
            history.append(fault)
            outcome.kills += 1
            outcome.in_save += fault.in_save
            if not bench.read(stage, folder) <= whole:
                outcome.half.append(str(history))
            if rng.random() < 2 / 3:
                break
        # 3. The same command again.
        code, _, _ = fork(run, folder, log)
        outcome.reruns += 1
        changed = differences(contents(folder), expected)
        if code:
            outcome.failures.append(f"{history}: exit code {code}\n{log.read_text()[-2000:]}")
        elif changed:
            outcome.failures.append(f"{history}: other files {changed}")
            if keep:
                shutil.copytree(folder, Path(keep, f"{name}-{outcome.reruns}"))
        else:
            outcome.same += 1
        if verbose and (code or changed):
            print(outcome.failures[-1], flush=True)
    outcome.seconds, outcome.cpu_seconds = time.perf_counter() - begin, cpu_seconds() - cpu_begin
    return outcome


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--kills", type=int, default=100, help="kills of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "INT"], default="KILL")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root, "bench").resolve())
        for name in args.stage:
            result = survive(bench, name, args.kills, args.seed, signal.Signals[f"SIG{args.signal}"], verbose=True)
            print(
                f"{name}: {result.kills} kills ({result.in_save} inside a save), {result.same} of {result.reruns} "
                f"reruns with the same bytes, {len(result.half)} half-written files taken for whole; "
                f"{result.operations} file operations a run; a kill takes {result.seconds / result.kills:.2f} s, "
                f"{result.cpu_seconds / result.kills:.2f} s of CPU time",
                flush=True,
            )
            for line in result.half:
                print("   half-written:", line)


if __name__ == "__main__":
    main()
