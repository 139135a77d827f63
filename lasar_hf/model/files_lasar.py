"""Atomic file writes, and the checksums that find damaged files of a checkpoint."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import cached_file, logging


logger = logging.get_logger(__name__)
CHECKSUMS_NAME = "checksums.json"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """
    Write a file under a temporary name, flush it to disk, then rename it: a reader sees the old or the complete new
    file, never a part.

    The temporary file is in the same folder and keeps the suffix, because some writers choose the format by it. If the
    block raises, the old file stays and the temporary file is removed. A process that is killed leaves its temporary
    file, see [`remove_temporary_files`]. The folder is created if missing. Errors name the file, such as those of a
    full disk.

    Example:

    ```python
    >>> with atomic_file("outputs/report.md") as temporary:
    ...     temporary.write_text("# Report")
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None):
            raise
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: str | Path) -> str:
    """SHA-256 of the content of a file, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(paths: Iterable[str | Path]) -> list[str]:
    """[`file_hash`] of several files, such as the shards of a large model, which are read at the same time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(file_hash, paths))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _read_checksums(path: str | Path) -> dict[str, str]:
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError, RecursionError) as error:  # AttributeError: no JSON object
        raise ValueError(f"{path} is damaged ({error!r}). Save or download the checkpoint again.") from error


def write_checksums(folder: str | os.PathLike, *patterns: str) -> None:
    """
    Write the SHA-256 of the files of a folder that match glob patterns to its `checksums.json`, for [`check_files`].
    The entries of other files stay.
    """
    path = Path(folder, CHECKSUMS_NAME)
    try:
        others = _read_checksums(path)
    except (FileNotFoundError, ValueError):
        others = {}
    paths = sorted(file for file in Path(folder).iterdir() if _matches(file.name, patterns))
    checksums = {name: digest for name, digest in others.items() if not _matches(name, patterns)}
    checksums |= zip([file.name for file in paths], file_hashes(paths), strict=True)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(checksums, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_files(pretrained_directory: str | os.PathLike, *patterns: str, **kwargs) -> None:
    """
    Refuse, with a `ValueError`, files of a folder or of a model id on the Hub that match glob patterns and are not
    those that [`write_checksums`] saw. Checkpoints of older versions have no checksums, which causes a warning.
    `kwargs` such as `revision` and `token` are passed to [`~transformers.utils.cached_file`].
    """
    kwargs["_raise_exceptions_for_missing_entries"] = False
    path = cached_file(pretrained_directory, CHECKSUMS_NAME, **kwargs)
    if path is None:
        logger.warning_once(
            f"{pretrained_directory} has no {CHECKSUMS_NAME}, so damaged files are not found. Save the checkpoint "
            "again with this version of lasar_hf."
        )
        return
    checksums = {name: digest for name, digest in _read_checksums(path).items() if _matches(name, patterns)}
    paths = {name: cached_file(pretrained_directory, name, **kwargs) for name in checksums}
    for name, found in paths.items():
        if found is None:
            raise ValueError(
                f"{pretrained_directory} has no {name}, which {CHECKSUMS_NAME} lists. Save or download the checkpoint "
                "again."
            )
    for (name, digest), found in zip(checksums.items(), file_hashes(list(paths.values())), strict=True):
        if found != digest:
            raise ValueError(
                f"{paths[name]} is not the file that was saved: its SHA-256 differs from that in {CHECKSUMS_NAME}. "
                f"Save or download the checkpoint again, or delete {CHECKSUMS_NAME} if you changed it on purpose."
            )


@contextmanager
def checked_files(pretrained_directory: str | os.PathLike, *patterns: str, **kwargs) -> Iterator[None]:
    """
    Call [`check_files`] after the block, which loads the files, and if it ends in the error of a parser. A
    `ValueError` or `OSError` of the block says more than that a file has changed.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error) is not ValueError:
            check_files(pretrained_directory, *patterns, **kwargs)
        raise
    check_files(pretrained_directory, *patterns, **kwargs)


__all__ = ["atomic_file", "checked_files", "file_hash", "file_hashes", "write_checksums"]
