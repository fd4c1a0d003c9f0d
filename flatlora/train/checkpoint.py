"""Checkpoints, which are either complete or ignored.

A checkpoint is valid once it has its manifest `checkpoint.json`, which is written last, atomically, and holds the
SHA-256 of every file. A folder without one was being written when the process was killed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flatlora.models.hashes import PUT_BACK, differing_part, short_state
from flatlora.utils import records, staging
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import fsync_folder
from flatlora.utils.plain_files import file_sha256

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
_STEP = re.compile(r"checkpoint-[0-9]+")  # excludes copies by users, such as checkpoint-40-best


def write_manifest(
    folder: Path,
    *,
    step: int,
    config_sha256: str,
    data_sha256: str,
    world_size: int = 1,
    zero: int = 0,
    base: str | None = None,
) -> None:
    """Flushes every file of a checkpoint to disk, then writes the manifest that makes it valid.

    Args:
        base: identity of the backbone, from `flatlora.models.loading.backbone_state`.
    """
    staging.obey_umask(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {str(path.relative_to(folder)): records.entry_of(path, flush=True) for path in paths}
    fsync_folder(folder)
    origin = {"config_sha256": config_sha256, "data_sha256": data_sha256, "world_size": world_size, "zero": zero}
    origin |= {"base": base, "beside": records.hash_inputs(folder.parent)}
    manifest = {"step": step, **origin, "files": files}
    records.write_signed(folder / MANIFEST, manifest)
    fsync_folder(folder.parent)


def error_of(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """Returns why a checkpoint is not valid: no manifest, a missing or unreadable file, or a wrong hash; else None.

    Args:
        wanted: whether a file of this name is checked.
    """
    try:
        folder.stat()
        manifest = records.read_record(folder / MANIFEST)
        if manifest is None:
            return f"{MANIFEST} is missing"
        needed = {name: entry["sha256"] for name, entry in manifest["files"].items() if wanted(name)}
    except (ValueError, KeyError, TypeError, AttributeError):  # invalid JSON, hash or keys
        return f"{MANIFEST} is broken"
    except OSError as error:  # a broken or circular link, or no permission
        return f"it cannot be read ({error.strerror})"
    return next(
        (f"{name} {message}" for name, sha256 in needed.items() if (message := _file_error(folder / name, sha256))),
        None,
    )


def _file_error(path: Path, sha256: str) -> str | None:
    try:
        return None if file_sha256(path) == sha256 else "is not what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:  # of read() too, whose errors name no file
        return f"cannot be read ({error.strerror})"


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    try:
        return records.read_record(folder / MANIFEST)
    except ConfigError:
        return None  # `error_of` reports it


def inference_error(folder: Path) -> str | None:
    """Same as `error_of`, without the files that only training reads; warns if files beside the checkpoint changed."""
    manifest = _manifest_of(folder) or {}
    if changed := records.damage(folder.parent, manifest.get("beside")):
        logger.warning("%s was written when other files were beside it: %s.", folder, "; ".join(changed))
    return error_of(folder, lambda name: not name.startswith(("optimizer", "scheduler", "rng_state", "global_step")))


def checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first, valid or not, including symbolic links of such names."""
    paths = [path for path in run.glob("checkpoint-*") if _STEP.fullmatch(path.name)]
    return sorted((path for path in paths if path.is_symlink() or os.path.isdir(path)), key=step_of)


def processes_of(folder: Path) -> int:
    """Returns the number of processes that wrote a valid checkpoint."""
    return (_manifest_of(folder) or {}).get("world_size", 1)


def step_of(folder: Path) -> int:
    """Returns the number of optimizer steps before a checkpoint."""
    return int(folder.name.split("-")[1])


def latest_good(
    run: Path,
    config_sha256: str,
    data_sha256: str,
    world_size: int = 1,
    zero: int = 0,
    *,
    tied: str | None = None,
    base: str | None = None,
    also: Callable[[Path], str | None] | None = None,
) -> Path | None:
    """Returns the newest valid checkpoint; logs a warning for invalid newer ones. Nothing is changed.

    Args:
        tied: why the results depend on the number of processes, so that it must stay; None lets it change.
        base: see `write_manifest`; None does not compare backbones.
        also: a further check, which returns why a valid checkpoint cannot be used, or None.

    Raises:
        ConfigError: the checkpoint was written by another experiment, for another backbone, other data or another stage
            of ZeRO, or by another number of processes, which must stay under ZeRO and with `tied`.
    """
    for folder in reversed(checkpoints(run)):
        message = error_of(folder) or (also(folder) if also else None)
        if message is None:
            _validate_origin(folder, config_sha256, data_sha256, world_size, zero, tied, base)
            return folder
        logger.warning("Ignoring %s: %s.", folder, message)
    return None


def remove_newer(run: Path, newest: Path | None) -> None:
    """Removes checkpoints newer than `newest` (all if None), which training writes again."""
    folders = checkpoints(run)
    for folder in folders[folders.index(newest) + 1 :] if newest else folders:
        remove(folder)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first, so that a partly deleted folder is not valid."""
    if not folder.is_symlink():
        staging.remove(folder / MANIFEST)
    staging.remove(folder)


def _validate_origin(
    folder: Path,
    config_sha256: str,
    data_sha256: str,
    world_size: int,
    zero: int,
    tied: str | None,
    base: str | None,
) -> None:
    manifest = records.read_record(folder / MANIFEST)
    errors = [
        f"{folder} is a checkpoint of {what} ({key} {str(manifest.get(key))[:12]}…, here {wanted[:12]}…): take it out "
        "of the run's folder, or give wandb.name or overwrite=true."
        for key, what, wanted in (
            ("config_sha256", "another experiment", config_sha256),
            ("data_sha256", "other training data", data_sha256),
        )
        if manifest.get(key) != wanted
    ]
    trained_on = manifest.get("base")
    if base is not None and trained_on is None:
        logger.warning("%s does not say which backbone it was trained on: an earlier version wrote it.", folder)
    elif base is not None and (part := differing_part(trained_on, base)):
        errors.append(
            f"{folder} was trained on other {part} of the backbone ({short_state(trained_on)}, here "
            f"{short_state(base)}): put {PUT_BACK[part]} back, pin them with model.revision, or say overwrite=true."
        )
    if zero or manifest.get("zero"):
        tied = "each process of ZeRO keeps a part of the optimizer in a file of its own (trainer=ddp does not)"
    if manifest.get("world_size") != world_size and tied:
        errors.append(
            f"{folder} was written by {manifest.get('world_size')} processes and there are {world_size} now, but "
            f"{tied}; start as many as before, or say overwrite=true."
        )
    if manifest.get("zero", 0) != zero:
        errors.append(
            f"{folder} was written with trainer.zero={manifest.get('zero', 0)} and this run has {zero}: the optimizer "
            "is kept in other files; go on with the trainer of before, or say overwrite=true."
        )
    if errors:
        raise ConfigError(errors)


def rotate(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for folder in checkpoints(run)[:-keep]:
        remove(folder)
