"""Temporary files and folders, written beside their target and locked until they are renamed to it.

A lock ends with its process, however that ends, so an unlocked temporary file was left by a dead process.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_LEFT_OVER = re.compile(r"\..+-[0-9a-z_]{8}")


@contextlib.contextmanager
def staging(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yields an empty file or folder beside `path`, to be filled and renamed; removes it at the end if it still exists.

    Its mode follows the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _create(path, folder)
    try:
        yield temporary
    finally:
        remove(temporary, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def exclusively(folder: Path) -> Iterator[None]:
    """Runs the block in one process at a time for a folder, which is created; for work that needs the whole machine."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("Waiting for another process that writes to %s.", folder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove temporary files of dead processes from a folder; files that cannot be removed stay."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if _LEFT_OVER.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_unlocked(Path(entry.path))


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a file, a folder or a link (not its target), if it exists.

    Args:
        ignore_errors: skip files of a folder that cannot be deleted.

    Raises:
        OSError: something cannot be deleted.
    """
    if not path.is_symlink() and path.is_dir():  # in this order: the target of a link may be unreadable
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def obey_umask(path: Path) -> None:
    """Give a file, or a folder and its content, the mode that `open` and `mkdir` would give it.

    safetensors writes files that only their owner can read, whatever the umask is.
    """
    mask = _umask()
    for entry in (path, *(path.rglob("*") if path.is_dir() else ())):
        if entry.is_symlink():
            continue
        wanted = (0o777 if entry.is_dir() else 0o666) & ~mask
        if stat.S_IMODE(entry.stat().st_mode) != wanted:
            entry.chmod(wanted)


def _create(path: Path, folder: bool) -> tuple[Path, int]:
    """A new file or folder, and the descriptor that holds its lock."""
    while True:
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        with contextlib.suppress(FileNotFoundError):  # another process swept it before it was locked
            descriptor = os.open(temporary, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks, on which `sweep` removes nothing either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, descriptor
            os.close(descriptor)


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The umask of this process, read without setting it: other threads may be creating files."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    mask = os.umask(0o077)  # no /proc: another system
    os.umask(mask)
    return mask
