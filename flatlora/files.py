"""Files that are whole or not there at all, and the folder of what is made once and kept."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatlora.staging import obey_umask, staging


def cache_folder() -> Path:
    """Where converted weights and prepared rows are kept: $FLATLORA_CACHE, else ~/.cache/flatlora."""
    return Path(os.environ.get("FLATLORA_CACHE", "~/.cache/flatlora")).expanduser()


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


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends well: whole or not there at all."""
    with staging(path, folder=True) as fresh:
        yield fresh
        obey_umask(fresh)
        shutil.rmtree(path, ignore_errors=True)
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
