"""
Steps that write files to one folder. A step runs only if its inputs changed, and a killed run resumes.

Each step has a mark `steps/<name>.json`: the fingerprint of its inputs and the names of its files. A step runs in a
hidden folder. Its files are then moved to the folder, and its mark is written last:

    1. delete the files of the steps that read this step, then its own
    2. run the step in `.<name>.partial`
    3. write the mark without a fingerprint ("unfinished"), move the files, write the complete mark

A process that is killed at any point leaves a mark that is missing or unfinished, so the next run repeats the step.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import read_json, remove_temporary_files, write_json


logger = logging.getLogger(__name__)

FORMAT = 3  # increase when a step writes other files for the same settings, so that old ones are not reused
MARKS = "steps"  # folder of the marks


@dataclass(frozen=True)
class Step:
    """
    One step. `run` writes the step's files to the empty folder that is its argument. It may read the files of the
    steps in `after` but nothing else in memory, so that a resumed run gives the same result. `settings` is everything
    else that decides the result, ready for JSON: arguments, `file_hash` of input files.
    """

    name: str
    run: Callable[[Path], None]
    settings: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()


def run_steps(folder: str | Path, steps: Sequence[Step], only: Sequence[str] | None = None) -> list[str]:
    """
    Run the steps whose inputs changed: their settings, or the fingerprints of the steps that they read.

    Each step must follow the steps that it reads. `only` names the steps to run, all by default; the steps that these
    read must then be up to date. The folder is created if missing. No other process may write to it. Returns the names
    of the steps that ran.

    Example:

    ```python
    >>> def write_table(out):
    ...     (out / "table.csv").write_text("1,2")

    >>> run_steps("outputs/demo", [Step("table", write_table, {"version": 1})])
    ['table']
    >>> run_steps("outputs/demo", [Step("table", write_table, {"version": 1})])
    []
    ```
    """
    folder = Path(folder)
    names = [step.name for step in steps]
    for name in only or ():
        if name not in names:
            raise ValueError(f"only contains {name!r}; expected some of {', '.join(names)}.")
    (folder / MARKS).mkdir(parents=True, exist_ok=True)
    remove_temporary_files(folder / MARKS)
    fingerprints: dict[str, str] = {}
    ran = []
    for position, step in enumerate(steps):
        before = [fingerprints[name] for name in step.after]
        inputs = json.dumps([FORMAT, step.name, step.settings, before], sort_keys=True)
        fingerprints[step.name] = hashlib.sha256(inputs.encode()).hexdigest()
        if _is_current(folder, step.name, fingerprints[step.name]):
            logger.info("%s: up to date", step.name)
            continue
        if only is not None and step.name not in only:
            continue
        for name in step.after:
            if not _is_current(folder, name, fingerprints[name]):
                raise ValueError(f"Step {step.name!r} reads step {name!r}, which is not up to date; run it too.")
        for name in [*_readers(steps[position:], step.name), step.name]:
            _clear(folder, name)
        begin = time.perf_counter()
        _run(folder, step, fingerprints[step.name])
        logger.info("%s: done in %.1f s", step.name, time.perf_counter() - begin)
        ran.append(step.name)
    return ran


def _mark(folder: Path, name: str) -> dict:
    path = folder / MARKS / f"{name}.json"
    return read_json(path) if path.exists() else {"fingerprint": None, "outputs": []}


def _is_current(folder: Path, name: str, fingerprint: str) -> bool:
    mark = _mark(folder, name)
    return mark["fingerprint"] == fingerprint and all((folder / output).exists() for output in mark["outputs"])


def _readers(steps: Sequence[Step], name: str) -> list[str]:
    """Names of the steps that read a step's files, directly or through others."""
    reached = {name}
    for step in steps:
        if reached & set(step.after):
            reached.add(step.name)
    return sorted(reached - {name})


def _clear(folder: Path, name: str) -> None:
    """Delete the files of a step. Its mark is unfinished until all of them are deleted."""
    shutil.rmtree(folder / f".{name}.partial", ignore_errors=True)
    path = folder / MARKS / f"{name}.json"
    outputs = _mark(folder, name)["outputs"]
    if outputs:
        write_json(path, {"fingerprint": None, "outputs": outputs})
    for output in reversed(outputs):
        _remove(folder / output)
    path.unlink(missing_ok=True)


def _run(folder: Path, step: Step, fingerprint: str) -> None:
    scratch = folder / f".{step.name}.partial"
    scratch.mkdir()
    step.run(scratch)
    # Files are moved after folders and deleted before them, so `prepared.json` exists only while the folders do.
    outputs = [path.name for path in sorted(scratch.iterdir(), key=lambda path: (path.is_file(), path.name))]
    path = folder / MARKS / f"{step.name}.json"
    write_json(path, {"fingerprint": None, "outputs": outputs})
    for output in outputs:
        _remove(folder / output)  # left there without a mark
        os.replace(scratch / output, folder / output)
    scratch.rmdir()
    write_json(path, {"fingerprint": fingerprint, "outputs": outputs})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
