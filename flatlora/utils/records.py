"""Records that runs and evaluations leave: one way to read them, and hashes that tell what was damaged since.

run.json signs itself and holds the hash of every file of its folder that is read later. A record from before there were
hashes is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flatlora.utils.errors import ConfigError
from flatlora.utils.files import fsync_folder, write_json
from flatlora.utils.plain_files import file_sha256, open_plain, read_plain

SIGNATURE = "record_sha256"
FILES = "files"  # of run.json: {name in the run's folder: {"sha256", "bytes"}}
ROWS_HASH = "predictions_sha256"  # of generation.json: the answers that its settings gave; None while they are made
_INPUTS = ("test.jsonl", "classes.json", "pictures.json")  # that scoring reads
_RECORDED = (*_INPUTS, "metrics.jsonl")  # and all of adapter/
_MOST_BYTES = 64 << 20  # of a record
_MOST_SETTINGS = 1 << 20  # bytes; YAML is read at some 100 KB a second
_DEEPEST = 64  # levels; what is nested further is no record, and would end whoever walks through it
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def read_record(path: Path, remedy: str = "put a whole copy back") -> dict[str, Any] | None:
    """The object of a JSON file; None where there is no such file.

    Args:
        remedy: what the user can do about a broken one.

    Raises:
        ConfigError: it cannot be read, holds something else, or is signed and not as it was written.
    """
    try:
        found = json.loads(read_plain(path, _MOST_BYTES))
        _validate_groups(found)
        if SIGNATURE in found and found[SIGNATURE] != _signature(found):
            raise ValueError(f"{SIGNATURE} in it is of another content: it was changed after it was written")
        if FILES in found and SIGNATURE not in found:
            raise ValueError(f"its {SIGNATURE} is missing")
    except (FileNotFoundError, NotADirectoryError):  # the latter where results_root is a file
        if not path.is_symlink():
            return None
        raise _broken(path, "it is a link to nothing", remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, _reason(error), remedy) from error
    return found


def read_settings(path: Path, remedy: str) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is not there, cannot be read, or is no YAML.
    """
    try:
        found = yaml.safe_load(read_plain(path, _MOST_SETTINGS))
        _validate_depth(found)
    except (OSError, *_YAML_ERRORS) as error:
        raise _broken(path, _reason(error), remedy, "file") from error
    return found


