"""Every task of lm-eval by name, with lm-eval's prompts and scores and this suite's token ids and decoding.

    python -m eval.lm_eval PATH tasks=[arc_easy,hellaswag] [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: tasks (lm-eval's tasks, groups and
tags), num_fewshot (null: each task's own), template and system (chat: prompts are chats in the tokenizer's own
template, with this system prompt and the shots as earlier turns; null: plain text; a run has its own),
include_path=DIR (tasks of your own, in lm-eval's YAML format), max_rows (of each task), batch_size, data_root=DIR,
device, out=DIR, score_only=true.

The data come from the hub, or from DIR/<owner>/<name>/<config>/<split>.jsonl (or .parquet). Answers are saved after
each task or group; a repeated call continues with the next one. The score has every metric of every task and group,
with lm-eval's standard error: TASK/METRIC, TASK/METRIC_stderr and TASK/n, where a metric of a filter is METRIC,FILTER
as in lm-eval. `average` is the mean of the first metric of each name, or null if higher values of one are not better.
Needs the extra `lm_eval`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eval import BENCHMARKS, lm_eval_tasks, predictions
from eval.backends import Backend
from flatlora.config.sections import PlainOrChat
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.rows import Source, gather
from flatlora.utils.errors import ConfigError, SettingError, nearest, reason_of
from flatlora.utils.files import write_json
from flatlora.utils.names import fitting
from flatlora.utils.plain_files import file_sha256
from flatlora.utils.records import read_record

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SCORER_VERSION = 1
_ASKING_VERSION = 1  # of the way models are prompted: saved answers of another version are generated again
HEADLINE = "average"
FIELDS: predictions.Fields = {"index": int, "name": str, "task": str, "doc": int, "filter": str, "metrics": dict}
_GENERATION_KEYS = frozenset(
    (
        *("until", "do_sample", "temperature", "top_p"),
        *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
    )
)


class Config(PlainOrChat):
    section_path: ClassVar[str] = "eval.lm_eval"
    tasks: list[str] = setting([], remedy="name lm-eval's tasks, groups or tags, such as [arc_easy,hellaswag]")
    num_fewshot: int | None = setting(None, ge=0, le=10**4, remedy="null takes the number of each task")
    include_path: str | None = setting(None, min_length=1, remedy="name a folder with tasks in lm-eval's YAML format")
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null asks every row of every task")
    batch_size: int = setting(8, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        if importlib.util.find_spec("lm_eval") is None:
            return [
                SettingError(
                    (),
                    "Invalid eval.lm_eval: the package lm_eval is not installed; run pip install -e '.[lm_eval]', or "
                    "leave the benchmark out.",
                )
            ]
        errors = super().rule_errors()
        if self.include_path and not os.path.isdir(self.include_path):
            errors.append(
                SettingError(
                    ("include_path",),
                    f"Invalid eval.lm_eval.include_path={self.include_path}: there is no such folder; name one with "
                    "tasks in lm-eval's YAML format, or leave the key out.",
                )
            )
        if not self.tasks:
            errors.append(
                SettingError(
                    ("tasks",),
                    "Invalid eval.lm_eval.tasks=[]: there is nothing to ask; name lm-eval's tasks, groups or tags, "
                    "such as eval.lm_eval.tasks=[arc_easy,hellaswag].",
                )
            )
        return errors or [
            SettingError(("tasks",), f"Invalid eval.lm_eval.tasks={self.tasks}: {problem}.")
            for problem in _task_problems(self)
        ]


def _task_problems(config: Config) -> list[str]:
    """Returns why the tasks cannot be scored here."""
    manager = _manager(config)
    if unknown := [name for name in config.tasks if name not in manager.task_index]:
        near = {name: nearest(name, manager.all_tasks) for name in unknown}
        listed = ", ".join(f"{name} (did you mean {close}?)" if close else name for name, close in near.items())
        return [
            f"lm-eval {importlib.metadata.version('lm_eval')} has no task, group or tag {listed}; correct the name "
            "(python -m lm_eval ls tasks lists all), or add your own tasks with eval.lm_eval.include_path=DIR"
        ]
    tasks: dict[str, list[str]] = {}
    for task in _leaves(manager, config.tasks):
        if problem := _problem(manager.task_index[task].cfg or {}, config):
            tasks.setdefault(problem, []).append(task)
    return [f"{_few(names)}: {problem}" for problem, names in tasks.items()]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _problem(task: Mapping[str, Any], config: Config) -> str | None:
    """Returns why a task cannot be scored here; None if it can."""
    if task.get("unsafe_code"):
        return (
            "lm-eval would run code that the model wrote, without a sandbox; use eval=[humaneval] or eval=[mbpp], or "
            "leave it out"
        )
    if kind := next((kind for kind in ("image", "audio") if f"doc_to_{kind}" in task), None):
        return f"the questions are about an {kind}, which text models do not read; leave it out"
    if unread := sorted((task.get("generation_kwargs") or {}).keys() - _GENERATION_KEYS):
        return f"generation_kwargs has {', '.join(unread)}, which has no effect here; leave it out"
    if config.num_fewshot and task.get("num_fewshot") == 0:
        return (
            f"zero-shot by lm-eval's definition, so num_fewshot={config.num_fewshot} has no effect; score it by "
            "itself, without num_fewshot"
        )
    return None


@functools.cache
def _index(include_path: str | None, defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _manager(config: Config) -> TaskManager:
    """Returns lm-eval's index: of `include_path` alone if all tasks are defined there, as that of all takes 10 s."""
    if config.include_path:
        own = _index(config.include_path, False)
        if all(name in own.task_index and own.task_index[name].kind.name == "TASK" for name in config.tasks):
            return own
    return _index(config.include_path, True)


