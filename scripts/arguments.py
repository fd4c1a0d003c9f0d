"""Options that several scripts share, and types of options that name the rule for an invalid value."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def add_folders(parser: argparse.ArgumentParser, out: str) -> None:
    """Add --results and --out to a script that reads runs; `out` describes the default of --out."""
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help=f"{out} by default")


_MOST = 1_000_000


def positive(text: str) -> int:
    """A whole number from 1 to a million."""
    value = int(text) if text.isdecimal() and len(text) <= 20 else 0
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]}: it must be a whole number from 1 to {_MOST:,}")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text}: it must be a number above 0")
    return value


def several_above_zero(text: str) -> tuple[float, ...]:
    """Distinct finite numbers above 0, separated by commas."""
    values = tuple(above_zero(word) for word in text.split(","))
    if len({f"{value:g}" for value in values}) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: a number occurs twice")
    return values


def odd(text: str) -> int:
    """An odd whole number of 3 or more."""
    value = positive(text)
    if value < 3 or value % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text}: it must be an odd number of 3 or more, so that there is a middle")
    return value
