"""Caches of files and folders that verify themselves: a broken entry is rebuilt.

The name of a cached file ends with the hash of its name and content. A cached folder has a manifest with its own name
and the hashes of all of its files. So no entry can be mistaken for another one.

A manifest may have only the size of a file that is too large to be hashed at every start; its reader verifies the parts
that it reads.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic, write_json
from flatlora.utils.plain_files import file_sha256, open_plain, read_plain
from flatlora.utils.staging import obey_umask, remove, staging, sweep

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_DIGITS = 20  # of a hash, in names
_MOST_BYTES = 1 << 24  # of a manifest


def find(folder: Path, name: str, suffix: str) -> Path | None:
    """The cached file of a name, after its hash was verified; None if there is none.

    A broken file is removed with a warning. Temporary files of dead processes are removed as well.
    """
    sweep(folder)
    pattern = f"{glob.escape(os.fspath(folder / name))}-{'[0-9a-f]' * _DIGITS}{suffix}"
    for path in map(Path, sorted(glob.glob(pattern))):
        if (problem := _file_problem(path, name)) is None:
            return path
        logger.warning("The cache file %s is broken (%s): it will be rebuilt.", path, problem)
    return None


def keep(folder: Path, name: str, suffix: str, content: bytes) -> Path | None:
    """Write a file for `find`. If the cache cannot be written, only a warning is logged: the next run rebuilds it."""
    path = folder / f"{name}-{_digest(folder, name, content)}{suffix}"
    try:
        write_atomic(path, content)
    except OSError as error:
        logger.warning("The cache folder %s cannot be written: %s.", folder, error.strerror or error)
        return None
    return path


def _digest(folder: Path, name: str, content: bytes) -> str:
    digest = hashlib.sha256(f"{folder.name}/{name}\0".encode())
    digest.update(content)
    return digest.hexdigest()[:_DIGITS]


def _file_problem(path: Path, name: str) -> str | None:
    """Why a cached file cannot be used; such a file is removed, unless this user may not read it."""
    digest = hashlib.sha256(f"{path.parent.name}/{name}\0".encode())
    problem = "its content does not match the hash in its name"
    try:
        with open_plain(path) as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        if path.stem.endswith(f"-{digest.hexdigest()[:_DIGITS]}"):
            return None
    except PermissionError as error:
        return reason_of(error)
    except OSError as error:
        problem = reason_of(error)
    with contextlib.suppress(OSError):  # another process removed it, or the folder belongs to another user
        remove(path)
    return problem


def kept_folder(path: Path, make: Callable[[Path], None], *, sized: Collection[str] = ()) -> Path:
    """Returns the cached folder `path`; if it is missing or broken, `make` fills it. Safe under several processes.

    Its files are verified once per process. Temporary files of dead processes are removed as well.

    Args:
        sized: names of files whose size is verified instead of their hash.

    Raises:
        PermissionError: the folder exists and this user may not read it.
        OSError: it cannot be written.
    """
    if (state := _state(path)) is not None and _verified.get(path) == state:
        return path
    sweep(path.parent)
    problem = _folder_problem(path)
    if problem is not None:
        if os.path.lexists(path):
            logger.warning("The cache folder %s is broken (%s): it will be rebuilt.", path, problem)
        with staging(path, folder=True) as fresh:
            make(fresh)
            obey_umask(fresh)
            hashes = {
                name: (fresh / name).stat().st_size if name in sized else file_sha256(fresh / name)
                for name in _names(fresh)
            }
            write_json(fresh / MANIFEST, {"name": path.name, "files": hashes})
            _put(fresh, path)
    _verified[path] = _state(path)
    return path


_verified: dict[Path, object] = {}  # folder → its state when its files were read


def _put(fresh: Path, path: Path) -> None:
    """Rename a folder to `path`, unless another process has put a valid one there."""
    try:
        if os.path.lexists(path) and _folder_problem(path) is not None:
            with staging(path, folder=True) as aside:
                os.rename(path, aside / "old")
        os.rename(fresh, path)
    except OSError:
        if _folder_problem(path) is not None:
            raise


def _names(folder: Path) -> list[str]:
    """Sorted relative paths of all files below a folder, without the manifest and hidden files."""
    paths = [
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    ]
    return sorted(path for path in paths if path != MANIFEST and not os.path.basename(path).startswith("."))


def _state(path: Path) -> object:
    """A value that changes whenever a file of a folder is written or replaced; None if the folder cannot be read."""
    try:
        stats = [os.stat(path / name) for name in (MANIFEST, *_names(path))]
    except OSError:
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def _folder_problem(path: Path) -> str | None:
    """Why a cached folder cannot be used; None if it can.

    Raises:
        PermissionError: this user may not read it.
    """
    try:
        manifest = json.loads(read_plain(path / MANIFEST, _MOST_BYTES))
        hashes = dict(manifest["files"])
        if manifest["name"] != path.name:
            return f"its manifest is that of {manifest['name']}"
        if differing := sorted(hashes.keys() ^ set(_names(path))):
            return f"{differing[0]} is {'missing' if differing[0] in hashes else 'not one of its files'}"
        wrong = next((name for name, recorded in hashes.items() if not _matches(path / name, recorded)), None)
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"it has no {os.path.relpath(error.filename, path)}"
    except OSError as error:
        return reason_of(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST}: {reason_of(error)}"
    return wrong and f"{wrong} is not what was written"


def _matches(path: Path, recorded: str | int) -> bool:
    """Whether a file has the recorded hash or size."""
    return (path.stat().st_size if isinstance(recorded, int) else file_sha256(path)) == recorded


def cache_error(what: str, error: Exception, folder: Path) -> ConfigError:
    """An error about a cache folder that cannot be read or written, with suggested fixes.

    Args:
        what: what is cached there, for the message.
    """
    verb, reason = "keep", reason_of(error)
    remedy = "set FLATLORA_CACHE=DIR to a folder that can be written to, with 0.6 GB free"
    if isinstance(error, PermissionError) and error.filename:
        closed, owner = _owned(Path(error.filename))
        reason = f"{error.strerror}: {closed} belongs to user {owner}"
        if not os.access(closed, os.R_OK, effective_ids=True):
            verb, remedy = "read", f"let that user open it with chmod -R a+rX {folder}, or {remedy}"
    return ConfigError([f"Cannot {verb} {what} in the cache folder {folder}: {reason}; {remedy}."])


def _owned(path: Path) -> tuple[Path, int]:
    """The path, or its nearest parent that this user can see, and its owner's id."""
    for visible in (path, *path.parents):
        with contextlib.suppress(OSError):
            return visible, os.lstat(visible).st_uid
    raise FileNotFoundError(path)
