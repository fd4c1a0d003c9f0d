"""SQuAD (Rajpurkar et al. 2016): exact match and token F1 of greedy answers with the best of the accepted answers.

    python -m eval.squad PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: max_rows, max_new_tokens,
batch_size, rows=FILE.jsonl (rows {"x", "y", "answers"}; rows=benchmark is SQuAD's own rows, also for a run),
data_root=DIR, device, out=DIR, score_only=true. The first non-empty line of a completion is the answer; case,
punctuation, articles and whitespace are ignored, as in SQuAD's own script.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import BENCHMARKS, predictions
from eval.answers import without_draft
from eval.backends import Generator, Sampling
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_TOKENS, Section, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.rows import Source, read_rows
from flatlora.inputs.templates import prompt
from flatlora.utils.errors import ConfigError

SCORER_VERSION = 2
HEADLINE = "f1"
FIELDS: predictions.Fields = {**predictions.GENERATED, "answers": list}


class Config(Section):
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every row of the test split")
    max_new_tokens: int = setting(48, ge=1, le=MOST_TOKENS, remedy="48 is enough for all but a few of SQuAD's answers")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")


def parse_answer(text: str) -> str:
    """Returns the first non-empty line after any thinking part; "" if there is none."""
    return next((line.strip() for line in without_draft(text).splitlines() if line.strip()), "")


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns exact match and F1 with the best of the accepted answers, averaged over rows.

    Args:
        rows: {"answers", "completion", "finished", "tokens"} each.
    """
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

    total = len(rows)

    def mean(values: list[float]) -> float | None:
        return float(sum(values) / total) if total else None

    parsed = [parse_answer(row["completion"]) for row in rows]
    pairs = list(zip(rows, parsed, strict=True))
    metrics = {
        "n": total,
        HEADLINE: mean([max(compute_f1(answer, text) for answer in row["answers"]) for row, text in pairs]),
        "exact_match": mean([max(compute_exact(answer, text) for answer in row["answers"]) for row, text in pairs]),
        "unanswered": mean([not text for text in parsed]),
        **predictions.answer_counts(rows),
    }
    return {"scorer": f"squad/{SCORER_VERSION}", "n": total, "metrics": metrics}


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {row: F1}."""
    return {(row["prompt"], row["index"]): score([row])["metrics"][HEADLINE] for row in rows}


def check_rows(rows: Sequence[dict[str, Any]], source: str, config: Config, **known: Any) -> None:
    """Checks that every row lists its accepted answers.

    Raises:
        ConfigError: a row does not; the error names `source`, where the rows come from.
    """
    broken = [number for number, row in enumerate(rows, start=1) if not _has_answers(row)]
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ConfigError(
            [
                f'Invalid answers in {source}, row {broken[0]}{others}: squad needs {{"answers": [text, …]}}, at '
                "least one text; use dataset=squad, or leave the benchmark out."
            ]
        )


def _has_answers(row: dict[str, Any]) -> bool:
    answers = row.get("answers")
    return isinstance(answers, list) and bool(answers) and all(isinstance(text, str) for text in answers)


def run(
    backend: Generator,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Answers `rows` ({"x", "y", "answers"}) and scores them; writes predictions.jsonl and score.json."""
    path = predictions.answer_rows(
        backend,
        rows[: config.max_rows],
        folder,
        Sampling(config.max_new_tokens),
        keep=("answers",),
        on_progress=on_progress,
    )
    return score_file(path, config)


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """As `predictions.score_file`."""
    return predictions.score_file(path, FIELDS, score)


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns SQuAD 1.1's 10,570 validation questions as "Q: … A: ", for models without a run."""
    columns = {"context": "text", "question": "text", "answers": "any"}
    rows = read_rows(Source("rajpurkar/squad", "plain_text", "validation"), columns=columns, data_root=data_root)
    accepted = [row["answers"].get("text") if isinstance(row["answers"], dict) else None for row in rows]
    return [  # `check_rows` reports invalid answers
        {
            "x": prompt("qa", row["question"], row["context"]),
            "y": answers[0] if answers else "",
            "answers": answers,
        }
        for row, answers in zip(rows, accepted, strict=True)
    ]


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("squad", sys.argv[1:]))


BENCHMARKS.add(
    "squad",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text",
        generates=True,
        own_rows=False,
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        row_columns={"x": "text", "y": "text", "answers": "any"},
        fields=FIELDS,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
        benchmark_rows=benchmark_rows,
    ),
)
