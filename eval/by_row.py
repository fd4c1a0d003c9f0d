"""Benchmarks that score each generated answer by itself: the score of a model is the mean over the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval import predictions
from eval.backends import Generator, Sampling
from flatlora.config.settings import Section
from flatlora.experiment.plugins import Benchmark
from flatlora.utils.errors import ConfigError

Row = Mapping[str, Any]


def _no_problem(row: Row) -> str | None:
    """Accepts every row."""


@dataclass(frozen=True)
class ByRow:
    """A benchmark of greedy answers that is defined by the scores of one answer.

    Args:
        name: the benchmark's name, that of its file and option.
        version: incremented when the same answers get different scores.
        metrics: names of the metrics; the first one is shown in tables.
        score_row: (row, config) → {metric: value}. The row has "prompt", "reference" (the data set's y), "completion",
            "tokens", "finished" and `columns`.
        columns: columns of the data set's rows that the score needs besides x and y, and the types of their values.
        row_problem: row of the data set → why it cannot be scored; None if it can.
        scoring: keys of the config that `score_row` reads; they are recorded with the score.
    """

    name: str
    version: int
    metrics: Sequence[str]
    score_row: Callable[[Row, Any], Mapping[str, float]]
    columns: Mapping[str, type] = field(default_factory=dict)
    row_problem: Callable[[Row], str | None] = _no_problem
    scoring: Sequence[str] = ()

    def score(self, rows: Sequence[Row], config: Any) -> dict[str, Any]:
        """Returns the mean of each metric over the answers; None without answers."""
        total, scores = len(rows), [self.score_row(row, config) for row in rows]
        means = {name: float(sum(each[name] for each in scores) / total) if total else None for name in self.metrics}
        metrics = {"n": total, **means, **predictions.answer_counts(rows)}
        settings = {key: getattr(config, key) for key in self.scoring}
        return {"scorer": f"{self.name}/{self.version}", **settings, "n": total, "metrics": metrics}

    def row_scores(self, rows: Sequence[Row], config: Any, folder: Path) -> dict[Any, float]:
        """Returns {row: its first metric}."""
        return {(row["prompt"], row["index"]): self.score_row(row, config)[self.metrics[0]] for row in rows}

    def check_rows(self, rows: Sequence[Row], source: str, config: Any, **known: Any) -> None:
        """Checks that every row can be scored.

        Raises:
            ConfigError: a row cannot; the error names `source`, where the rows come from.
        """
        problems = {number: text for number, row in enumerate(rows, start=1) if (text := self.row_problem(row))}
        if problems:
            first, others = min(problems), f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ConfigError(
                [
                    f"Invalid row {first}{others} in {source} for {self.name}: {problems[first]}; use a data set with "
                    "such rows, or leave the benchmark out."
                ]
            )

    def run(
        self,
        backend: Generator,
        rows: Sequence[dict[str, Any]],
        folder: Path,
        config: Any,
        *,
        on_progress: predictions.OnProgress | None = None,
    ) -> dict[str, Any]:
        """Answers `rows` and scores them; writes predictions.jsonl and score.json."""
        path = predictions.answer_rows(
            backend,
            rows[: config.max_rows],
            folder,
            Sampling(config.max_new_tokens),
            keep=tuple(self.columns),
            on_progress=on_progress,
        )
        return self.score_file(path, config)

    def score_file(self, path: Path, config: Any) -> dict[str, Any]:
        """As `predictions.score_file`."""
        return predictions.score_file(path, self._fields, lambda rows: self.score(rows, config))

    @property
    def _fields(self) -> predictions.Fields:
        return {**predictions.GENERATED, **self.columns}

    def benchmark(self, Config: type[Section], help: str, **settings: Any) -> Benchmark:
        """Returns the plug-in to register.

        Args:
            Config: class of its config section, with `max_rows`, `max_new_tokens` and `batch_size`.
            help: text of `python -m eval.NAME --help`.
            settings: further fields of `Benchmark`.
        """
        return Benchmark(
            Config=Config,
            help=help,
            kind="text",
            generates=True,
            scorer_version=self.version,
            headline=self.metrics[0],
            row_columns={"x": "text", "y": "text", **dict.fromkeys(self.columns, "any")},
            fields=self._fields,
            check_rows=self.check_rows,
            run=self.run,
            score_file=self.score_file,
            row_scores=self.row_scores,
            scoring=self.scoring,
            **settings,
        )
