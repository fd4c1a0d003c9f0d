"""InstructEval (Chia et al. 2023): MMLU 5-shot, DROP 3-shot and BBH 3-shot by lm-eval, HumanEval zero-shot.

    python -m eval.instruct_eval PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: tasks (any of mmlu, drop, bbh and
humaneval, or single lm-eval tasks such as mmlu_anatomy), allow_code_execution (for humaneval), max_rows (of each
lm-eval task), batch_size, data_root=DIR, device, out=DIR, score_only=true.

The data come from the hub (cais/mmlu, EleutherAI/drop, SaylorTwift/bbh), or from
DIR/<owner>/<name>/<config>/<split>.jsonl (or .parquet). Answers are saved after each of MMLU's 57 subjects and BBH's 27
tasks; a repeated call continues with the next one. Needs the extra `instruct`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from eval import BENCHMARKS, humaneval, lm_eval_tasks, predictions
from eval.backends import Backend
from flatlora.config.sections import ChatSection
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.rows import Source, gather
from flatlora.utils.errors import SettingError, nearest
from flatlora.utils.files import write_json

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SCORER_VERSION = 1
_ASKING_VERSION = 2  # of the way models are prompted: saved answers of another version are generated again
HEADLINE = "average"
FIELDS: predictions.Fields = {"index": int, "task": str, "doc": int, "score": float}
# (lm-eval's name, its folder in lm-eval, shots, the metric of a row)
_GROUPS = {
    "mmlu": ("mmlu", "mmlu/default", 5, "acc"),
    "drop": ("drop", "drop", 3, "f1"),
    "bbh": ("bbh_fewshot", "bbh/fewshot", 3, "exact_match"),
}


class Config(ChatSection):
    section_path: ClassVar[str] = "eval.instruct_eval"
    tasks: list[str] = setting(
        ["mmlu", "drop", "bbh"], remedy="name mmlu, drop, bbh, humaneval, or lm-eval's own tasks"
    )
    allow_code_execution: bool = setting(False, remedy="true runs what the model wrote for humaneval, in a sandbox")
    template: Literal["alpaca", "qa", "none", "chat"] = "alpaca"  # for humaneval
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null asks every row of every task")
    batch_size: int = setting(8, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        errors = super().rule_errors()
        if importlib.util.find_spec("lm_eval") is None:
            errors.append(
                SettingError(
                    (),
                    "Invalid eval.instruct_eval: the package lm_eval is not installed; run pip install lm_eval, or "
                    "leave the benchmark out.",
                )
            )
        elif unknown := [name for name in self.tasks if name != "humaneval" and not _parts(name)]:
            near = [close for name in unknown if (close := nearest(name, ["humaneval", *_known_tasks()]))]
            errors.append(
                SettingError(
                    ("tasks",),
                    f"Invalid eval.instruct_eval.tasks={self.tasks}: {', '.join(unknown)} is none of mmlu, drop, bbh, "
                    "humaneval, nor a part of them such as mmlu_anatomy"
                    + (f"; did you mean {', '.join(near)}?" if near else "; name some."),
                )
            )
        if not self.tasks:
            errors.append(
                SettingError(
                    ("tasks",),
                    "Invalid eval.instruct_eval.tasks=[]: there is nothing to ask; name mmlu, drop, bbh or humaneval.",
                )
            )
        if "humaneval" in self.tasks:
            errors += self.humaneval().rule_errors()
        return errors

    def humaneval(self) -> humaneval.Config:
        """Returns HumanEval's settings, zero-shot and greedy as in InstructEval."""
        return humaneval.Config(
            allow_code_execution=self.allow_code_execution,
            template=self.template,
            system=self.system,
            samples=1,
            temperature=0.0,
            max_rows=self.max_rows,
            batch_size=self.batch_size,
        )


def _group(task: str) -> str | None:
    """Returns the group of a task: mmlu, drop or bbh; None for other names."""
    return next((name for name in _GROUPS if task == name or task.startswith(f"{name}_")), None)


@functools.cache
def _task_manager() -> TaskManager:
    """Returns lm-eval's index of the three groups; an index of all its tasks would take 10 s."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[root / folder for _, folder, _, _ in _GROUPS.values()]
    )


def _known_tasks() -> list[str]:
    return [part for group in _GROUPS for part in (group, *_parts(group))]


def _parts(task: str) -> list[str]:
    """Returns the tasks of a name, as `lm_eval_tasks.parts`."""
    return [part.replace("bbh_fewshot", "bbh") for part in lm_eval_tasks.parts(_task_manager(), _name(task))]


def _name(task: str) -> str:
    """Returns lm-eval's name of a task."""
    return task if task.startswith("bbh_fewshot") else task.replace("bbh", "bbh_fewshot")


def _sources(task: str) -> list[Source]:
    return lm_eval_tasks.sources(_task_manager(), _name(task))


