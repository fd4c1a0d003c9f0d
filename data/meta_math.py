"""MetaMathQA (Yu et al. 2023), the rows that were made from GSM8K. Hub: meta-math/MetaMathQA, split train.

As the published code prepares it: rows whose type contains "GSM"; the response up to "\\nThe answer is:"; prompt and
response together below `max_tokens` tokens; the first 100,000 to train and the next 10,000 to validate. Deviation:
tokens are counted with the run's own tokenizer. Scored on GSM8K's test split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from data import CountTokens, Row, Splits, gsm8k
from data.selection import batched, ordered, split_train_validation
from flatlora.config import setting
from flatlora.rows import gather, read_rows

HUB_ID, CONFIG = "meta-math/MetaMathQA", "default"


class Config(gsm8k.Config):
    train_rows: int | None = setting(100_000, ge=1, remedy="null takes all rows")
    validation_rows: int = setting(10_000, ge=0)
    max_tokens: int = setting(512, ge=8, remedy="512 as published")  # rows this long or longer are left out


def format_row(row: Row) -> Row:
    return {"x": f"Q: {row['query']}\nA: ", "y": row["response"].split("\nThe answer is:")[0]}


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    def learned() -> tuple[list[Row], list[Row]]:
        columns = ("type", "query", "response")
        rows = read_rows(HUB_ID, CONFIG, "train", columns=columns, revision=config.revision, data_root=data_root)
        formatted = (format_row(row) for row in ordered(rows, config.subset) if "GSM" in row["type"])
        wanted = None if config.train_rows is None else config.train_rows + config.validation_rows
        kept = list(islice(shorter_than(config.max_tokens, formatted, count_tokens), wanted))
        return split_train_validation(kept, config.train_rows, config.validation_rows)

    (train, validation), test = gather(learned, lambda: gsm8k.read_test(config, data_root))
    return Splits(train, validation, test)


def shorter_than(limit: int, rows: Iterable[Row], count_tokens: CountTokens) -> Iterator[Row]:
    """Rows whose text x + " " + y has fewer than `limit` tokens, in order; counted a thousand rows at a time."""
    for batch in batched(rows, 1000):
        counts = count_tokens([f"{row['x']} {row['y']}" for row in batch])
        yield from (row for row, count in zip(batch, counts, strict=True) if count < limit)


def describe(config: Config) -> str:
    return f"{HUB_ID} (train, type contains GSM); test: {gsm8k.HUB_ID}"
