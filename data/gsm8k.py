"""GSM8K (Cobbe et al. 2021): grade-school word problems, answer after "####". Hub: openai/gsm8k, config main.

The hub has no validation split: the `validation_rows` train rows that follow the first `train_rows` take its place
(null `train_rows` trains on all others, and validates on the last ones).
"""

from __future__ import annotations

from typing import Literal

from data import CountTokens, Row, Splits
from data.selection import ordered, split_train_validation, take
from flatlora.config import DatasetConfig, setting
from flatlora.rows import gather, read_rows

HUB_ID, CONFIG = "openai/gsm8k", "main"


class Config(DatasetConfig):
    train_rows: int | None = setting(None, ge=1, remedy="null takes all rows")
    validation_rows: int = setting(100, ge=0)
    test_rows: int | None = setting(None, ge=1, remedy="null takes all 1,319 rows")
    subset: Literal["first", "shuffled"] = "first"
    revision: str | None = None


def format_row(row: Row) -> Row:
    """The published prompt of Flat-LoRA and LoRA-GA."""
    return {"x": f"Q: {row['question']}\nA: ", "y": row["answer"]}


def read_split(split: str, data_root: str | None, revision: str | None = None) -> list[Row]:
    """One formatted split of the hub or of `data_root`."""
    rows = read_rows(HUB_ID, CONFIG, split, columns=("question", "answer"), revision=revision, data_root=data_root)
    return [format_row(row) for row in rows]


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    def learned() -> tuple[list[Row], list[Row]]:
        rows = ordered(read_split("train", data_root, config.revision), config.subset)
        return split_train_validation(rows, config.train_rows, config.validation_rows)

    (train, validation), test = gather(learned, lambda: read_test(config, data_root, config.revision))
    return Splits(train, validation, test)


def read_test(config: Config, data_root: str | None, revision: str | None = None) -> list[Row]:
    """The first `config.test_rows` rows of GSM8K's test split."""
    return take(read_split("test", data_root, revision), config.test_rows, name="dataset.test_rows")


def describe(config: Config) -> str:
    return f"{HUB_ID} ({CONFIG}; train, test)"
