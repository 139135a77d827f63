"""
Mutation check: small changes to the core, each of which must make a test fail.

    python tests/mutants.py                      # all changes of tests/mutants.toml, on one core
    python tests/mutants.py --only "depth mask"  # some of them, by name

Each change is tried in a forked process, where it is made to the source that Python imports. No file of the package is
written, so nothing is left behind, even by a kill. The libraries are imported once, before the first fork. Processes
that a test starts have the code without the change, so they see nothing.

The report is a table in Markdown. A change with a reason in `equivalent` alters no result, so it must survive, and
does not count. The run fails if a test fails without a change, or if less than 95 % of the others are caught.
"""

import argparse
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutants.toml"
GOAL = 0.95
LIMIT = 300  # seconds that the tests of a change may take; a change that makes them hang is caught
# Everything slow that the package and the tests import, except the package itself.
LIBRARIES = (
    "accelerate", "datasets", "evaluate", "hypothesis", "pandas", "peft", "pytest", "scipy.stats", "sklearn.cluster",
    "sklearn.decomposition", "torch.distributed.fsdp", "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3", "trl.trainer.grpo_trainer", "trl.trainer.sft_trainer",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A change: in `file`, `new` takes the place of `old`, which occurs once. `tests` are those that should see it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def source(self) -> str:
        """The changed source."""
        source = (ROOT / self.file).read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {source.count(self.old)} times, not once.")
        return source.replace(self.old, self.new)


def read_table() -> list[Mutant]:
    """The changes of `mutants.toml`, in order; its names of tests are relative to the folder of the tests."""
    return [
        Mutant(file=file, **row | {"tests": tuple(f"tests/{test}" for test in row["tests"])})
        for file, rows in tomllib.loads(TABLE.read_text(encoding="utf-8")).items()
        for row in rows
    ]


class ChangedSource(SourceFileLoader, MetaPathFinder):
    """Finds one module, and loads it from the changed source instead of its file."""

    def __init__(self, mutant: Mutant):
        super().__init__(mutant.file.removesuffix(".py").replace("/", "."), str(ROOT / mutant.file))
        self.mutant = mutant

    def find_spec(self, name, path=None, target=None):
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name):
        return self.source_to_code(self.mutant.source(), self.path)


def run_tests(tests: tuple[str, ...], folder: str, mutant: Mutant | None = None, limit=LIMIT) -> tuple[int, str]:
    """
    Run tests up to the first failure in a process of its own, with temporary files in `folder`.

    Returns:
        `tuple[int, str]`: the exit status of pytest, or minus the number of the signal that ended the process, and its
        output.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(limit)  # ends this process, also if the run was killed meanwhile
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        if mutant is not None:
            sys.meta_path.insert(0, ChangedSource(mutant))
        status = importlib.import_module("pytest").main(
            ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--basetemp={folder}/pytest", *tests]
        )
        sys.stdout.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def temporary_folder() -> str:
    """A folder that another process removes when this one and those that it forked have ended, also by SIGKILL."""
    folder = tempfile.mkdtemp()
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()  # Ctrl-C does not end it
        os.close(writing)
        os.read(reading, 1)  # returns when nobody has `writing` open
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)
    os.close(reading)
    return folder


def seen_by(status: int, output: str) -> str:
    """The test that failed; empty if none did. Raises `RuntimeError` if the tests could not run."""
    if status == -signal.SIGALRM:
        return f"(no end within {LIMIT} s)"
    if status not in (0, 1):
        raise RuntimeError(f"The tests did not run (status {status}):\n{output}")
    return re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", output, re.MULTILINE)[1] if status else ""


def prepare(folder: str) -> None:
    """The settings of the tests, the libraries, and examples of property tests that are the same in every run."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder  # for the temporary folders of tests and libraries too
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test needs plugins, and loading them takes a second
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)  # instead of the folder of this file, and before an installed package
    importlib.import_module("tests.conftest")
    for name in LIBRARIES:
        importlib.import_module(name)
    hypothesis = importlib.import_module("hypothesis")
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # failing examples need not be small
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, deadline=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    gc.freeze()  # forked processes need not search the libraries for garbage


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def report(mutants: list[Mutant], folder: str) -> bool:
    """Try each change and write the table. Returns whether enough are caught."""
    write("| change | file | seen by | seconds |\n|---|---|---|---:|")
    survivors, wrong, begin = [], [], time.perf_counter()
    for mutant in mutants:
        start = time.perf_counter()
        test = seen_by(*run_tests(mutant.tests, folder, mutant))
        verdict = test or (f"equivalent: {mutant.equivalent}" if mutant.equivalent else "**survived**")
        write(f"| {mutant.name} | {mutant.file} | {verdict} | {time.perf_counter() - start:.1f} |")
        if mutant.equivalent and test:
            wrong.append(mutant.name)
        elif not mutant.equivalent and not test:
            survivors.append(mutant.name)
    total = sum(not mutant.equivalent for mutant in mutants)
    caught = total - len(survivors)
    write(f"\n{caught} of {total} caught in {time.perf_counter() - begin:.0f} s; {len(mutants) - total} equivalent.")
    write(f"Survivors: {', '.join(survivors) or 'none'}.")
    if wrong:
        write(f"Said to be equivalent, but caught: {', '.join(wrong)}.")
    return caught >= GOAL * total and not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the changes to try")
    only = parser.parse_args().only
    mutants = [mutant for mutant in read_table() if only is None or mutant.name in only]
    unknown = sorted(set(only or ()) - {mutant.name for mutant in mutants})
    if unknown:
        parser.error(f"{TABLE.name} has no change named {', '.join(map(repr, unknown))}.")
    for mutant in mutants:
        mutant.source()
    folder = temporary_folder()
    prepare(folder)
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    status, output = run_tests(tests, folder, limit=LIMIT * len(mutants))
    if status != 0:
        write(f"The tests fail without a change (status {status}):\n{output}")
        return 1
    return 0 if report(mutants, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
