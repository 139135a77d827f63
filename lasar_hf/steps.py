"""
Steps that write files to one folder. A step runs only if its inputs changed, and a killed run resumes.

Each step has a mark `steps/<name>.json`: the fingerprint of its inputs and the SHA-256 of its files. A step whose
files are lost or damaged runs again, and so do those that read them. A step runs in a hidden folder. Its files are
then moved to the folder, and its mark is written last:

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import (
    file_hashes,
    folder_hashes,
    read_json,
    remove_temporary_files,
    write_json,
)


logger = logging.getLogger(__name__)

FORMAT = 4  # increase when a step writes other files for the same settings, so that old ones are not reused
MARKS = "steps"  # folder of the marks
MEND = (
    "Run the command that prepared the data again (lasar prepare or recipes/prepare.py): it replaces what is missing "
    "or damaged."
)


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
    read must then be up to date. Files of steps that are no longer among them are deleted. The folder is created if
    missing. No other process may write to it. Returns the names of the steps that ran.

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
    _tidy(folder, names)
    fingerprints = _fingerprints(steps)
    current: list[str] = []
    ran: list[str] = []
    for position, step in enumerate(steps):
        if _is_current(folder, step.name, fingerprints[step.name]):
            logger.info("%s: up to date", step.name)
            current.append(step.name)
            continue
        if only is not None and step.name not in only:
            continue
        for name in step.after:
            if name not in current:
                raise ValueError(f"Step {step.name!r} reads step {name!r}, which is not up to date; run it too.")
        for name in [*_readers(steps[position:], step.name), step.name]:
            _clear(folder, name)
        begin = time.perf_counter()
        _run(folder, step, fingerprints[step.name])
        logger.info("%s: done in %.1f s", step.name, time.perf_counter() - begin)
        current.append(step.name)
        ran.append(step.name)
    return ran


def check_outputs(folder: str | Path, names: Iterable[str]) -> None:
    """
    Refuse files that are not as a step wrote them.

    Args:
        folder (`str` or `Path`):
            Folder that [`run_steps`] wrote. A folder without marks, or with marks of an older version, is not checked.
        names (`Iterable[str]`):
            Files of the folder, and folders with all their files, to look at.

    Raises:
        `ValueError`: if a file is missing or has another content, with its path and what to do.
    """
    folder, hashes = Path(folder), dict[str, str]()
    for path in sorted((folder / MARKS).glob("*.json")):
        try:
            outputs = read_json(path)["outputs"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). {MEND}") from error
        if isinstance(outputs, dict):
            hashes |= {name: digest for name, digest in outputs.items() if Path(name).parts[0] in names}
    for name, problem in _damaged(folder, hashes).items():
        raise ValueError(f"{folder / name} {problem}. {MEND}")


def _fingerprints(steps: Sequence[Step]) -> dict[str, str]:
    """Hash of the settings of each step and of the steps that it reads."""
    fingerprints: dict[str, str] = {}
    for step in steps:
        before = [fingerprints[name] for name in step.after]
        inputs = json.dumps([FORMAT, step.name, step.settings, before], sort_keys=True)
        fingerprints[step.name] = hashlib.sha256(inputs.encode()).hexdigest()
    return fingerprints


def _tidy(folder: Path, names: Sequence[str]) -> None:
    """Delete what killed processes left, and the files of steps that no longer exist."""
    remove_temporary_files(folder / MARKS)
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path)
    for path in sorted((folder / MARKS).glob("*.json")):
        if path.stem not in names:
            _clear(folder, path.stem)


def _damaged(folder: Path, outputs: dict[str, str]) -> dict[str, str]:
    """Files that are missing or have another SHA-256, and which of these."""
    problems = {name: "is missing" for name in outputs if not (folder / name).is_file()}
    if not problems:
        hashes = file_hashes(folder / name for name in outputs)
        wrong = [name for (name, digest), found in zip(outputs.items(), hashes, strict=True) if found != digest]
        problems = dict.fromkeys(wrong, "is damaged: its content is not what was written")
    return problems


def _mark(folder: Path, name: str) -> dict:
    """The mark of a step. One that is missing, or cannot be read, is that of a step that did not run."""
    try:
        mark = read_json(folder / MARKS / f"{name}.json")
        paths = [Path(output) for output in mark["outputs"]]
        if all(path.parts and not path.is_absolute() and ".." not in path.parts for path in paths):
            return {"fingerprint": mark["fingerprint"], "outputs": mark["outputs"]}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    return {"fingerprint": None, "outputs": {}}


def _is_current(folder: Path, name: str, fingerprint: str) -> bool:
    mark = _mark(folder, name)
    if mark["fingerprint"] != fingerprint:
        return False
    damaged = _damaged(folder, mark["outputs"])
    for path, problem in damaged.items():
        logger.warning("%s %s. It is made again.", folder / path, problem)
    return not damaged


def _readers(steps: Sequence[Step], name: str) -> list[str]:
    """Names of the steps that read a step's files, directly or through others."""
    reached = {name}
    for step in steps:
        if reached & set(step.after):
            reached.add(step.name)
    return sorted(reached - {name})


def _clear(folder: Path, name: str) -> None:
    """Delete the files of a step. Its mark is unfinished until all of them are deleted."""
    path = folder / MARKS / f"{name}.json"
    outputs = _mark(folder, name)["outputs"]
    if outputs:
        write_json(path, {"fingerprint": None, "outputs": outputs})
    for output in reversed(_top_level(outputs)):
        _remove(folder / output)
    path.unlink(missing_ok=True)


def _run(folder: Path, step: Step, fingerprint: str) -> None:
    scratch = folder / f".{step.name}.partial"
    scratch.mkdir(parents=True)
    try:
        step.run(scratch)
        hashes = folder_hashes(scratch, "**/*")
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    # Files are moved after folders and deleted before them, so `prepared.json` exists only while the folders do.
    outputs = dict(sorted(hashes.items(), key=lambda output: len(Path(output[0]).parts) == 1))
    path = folder / MARKS / f"{step.name}.json"
    write_json(path, {"fingerprint": None, "outputs": outputs})
    for output in _top_level(outputs):
        _remove(folder / output)  # left there without a mark
        os.replace(scratch / output, folder / output)
    scratch.rmdir()
    write_json(path, {"fingerprint": fingerprint, "outputs": outputs})


def _top_level(outputs: Iterable[str]) -> list[str]:
    """The files and folders that a step moved, in order."""
    return list(dict.fromkeys(Path(output).parts[0] for output in outputs))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
