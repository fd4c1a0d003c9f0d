"""Which rows of a data set are used: sizes, order, and disjoint train and validation."""

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


def row_key(row: Row) -> tuple[str, str]:
    """What makes two rows the same."""
    return row["x"], row["y"]


def split_train_validation(
    rows: Iterable[Row], train_rows: int | None, validation_rows: int, same: Callable[[Row], object] = row_key
) -> tuple[list[Row], list[Row]]:
    """The first `train_rows` rows and the next `validation_rows`; null train rows are all but the validation's.

    A row that repeats one of the train rows does not validate: the next one takes its place, and where none is left,
    there are fewer. Reads no further than it must. `same` gives what two rows have in common that repeat each other.

    Raises:
        ConfigError: there are fewer, or none at all.
    """
    repeated: list[Row] = []
    if train_rows is None:
        rows = list(rows)
        train_rows = max(1, len(rows) - validation_rows)
        train, rest = rows[:train_rows], rows[train_rows:]
        enough = rest  # those that repeat a train row are among those asked for
        kept = list(_unseen(rest, train, repeated, same))
    else:
        rows = iter(rows)
        train = list(islice(rows, train_rows))
        enough = kept = list(islice(_unseen(rows, train, repeated, same), validation_rows))
    if not train:
        raise ConfigError(
            ["Empty data set: the loader keeps none of its train rows; raise its limits, such as dataset.max_tokens."]
        )
    take(train, train_rows, name="dataset.train_rows")
    take(enough, validation_rows, name="dataset.validation_rows", remedy="lower it")
    _warn_of_repeated(len(repeated))
    return train, kept


def fresh_places(held_out: Sequence[Hashable], train: Iterable[Hashable]) -> list[int]:
    """Places of the held-out rows that repeat no train row, by what two rows have in common that do."""
    seen = set(train)
    places = [place for place, key in enumerate(held_out) if key not in seen]
    _warn_of_repeated(len(held_out) - len(places))
    return places


def _warn_of_repeated(count: int) -> None:
    if count:
        logger.warning("%d rows stand among the train rows already and do not validate.", count)


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
    """Consecutive lists of `size` rows, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
