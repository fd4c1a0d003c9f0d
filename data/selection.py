"""Selects the rows of a data set: number, order, and disjoint train and validation rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from data import Row
from flatlora.utils.errors import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")


def take(rows: Sequence[T], count: int | None, *, name: str, remedy: str = "lower it, or use null") -> list[T]:
    """The first `count` rows; None takes all.

    Raises:
        ConfigError: there are fewer.
    """
    if count is not None and count > len(rows):
        raise ConfigError([f"Invalid {name}={count}: only {len(rows)} rows are left; {remedy}."])
    return list(rows[:count])


def ordered(rows: Sequence[T], subset: str, seed: int = 0) -> list[T]:
    """The rows in the file's order ("first", as in the published code), or permuted once by `seed` ("shuffled")."""
    rows = list(rows)
    if subset == "shuffled":
        random.Random(seed).shuffle(rows)
    return rows


def row_key(row: Row) -> tuple[str, str]:
    """The key by which two rows are equal."""
    return row["x"], row["y"]


def split_train_validation(
    rows: Iterable[Row], train_rows: int | None, validation_rows: int, same: Callable[[Row], object] = row_key
) -> tuple[list[Row], list[Row]]:
    """Returns the first `train_rows` rows and the next `validation_rows`. Reads no more rows than needed.

    Args:
        train_rows: None takes all rows but the last `validation_rows`.
        same: key of a row. A row with the key of a train row is not used for validation; the next one is, if any.

    Raises:
        ConfigError: there are fewer rows, or no train row.
    """
    repeated: list[Row] = []
    if train_rows is None:
        rows = list(rows)
        train_rows = max(1, len(rows) - validation_rows)
        train, rest = rows[:train_rows], rows[train_rows:]
        enough = rest  # counted with the rows that repeat a train row
        kept = list(_unseen(rest, train, repeated, same))
    else:
        rows = iter(rows)
        train = list(islice(rows, train_rows))
        enough = kept = list(islice(_unseen(rows, train, repeated, same), validation_rows))
    if not train:
        raise ConfigError(
            ["Empty data set: the loader keeps no train rows; raise its limits, such as dataset.max_tokens."]
        )
    take(train, train_rows, name="dataset.train_rows")
    take(enough, validation_rows, name="dataset.validation_rows", remedy="lower it")
    _warn_of_repeated(len(repeated))
    return train, kept


def fresh_places(held_out: Sequence[Hashable], train: Iterable[Hashable]) -> list[int]:
    """Indices of the held-out rows whose key is not that of a train row."""
    seen = set(train)
    fresh = [index for index, key in enumerate(held_out) if key not in seen]
    _warn_of_repeated(len(held_out) - len(fresh))
    return fresh


def _warn_of_repeated(count: int) -> None:
    if count:
        logger.warning("%d rows repeat train rows and are not used for validation.", count)


def _unseen(
    rows: Iterable[Row], train: Sequence[Row], repeated: list[Row], same: Callable[[Row], object]
) -> Iterator[Row]:
    seen = {same(row) for row in train}
    for row in rows:
        if same(row) in seen:
            repeated.append(row)
        else:
            yield row


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` rows; the last one may be shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
