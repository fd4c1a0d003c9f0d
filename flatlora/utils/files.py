"""Files that are whole or not there at all, and the folder of what is made once and kept."""

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
    """Where converted weights and prepared rows are kept: $FLATLORA_CACHE, else ~/.cache/flatlora.

    Raises:
        ConfigError: the variable is empty, which would be the working directory, or names a user's home that is none.
    """
    given = os.environ.get("FLATLORA_CACHE", "~/.cache/flatlora")
    if not given.strip():
        raise ConfigError([f"Invalid FLATLORA_CACHE={given!r}: a folder's name is needed; name one, or unset it."])
    try:
        return Path(given).expanduser()
    except RuntimeError as error:  # ~nouser, or a user without a home
        raise ConfigError(
            [f"Invalid FLATLORA_CACHE={given}: {reason_of(error)}; set it to a folder by its whole name."]
        ) from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: temporary file in the same folder, fsync, rename; with the mode of the umask.

    Raises:
        OSError: as the file system says (read-only, full); `path` is as it was.
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
    """Make all that is in `folder` survive a power cut."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_folder(Path(parent, name))
        fsync_folder(Path(parent))


def no_link(path: str, flags: int) -> int:
    """Opener for `open`: a link there is an error, so that nothing is written to where it points."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends well: whole or not there at all."""
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
    """Whether an error is that of a full disk: safetensors, tokenizers and torch each have their own for it."""
    return "no space left" in str(error).lower() or disk_is_full(folder)


def disk_is_full(folder: Path) -> bool:
    """Whether less than a mebibyte is left for files in `folder`."""
    return folder.is_dir() and shutil.disk_usage(folder).free < 1 << 20
