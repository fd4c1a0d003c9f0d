"""GSM8K and data sets in its form: zero-shot, greedy, exact match of the final answer.

    python -m eval.gsm8k PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: parser, template (of the
benchmark's own rows; a run's test rows have its own), max_rows, max_new_tokens, batch_size, rows=FILE.jsonl (rows
{"x", "y"}), data_root=DIR, device, out=DIR, score_only=true. A run is asked its data set's test rows;
`rows=benchmark` asks it GSM8K's own, in the run's template. `parser=strict` reads the number after "####" or else the
last one; `parser=math_verify` reads expressions and LaTeX too, by that package (extra `math`). A score has both.
A run's own answers stay: other settings, other rows and another device have folders of their own beside eval/gsm8k.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from eval import predictions
from eval.backends import Generator, Sampling
from flatlora.config import ConfigError, Section, setting
from flatlora.files import write_json
from flatlora.rows import Source, read_rows
from flatlora.templates import prompt

KIND = "text"
GENERATES = True
OWN_ROWS = False
SCORING = ("parser",)
SCORER_VERSION = 1
HEADLINE = "exact_match"
FIELDS = predictions.GENERATED
ROW_COLUMNS = {"x": "text", "y": "text"}

# A number as people write it: sign, dollar sign, thousands separators, decimals; "42." ends a sentence. A sign touches
# its number and follows no other, so that "5-3", "10 - 7" and the dash of a list are not negative.
_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\$\s?)?[-−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


class Config(Section):
    max_rows: int | None = setting(None, ge=1, remedy="null scores every row of the data set's test split")
    max_new_tokens: int = setting(512, ge=1, remedy="512 as published")
    batch_size: int = setting(16, ge=1, remedy="lower it when memory runs out")
    parser: Literal["strict", "math_verify"] = "strict"
    template: Literal["qa", "alpaca", "none"] = "qa"

    def rule_faults(self) -> list[str]:
        if self.parser == "math_verify" and not _has_math_verify():
            return [
                "Invalid eval.gsm8k.parser=math_verify: the package math-verify is not installed; run pip install "
                "'math-verify[antlr4_9_3]', or use eval.gsm8k.parser=strict."
            ]
        return []


def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def parse_answer(text: str) -> Decimal | None:
    """The number on the line of the first "####", else the last number of the text; None when there is none.

    Reads 1,000 · -5 · $42.50 · 42. · +7 as people mean them, exactly, however long; digits of every script count, and
    there are no exponents: 1e400 is 1, as 18kg is 18. The first mark counts, for a base model rambles on with
    questions and answers of its own. A mark without a number on its line is no answer.
    """
    _, mark, rest = text.partition("####")
    if mark:
        number = _NUMBER.search(rest.partition("\n")[0])
        return _to_decimal(number[0]) if number else None
    numbers = _NUMBER.findall(text)
    return _to_decimal(numbers[-1]) if numbers else None


def is_right(row: Mapping[str, Any], parser: str) -> bool:
    """Whether a row's completion gives the number of its reference.

    Raises:
        ValueError: a reference without a number: the data set is broken, and a score of it would mean nothing.
    """
    wanted = parse_answer(row["reference"])
    if wanted is None:
        raise ValueError(f"Row {row.get('index')} has no number in its reference {row['reference'][-60:]!r}.")
    if parser == "strict":
        return parse_answer(row["completion"]) == wanted
    from math_verify import parse, verify

    said, mark, rest = row["completion"].replace("−", "-").partition("####")
    return verify(parse(str(wanted)), parse(rest.partition("\n")[0] if mark else said))


def _to_decimal(number: str) -> Decimal:
    digits = re.sub(r"[^\d.]", "", number)
    negative = "-" in number or "−" in number
    return Decimal(f"-{digits}" if negative else digits)  # -Decimal(digits) would round to 28 digits


def score(rows: Sequence[dict[str, Any]], parser: str = "strict") -> dict[str, Any]:
    """Exact match of predictions; an unparsed prediction is wrong and counted apart.

    Args:
        rows: {"reference", "completion", "finished", "tokens"} each.
        parser: whose count is the exact match; that of the other stands beside it, where its package is installed.

    Raises:
        ValueError: as `is_right`.
    """
    total = len(rows)
    parsers = ["strict", "math_verify"] if _has_math_verify() else ["strict"]
    shares = {name: sum(is_right(row, name) for row in rows) / total if total else None for name in parsers}
    versions = {"math_verify": importlib.metadata.version("math-verify")} if len(parsers) > 1 else {}
    unparsed = sum(parse_answer(row["completion"]) is None for row in rows)
    return {
        "scorer": f"gsm8k/{SCORER_VERSION}",
        "n": total,
        "parser": parser,
        "versions": versions,
        "metrics": {
            "n": total,  # again, for run.json keeps the metrics alone
            HEADLINE: shares[parser],
            **shares,
            "unparsed": unparsed / total if total else None,
            "unfinished": sum(not row["finished"] for row in rows) / total if total else None,
            "mean_tokens": sum(row["tokens"] for row in rows) / total if total else None,
        },
    }


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """{row: 1.0 or 0.0}; rows of two models with the same name are the same question."""
    return {(row["prompt"], row["index"]): float(is_right(row, config.parser)) for row in rows}


def check_rows(rows: Sequence[dict[str, str]], source: str, config: Config, **known: Any) -> None:
    """See to it that every answer can be scored, before a model answers for hours.

    Raises:
        ConfigError: an answer without a number; `source` says in the fault where the rows are from.
    """
    broken = [number for number, row in enumerate(rows, start=1) if parse_answer(row["y"]) is None]
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ConfigError(
            [
                f"Invalid answer in {source}, row {broken[0]}{others}: gsm8k scores a final number, and "
                f'{rows[broken[0] - 1]["y"][-60:]!r} has none; end it in "#### NUMBER", or leave the row out.'
            ]
        )


def run(
    backend: Generator,
    rows: Sequence[dict[str, str]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Answer `rows` ({"x", "y"}) and score them; writes predictions.jsonl and score.json, returns the score."""
    path = predictions.answer_rows(
        backend, rows[: config.max_rows], folder, Sampling(config.max_new_tokens), on_progress=on_progress
    )
    return score_file(path, config)


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Score a predictions file and write score.json beside it.

    Raises:
        ConfigError: the file is not there, or broken.
    """
    rows = predictions.read(path)
    try:
        result = score(rows, config.parser)
    except ValueError as error:
        raise ConfigError([f"Broken file {path}: {error} Mend the data set's row, and generate anew."]) from error
    write_json(path.with_name("score.json"), result)
    return result


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, str]]:
    """GSM8K's 1,319 test questions, for models that no run of ours describes."""
    rows = read_rows(Source("openai/gsm8k", "main", "test"), columns=("question", "answer"), data_root=data_root)
    return [{"x": prompt(config.template, row["question"]), "y": row["answer"]} for row in rows]


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("gsm8k", sys.argv[1:]))
