"""JSON, content hashes, and the atomic writes that the model's files share."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .model.files_lasar import atomic_file as atomic_file
from .model.files_lasar import file_hash as file_hash
from .model.files_lasar import file_hashes as file_hashes


# What errors of a full disk, quota or limit say, of the system, torch (two) and NumPy.
FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
FULL += ["iostream error", "inline_container", "requested and"]
# Names of the temporary files of `atomic_file` and of safetensors.
TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.[^.]+)?|\.tmp[A-Za-z0-9]{6}")


def check_writable(folder: str | Path) -> None:
    """
    Create a folder if it is missing, and refuse it with an `OSError` if nothing can be written there, before the work
    whose results go there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" ")
    except OSError as error:
        reason = f"{error.strerror}; the results cannot be written there"
        raise OSError(error.errno, reason, str(folder)) from error


@contextmanager
def naming_full_disk(folder: str | Path) -> Iterator[None]:
    """
    Name the folder in the error of a full disk: `OSError` instead of what torch, safetensors, Arrow and NumPy raise,
    which names no file.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "filename", None) or not any(text in str(error) for text in FULL):
            raise
        raise OSError(errno.ENOSPC, f"The disk is full ({error})", str(folder)) from error


def remove_temporary_files(folder: str | Path) -> None:
    """
    Delete the temporary files that killed processes left in a folder to which no other process writes: those of
    [`atomic_file`] and of safetensors. Files with other names stay.
    """
    for path in Path(folder).glob(".*"):
        if path.is_file() and TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON atomically. NumPy numbers are written as floats."""
    text = json.dumps(content, indent=2, default=float) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises `ValueError` with the name of the file if it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error


def folder_hashes(folder: str | Path | None, pattern: str) -> dict[str, str]:
    """
    SHA-256 of each file of a folder that matches a glob pattern, by its path relative to the folder. `None`, or the
    name of a model on the Hub, has no files. `"**/*"` does not enter links to folders.
    """
    files = sorted(path for path in Path(folder).glob(pattern) if path.is_file()) if folder is not None else []
    names = [str(path.relative_to(folder)) for path in files]
    return dict(zip(names, file_hashes(files), strict=True))


def checkpoint_hashes(model: str | Path | None, patterns: Iterable[str]) -> dict[str, str]:
    """As [`folder_hashes`], of the files of a checkpoint by several patterns; of an adapter, with its base model's."""
    hashes = {name: digest for pattern in patterns for name, digest in folder_hashes(model, pattern).items()}
    adapter = Path(model or "", "adapter_config.json")
    if adapter.exists():
        base = read_json(adapter)["base_model_name_or_path"]
        hashes |= {f"{base}/{name}": digest for name, digest in checkpoint_hashes(base, patterns).items()}
    return hashes