def write_signed(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with the hash of itself, atomically."""
    write_json(path, signed(record))


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the hash of all else that is in it."""
    unsigned = {key: value for key, value in record.items() if key != SIGNATURE}
    return {**unsigned, SIGNATURE: _signature(unsigned)}


def entry_of(path: Path, *, flush: bool = False) -> dict[str, Any]:
    """What a record holds of a file: its hash and its bytes. Arguments and errors as `file_sha256`."""
    return {"sha256": file_sha256(path, flush=flush), "bytes": path.stat().st_size}


def hash_files(run: Path) -> dict[str, dict[str, Any]]:
    """What run.json holds of the files beside it, each of them flushed to the disk."""
    adapter = run / "adapter"
    paths = [run / name for name in _RECORDED if (run / name).is_file()]
    paths += sorted(path for path in adapter.rglob("*") if path.is_file())
    found = {path.relative_to(run).as_posix(): entry_of(path, flush=True) for path in paths}
    for folder in {path.parent for path in paths}:
        fsync_folder(folder)
    return found


def hash_inputs(run: Path) -> dict[str, dict[str, Any]]:
    """As `hash_files`, of what scoring reads besides weights, which is there from a run's beginning."""
    paths = [run / name for name in _INPUTS if (run / name).is_file()]
    return {path.name: entry_of(path) for path in paths}


def damage(
    run: Path,
    record: Mapping[str, Any],
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    largest_bytes: int | None = None,
) -> list[str]:
    """What became of a finished run's files since its record was written, a phrase each; none for a record of before.

    Args:
        wanted: which of the names to look at.
        largest_bytes: of larger files only the size is compared; None hashes all.
    """
    found = []
    for name, entry in (record.get(FILES) or {}).items():
        if wanted(name) and (problem := _file_problem(run / name, entry, largest_bytes)):
            found.append(f"{name} {problem}")
    return found


def metrics_of(record: Mapping[str, Any], benchmark: str) -> dict[str, Any]:
    """What a run's record has of a benchmark's score.json."""
    parts = [(key.partition("/"), value) for key, value in record["metrics"].items()]
    return {metric: value for (name, _, metric), value in parts if name == benchmark and metric}


def is_alone(run: Path) -> bool:
    """Whether a record was kept without the folder that it belongs to, as results/study/ keeps them."""
    return not os.path.lexists(run / "config.yaml") and not os.path.lexists(run / "adapter")


def _file_problem(path: Path, entry: Mapping[str, Any], largest_bytes: int | None = None) -> str | None:
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size == entry["bytes"]:
            if largest_bytes is not None and size > largest_bytes:
                return None
            if file_sha256(path) == entry["sha256"]:
                return None
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"
    return "is not what the run wrote"


def settings_differ(run: Path, record: Mapping[str, Any]) -> list[str]:
    """What became of a finished run's config.yaml, which run.json has a copy of."""
    experiment = record.get("experiment")
    if SIGNATURE not in record or not isinstance(experiment, dict):
        return []
    try:
        saved = read_settings(run / "config.yaml", "")
    except ConfigError:
        return ["config.yaml is missing" if not os.path.lexists(run / "config.yaml") else "config.yaml is broken"]
    if not isinstance(saved, dict):
        return ["config.yaml is broken"]
    keys = [key for key in {**experiment, **saved} if _canonical(saved.get(key)) != _canonical(experiment.get(key))]
    return [f"config.yaml is not what the run wrote (in {', '.join(keys)})"] if keys else []


def answers_damage(folder: Path, metrics: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with a folder of finished answers, a phrase each.

    Args:
        metrics: what the run's record has of its score.json; None looks at the answers alone.
    """
    name = folder.name
    if not os.path.isdir(folder):
        return [f"eval/{name} is gone"]
    found = {}
    for file in ("generation.json", *(("score.json",) if metrics is not None else ())):
        try:
            found[file] = read_record(folder / file)
        except ConfigError:
            return [f"eval/{name}/{file} is broken"]
        if found[file] is None:
            return [f"eval/{name}/{file} is missing"]
    made, score = found["generation.json"], found.get("score.json", {})
    if problem := rows_problem(folder / "predictions.jsonl", made):
        return [f"eval/{name}/predictions.jsonl {problem}"]
    if metrics is not None and _canonical(score.get("metrics")) != _canonical(dict(metrics)):
        return [f"eval/{name}/score.json has not the numbers of run.json"]
    return []


def rows_problem(path: Path, made: Mapping[str, Any]) -> str | None:
    """Why a predictions file is not what its generation.json says; None for a good one, and for one without a hash."""
    if ROWS_HASH not in made:
        return None  # of an earlier version
    try:
        if made[ROWS_HASH] is None:
            return "is not finished"
        return None if file_sha256(path) == made[ROWS_HASH] else "is not what its generation.json says"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"


def _signature(record: Mapping[str, Any]) -> str:
    unsigned = {key: value for key, value in record.items() if key != SIGNATURE}
    return hashlib.sha256(_canonical(unsigned).encode()).hexdigest()


def _canonical(value: Any) -> str:
    """One text for all that JSON reads back as the same."""
    return json.dumps(json.loads(json.dumps(value, default=str)), sort_keys=True)


def _validate_groups(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"an object is needed, not a {type(value).__name__}")
    _validate_depth(value)


def _validate_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {_DEEPEST} levels")


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)[:200]


def _broken(path: Path, reason: str, remedy: str, kind: str = "record") -> ConfigError:
    return ConfigError([f"Broken {kind} {path}: {reason}; {remedy}."])


def own_paths_errors(run: Path) -> list[str]:
    """Links, and folders in the place of files, where a run writes: nothing outside of it is written to.

    Checkpoints may be links, for what is written anew replaces them.
    """
    files = ("config.yaml", "metrics.jsonl", *_RECORDED, "run.json", ".lock", ".probe")
    kinds: Sequence[tuple[str, Callable[[Path], bool], str]] = [
        *((name, os.path.isfile, "a file") for name in dict.fromkeys(files)),
        *((name, os.path.isdir, "a folder") for name in ("adapter", "eval", "start", "best")),
    ]
    wrong = []
    for name, is_right, needed in kinds:
        path = run / name
        if os.path.islink(path):
            wrong.append((path, f"it is a link, and a run writes {needed} of its own there"))
        elif os.path.lexists(path) and not is_right(path):
            wrong.append((path, f"{needed} is needed there"))
    for folder in ("eval", "start", "best"):
        if not os.path.islink(run / folder):
            wrong += [
                (path, "it is a link, and a run writes files of its own there") for path in links_in(run / folder)
            ]
    return [f"Invalid {path}: {problem}; move it away, or say overwrite=true." for path, problem in wrong]


def links_in(folder: Path) -> list[Path]:
    """All links below a folder."""
    return sorted(
        Path(parent, name)
        for parent, folders, names in os.walk(folder)
        for name in (*folders, *names)
        if os.path.islink(os.path.join(parent, name))
    )
