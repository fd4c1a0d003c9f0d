"""Two runs on the same questions: the paired difference, its bootstrap interval, and McNemar's test.

    python -m eval compare RUN_A RUN_B [BENCHMARK ...]

A and B are run folders, or folders of answers such as RUN/eval/gsm8k-max_rows=100 or what out=DIR named. Every
benchmark that both have answered is compared on the questions that both were asked. The gains of the papers are of the
size of the noise that a few hundred questions leave, which an interval shows and two numbers do not.
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
    """B against A on one benchmark; scores and their difference are shares, or ratings."""

    benchmark: str
    questions: int
    left_out: int  # questions that one of both was asked alone
    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None  # None for one question, or where all differences are the same
    only_a: int  # questions that A answers better than B
    only_b: int
    p: float | None  # exact McNemar; None where rows are neither right nor wrong


def compare(benchmark: str, a: Mapping[Any, float], b: Mapping[Any, float]) -> Comparison:
    """Compare the scores of rows, {row: score}, on the rows that both have.

    Raises:
        ConfigError: none in common.
    """
    from scipy.stats import binomtest, bootstrap

    common = [row for row in a if row in b]
    if not common:
        raise ConfigError([f"Nothing to compare in {benchmark}: the two have no question in common."])
    left, right = np.array([a[row] for row in common]), np.array([b[row] for row in common])
    differences = right - left
    interval = None
    if len(common) > 1 and len(set(differences.tolist())) > 1:
        found = bootstrap(
            (differences,),
            np.mean,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        interval = float(found.low), float(found.high)
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


def main(words: Sequence[str]) -> None:
    """Print one row a benchmark, or the help that is asked for.

    Raises:
        ConfigError: folders without answers, or answers that cannot be compared; every error at once.
    """
    if {"-h", "--help"} & set(words):
        print((__doc__ or "").strip())
        return
    if len(words) < 2:
        raise ConfigError(
            [
                f"Missing {' and '.join(['RUN_A', 'RUN_B'][len(words) :])}: two runs are compared, as python -m eval "
                "compare RUN_A RUN_B [BENCHMARK ...]; --help tells more."
            ]
        )
    a, b = gather(*(lambda name=name: _answered(Path(name)) for name in words[:2]))
    wanted = list(words[2:]) or [name for name in a if name in b]
    if not wanted:
        raise ConfigError(
            [
                f"Nothing to compare: {words[0]} has answers to {', '.join(a)}, and {words[1]} to {', '.join(b)}; "
                "score both on one benchmark."
            ]
        )
    missing = [
        f"No answers to {name} in {path}: it has {', '.join(found)}; score it with python -m eval.{name} {path}."
        for name in wanted
        for path, found in ((words[0], a), (words[1], b))
        if name not in found
    ]
    if missing:
        raise ConfigError(missing)
    gather(*(lambda name=name: _check_alike(name, a[name], b[name]) for name in wanted))
    print_comparisons(
        words[0], words[1], [compare(name, _scores(name, a[name]), _scores(name, b[name])) for name in wanted]
    )


def _check_alike(benchmark: str, a: Path, b: Path) -> None:
    parsers = [getattr(_settings(benchmarks.BENCHMARKS[benchmark], folder), "parser", None) for folder in (a, b)]
    if parsers[0] != parsers[1]:
        raise ConfigError(
            [
                f"Invalid pair for {benchmark}: {a} was scored by parser={parsers[0]} and {b} by parser={parsers[1]}; "
                f"score one anew, with python -m eval.{benchmark} PATH score_only=true parser={parsers[0]}."
            ]
        )


def print_comparisons(a: str, b: str, found: Sequence[Comparison]) -> None:
    """One table on standard output."""
    table = Table(title=f"A = {a}\nB = {b}", title_justify="left")
    interval = f"{CONFIDENCE:.0%} interval"
    for column in ("benchmark", "questions", "A", "B", "B − A", interval, "A better", "B better", "p"):
        table.add_column(column, justify="left" if column == "benchmark" else "right", no_wrap=True)
    for one in found:
        share = benchmarks.BENCHMARKS[one.benchmark].is_share
        form = "{:+.2%}" if share else f"{{:+.{benchmarks.BENCHMARKS[one.benchmark].digits}f}}"
        interval = " to ".join(map(form.format, one.interval)) if one.interval else "—"
        table.add_row(
            f"{one.benchmark} {benchmarks.BENCHMARKS[one.benchmark].headline}",
            f"{one.questions:,}" + (f" ({one.left_out} left out)" if one.left_out else ""),
            form.format(one.a).lstrip("+"),
            form.format(one.b).lstrip("+"),
            form.format(one.difference),
            interval,
            str(one.only_a),
            str(one.only_b),
            "—" if one.p is None else f"{one.p:.3g}",
        )
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=150)).print(table)


def _answered(folder: Path) -> dict[str, Path]:
    """{benchmark: folder with its predictions.jsonl} of a run, or of one folder of answers."""
    if not folder.is_dir():
        raise ConfigError([f"Invalid path {folder}: no such folder; name a run that was scored."])
    if (folder / "predictions.jsonl").is_file():
        return {_benchmark_of(folder): folder}
    found = {name: folder / "eval" / name for name in benchmarks.BENCHMARKS}
    found = {name: path for name, path in found.items() if (path / "predictions.jsonl").is_file()}
    if not found:
        others = sorted(str(path.parent) for path in folder.glob("eval/*/predictions.jsonl"))
        there = f" (there are {', '.join(others)}, which can be named themselves)" if others else ""
        raise ConfigError([f"No answers in {folder}{there}: score it first, as with python -m eval.gsm8k {folder}."])
    return found


def _benchmark_of(folder: Path) -> str:
    """Whose answers a folder holds: its score says so, for out=DIR may have named it anything.

    Raises:
        ConfigError: neither its score nor its name does.
    """
    try:
        scorer = str((read_record(folder / "score.json") or {})["scorer"])
    except (ConfigError, KeyError):
        scorer = folder.name.partition("-")[0]  # RUN/eval/NAME-key=value
    name = scorer.partition("/")[0]
    if name not in benchmarks.BENCHMARKS:
        raise ConfigError(
            [
                f"Invalid path {folder}: it holds answers, and neither its score.json nor its name says to which "
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
    """The settings that the answers were scored with, as far as they decide a row's score."""
    try:
        parser = (read_record(folder / "score.json") or {}).get("parser")
    except ConfigError:
        parser = None
    fields = module.Config.model_fields
    return module.Config.model_construct(**({"parser": parser} if parser and "parser" in fields else {}))
