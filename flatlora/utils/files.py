"""Atomic writes of files and folders, and the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.staging import obey_umask, remove, staging


def cache_folder() -> Path:
    """The folder of converted weights and prepared rows: $FLATLORA_CACHE, else ~/.cache/flatlora.

    Raises:
        ConfigError: the variable is empty (it would mean the working directory), or names a home that does not exist.
    """
    given = os.environ.get("FLATLORA_CACHE", "~/.cache/flatlora")
    if not given.strip():
        raise ConfigError([f"Invalid FLATLORA_CACHE={given!r}: it must name a folder; set it to one, or unset it."])
    try:
        return Path(given).expanduser()
    except RuntimeError as error:  # ~nouser, or a user without a home
        raise ConfigError(
            [f"Invalid FLATLORA_CACHE={given}: {reason_of(error)}; set it to the full path of a folder."]
        ) from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: temporary file in the same folder, fsync, rename. Its mode follows the umask.

    Raises:
        OSError: the file system is full or read-only; `path` is unchanged.
    """
    with staging(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Make all content of `folder` survive a power cut."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_folder(Path(parent, name))
        fsync_folder(Path(parent))


def no_link(path: str, flags: int) -> int:
    """Opener for `open` that does not follow a symbolic link, so that nothing is written to its target."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: yields a temporary folder, which replaces `path` if the block raises no error."""
    with staging(path, folder=True) as fresh:
        yield fresh
        obey_umask(fresh)
        flush_folder(fresh)
        remove(path)
        fresh.rename(path)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def out_of_space(error: Exception, folder: Path) -> bool:
    """Whether an error means a full disk; safetensors, tokenizers and torch each raise their own type for it."""
    return "no space left" in str(error).lower() or disk_is_full(folder)


def disk_is_full(folder: Path) -> bool:
    """Whether less than 1 MiB is free for files in `folder`."""
    return folder.is_dir() and shutil.disk_usage(folder).free < 1 << 20
