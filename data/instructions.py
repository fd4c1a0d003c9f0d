"""Shared by data sets of instructions and responses: their config, and the conversion of examples to rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from data import CountTokens, Row
from data.selection import batched, split_train_validation
from flatlora.config.sections import TextDatasetConfig
from flatlora.config.settings import MOST_ROWS, MOST_TOKENS, setting
from flatlora.inputs.templates import Template, prompt
from flatlora.utils.errors import SettingError

logger = logging.getLogger(__name__)


class InstructionConfig(TextDatasetConfig):
    train_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    validation_rows: int = setting(0, ge=0, le=MOST_ROWS, remedy="0 takes none")
    subset: Literal["first", "shuffled"] = "first"  # the published code takes the first rows
    revision: str | None = None
    template: Template = "alpaca"
    # Rows whose x + " " + y has fewer tokens are kept.
    max_tokens: int | None = setting(None, ge=8, le=MOST_TOKENS, remedy="null keeps rows of every length")
    limit_tokenizer: str | None = setting(None, min_length=1, remedy="null counts with the model's own")

    def rule_errors(self) -> list[SettingError]:
        if self.limit_tokenizer is not None and self.max_tokens is None:
            return [
                *super().rule_errors(),
                SettingError(
                    ("limit_tokenizer", "max_tokens"),
                    f"Invalid dataset.limit_tokenizer={self.limit_tokenizer} without dataset.max_tokens: without a "
                    "limit no tokens are counted; set dataset.max_tokens, or leave the key out.",
                ),
            ]
        return super().rule_errors()


class Example(NamedTuple):
    """One instruction and its response."""

    instruction: str
    response: str
    context: str = ""


def learned_rows(
    examples: Iterable[Example],
    config: InstructionConfig,
    count_tokens: CountTokens,
    template: str | None = None,
) -> tuple[list[Row], list[Row]]:
    """Converts examples to disjoint train and validation rows, without empty and too long ones.

    Args:
        template: overrides that of the config.

    Raises:
        ConfigError: there are fewer rows than the config asks for.
    """
    rows = formatted(examples, template or config.template)
    if config.max_tokens is not None:
        rows = shorter_than(config.max_tokens, rows, count_tokens)
    return split_train_validation(rows, config.train_rows, config.validation_rows)


def formatted(examples: Iterable[Example], template: str) -> Iterator[Row]:
    """Rows of all examples that have an instruction and a response."""
    empty = 0
    for example in examples:
        if example.instruction.strip() and example.response.strip():
            yield {"x": prompt(template, example.instruction, example.context), "y": example.response}
        else:
            empty += 1
    if empty:
        logger.warning("%d rows have no instruction or no response and are left out.", empty)


def shorter_than(limit: int, rows: Iterable[Row], count_tokens: CountTokens) -> Iterator[Row]:
    """Rows whose text x + " " + y has fewer than `limit` tokens, in order."""
    for batch in batched(rows, 1000):
        counts = count_tokens([f"{row['x']} {row['y']}" for row in batch])
        yield from (row for row, count in zip(batch, counts, strict=True) if count < limit)
