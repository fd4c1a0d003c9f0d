"""SQuAD (Rajpurkar et al. 2016): exact match and token F1 of greedy answers with the best of the accepted answers.

    python -m eval.squad PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: max_rows, max_new_tokens,
batch_size, rows=FILE.jsonl (rows {"x", "y", "answers"}; rows=benchmark is SQuAD's own rows, also for a run),
data_root=DIR, device, out=DIR, score_only=true. The first non-empty line of a completion is the answer; case,
punctuation, articles and whitespace are ignored, as in SQuAD's own script.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from eval import BENCHMARKS
from eval.answers import without_draft
from eval.by_row import ByRow
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_TOKENS, Section, setting
from flatlora.inputs.rows import Source, read_rows
from flatlora.inputs.templates import prompt


class Config(Section):
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every row of the test split")
    max_new_tokens: int = setting(48, ge=1, le=MOST_TOKENS, remedy="48 is enough for all but a few of SQuAD's answers")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")


def parse_answer(text: str) -> str:
    """Returns the first non-empty line after any thinking part; "" if there is none."""
    return next((line.strip() for line in without_draft(text).splitlines() if line.strip()), "")


def score_row(row: Mapping[str, Any], config: Config) -> dict[str, float]:
    """Returns F1 and exact match with the best of the accepted answers, and whether there is no answer."""
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

    text = parse_answer(row["completion"])
    return {
        "f1": max(compute_f1(answer, text) for answer in row["answers"]),
        "exact_match": max(compute_exact(answer, text) for answer in row["answers"]),
        "unanswered": not text,
    }


def row_problem(row: Mapping[str, Any]) -> str | None:
    answers = row.get("answers")
    if isinstance(answers, list) and answers and all(isinstance(text, str) for text in answers):
        return None
    return 'it needs {"answers": [text, …]}, at least one text'


SCORER = ByRow(
    name="squad",
    version=2,
    metrics=("f1", "exact_match", "unanswered"),
    score_row=score_row,
    columns={"answers": list},
    row_problem=row_problem,
)


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns SQuAD 1.1's 10,570 validation questions as "Q: … A: ", for models without a run."""
    columns = {"context": "text", "question": "text", "answers": "any"}
    rows = read_rows(Source("rajpurkar/squad", "plain_text", "validation"), columns=columns, data_root=data_root)
    accepted = [row["answers"].get("text") if isinstance(row["answers"], dict) else None for row in rows]
    return [  # `row_problem` reports invalid answers
        {
            "x": prompt("qa", row["question"], row["context"]),
            "y": answers[0] if answers else "",
            "answers": answers,
        }
        for row, answers in zip(rows, accepted, strict=True)
    ]


if __name__ == "__main__":  # before the last line: `python -m` runs this file, and `main` imports it again
    from eval.command import main

    sys.exit(main("squad", sys.argv[1:]))


BENCHMARKS.add("squad", SCORER.benchmark(Config, __doc__, benchmark_rows=benchmark_rows))
