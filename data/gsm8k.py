"""GSM8K (Cobbe et al. 2021): grade-school word problems, answer after "####". Hub: openai/gsm8k, config main.

The hub has no validation split: the `validation_rows` rows after the first `train_rows` of the train split are used. If
`train_rows` is null, the last `validation_rows` are used, and all others are train rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from data import DATASETS, CountTokens, Row, Splits
from data.instructions import Example, InstructionConfig, learned_rows
from data.selection import ordered, take
from flatlora.config.settings import MOST_ROWS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source, gather, read_rows
from flatlora.inputs.templates import MathTemplate, prompt

HUB_ID, CONFIG = "openai/gsm8k", "main"


class Config(InstructionConfig):
    validation_rows: int = setting(100, ge=0, le=MOST_ROWS, remedy="0 takes none")
    test_rows: int | None = setting(None, identity=False, ge=1, le=MOST_ROWS, remedy="null takes all 1,319 rows")
    template: MathTemplate = "qa"


def sources(config: Config) -> list[Source]:
    """The train split, and the test split unless validation rows are scored."""
    splits = ("train",) if config.evaluate == "validation" else ("train", "test")
    return [Source(HUB_ID, CONFIG, split, config.revision) for split in splits]


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    train, *tests = sources(config)

    def learned() -> tuple[list[Row], list[Row]]:
        rows = ordered(_read(train, data_root), config.subset)
        return learned_rows((Example(row["question"], row["answer"]) for row in rows), config, count_tokens)

    (train_rows, validation), asked = gather(learned, lambda: read_test(tests, config, data_root))
    return Splits(train_rows, validation, asked)


def read_test(sources: Sequence[Source], config: Config, data_root: str | None) -> list[Row]:
    """The first `config.test_rows` rows of GSM8K's test split, in the config's prompt; none without a source."""
    if not sources:
        return []
    (source,) = sources
    rows = [{"x": prompt(config.template, row["question"]), "y": row["answer"]} for row in _read(source, data_root)]
    return take(rows, config.test_rows, name="dataset.test_rows")


def _read(source: Source, data_root: str | None) -> list[Row]:
    return read_rows(source, columns=("question", "answer"), data_root=data_root)


def describe(config: Config) -> str:
    return f"{HUB_ID} ({CONFIG}; {', '.join(source.split for source in sources(config))})"


DATASETS.add("gsm8k", DataSet(Config=Config, version=1, describe=describe, sources=sources, load=load))
