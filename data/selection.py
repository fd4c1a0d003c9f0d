"""Which rows of a data set are used: sizes, order, and disjoint train and validation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from flatlora.config import ConfigError

T = TypeVar("T")


def take(rows: Sequence[T], count: int | None, *, name: str, remedy: str = "lower it, or use null") -> list[T]:
    """The first `count` rows, all for None.

    Raises:
        ConfigError: there are fewer.
    """
    if count is not None and count > len(rows):
        raise ConfigError([f"Invalid {name}={count}: only {len(rows)} rows are left for it; {remedy}."])
    return list(rows[:count])


def ordered(rows: Sequence[T], subset: str, seed: int = 0) -> list[T]:
    """`first` keeps the file's order, as the published code really did; `shuffled` permutes it once, by `seed`."""
    rows = list(rows)
    if subset == "shuffled":
        random.Random(seed).shuffle(rows)
    return rows


def split_train_validation(rows: Sequence[T], train_rows: int | None, validation_rows: int) -> tuple[list[T], list[T]]:
    """The first `train_rows` rows and the next `validation_rows`; null train rows are all but the validation's.

    Raises:
        ConfigError: there are fewer, or none at all.
    """
    if not rows:
        raise ConfigError(
            ["Empty data set: the loader keeps none of its train rows; raise its limits, such as dataset.max_tokens."]
        )
    if train_rows is None:
        train_rows = max(1, len(rows) - validation_rows)
    train = take(rows, train_rows, name="dataset.train_rows")
    return train, take(rows[len(train) :], validation_rows, name="dataset.validation_rows", remedy="lower it")


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` rows, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
