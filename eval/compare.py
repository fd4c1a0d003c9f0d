"""Compares two runs on the same questions: paired difference, bootstrap confidence interval, and McNemar's test.

    python -m eval compare RUN_A RUN_B [BENCHMARK ...]

RUN_A and RUN_B are run folders, or folders of answers such as RUN/eval/gsm8k-max_rows=100 or the one given as out=DIR.
Every benchmark that both have answers to is compared on the questions that both answered. The gains that the papers
report are about as large as the sampling noise of a few hundred questions: an interval shows it, two scores do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import eval as benchmarks
from eval import predictions
from flatlora.inputs.rows import gather
from flatlora.utils.errors import ConfigError
from flatlora.utils.records import read_record

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Comparison of B with A on one benchmark; scores and their difference are fractions, or ratings."""

    benchmark: str
    questions: int
    left_out: int  # questions that only one of the two answered
    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None  # None for a single question, or if all differences are equal
    only_a: int  # questions that A answers better than B
    only_b: int
    p: float | None  # exact McNemar; None if scores are not just 0 and 1


def compare(benchmark: str, a: Mapping[Any, float], b: Mapping[Any, float]) -> Comparison:
    """Compares two mappings {row: score} on the rows that both contain.

    Raises:
        ConfigError: they have no row in common.
    """
    from scipy.stats import binomtest, bootstrap

    common = [row for row in a if row in b]
    if not common:
        raise ConfigError([f"Nothing to compare in {benchmark}: the two have no question in common."])
    left, right = np.array([a[row] for row in common]), np.array([b[row] for row in common])
    differences = right - left
    interval = None
    if len(common) > 1 and len(set(differences.tolist())) > 1:
        bounds = bootstrap(
            (differences,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        interval = float(bounds.low), float(bounds.high)
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    binary = set(np.concatenate([left, right]).tolist()) <= {0.0, 1.0}
    decided = only_a + only_b
    p = (float(binomtest(only_b, decided, 0.5).pvalue) if decided else 1.0) if binary else None
    return Comparison(
        benchmark,
        len(common),
        len(a) + len(b) - 2 * len(common),
        float(left.mean()),
        float(right.mean()),
        float(differences.mean()),
        interval,
        only_a,
        only_b,
        p,
    )


def main(arguments: Sequence[str]) -> None:
    """Prints a table with one row per benchmark, or the help for --help.

    Raises:
        ConfigError: folders without answers, or answers that cannot be compared; all errors together.
    """
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return
    if len(arguments) < 2:
        raise ConfigError(
            [
                f"Missing {' and '.join(['RUN_A', 'RUN_B'][len(arguments) :])}: name two runs, as in python -m eval "
                "compare RUN_A RUN_B [BENCHMARK ...]; --help shows more."
            ]
        )
    a, b = gather(*(lambda name=name: _answer_folders(Path(name)) for name in arguments[:2]))
    names = list(arguments[2:]) or [name for name in a if name in b]
    if not names:
        raise ConfigError(
            [
                f"Nothing to compare: {arguments[0]} has answers to {', '.join(a)}, and {arguments[1]} to "
                f"{', '.join(b)}; score both on one benchmark."
            ]
        )
    missing = [
        f"No answers to {name} in {path}: it has {', '.join(answered)}; score it with python -m eval.{name} {path}."
        for name in names
        for path, answered in ((arguments[0], a), (arguments[1], b))
        if name not in answered
    ]
    if missing:
        raise ConfigError(missing)
    gather(*(lambda name=name: _check_same_scoring(name, a[name], b[name]) for name in names))
    print_comparisons(
        arguments[0], arguments[1], [compare(name, _scores(name, a[name]), _scores(name, b[name])) for name in names]
    )


def _check_same_scoring(benchmark: str, a: Path, b: Path) -> None:
    module = benchmarks.BENCHMARKS[benchmark]
    settings = [_settings(module, folder) for folder in (a, b)]
    for key in module.scoring:
        values = [getattr(each, key, None) for each in settings]
        if values[0] != values[1]:
            raise ConfigError(
                [
                    f"Invalid pair for {benchmark}: {a} was scored by {key}={values[0]} and {b} by {key}={values[1]}; "
                    f"score one again, with python -m eval.{benchmark} PATH score_only=true {key}={values[0]}."
                ]
            )


def print_comparisons(a: str, b: str, comparisons: Sequence[Comparison]) -> None:
    """Prints a table, one row per comparison; `a` and `b` are the titles of the two runs."""
    table = Table(title=f"A = {a}\nB = {b}", title_justify="left")
    interval = f"{CONFIDENCE:.0%} interval"
    for column in ("benchmark", "questions", "A", "B", "B − A", interval, "A better", "B better", "p"):
        table.add_column(column, justify="left" if column == "benchmark" else "right", no_wrap=True)
    for comparison in comparisons:
        share = benchmarks.BENCHMARKS[comparison.benchmark].is_share
        form = "{:+.2%}" if share else f"{{:+.{benchmarks.BENCHMARKS[comparison.benchmark].digits}f}}"
        interval = " to ".join(map(form.format, comparison.interval)) if comparison.interval else "—"
        table.add_row(
            f"{comparison.benchmark} {benchmarks.BENCHMARKS[comparison.benchmark].headline}",
            f"{comparison.questions:,}" + (f" ({comparison.left_out} left out)" if comparison.left_out else ""),
            form.format(comparison.a).lstrip("+"),
            form.format(comparison.b).lstrip("+"),
            form.format(comparison.difference),
            interval,
            str(comparison.only_a),
            str(comparison.only_b),
            "—" if comparison.p is None else f"{comparison.p:.3g}",
        )
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=150)).print(table)