def score(rows: Sequence[dict[str, Any]], programs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the mean over the rows of each group, and the average over groups.

    Args:
        rows: {"task", "score"} each; a score is 1 or 0, or DROP's F1.
        programs: HumanEval's score, if it is one of the tasks.
    """
    scores_of_group: dict[str, list[float]] = {}
    for row in rows:
        scores_of_group.setdefault(_group(row["task"]) or row["task"], []).append(row["score"])
    means, n_rows = {name: sum(values) / len(values) for name, values in scores_of_group.items()}, len(rows)
    if programs is not None:
        means["humaneval"] = programs["metrics"][humaneval.HEADLINE]
        n_rows += programs["n"]
    average = sum(means.values()) / len(means) if means else None
    return {
        "scorer": f"instruct_eval/{SCORER_VERSION}",
        "n": n_rows,
        "metrics": {"n": n_rows, HEADLINE: average, **means},
    }


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {row: score} of the lm-eval tasks."""
    return {(row["task"], row["doc"]): row["score"] for row in rows}


def check_rows(rows: Sequence[dict[str, Any]], source: str, config: Config, **known: Any) -> None:
    """Checks that the data of every task exist, and that HumanEval, if selected, can run on this machine.

    Raises:
        ConfigError: a split is missing in data_root, or a data set cannot be read from the hub; or as
            `humaneval.check_rows`.
    """
    root = _root(rows)

    def check_programs() -> None:
        humaneval.check_rows(humaneval.benchmark_rows(root), "humaneval's own rows", config.humaneval())

    names = [row["task"] for row in rows if row["task"] != "humaneval"]
    by_data_set: dict[str, list[Source]] = {}
    for split in (split for name in names for split in _sources(name)):
        by_data_set.setdefault(split.hub_id, []).append(split)
    gather(
        *(lambda sources=sources: lm_eval_tasks.check_data(sources, root) for sources in by_data_set.values()),
        *([check_programs] if "humaneval" in config.tasks else []),
    )


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns one row per task; lm-eval reads the rows of a task when it runs it."""
    names = [part for task in config.tasks for part in ([task] if task == "humaneval" else _parts(task))]
    return [{"task": name, "data_root": data_root} for name in dict.fromkeys(names)]


def _root(rows: Sequence[dict[str, Any]]) -> str | None:
    return rows[0].get("data_root") if rows else None


def run(
    backend: Backend,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Runs every task: writes tasks/NAME.jsonl for each, predictions.jsonl of all, and score.json."""
    settings = {
        **backend.describe(),
        "max_rows": config.max_rows,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "asking": _ASKING_VERSION,
    }
    root = _root(rows)
    answers = lm_eval_tasks.answer_each(
        [row["task"] for row in rows if row["task"] != "humaneval"],
        folder,
        settings,
        read=lambda task: lm_eval_tasks.file_hashes(_sources(task), root),
        answer=lambda task: (_ask(backend, task, config, root), {}),
        on_progress=on_progress,
    )
    if "humaneval" in config.tasks:
        problems = humaneval.benchmark_rows(root)
        humaneval.run(backend, problems, folder / "humaneval", config.humaneval(), on_progress=on_progress)
    return score_file(answers, config)


def _ask(backend: Any, task: str, config: Config, data_root: str | None) -> list[dict[str, Any]]:
    """Returns rows {"task", "doc", "prompt", "answer", "target", "score"} of one lm-eval task, as lm-eval scores them.

    Raises:
        OSError: lm-eval cannot run the task, mostly because its data are missing.
    """
    from eval.backends.lm_eval import LMEvalModel

    _, _, shots, metric = _GROUPS[_group(task)]
    results = lm_eval_tasks.ask(
        LMEvalModel(backend, task, config.batch_size),
        _task_manager(),
        _name(task),
        _sources(task),
        data_root,
        num_fewshot=shots,
        limit=config.max_rows,
        bootstrap_iters=0,
    )
    return [
        {
            **lm_eval_tasks.row_of(task, sample),
            "answer": json.dumps(sample["filtered_resps"], default=str, ensure_ascii=False),
            "target": str(sample["target"]),
            "score": float(sample[metric]),
        }
        for sample in sorted(results["samples"][_name(task)], key=lambda sample: sample["doc_id"])
    ]


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Scores a finished predictions.jsonl, and HumanEval's beside it; writes score.json.

    Raises:
        ConfigError: a file is missing or broken.
    """
    programs = None
    if "humaneval" in config.tasks:
        programs = humaneval.score_file(path.parent / "humaneval" / "predictions.jsonl", config.humaneval())
    result = score(predictions.read(path, FIELDS), programs)
    write_json(path.with_name("score.json"), result)
    return result


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("instruct_eval", sys.argv[1:]))


BENCHMARKS.add(
    "instruct_eval",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text",
        generates=False,
        own_rows=lambda config: True,
        scoring=("allow_code_execution",),
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
