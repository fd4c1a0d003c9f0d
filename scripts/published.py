"""Published results that stand in a CSV file beside paper.yaml, one row each, instead of in paper.yaml itself."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

from flatlora.config.settings import Section, build_section
from flatlora.utils.errors import ConfigError, reason_of

KEY = "experiment"  # the column that names a row


class Quantity(Section):
    """A column of a table: which column of the CSV it shows, times `times` and divided by `per`."""

    of: str
    times: float = 1.0
    per: float = 1.0


class PublishedFile(Section):
    """`values` of a table of paper.yaml whose numbers are in a CSV file."""

    file: str
    columns: dict[str, dict]  # {column of the table: Quantity}


def read_published(path: Path) -> dict[str, dict[str, str]]:
    """{row: {column: text}} of a CSV file, in its order.

    Raises:
        ConfigError: the file cannot be read, has no column `experiment`, or has a row twice or incomplete.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError([f"Cannot read {path}: {reason_of(error)}; fix it."]) from error
    named = {row.get(KEY): row for row in rows}
    whole = all(None not in row and None not in row.values() for row in rows)
    if not rows or None in named or len(named) < len(rows) or not whole:
        raise ConfigError(
            [f"Invalid {path}: its column {KEY} must name each row, none twice, and rows must be whole; fix it."]
        )
    return named


def title_of_row(name: str) -> str:
    """`lora/llama-3.2-3B-rank32` → `lora/rank32`: one model is the same for all rows."""
    return name.replace("llama-3.2-3B-", "")


def numbers_of(name: str, raw: Mapping, folder: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """{row: {column: number}} of a `PublishedFile`, and messages about entries that are no numbers.

    Args:
        name: of the table, for messages.
        folder: that of paper.yaml.

    Raises:
        ConfigError: the file or the description of its columns is invalid.
    """
    described = build_section(f"paper.{name}.values", PublishedFile, raw)
    quantities = {
        key: build_section(f"paper.{name}.values.columns.{key}", Quantity, value)
        for key, value in described.columns.items()
    }
    numbers, problems = {}, []
    for row, found in read_published(folder / described.file).items():
        for key, quantity in quantities.items():
            text = found.get(quantity.of)
            if text is None or (number := _number(text)) is None:
                problems.append(f"Invalid paper.{name}.{row}.{key}={text!r}: it must be a number; fix it.")
            else:
                numbers.setdefault(row, {})[key] = number * quantity.times / quantity.per
    return numbers, problems


def _number(text: str) -> float | None:
    """A finite number; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
