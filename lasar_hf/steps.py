"""Steps that leave files in one folder: each runs when its inputs changed, and a killed run resumes."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .files import write_json


logger = logging.getLogger(__name__)

FORMAT = 2  # to be raised when a step writes other files for the same settings; old ones are then made again
_MARKS = "steps"  # folder of one small JSON a step: the fingerprint of its inputs, and what it wrote


@dataclass(frozen=True)
class Step:
    """
    One step of a preparation.

    Args:
        name (`str`):
            Distinct among the steps.
        run (`Callable[[Path], None]`):
            Writes the step's files and folders into the empty folder that it is given. It reads what earlier steps
            left on disk and nothing else, so that a resumed run sees what an undisturbed one sees.
        settings (`dict`, *optional*):
            All else that decides the outcome, ready for JSON: arguments, `file_hash` of files from outside.
        after (`tuple[str, ...]`, *optional*):
            Steps whose files it reads.
    """

    name: str
    run: Callable[[Path], None]
    settings: dict[str, object] = field(default_factory=dict)
    after: tuple[str, ...] = ()


def run_steps(folder: str | Path, steps: Sequence[Step], only: Sequence[str] | None = None) -> list[str]:
    """
    Run those steps whose inputs (settings, and the fingerprints of the steps before) are not those of their files.

    A step works in a hidden folder; its files are then moved into `folder` and its mark `steps/<name>.json` is written
    last. Before it runs, its old files and those of every step that reads them are deleted: files that do not belong
    together never lie side by side. Nothing may write to `folder` at the same time.

    Args:
        folder (`str` or `Path`):
            Where the files go; created if missing.
        steps (`Sequence[Step]`):
            In an order in which each comes after those it reads.
        only (`Sequence[str]`, *optional*):
            Names of the steps to run; the others must be up to date where one of these reads them.

    Returns:
        `list[str]`: the steps that ran.

    Raises:
        ValueError: `only` names an unknown step, or one that reads a step which is not up to date.
    """
    folder = Path(folder)
    names = [step.name for step in steps]
    for name in only or ():
        if name not in names:
            raise ValueError(f"there is no step {name!r}: choose among {', '.join(names)}.")
    (folder / _MARKS).mkdir(parents=True, exist_ok=True)
    for path in (folder / _MARKS).glob(".*.partial"):  # of a run that was killed
        path.unlink()
    fingerprints: dict[str, str] = {}
    ran = []
    for position, step in enumerate(steps):
        before = [fingerprints[name] for name in step.after]
        fingerprints[step.name] = _fingerprint([FORMAT, step.name, step.settings, before])
        if _is_current(folder, step.name, fingerprints[step.name]):
            logger.info("%s: up to date", step.name)
            continue
        if only is not None and step.name not in only:
            continue
        for name in step.after:
            if not _is_current(folder, name, fingerprints[name]):
                raise ValueError(f"step {step.name!r} reads {name!r}, which {folder} has not up to date: run it too.")
        for name in [*_readers(steps[position:], step.name), step.name]:
            _clear(folder, name)
        begin = time.perf_counter()
        _run(folder, step, fingerprints[step.name])
        logger.info("%s: done in %.1f s", step.name, time.perf_counter() - begin)
        ran.append(step.name)
    return ran


def _fingerprint(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _mark(folder: Path, name: str) -> dict:
    path = folder / _MARKS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"fingerprint": None, "outputs": []}


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
    """Delete what a step left; its mark says "unfinished" as long as there is something."""
    shutil.rmtree(folder / f".{name}.partial", ignore_errors=True)
    path = folder / _MARKS / f"{name}.json"
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
    # Files after folders: a file that says that the folders are complete comes last, and goes first.
    outputs = [path.name for path in sorted(scratch.iterdir(), key=lambda path: (path.is_file(), path.name))]
    path = folder / _MARKS / f"{step.name}.json"
    write_json(path, {"fingerprint": None, "outputs": outputs})
    for output in outputs:
        _remove(folder / output)  # of a folder that was written without marks
        os.replace(scratch / output, folder / output)
    scratch.rmdir()
    write_json(path, {"fingerprint": fingerprint, "outputs": outputs})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