def _leaves(manager: TaskManager, names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(part for name in names for part in lm_eval_tasks.parts(manager, name)))


def _scored(manager: TaskManager, name: str) -> Iterator[str]:
    """Yields the tasks and groups that have a score: a tag, or a group without a score of its own, is its members."""
    index = manager.task_index
    entry = index[name]
    whole = entry.kind.name in ("TASK", "PY_TASK") or (entry.cfg or {}).get("aggregate_metric_list")
    members = [] if whole else lm_eval_tasks.members(index, name)
    if members and all(isinstance(member, str) and member in index and member != name for member in members):
        for member in members:
            yield from _scored(manager, member)
    else:
        yield name


def _sources(manager: TaskManager, name: str) -> list[Source]:
    return [source for task in lm_eval_tasks.parts(manager, name) for source in lm_eval_tasks.sources(manager, task)]


def _files(config: Config, name: str, data_root: str | None) -> dict[str, str]:
    """Returns the files that a task is read from, with their hashes: data, and its definition below include_path."""
    manager = _manager(config)
    files = lm_eval_tasks.file_hashes(_sources(manager, name), data_root)
    for task in lm_eval_tasks.parts(manager, name):
        entry = manager.task_index[task]
        named = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files") or []
        groups = named.values() if isinstance(named, Mapping) else [named]
        paths = [Path(path) for group in groups for path in ([group] if isinstance(group, str) else group)]
        if config.include_path and entry.yaml_path and entry.yaml_path.is_relative_to(config.include_path):
            paths += [entry.yaml_path, *sorted(entry.yaml_path.parent.glob("*.py"))]
        files |= {f"{task}/{path.name}": file_sha256(path) for path in paths if path.is_file()}
    return files


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns one row per task or group with a score; lm-eval reads the rows of a task when it runs it."""
    names = [each for name in config.tasks for each in _scored(_manager(config), name)]
    return [{"task": name, "data_root": data_root} for name in dict.fromkeys(names)]


def check_rows(rows: Sequence[dict[str, Any]], source: str, config: Config, **known: Any) -> None:
    """Checks that the packages and the data of every task exist.

    Raises:
        ConfigError: a package is missing, a split is missing in data_root, or a data set cannot be read from the hub.
    """
    manager, by_data_set = _manager(config), {}
    names = [row["task"] for row in rows]
    for split in dict.fromkeys(split for name in names for split in _sources(manager, name)):
        by_data_set.setdefault(split.hub_id, []).append(split)
    root = rows[0]["data_root"] if rows else None
    gather(
        *(lambda splits=splits: lm_eval_tasks.check_data(splits, root) for splits in by_data_set.values()),
        lambda: _check_packages(manager, _leaves(manager, names)),
    )


def _check_packages(manager: TaskManager, tasks: Sequence[str]) -> None:
    """Imports the functions that the tasks name.

    Raises:
        ConfigError: a package is not installed, or a function is not there.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    problems = {}
    for path in dict.fromkeys(manager.task_index[task].yaml_path for task in tasks):
        try:
            load_yaml(path, resolve_func=True)
        except (ImportError, AttributeError, LookupError, OSError) as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            problems.setdefault(reason_of(cause), []).append(path.stem)
    if problems:
        raise ConfigError(
            [
                f"Cannot load lm-eval's {_few(names)}: {reason}; install what is missing (lm-eval's extras name it), "
                "or leave these tasks out."
                for reason, names in problems.items()
            ]
        )


