"""Reads and writes the records of runs and evaluations, with hashes that detect later damage.

Older records without hashes are read as they are; `flatlora.runs.record` has the schema of run.json.
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
FILES = "files"  # in run.json: {name in the run's folder: {"sha256", "bytes"}}
ROWS_HASH = "predictions_sha256"  # in generation.json: hash of predictions.jsonl; None until it is finished
_INPUTS = ("test.jsonl", "classes.json", "pictures.json")  # read by scoring
_RECORDED = (*_INPUTS, "metrics.jsonl")  # hashed in run.json, besides all of adapter/
_MOST_BYTES = 64 << 20  # of a record
_MOST_SETTINGS = 1 << 20  # bytes; YAML is parsed at about 100 KB/s
_DEEPEST = 64  # levels of nesting; more would exceed Python's recursion limit in functions that walk the record
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def read_record(path: Path, remedy: str = "restore it from a copy") -> dict[str, Any] | None:
    """Reads the object in a JSON file; None if there is no such file.

    Args:
        remedy: end of the message about a broken file.

    Raises:
        ConfigError: it cannot be read, does not hold an object, or does not match its own hash.
    """
    try:
        record = json.loads(read_plain(path, _MOST_BYTES))
        _validate_groups(record)
        if SIGNATURE in record and record[SIGNATURE] != _signature(record):
            raise ValueError(f"it does not match its {SIGNATURE}: it was changed after it was written")
        if FILES in record and SIGNATURE not in record:
            raise ValueError(f"its {SIGNATURE} is missing")
    except (FileNotFoundError, NotADirectoryError):  # the latter if results_root is a file
        if not path.is_symlink():
            return None
        raise _broken(path, "it is a broken link", remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, _reason(error), remedy) from error
    return record


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases: nested aliases can expand a short text to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a reference (*), which this suite does not write")
        return super().compose_node(parent, index)


def read_settings(path: Path, remedy: str) -> Any:
    """Reads a YAML file.

    Raises:
        ConfigError: it does not exist, cannot be read, or is not YAML.
    """
    try:
        content = yaml.load(read_plain(path, _MOST_SETTINGS), PlainLoader)
        _validate_depth(content)
    except (OSError, *_YAML_ERRORS) as error:
        raise _broken(path, _reason(error), remedy, "file") from error
    return content


def write_signed(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record and its own hash, atomically."""
    write_json(path, signed(record))


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the hash of its other keys added."""
    unsigned = {key: value for key, value in record.items() if key != SIGNATURE}
    return {**unsigned, SIGNATURE: _signature(unsigned)}


def entry_of(path: Path, *, flush: bool = False) -> dict[str, Any]:
    """A file's SHA-256 and size in bytes, as records hold them. Arguments and errors as for `file_sha256`."""
    return {"sha256": file_sha256(path, flush=flush), "bytes": path.stat().st_size}


def hash_files(run: Path) -> dict[str, dict[str, Any]]:
    """`entry_of` each file beside run.json, by its relative path; the files are flushed to the disk."""
    adapter = run / "adapter"
    paths = [run / name for name in _RECORDED if (run / name).is_file()]
    paths += sorted(path for path in adapter.rglob("*") if path.is_file())
    entries = {path.relative_to(run).as_posix(): entry_of(path, flush=True) for path in paths}
    for folder in {path.parent for path in paths}:
        fsync_folder(folder)
    return entries


def hash_inputs(run: Path) -> dict[str, dict[str, Any]]:
    """`entry_of` each file that scoring reads besides weights; these are written at the start of a run."""
    paths = [run / name for name in _INPUTS if (run / name).is_file()]
    return {path.name: entry_of(path) for path in paths}


