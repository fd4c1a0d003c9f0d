"""Settings of a row that are chosen by validation scores before the row is scored on test rows.

Each point of the grid is trained with the tuning seeds and scored on validation rows (`dataset.evaluate=validation`).
The point with the best mean is then trained with the test seeds, and only these runs are scored on test rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import run_exp
from flatlora.config.experiment import Experiment, parse
from flatlora.config.settings import Section, setting
from flatlora.utils.errors import ConfigError

EVALUATE = "dataset.evaluate=validation"
LOSS = "eval_loss"  # the one validation score that is no benchmark's

Value = float | int | str
Values = dict[str, Value]  # {key: value} of one point of a grid


class Tuning(Section):
    """How the rows of a table with `tune` are tuned."""

    seeds: list[int]  # of the runs that are scored on validation rows
    test_seeds: list[int]  # of the runs that the table shows
    overrides: list[str] = setting([], remedy="write [KEY=VALUE]")  # of tuning runs alone


class Point(NamedTuple):
    """One setting of a grid, with the validation scores of its runs in the column's scale."""

    values: Values
    by_seed: dict[int, float]
    paths: list[Path]
    diverged: list[int]  # seeds whose training diverged

    @property
    def mean(self) -> float | None:
        """The mean score; None without runs, or if one of them diverged."""
        return sum(self.by_seed.values()) / len(self.by_seed) if self.by_seed and not self.diverged else None

    def missing(self, seeds: Iterable[int]) -> list[int]:
        return [seed for seed in seeds if seed not in self.by_seed and seed not in self.diverged]

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def label(self) -> str:
        """The values with short keys: "lr=5e-4 sigma=0.05"."""
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items())


class Tuned(NamedTuple):
    """The tuning of one cell."""

    points: list[Point]
    seeds: list[int]
    metric: str
    lower: bool  # whether lower validation scores are better

    @property
    def missing(self) -> list[tuple[Point, list[int]]]:
        """Points without all their runs, and the seeds of the missing ones."""
        return [(point, lacking) for point in self.points if (lacking := point.missing(self.seeds))]

    @property
    def chosen(self) -> Point | None:
        """The point with the best mean, the first of equal ones; None while a run is missing, or if all diverged."""
        scored = [point for point in self.points if point.mean is not None]
        if self.missing or not scored:
            return None
        return max(scored, key=lambda point: -point.mean if self.lower else point.mean)

    @property
    def at_edge(self) -> list[str]:
        """Tuned keys whose chosen value is the smallest or largest of their numbers: the best may lie outside."""
        if self.chosen is None:
            return []
        edges = []
        for key, value in self.chosen.values.items():
            numbers = [number_of(point.values[key]) for point in self.points]
            if None not in numbers and number_of(value) in (min(numbers), max(numbers)):
                edges.append(key)
        return edges

    @property
    def status(self) -> str:
        """The chosen values, or what is missing."""
        if self.chosen is not None:
            return self.chosen.label + (" (edge)" if self.at_edge else "")
        total, lacking = len(self.points) * len(self.seeds), sum(len(seeds) for _, seeds in self.missing)
        return f"{total - lacking} of {total} tuning runs" if lacking else "all diverged"


def number_of(value: Value) -> float | None:
    """The number that a value is on the command line ("5e-4" is text in YAML); None for other text."""
    try:
        return float(value)
    except ValueError:
        return None


def grid(tune: Mapping[str, Sequence[Value]]) -> list[Values]:
    """All combinations of values; the last key varies fastest."""
    return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]


def with_values(experiment: Experiment, values: Values) -> Experiment:
    """The experiment with other values of settings, as if they were overrides.

    Raises:
        ConfigError: a key is no setting, or a value is invalid.
    """
    raw: dict[str, Any] = experiment.model_dump(mode="json")
    for key, value in values.items():
        *sections, name = key.split(".")
        place = raw
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or not sections:
            raise ConfigError([f"Unknown key {key}: a tuned key is one setting, such as optim.lr or rho.sigma."])
        place[name] = _parsed(value)
    return parse(raw, run_exp.SUITE)


def _parsed(value: Value) -> Any:
    """The value as the command line reads it."""
    loaded = yaml.safe_load(value) if isinstance(value, str) else value
    number = number_of(loaded) if isinstance(loaded, str) else None
    return loaded if number is None else number


def sweeps(missing: Sequence[tuple[Point, list[int]]]) -> list[tuple[list[str], list[int]]]:
    """Missing runs as few sweeps: ([KEY=VALUE,VALUE], seeds) each."""
    by_seeds: dict[tuple[int, ...], list[Values]] = {}
    for point, seeds in missing:
        by_seeds.setdefault(tuple(seeds), []).append(point.values)
    found = []
    for seeds, points in by_seeds.items():
        keys = list(points[0])
        values = {key: list(dict.fromkeys(point[key] for point in points)) for key in keys}
        whole = grid(values) == points
        parts = [values] if whole else [{key: [value] for key, value in point.items()} for point in points]
        found += [([f"{key}={','.join(map(str, part[key]))}" for key in keys], list(seeds)) for part in parts]
    return found


def seeds_text(seeds: Sequence[int]) -> str:
    """ "0 to 9", or "3, 5, 8" for seeds that are not consecutive."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))
