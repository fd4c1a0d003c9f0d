"""Interfaces of the plug-ins: datasets and benchmarks, one file each, which register themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flatlora.config.sections import DatasetConfig, ModelConfig
from flatlora.config.settings import Section
from flatlora.inputs.rows import Source


@dataclass(frozen=True)
class DataSet:
    """A dataset loader.

    Args:
        Config: class of its config section.
        version: incremented when the same config and files give different rows.
        describe: (config) → a one-line description.
        sources: (config) → the public splits that it reads; empty if rows are generated.
        load: (config, data_root, count_tokens) → `data.Splits`; None for images, which their `RowKind` reads.
    """

    Config: type[DatasetConfig]
    version: int
    describe: Callable[[Any], str]
    sources: Callable[[Any], list[Source]]
    load: Callable[..., Any] | None = None


def _no_check(config: Section, model: ModelConfig) -> None:
    """Accepts any settings with any model."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: generates a model's answers, saves them in predictions.jsonl, and scores this file.

    Args:
        Config: class of its config section, with `max_rows` and `batch_size`.
        help: text of `python -m eval.NAME --help`.
        kind: kind of rows that it scores.
        headline: name of the metric in tables.
        scorer_version: incremented when the same answers get different scores.
        fields: keys of a row of predictions.jsonl, and their types.
        row_columns: columns of a dataset's rows, as `flatlora.inputs.rows.Columns`; empty if the benchmark uses its
            own.
        check_rows: (rows, source, config, tokenizer=, classes=, model=) raises ConfigError for rows that cannot be
            scored. The keyword arguments are what is known of the model before its weights are loaded.
        run: (backend, rows, folder, config) → the score, {"scorer", "n", "metrics"}; generates and scores answers.
        score_file: (path, config) → the score of a complete predictions.jsonl.
        row_scores: (rows, config, folder) → {row: score}.
        benchmark_rows: (data_root, config) → the benchmark's own rows, for a model without a run.
        check_settings: (config, model) raises ConfigError for settings that are invalid with any rows.
        generates: whether answers are generated text, which every backend supports; text only.
        own_rows: (config) → whether runs are scored on the benchmark's own rows, not on their dataset's; text only.
        test_only: whether its rows are test rows whatever `dataset.evaluate` says; so are those of `own_rows`.
        scoring: settings that affect scores but not answers.
        is_share, digits: whether scores are fractions of one; if not, the number of decimals they are shown with.
        picture: name of an image file beside the answers that shows them.
        belongs_to: {setting: parent setting}; if the parent is changed, a run's value of the setting is not used.
    """

    Config: type[Section]
    help: str
    kind: Literal["text", "image", "text_to_image"]
    headline: str
    scorer_version: int
    fields: Mapping[str, Any]
    row_columns: Mapping[str, str]
    check_rows: Callable[..., None]
    run: Callable[..., dict[str, Any]]
    score_file: Callable[[Path, Any], dict[str, Any]]
    row_scores: Callable[[Sequence[dict[str, Any]], Any, Path], dict[Any, float]]
    benchmark_rows: Callable[[str | None, Any], list[Any]] | None = None
    check_settings: Callable[[Any, ModelConfig], None] = _no_check
    generates: bool = False
    own_rows: Callable[[Any], bool] = lambda config: False
    test_only: bool = False
    scoring: Sequence[str] = ()
    is_share: bool = True
    digits: int = 2
    picture: str | None = None
    belongs_to: Mapping[str, str] = field(default_factory=lambda: {"system": "template"})