def damage(
    run: Path,
    entries: Mapping[str, Mapping[str, Any]] | None,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    largest_bytes: int | None = None,
) -> list[str]:
    """One phrase for each file of a run that is missing or has changed.

    Args:
        entries: `entry_of` each file by its name in the run's folder; None for records without hashes.
        wanted: selects the names to check.
        largest_bytes: only the size of larger files is compared; None hashes all files.
    """
    problems = []
    for name, entry in (entries or {}).items():
        if wanted(name) and (problem := _file_problem(run / name, entry, largest_bytes)):
            problems.append(f"{name} {problem}")
    return problems


def is_alone(run: Path) -> bool:
    """Whether a record is kept without its run folder, as in results/study/."""
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


def answers_damage(folder: Path, metrics: Mapping[str, Any] | None = None) -> list[str]:
    """What is wrong with a folder of finished answers, one phrase per problem.

    Args:
        metrics: the metrics in the run's record, compared with score.json; None checks the answers only.
    """
    name = folder.name
    if not os.path.isdir(folder):
        return [f"eval/{name} is missing"]
    found = {}
    for file in ("generation.json", *(("score.json",) if metrics is not None else ())):
        try:
            found[file] = read_record(folder / file)
        except ConfigError:
            return [f"eval/{name}/{file} is broken"]
        if found[file] is None:
            return [f"eval/{name}/{file} is missing"]
    generation, score = found["generation.json"], found.get("score.json", {})
    if problem := rows_problem(folder / "predictions.jsonl", generation):
        return [f"eval/{name}/predictions.jsonl {problem}"]
    if metrics is not None and not same(score.get("metrics"), dict(metrics)):
        return [f"eval/{name}/score.json differs from the metrics in run.json"]
    return []


def rows_problem(path: Path, generation: Mapping[str, Any]) -> str | None:
    """Why a predictions file does not match its generation.json; None if it does, or if there is no hash."""
    if ROWS_HASH not in generation:
        return None  # written by an earlier version
    try:
        if generation[ROWS_HASH] is None:
            return "is not finished"
        return None if file_sha256(path) == generation[ROWS_HASH] else "does not match its generation.json"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"


def _signature(record: Mapping[str, Any]) -> str:
    unsigned = {key: value for key, value in record.items() if key != SIGNATURE}
    return hashlib.sha256(_canonical(unsigned).encode()).hexdigest()


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal after a round trip through JSON."""
    return _canonical(left) == _canonical(right)


def _canonical(value: Any) -> str:
    """The same text for all values that are equal after a round trip through JSON."""
    return json.dumps(json.loads(json.dumps(value, default=str)), sort_keys=True)


def _validate_groups(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"it must hold an object, not a {type(value).__name__}")
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
    """Errors about paths in a run's folder that are links, or folders where the run writes files (and vice versa).

    A run must not write outside its folder. Checkpoints may be links: a new checkpoint replaces the link.
    """
    files = (
        "config.yaml",
        "metrics.jsonl",
        "init_from.json",
        *_RECORDED,
        "run.json",
        "trackers.json",
        ".lock",
        ".probe",
    )
    kinds: Sequence[tuple[str, Callable[[Path], bool], str]] = [
        *((name, os.path.isfile, "a file") for name in dict.fromkeys(files)),
        *((name, os.path.isdir, "a folder") for name in ("adapter", "eval", "start", "best", "tensorboard")),
    ]
    wrong = []
    for name, is_right, needed in kinds:
        path = run / name
        if os.path.islink(path):
            wrong.append((path, f"it is a link, and the run writes {needed} of its own there"))
        elif os.path.lexists(path) and not is_right(path):
            wrong.append((path, f"it must be {needed}"))
    for folder in ("eval", "start", "best"):
        if not os.path.islink(run / folder):
            wrong += [
                (path, "it is a link, and the run writes files of its own there") for path in links_in(run / folder)
            ]
    return [f"Invalid {path}: {problem}; move it away, or use overwrite=true." for path, problem in wrong]


def links_in(folder: Path) -> list[Path]:
    """All symbolic links below a folder."""
    return sorted(
        Path(parent, name)
        for parent, folders, names in os.walk(folder)
        for name in (*folders, *names)
        if os.path.islink(os.path.join(parent, name))
    )
