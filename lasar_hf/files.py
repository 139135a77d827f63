"""JSON, content hashes, and the atomic writes that the model's files share."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .model.files_lasar import atomic_file as atomic_file
from .model.files_lasar import file_hash as file_hash


def remove_temporary_files(folder: str | Path) -> None:
    """Delete the temporary files that killed processes left in a folder to which no other process writes."""
    for path in Path(folder).glob(".*.tmp*"):
        path.unlink()


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
    name of a model on the Hub, has no files. `"**/data-*.arrow"` matches the tables of saved `Dataset`s.
    """
    files = sorted(path for path in Path(folder).glob(pattern) if path.is_file()) if folder is not None else []
    return {str(path.relative_to(folder)): file_hash(path) for path in files}


def checkpoint_hashes(model: str | Path | None, patterns: Iterable[str]) -> dict[str, str]:
    """As [`folder_hashes`], of the files of a checkpoint by several patterns; of an adapter, with its base model's."""
    hashes = {name: digest for pattern in patterns for name, digest in folder_hashes(model, pattern).items()}
    adapter = Path(model or "", "adapter_config.json")
    if adapter.exists():
        base = read_json(adapter)["base_model_name_or_path"]
        hashes |= {f"{base}/{name}": digest for name, digest in checkpoint_hashes(base, patterns).items()}
    return hashes
