"""Files and folders while they are written: beside their place, locked until they are renamed to it.

The lock ends with the process that holds it, however that ends, so what nobody has locked was left by a dead one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_LEFT_OVER = re.compile(r"\..+-[0-9a-z_]{8}")


@contextlib.contextmanager
def staging(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside `path`, to be filled and renamed; what is still there in the end is removed.

    Its mode is what the umask leaves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _create(path, folder)
    try:
        yield temporary
    finally:
        remove(temporary, ignore_errors=True)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what dead processes left half-written in a folder. What cannot be removed stays."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if _LEFT_OVER.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_unlocked(Path(entry.path))


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Delete a file or a folder, if it is there; of a link the link alone.

    Args:
        ignore_errors: leave what cannot be deleted of a folder where it is.

    Raises:
        OSError: something cannot be deleted.
    """
    if not path.is_symlink() and path.is_dir():  # in this order: a link may lead where nobody may look
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def obey_umask(path: Path) -> None:
    """Give a file, or a folder and all in it, the mode that it would have had if `open` or `mkdir` had made it.

    safetensors writes files that nobody but their owner can read, whatever the umask is.
    """
    mask = _umask()
    for place in (path, *(path.rglob("*") if path.is_dir() else ())):
        if place.is_symlink():
            continue
        wanted = (0o777 if place.is_dir() else 0o666) & ~mask
        if stat.S_IMODE(place.stat().st_mode) != wanted:
            place.chmod(wanted)


def _create(path: Path, folder: bool) -> tuple[Path, int]:
    """A new file or folder, and the descriptor that holds its lock."""
    while True:
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        with contextlib.suppress(FileNotFoundError):  # a sweep of another process came between
            descriptor = os.open(temporary, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks, where nothing is swept either
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
    """Of this process, read without setting it: other threads may be making files."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    mask = os.umask(0o077)  # no /proc: another system
    os.umask(mask)
    return mask
