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
from contextlib import contextmanager
from pathlib import Path
from typing import IO


LOCK_NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


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
    Hold a folder, so that no second command writes to it. The folder is created if missing.

    Processes that inherit the yielded file hold the folder as well, until all of them end.

    Args:
        folder (`str` or `Path`):
            Folder of the command's output. Its file `.lock` names process and host while it is held.

    Raises:
        `RuntimeError`: if another command holds the folder; names its process and host.

    Example:

    ```python
    >>> with locked("outputs/report"):
    ...     Path("outputs/report/table.md").write_text("| a |")
    ```
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:  # "w" would erase the name of the holder
        if not try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RuntimeError(
                f"{folder} is in use by {holder}, or by a process that it started. Wait until it ends, or use another "
                "folder."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield file
        finally:
            file.truncate(0)
