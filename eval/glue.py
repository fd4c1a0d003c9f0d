"""GLUE and data sets of its format: each row's choices are ranked by likelihood; the most likely is the prediction.

    python -m eval.glue PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: task (default: that of the run's
data set; null for one that is not of GLUE), metric, metrics (f1, macro_f1, matthews: besides accuracy), max_rows,
batch_size, rows=FILE.jsonl (rows {"x", "y", "choices"}), device, out=DIR, score_only=true.
`metric=likelihood` sums over all tokens of a choice and the end of the sequence, for any number of choices;
`metric=published` compares the first tokens of two choices, as the public code does. Reports accuracy, and by
task the Matthews correlation (CoLA), F1 (MRPC, QQP) or the Pearson correlation (STS-B).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from eval import BENCHMARKS, predictions
from eval.backends import Backend
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, Section, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.rows import prompt_text
from flatlora.inputs.tokenizing import text_ids
from flatlora.utils.errors import ConfigError, SettingError

SCORER_VERSION = 1
HEADLINE = "accuracy"

FIELDS: predictions.Fields = {
    "index": int,
    "task": str,
    "prompt": str,
    "reference": str,
    "choices": list,
    "scores": list,
    "prediction": str,
}
TaskName = Literal["mnli", "sst2", "cola", "qnli", "mrpc", "qqp", "rte", "stsb", "boolq", "cb", "copa", "wic", None]


class Config(Section):
    task: TaskName = setting(remedy="it determines the metrics, null is accuracy alone")
    metric: Literal["likelihood", "published"] = "likelihood"
    # Of own classes, besides accuracy.
    metrics: list[Literal["f1", "macro_f1", "matthews"]] = setting([], remedy="f1 is that of the second of two classes")
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every row of the test split")
    batch_size: int = setting(32, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        if self.metric == "published" and self.task in ("mnli", "stsb", "cb"):
            return [
                SettingError(
                    ("metric", "task"),
                    f"Invalid eval.glue.metric=published with eval.glue.task={self.task}: the public code compares the "
                    "first tokens of two answers, and this task has more; use eval.glue.metric=likelihood.",
                )
            ]
        return []


def score(rows: Sequence[dict[str, Any]], also: Sequence[str] = ()) -> dict[str, Any]:
    """Returns accuracy, the metric that the task's own paper reports, and others by name.

    Args:
        rows: {"task", "reference", "choices", "prediction"} each, and for STS-B "value", the unrounded reference.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import f1_score, matthews_corrcoef

    total = len(rows)
    truth, guess = [row["reference"] for row in rows], [row["prediction"] for row in rows]
    metrics: dict[str, Any] = {"n": total, HEADLINE: None}
    if total:
        metrics[HEADLINE] = sum(a == b for a, b in zip(truth, guess, strict=True)) / total
        # Accuracy of the most frequent answer.
        metrics["majority"] = max(truth.count(word) for word in set(truth)) / total
        task = rows[0]["task"]
        if task == "cola" or "matthews" in also:
            metrics["matthews"] = float(matthews_corrcoef(truth, guess))
        if "macro_f1" in also:
            metrics["macro_f1"] = float(f1_score(truth, guess, average="macro", zero_division=0.0))
        if task in ("mrpc", "qqp") or "f1" in also:
            metrics["f1"] = float(f1_score(truth, guess, pos_label=rows[0]["choices"][1], zero_division=0.0))
        if task == "stsb":
            values, guesses = [row["value"] for row in rows], [float(word) for word in guess]
            constant = len(set(values)) < 2 or len(set(guesses)) < 2  # without variance, correlation is undefined
            metrics["pearson"] = None if constant else float(pearsonr(values, guesses).statistic)
    return {"scorer": f"glue/{SCORER_VERSION}", "n": total, "metrics": metrics}


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {row: 1.0 or 0.0}."""
    return {(row["prompt"], row["index"]): float(row["prediction"] == row["reference"]) for row in rows}


def check_rows(
    rows: Sequence[dict[str, Any]], source: str, config: Config, *, tokenizer: Any = None, **known: Any
) -> None:
    """Checks that every row can be scored by the metrics of its task.

    Args:
        tokenizer: if given, checks that the choices' first tokens differ, for metric=published.

    Raises:
        ConfigError: a row has no choices, an answer that is not among them, or is of another task.
    """
    expected = rows[0].get("choices") if rows else None
    broken = {
        number: problem
        for number, row in enumerate(rows, start=1)
        if (problem := _problem(row) or _task_problem(row, config, expected))
    }
    if broken:
        first, others = min(broken), f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ConfigError(
            [
                f"Invalid choices in {source}, row {first}{others}: {broken[first]}; glue ranks given answers, so use "
                "a data set whose rows have choices (dataset.label of dataset=custom), and its own task, or leave the "
                "benchmark out."
            ]
        )
    if config.metric == "published" and tokenizer is not None:
        _check_first_tokens(lambda choice: text_ids(tokenizer, choice, special=False)[0], rows)


def _task_problem(row: dict[str, Any], config: Config, expected: list[str]) -> str | None:
    """Returns why the task's metrics cannot be computed for a row; None if they can.

    Args:
        expected: the choices of the first row, which those of every row of a binary task must equal.
    """
    choices, value, task = row["choices"], row.get("value"), config.task
    binary = f"metrics={config.metrics}" if "f1" in config.metrics else f"task={task}" if task in _BINARY else None
    if binary and (len(choices) != 2 or choices != expected):
        return f"{binary} needs the same two answers in every row, the positive one second"
    if task == "stsb":
        if not isinstance(value, int | float) or isinstance(value, bool):
            return 'its "value", the unrounded number of its answer, is missing, which task=stsb needs'
        return None if all(_is_number(choice) for choice in choices) else "task=stsb needs answers that are numbers"
    return None


_BINARY = ("cola", "mrpc", "qqp")  # tasks with a metric for two classes besides accuracy


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _problem(row: dict[str, Any]) -> str | None:
    choices = row.get("choices")
    if not isinstance(choices, list) or len(set(map(str, choices))) != len(choices) or len(choices) < 2:
        return "it needs a list of at least two different answers"
    if not all(isinstance(choice, str) and choice for choice in choices):
        return "its answers must be texts"
    return None if row["y"] in choices else f"its answer {row['y'][:40]!r} is not among them"


def run(
    backend: Backend,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Ranks the choices of `rows` and scores them; writes predictions.jsonl and score.json, returns the score.

    Raises:
        ConfigError: metric=published for choices that begin with the same token, or for more than two; rows that are
            longer than the model's context.
    """
    rows = rows[: config.max_rows]
    prompts = [prompt_text(row) for row in rows]
    published = config.metric == "published"
    if published:
        _check_first_tokens(backend.first_token, rows)
    backend.check_choices(prompts, [row["choices"] for row in rows], first_token=published)

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        likelihoods = backend.log_likelihoods(
            [prompts[index] for index in batch], [rows[index]["choices"] for index in batch], first_token=published
        )
        return [
            {"scores": scores, "prediction": rows[index]["choices"][scores.index(max(scores))]}
            for index, scores in zip(batch, likelihoods, strict=True)
        ]

    path = predictions.collect(
        [
            {
                "task": config.task or "",
                "prompt": prompt,
                "reference": row["y"],
                "choices": row["choices"],
                **({"value": row["value"]} if config.task == "stsb" else {}),
            }
            for prompt, row in zip(prompts, rows, strict=True)
        ],
        answer,
        folder,
        fields=FIELDS,
        lengths=predictions.prompt_lengths(backend, prompts),
        batch_size=backend.batch_size,
        settings={**backend.describe(), "metric": config.metric},
        on_progress=on_progress,
    )
    return score_file(path, config)


def _check_first_tokens(first_token: Callable[[str], int], rows: Sequence[dict[str, Any]]) -> None:
    for choices in {tuple(row["choices"]) for row in rows}:
        if len(choices) != 2 or len({first_token(choice) for choice in choices}) != 2:
            raise ConfigError(
                [
                    f"Invalid eval.glue.metric=published for the answers {', '.join(choices)}: it compares the first "
                    "tokens of two answers, which must differ; use eval.glue.metric=likelihood."
                ]
            )


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """As `predictions.score_file`."""
    return predictions.score_file(path, FIELDS, lambda rows: score(rows, config.metrics))


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """GLUE has no default rows: they come from a run, or from rows=FILE.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        [
            "Missing rows: glue has no rows of its own for a model without a run; name them with "
            'rows=FILE.jsonl ({"x", "y", "choices"}; a run\'s test.jsonl is such a file).'
        ]
    )


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("glue", sys.argv[1:]))


BENCHMARKS.add(
    "glue",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text",
        generates=False,
        scoring=("metrics",),
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        row_columns={"x": "text", "y": "text", "choices": "any"},
        fields=FIELDS,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
        benchmark_rows=benchmark_rows,
    ),
)
