"""Reads files from untrusted folders after checking their type, location and size."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class NotPlainError(OSError):
    """The path is a pipe, a device or a socket instead of a file."""

    def __str__(self) -> str:
        return self.strerror


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: as `open`; `NotPlainError` for a pipe, a device or a socket, whose reading may never begin or end.
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
    """Reads a whole file.

    Raises:
        OSError: as `open_plain`; or the file has more than `most_bytes` bytes.
    """
    with open_plain(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise OSError(f"it has {size / 2**20:,.0f} MiB, and at most {most_bytes / 2**20:,.0f} are read")
        return file.read(most_bytes)


def file_sha256(path: Path, *, flush: bool = False) -> str:
    """SHA-256 of a file.

    Args:
        flush: whether to call fsync on it.

    Raises:
        OSError: as `open_plain`.
    """
    with open_plain(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
    return digest


def place_inside(folder: Path, name: str, *others: str | Path) -> Path:
    """The path of a file that is named relative to a folder, with links resolved.

    Args:
        others: other folders that may contain it.

    Raises:
        OSError: the file is outside all of these folders. Links within the hub's cache are allowed.
    """
    path = Path(os.path.realpath(folder / name))
    roots = (root for allowed in (folder, *others) for root in _roots(Path(os.path.realpath(allowed))))
    if not any(path.is_relative_to(root) for root in roots):
        raise OSError(f"it is outside {folder}, at {path}, and only files in that folder are read")
    return path


def _roots(folder: Path) -> Iterator[Path]:
    """A folder and, if it is a snapshot in the hub's cache, the folder of blobs that its links point to."""
    yield folder
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            yield parent.parent.parent / "blobs"


def kind_of(mode: int) -> str:
    """The kind of a path that is not a regular file, from its `st_mode`."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "something else")


def irregular_files(folder: Path) -> list[str]:
    """Entries of a folder and its direct subfolders that are not files, with the reason: pipes, devices, link loops.

    A library that opens a pipe would wait forever.
    """
    irregular = []
    for parent in (folder, *filter(os.path.isdir, _entries(folder))):
        for entry in _entries(parent):
            try:
                mode = os.stat(entry).st_mode
            except FileNotFoundError:
                continue  # a broken link: its reader reports the missing file
            except OSError as error:
                irregular.append(f"{entry} ({error.strerror})")
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                irregular.append(f"{entry} ({kind_of(mode)})")
    return irregular


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []  # the reader of the folder reports the reason