def run(
    backend: Backend,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Runs every task: writes tasks/NAME.jsonl for each, predictions.jsonl of all, and score.json."""
    from eval.backends.lm_eval import LMEvalModel

    manager, root, chat = _manager(config), rows[0].get("data_root"), config.template == "chat"

    def answer(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        model = LMEvalModel(backend, name, config.batch_size, chat=chat)
        results = lm_eval_tasks.ask(
            model,
            manager,
            name,
            _sources(manager, name),
            root,
            num_fewshot=config.num_fewshot,
            limit=config.max_rows,
            apply_chat_template=chat,
            system_instruction=config.system,
        )
        return _answers(results, name, model.readable), {"scores": _scores(results)}

    path = lm_eval_tasks.answer_each(
        [row["task"] for row in rows],
        folder,
        {
            **backend.describe(),
            **config.model_dump(include={"num_fewshot", "template", "system", "max_rows"}),
            "lm_eval": importlib.metadata.version("lm_eval"),
            "asking": _ASKING_VERSION,
        },
        read=lambda name: _files(config, name, root),
        answer=answer,
        on_progress=on_progress,
    )
    return score_file(path, config)


def _answers(results: Mapping[str, Any], name: str, readable: Any) -> list[dict[str, Any]]:
    """Returns a row for each question and filter, in lm-eval's order of tasks."""

    def text(value: Any) -> str:
        return json.dumps(value, default=str, ensure_ascii=False)

    rows = []
    for task, samples in results["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):  # stable: filters stay in order
            row = lm_eval_tasks.row_of(task, sample)
            rows.append(
                {
                    "name": name,
                    **row,
                    "prompt": readable(row["prompt"]),
                    "filter": sample["filter"],
                    "response": text(sample["resps"]),
                    "answer": text(sample["filtered_resps"]),
                    "target": str(sample["target"]),
                    "metrics": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
                }
            )
    return rows


def _plain(value: Any) -> Any:
    """Returns a metric of lm-eval as JSON has it: a finite number, or text for what is not aggregated by a mean."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None if value == "N/A" else str(value)
    return number if math.isfinite(number) else None


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {task or group: {"n", "num_fewshot", "version", "higher_is_better", "metrics"}} of lm-eval's results."""
    return {
        name: {
            "n": values.get("sample_len"),
            "num_fewshot": results["n-shot"].get(name),
            "version": results["versions"].get(name),
            "higher_is_better": results["higher_is_better"].get(name, {}),
            "metrics": {key.removesuffix(",none"): _plain(value) for key, value in values.items() if "," in key},
        }
        for name, values in {**results["results"], **results.get("groups", {})}.items()
    }


def score(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], questions: int) -> dict[str, Any]:
    """Returns the metrics of every task and group, and the average over the names.

    Args:
        scores: {name that was run: `_scores` of it}.
        questions: their number over all tasks.
    """
    firsts = [_first_metric(of_name[name]) for name, of_name in scores.items()]
    tasks = {task: one for of_name in scores.values() for task, one in of_name.items()}
    metrics: dict[str, Any] = {"n": questions, HEADLINE: None if None in firsts else sum(firsts) / len(firsts)}
    for task, one in tasks.items():
        metrics |= {f"{task}/{metric}": value for metric, value in one["metrics"].items()}
        metrics |= {f"{task}/n": one["n"]} if one["n"] is not None else {}
    return {
        "scorer": f"lm_eval/{SCORER_VERSION}",
        "n": questions,
        "tasks": {task: {key: one[key] for key in ("version", "num_fewshot")} for task, one in tasks.items()},
        "metrics": metrics,
    }


def _first_metric(one: Mapping[str, Any]) -> float | None:
    """Returns the first metric of a task or group; None if there is none, or higher values of it are not better."""
    name, value = next(iter(one["metrics"].items()), ("", None))
    return value if one["higher_is_better"].get(name.partition(",")[0]) else None


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {question: its first metric} of the questions that have a number as such."""
    scores: dict[Any, float] = {}
    for row in rows:
        value = next(iter(row["metrics"].values()), None)
        if isinstance(value, float):
            scores.setdefault((row["task"], row["doc"]), value)  # of the first filter
    return scores


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Collects lm-eval's scores of a finished predictions.jsonl from tasks/NAME.read.json; writes score.json.

    Raises:
        ConfigError: a file is missing or broken.
    """
    rows = predictions.read(path, FIELDS)
    scores = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        record = lm_eval_tasks.record_path(path.parent / "tasks" / f"{fitting(name)}.jsonl")
        try:
            scores[name] = read_record(record)["scores"]
        except (TypeError, KeyError) as error:
            raise ConfigError(
                [f"Broken file {record}: it has no scores; generate again (leave out score_only=true)."]
            ) from error
    result = score(scores, len({(row["task"], row["doc"]) for row in rows}))
    write_json(path.with_name("score.json"), result)
    return result


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("lm_eval", sys.argv[1:]))


BENCHMARKS.add(
    "lm_eval",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text",
        own_rows=lambda config: True,
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        row_columns={"task": "text"},
        fields=FIELDS,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
        benchmark_rows=benchmark_rows,
    ),
)
