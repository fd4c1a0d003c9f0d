"""What is made once and kept, as files and folders whose hashes are known: whatever is broken is made anew.

The name of a file ends with the hash of what belongs in it, and a folder has a manifest with those of all of its files;
both hashes cover the name too, so that nothing is taken for something else.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic, write_json
from flatlora.utils.plain_files import file_sha256, open_plain
from flatlora.utils.staging import obey_umask, remove, staging, sweep

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_DIGITS = 20  # of a hash, in names


def find(folder: Path, name: str, suffix: str) -> Path | None:
    """The file that was kept under a name, read and found whole; None where there is none.

    A broken one is removed, with a warning; and so is what dead processes left half-written beside it.
    """
    sweep(folder)
    pattern = f"{glob.escape(os.fspath(folder / name))}-{'[0-9a-f]' * _DIGITS}{suffix}"
    for path in map(Path, sorted(glob.glob(pattern))):
        if (problem := _file_problem(path, name)) is None:
            return path
        logger.warning("The cache file %s is broken (%s): it is made anew.", path, problem)
    return None


def keep(folder: Path, name: str, suffix: str, content: bytes) -> Path | None:
    """Write a file for `find`. A cache that cannot be written costs the next run its time, so that is a warning."""
    path = folder / f"{name}-{_digest(folder, name, content)}{suffix}"
    try:
        write_atomic(path, content)
    except OSError as error:
        logger.warning("What was made cannot be kept in %s: %s.", folder, error.strerror or error)
        return None
    return path


def _digest(folder: Path, name: str, content: bytes) -> str:
    digest = hashlib.sha256(f"{folder.name}/{name}\0".encode())
    digest.update(content)
    return digest.hexdigest()[:_DIGITS]


def _file_problem(path: Path, name: str) -> str | None:
    """Why a kept file cannot be used; it is removed then, unless it is closed to this user."""
    digest = hashlib.sha256(f"{path.parent.name}/{name}\0".encode())
    problem = "it does not hold what its name says"
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
    with contextlib.suppress(OSError):  # another process did, or the folder is somebody else's
        remove(path)
    return problem


def kept_folder(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, a folder that `make` has filled: now, or before and still whole. Several processes may make the same one.

    Its files are read once a process; what dead processes left half-written beside it is removed then, too.

    Raises:
        PermissionError: the folder is there and closed to this user.
        OSError: it cannot be written.
    """
    if (state := _state(path)) is not None and _found_whole.get(path) == state:
        return path
    sweep(path.parent)
    problem = _folder_problem(path)
    if problem is not None:
        if os.path.lexists(path):
            logger.warning("The cache folder %s is broken (%s): it is made anew.", path, problem)
        with staging(path, folder=True) as fresh:
            make(fresh)
            obey_umask(fresh)
            hashes = {name: file_sha256(fresh / name) for name in _names(fresh)}
            write_json(fresh / MANIFEST, {"name": path.name, "files": hashes})
            _put(fresh, path)
    _found_whole[path] = _state(path)
    return path


_found_whole: dict[Path, object] = {}  # folder → its state when its files were read


def _put(fresh: Path, path: Path) -> None:
    """Rename a folder to its place, unless another process has put a whole one there."""
    try:
        if os.path.lexists(path) and _folder_problem(path) is not None:
            with staging(path, folder=True) as aside:
                os.rename(path, aside / "old")
        os.rename(fresh, path)
    except OSError:
        if _folder_problem(path) is not None:
            raise


def _names(folder: Path) -> list[str]:
    """Of all files in a folder and its folders but the manifest and hidden ones, in order."""
    found = [
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    ]
    return sorted(name for name in found if name != MANIFEST and not os.path.basename(name).startswith("."))


def _state(path: Path) -> object:
    """What changes whenever a file of a folder is written or replaced; None where it cannot be had."""
    try:
        stats = [os.stat(path / name) for name in (MANIFEST, *_names(path))]
    except OSError:
        return None
    return tuple((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in stats)


def _folder_problem(path: Path) -> str | None:
    """Why a kept folder cannot be used.

    Raises:
        PermissionError: it is closed to this user.
    """
    try:
        with open_plain(path / MANIFEST) as file:
            manifest = json.loads(file.read())
        hashes = dict(manifest["files"])
        if manifest["name"] != path.name:
            return f"it is that of {manifest['name']}"
        if differing := sorted(hashes.keys() ^ set(_names(path))):
            return f"{differing[0]} is {'missing' if differing[0] in hashes else 'not one of its files'}"
        wrong = next((name for name, sha256 in hashes.items() if file_sha256(path / name) != sha256), None)
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"it has no {os.path.relpath(error.filename, path)}"
    except OSError as error:
        return reason_of(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST}: {reason_of(error)}"
    return wrong and f"{wrong} is not what was written"


def cache_error(what: str, error: Exception, folder: Path) -> ConfigError:
    """A cache folder that cannot be read or written, with the ways out.

    Args:
        what: is kept there.
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
    """A path, or the innermost folder around it that this user sees, and whose it is."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            return place, os.lstat(place).st_uid
    raise FileNotFoundError(path)
