"""MATH-500 (Lightman et al. 2023): 500 problems of MATH, zero-shot; answers are compared by math-verify.

    python -m eval.math500 PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: template, max_rows, max_new_tokens,
batch_size, rows=FILE.jsonl (rows {"x", "y"}, y an answer in LaTeX), data_root=DIR, device, out=DIR, score_only=true.

The prompt asks for the final answer in \\boxed{}. math-verify reads the answer of a completion after any thinking part,
and compares values: 0.5 is \\frac{1}{2}. The problems come from the hub (HuggingFaceH4/MATH-500), or from
DIR/HuggingFaceH4/MATH-500/default/test.jsonl (or .parquet). Needs the extra `math`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from eval import BENCHMARKS
from eval.answers import without_draft
from eval.by_row import ByRow
from flatlora.config.sections import ChatSection
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_TOKENS, setting
from flatlora.inputs.conversations import question
from flatlora.inputs.rows import Source, read_rows
from flatlora.utils.errors import SettingError

_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."


class Config(ChatSection):
    section_path: ClassVar[str] = "eval.math500"
    template: Literal["qa", "alpaca", "step_by_step", "none", "chat"] = "qa"
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null asks all 500 problems")
    max_new_tokens: int = setting(1024, ge=1, le=MOST_TOKENS, remedy="1024 is enough for most solutions")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        if importlib.util.find_spec("math_verify") is not None:
            return super().rule_errors()
        return [
            *super().rule_errors(),
            SettingError(
                (),
                "Invalid eval.math500: the package math-verify is not installed; run pip install -e '.[math]', or "
                "leave the benchmark out.",
            ),
        ]


def score_row(row: Mapping[str, Any], config: Config) -> dict[str, float]:
    """Returns whether the answer equals the reference, and whether none was found."""
    from math_verify import parse, verify

    answer = parse(without_draft(row["completion"]))
    return {"exact_match": float(verify(parse(f"${row['reference']}$"), answer)), "unparsed": float(not answer)}


def row_problem(row: Mapping[str, Any]) -> str | None:
    from math_verify import parse

    return None if parse(f"${row['y']}$") else f"math-verify reads no answer in {row['y']!r}"


SCORER = ByRow(
    name="math500",
    version=1,
    metrics=("exact_match", "unparsed"),
    score_row=score_row,
    row_problem=row_problem,
)


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns the 500 problems."""
    source = Source("HuggingFaceH4/MATH-500", "default", "test")
    rows = read_rows(source, columns=("problem", "answer"), data_root=data_root)
    return [question(config.template, config.system, f"{row['problem']}\n{_REQUEST}", row["answer"]) for row in rows]


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("math500", sys.argv[1:]))


BENCHMARKS.add(
    "math500", SCORER.benchmark(Config, __doc__, own_rows=lambda config: True, benchmark_rows=benchmark_rows)
)
