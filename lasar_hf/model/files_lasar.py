"""Atomic file writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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


__all__ = ["atomic_file"]
