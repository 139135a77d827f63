"""Full and read-only disks as a program sees them, and damaged files."""

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


DAC_RIGHTS = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root ignores the rights of files
VERSION = 0x20080522  # of the structures


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take the right to write to a folder and all in it. Root loses its right to ignore that, in this thread."""
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)
    try:
        with _without_root_rights():
            yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


@contextmanager
def _without_root_rights() -> Iterator[None]:
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(VERSION, 0)
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and the same for capabilities above 31
    if os.geteuid() == 0:
        assert libc.capget(header, rights) == 0
    effective = rights[0]
    rights[0] &= ~DAC_RIGHTS
    assert os.geteuid() or libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = effective
        assert os.geteuid() or libc.capset(header, rights) == 0


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a disk with so much space. Writing fails as on a full one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# What may happen to a file.
DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped bit": flip_bit,
}
