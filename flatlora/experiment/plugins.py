"""What a data set and a benchmark bring along; each registers itself, one file each."""

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
    """A loader of rows.

    Args:
        Config: its config section.
        version: raised whenever the same config and files give other rows.
        describe: (config) → one line for people.
        sources: (config) → the public splits that it reads; none where rows are generated.
        load: (config, data_root, count_tokens) → `data.Splits`; None for pictures, which their kind of rows reads.
    """

    Config: type[DatasetConfig]
    version: int
    describe: Callable[[Any], str]
    sources: Callable[[Any], list[Source]]
    load: Callable[..., Any] | None = None


def _no_check(config: Section, model: ModelConfig) -> None:
    """Every setting goes with every model."""


@dataclass(frozen=True)
class Benchmark:
    """What asks a model and scores its answers; the answers' file, predictions.jsonl, lies between.

    Args:
        Config: its config section, with `max_rows` and `batch_size`.
        help: what `python -m eval.NAME --help` prints.
        kind: of the rows that it scores.
        headline: the metric of tables.
        scorer_version: raised whenever the same answers score otherwise.
        fields: keys of a row of predictions.jsonl, and their types.
        row_columns: what a row has, as `flatlora.inputs.rows.Columns`; empty if it has rows of its own.
        check_rows: (rows, source, config, tokenizer=, classes=, model=); ConfigError for rows that cannot be scored.
            What is known of the model, before its weights are loaded, is its tokenizer, its classes or its config.
        run: (backend, rows, folder, config) → the score, {"scorer", "n", "metrics"}; asks and scores.
        score_file: (path, config) → the score of a finished predictions.jsonl.
        row_scores: (rows, config, folder) → {row: score}.
        benchmark_rows: (data_root, config) → the benchmark's own rows, for a model that no run describes.
        check_settings: (config, model); ConfigError for settings that no rows could make good.
        generates: whether words are asked for, which every backend has; of text alone.
        own_rows: whether a run asks the benchmark's own rows, not its data set's; of text alone.
        scoring: settings that decide scores and no answer.
        is_share, digits: whether scores are shares of one, and how many decimals they are shown with if they are not.
        picture: a file beside the answers that shows them.
        belongs_to: setting → another that it is of: a new value of that one leaves a run's value of this one out.
    """

    Config: type[Section]
    help: str
    kind: Literal["text", "image", "captioned"]
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
    own_rows: bool = False
    scoring: Sequence[str] = ()
    is_share: bool = True
    digits: int = 2
    picture: str | None = None
    belongs_to: Mapping[str, str] = field(default_factory=dict)
