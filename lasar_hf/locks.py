"""
One run, one folder: a lock that names its holder.

The operating system releases the lock when its holder ends, also when it is killed, so there are no stale locks. It
holds between machines on NFS (version 4, or 3 with its lock service). A file system or a system without such locks is
named in a warning.
"""

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .files import check_writable, naming_full_disk, remove_temporary_files


LOCK_NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def try_lock(file: IO, wait: bool = False) -> bool:
    """
    Lock an open file until it is closed. Processes that inherit the file hold the lock as well.

    Args:
        file (`IO`):
            File that is open for writing.
        wait (`bool`, *optional*, defaults to `False`):
            Whether to wait for the end of another holder.

    Returns:
        `bool`: whether no one else holds it. `True`, with a warning, where files cannot be locked.
    """
    if sys.platform == "win32":
        warnings.warn(f"{file.name} is not locked on Windows: start no second run in its folder.", stacklevel=3)
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warnings.warn(
            f"{file.name} cannot be locked, since its file system has no locks ({error.strerror}): start no second "
            "run in its folder.",
            stacklevel=3,
        )
    return True


@contextmanager
def locked(folder: str | Path) -> Iterator[IO]:
    """
    Hold a folder, so that no second command writes to it. The folder is created if missing, must allow to be written
    to, and loses the temporary files of killed processes.

    Processes that inherit the yielded file hold the folder as well, until all of them end.

    Args:
        folder (`str` or `Path`):
            Folder of the command's output. While it is held, its file `.lock` names process and host.

    Raises:
        `RuntimeError`: if another command holds the folder; names its process and host.
        `OSError`: at once if the folder cannot be written to, or later if its disk is full; names the folder.

    Example:

    ```python
    >>> with locked("outputs/report"):
    ...     Path("outputs/report/table.md").write_text("| a |")
    ```
    """
    path = Path(folder, LOCK_NAME)
    check_writable(path.parent)
    with _hold(path) as file:
        file.truncate(0)  # a killed holder left its name
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        remove_temporary_files(folder)
        try:
            with naming_full_disk(folder):
                yield file
        finally:
            if _is_at(path, file):
                with suppress(PermissionError):  # Windows keeps open files
                    path.unlink()


def _hold(path: Path) -> IO:
    """Open and lock a file, again if the last holder deleted it in between."""
    while True:
        file = path.open("a+", encoding="utf-8")  # "w" would erase the name of the holder
        if not try_lock(file):
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise RuntimeError(
                f"{path.parent} is in use by {holder}, or by a process that it started. Wait until it ends, or use "
                "another folder."
            )
        if _is_at(path, file):
            return file
        file.close()


def _is_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
