"""Files of folders that somebody else filled: asked what they are, where they lie and how large they are, then read."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class NotPlainError(OSError):
    """What was to be read is no file: a pipe, a device or a socket."""

    def __str__(self) -> str:
        return self.strerror


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: as `open`; `NotPlainError` for a pipe, a device or a socket, which may never end or never begin.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise NotPlainError(errno.EINVAL, f"it is {kind_of(mode)}, not a file", os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """All of a file.

    Raises:
        OSError: as `open_plain`, and for a file of more than `most_bytes`.
    """
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise OSError(f"it has {size / 2**20:,.0f} MiB, and at most {most_bytes / 2**20:,.0f} are read")
        return file.read(most_bytes)


def file_sha256(path: Path, *, flush: bool = False) -> str:
    """SHA-256 of a file.

    Args:
        flush: whether to wait until all of it is on the disk.

    Raises:
        OSError: as `open_plain`.
    """
    with open_plain(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
    return digest


def place_inside(folder: Path, name: str, *others: str | Path) -> Path:
    """Where a file lies that is named relative to a folder.

    Args:
        others: folders that it may lie in besides.

    Raises:
        OSError: outside all of them, after all links. Links of the hub's cache lead to its own store of files.
    """
    place = Path(os.path.realpath(folder / name))
    roots = (root for one in (folder, *others) for root in _roots(Path(os.path.realpath(one))))
    if not any(place.is_relative_to(root) for root in roots):
        raise OSError(f"it lies outside {folder}, at {place}, and no other files are read than those in that folder")
    return place


def _roots(folder: Path) -> Iterator[Path]:
    """A folder, and where the files are that it links to, if it is a snapshot in the hub's cache."""
    yield folder
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            yield parent.parent.parent / "blobs"


def kind_of(mode: int) -> str:
    """What a thing is that is no file, by its `st_mode`."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "something else")


def irregular_files(folder: Path) -> list[str]:
    """What in a folder, or in one of its folders, cannot be read as a file, and why: pipes, devices, links in a circle.

    A library that opens a pipe waits for ever.
    """
    found = []
    for place in (folder, *filter(os.path.isdir, _entries(folder))):
        for entry in _entries(place):
            try:
                mode = os.stat(entry).st_mode
            except FileNotFoundError:
                continue  # a link to nothing: whoever needs the file misses it
            except OSError as error:
                found.append(f"{entry} ({error.strerror})")
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                found.append(f"{entry} ({kind_of(mode)})")
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []  # what reads the folder tells why