def _answer_folders(folder: Path) -> dict[str, Path]:
    """Returns {benchmark: folder with its predictions.jsonl} for a run's folder, or for one folder of answers."""
    if not folder.is_dir():
        raise ConfigError([f"Invalid path {folder}: no such folder; name a run that was scored."])
    if (folder / "predictions.jsonl").is_file():
        return {_benchmark_of(folder): folder}
    folders = {name: folder / "eval" / name for name in benchmarks.BENCHMARKS}
    folders = {name: path for name, path in folders.items() if (path / "predictions.jsonl").is_file()}
    if not folders:
        others = sorted(str(path.parent) for path in folder.glob("eval/*/predictions.jsonl"))
        hint = f" (there are {', '.join(others)}; name one of those)" if others else ""
        raise ConfigError([f"No answers in {folder}{hint}: score it first, as with python -m eval.gsm8k {folder}."])
    return folders


def _benchmark_of(folder: Path) -> str:
    """Returns the benchmark that a folder's answers belong to: by score.json, as out=DIR can have any name.

    Raises:
        ConfigError: neither score.json nor the folder's name says it.
    """
    try:
        scorer = str((read_record(folder / "score.json") or {})["scorer"])
    except (ConfigError, KeyError):
        scorer = folder.name.partition("-")[0]  # RUN/eval/NAME-key=value
    name = scorer.partition("/")[0]
    if name not in benchmarks.BENCHMARKS:
        raise ConfigError(
            [
                f"Invalid path {folder}: it holds answers, but neither its score.json nor its name says to which "
                f"benchmark; score them with python -m eval.NAME PATH out={folder} score_only=true, where NAME is one "
                f"of {', '.join(benchmarks.BENCHMARKS)}."
            ]
        )
    return name


def _scores(benchmark: str, folder: Path) -> dict[Any, float]:
    module = benchmarks.BENCHMARKS[benchmark]
    rows = predictions.read(folder / "predictions.jsonl", module.fields)
    try:
        return module.row_scores(rows, _settings(module, folder), folder)
    except ValueError as error:
        raise ConfigError([f"Broken file {folder / 'predictions.jsonl'}: {error}"]) from error


def _settings(module: Any, folder: Path) -> Any:
    """Returns the settings with which the answers were scored, as far as they affect a row's score."""
    try:
        record = read_record(folder / "score.json") or {}
    except ConfigError:
        record = {}
    return module.Config.model_construct(**{key: record[key] for key in module.scoring if key in record})
