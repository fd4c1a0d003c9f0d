"""Tasks of lm-eval: the names and the data of each, and a loop that saves the answers task by task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import predictions
from flatlora.inputs.rows import Source, fingerprint, jsonl, local_file, read_file, read_jsonl
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic, write_json
from flatlora.utils.names import fitting
from flatlora.utils.plain_files import file_sha256
from flatlora.utils.records import ROWS_HASH, read_record

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_FORMATS = (
    "arrow",
    "csv",
    "json",
    "parquet",
    "text",
    "webdataset",
)  # a task's `dataset_path` that is no data set's name


def parts(manager: TaskManager, name: str | Mapping[str, Any]) -> list[str]:
    """Returns the tasks of a name, such as MMLU's subjects, in lm-eval's order; [] for a name unknown to lm-eval.

    Args:
        name: a task, group or tag, or a member of a group with settings of its own.
    """
    return list(dict.fromkeys(_walk(manager.task_index, name)))


def _walk(index: Mapping[str, Any], name: str | Mapping[str, Any]) -> Iterator[str]:
    if isinstance(name, Mapping):
        if isinstance(name.get("task"), list):  # a group that is defined inside another one
            for member in name["task"]:
                yield from _walk(index, member)
            return
        name = name.get("task") or name["group"]
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name in ("TASK", "PY_TASK"):
        yield name
        return
    for member in members(index, name):
        if member != name:
            yield from _walk(index, member)


def members(index: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the members of a group or tag."""
    entry = index[name]
    listed = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg.get("task") or []
    return [listed] if isinstance(listed, str) else listed


def sources(manager: TaskManager, task: str) -> list[Source]:
    """Returns the splits that lm-eval reads for a task: questions and shots; [] if it reads them from other files."""
    entry = manager.task_index[task].cfg or {}
    path, config = entry.get("dataset_path"), entry.get("dataset_name") or "default"
    if path is None or path in _FORMATS or os.path.isdir(path) or "custom_dataset" in entry:
        return []
    splits = [entry.get(f"{use}_split") for use in ("test", "validation", "training", "fewshot")]
    return [Source(path, config, split) for split in dict.fromkeys(splits) if split]


def check_data(splits: Sequence[Source], data_root: str | None) -> None:
    """Checks the splits of one data set: all below `data_root`, or only the first at the hub, as MMLU has 57.

    Raises:
        ConfigError: a file is missing, or the hub cannot be read.
    """
    if data_root is None:
        fingerprint(splits[0])
        return
    errors = []
    for source in splits:
        try:
            local_file(source, data_root)
        except ConfigError as error:
            errors += error.errors
    if errors:
        more = len(dict.fromkeys(errors)) - 1
        raise ConfigError([errors[0] + (f" {more} more files of {splits[0].hub_id} are missing." if more else "")])


def file_hashes(splits: Sequence[Source], data_root: str | None) -> dict[str, str]:
    """Returns the files below `data_root` that are read, with their hashes; {} for the hub's."""
    if data_root is None:
        return {}
    return {f"{source.hub_id}/{source.config}/{source.split}": fingerprint(source, data_root) for source in splits}


@contextlib.contextmanager
def data_of(splits: Sequence[Source], data_root: str | None) -> Iterator[None]:
    """Makes lm-eval read `splits` from `data_root` instead of the hub."""
    if data_root is None:
        yield
        return
    import datasets

    def load(path: str, name: str | None = None, *arguments: Any, **options: Any) -> Any:
        wanted = [source for source in splits if (source.hub_id, source.config) == (path, name or "default")]
        if not wanted:  # files of the task's own
            return original(path, name, *arguments, **options)
        return datasets.DatasetDict(
            {source.split: datasets.Dataset.from_list(read_file(local_file(source, data_root))) for source in wanted}
        )

    original, datasets.load_dataset = datasets.load_dataset, load
    try:
        yield
    finally:
        datasets.load_dataset = original


def ask(model: Any, manager: TaskManager, task: str, splits: Sequence[Source], data_root: str | None, **options: Any):
    """Returns lm-eval's results of one task or group: `lm_eval.simple_evaluate` with the data of `data_root`.

    Raises:
        OSError: lm-eval cannot run the task, mostly because its data are missing.
    """
    import lm_eval
    from jinja2 import TemplateError

    try:
        with data_of(splits, data_root):
            return lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, **options)
    # also a ConfigError, since the weights are loaded and earlier answers are saved
    except (KeyError, ValueError, OSError, NotImplementedError, TemplateError) as error:
        raise OSError(f"lm-eval cannot run {task}: {reason_of(error)}") from error


def row_of(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of an answer that every benchmark of lm-eval's tasks saves."""
    return {
        "task": task,
        "doc": sample["doc_id"],
        "prompt": str(sample["arguments"][0][0]),  # of its first request; the others differ only in the choice
    }


def answer_each(
    names: Sequence[str],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    read: Callable[[str], dict[str, str]],
    answer: Callable[[str], tuple[list[dict[str, Any]], dict[str, Any]]],
    on_progress: predictions.OnProgress | None = None,
) -> Path:
    """Answers every task, in tasks/NAME.jsonl with a record beside it, and all in predictions.jsonl; returns its path.

    Saved answers of other settings are moved away. Those of a task are used again if they are undamaged and its data
    have not changed since.

    Args:
        settings: what determines the answers besides the data.
        read: task → the files that it is read from, with their hashes.
        answer: task → its rows, and further entries of its record.
    """
    saved = folder / "tasks"
    saved.mkdir(parents=True, exist_ok=True)
    if _settings(folder) != settings and any(saved.iterdir()):  # answers of another model, or with other settings
        saved.rename(predictions.free_name(folder / "tasks.stale"))
        saved.mkdir()
    write_json(folder / "generation.json", {**settings, ROWS_HASH: None})
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(names):
        if on_progress:
            on_progress(done, len(names), [])
        path, files = saved / f"{fitting(name)}.jsonl", read(name)
        if not _is_answered(path, files):
            answers, more = answer(name)
            write_atomic(path, jsonl(answers))
            write_json(record_path(path), {"read": files, "sha256": file_sha256(path), **more})
        rows += read_jsonl(path)
    if on_progress:
        on_progress(len(names), len(names), [])
    return predictions.write_finished(folder, ({"index": index, **row} for index, row in enumerate(rows)), settings)


def record_path(answers: Path) -> Path:
    """Returns the record of a task's answers."""
    return answers.with_suffix(".read.json")


def _is_answered(path: Path, files: Mapping[str, str]) -> bool:
    """Whether a task's answers are saved and undamaged, and its data have not changed since."""
    try:
        record = read_record(record_path(path)) or {}
        return (record.get("read"), record.get("sha256")) == (files, file_sha256(path))
    except (OSError, ConfigError):
        return False


def _settings(folder: Path) -> Any:
    try:
        record = read_record(folder / "generation.json") or {}
    except ConfigError:
        return None
    return {key: value for key, value in record.items() if key != ROWS_HASH}
