"""The content of tables: cells of rows and columns, and the runs and published numbers that fill them.

A run counts for a cell if its configuration is the cell's, for any seed. Runs that are broken, unfinished, duplicated
or of another setting are named and left out.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from scipy import stats

import eval as benchmarks
import run_exp
from flatlora.config.experiment import Experiment, parse
from flatlora.config.settings import Section, build_section, checked_section, setting
from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.utils import records
from flatlora.utils.errors import ConfigError, SettingError, reason_of
from scripts import published as published_files
from scripts import tuning
from scripts.tuning import Tuned, Tuning, Value

PROJECT = Path(__file__).parents[1]

LAYOUTS = PROJECT / "results/tables.yaml"
PAPER = PROJECT / "results/paper.yaml"
SIGNIFICANT = 0.05
USUAL_SEEDS = 3  # of a cell whose table names no number
_MOST_SEEDS = 1000
MEASURED = ("timing", "memory")  # groups of a record whose numbers a column may show; they depend on the machine
NOT_RUNS = ("bench", "tables", "sweeps")  # folders of results/ without runs
AVERAGE = "avg"  # key of a published row's average, in a table that has averages


class Row(Section):
    """One row: its label, and the overrides after `experiment=TABLE` that define its setting."""

    title: str
    overrides: list[str] = setting([], remedy="write [KEY=VALUE]")
    published_only: bool = False  # a method that this suite does not have
    # Settings that are chosen by validation scores, see scripts/tuning.py.
    tune: dict[str, list[Value]] = setting({}, remedy="write {KEY: [VALUE, VALUE]}")


class Column(Section):
    """One column: the overrides that are added to those of a row, and the metric of run.json, times `scale`.

    The metric may be one of time or memory too, such as timing/train_s.
    """

    title: str
    overrides: list[str]
    metric: str
    scale: float
    digits: int = 2
    lower: bool = False  # whether lower is better
    seeds: int | None = setting(None, ge=1, le=_MOST_SEEDS, remedy="leave it out to take the table's")
    tuned_by: str | None = None  # validation metric that tuned rows are chosen by; default: `metric`

    @property
    def dataset(self) -> str:
        """Option name of the data set."""
        return next(override.partition("=")[2] for override in self.overrides if override.startswith("dataset="))


class Layout(Section):
    """One table: rows and columns are overrides of one file of conf/experiment."""

    rows: dict[str, Row]
    columns: dict[str, Column]
    title: str | None = None  # default: the published table's
    experiment: str | None = None  # file of conf/experiment; default: the table's name
    average: bool = True
    # Words of every command that name a folder of the reader's; runs are not compared by them.
    also: list[str] = setting([], remedy="write [WORD, ...]")
    then: list[str] = setting([], remedy="write [COMMAND, ...]")  # commands that measure the finished runs
    seeds: int | None = setting(None, ge=1, le=_MOST_SEEDS, remedy="the paper's number; leave it out if it has none")
    published_rows: str | None = None  # a CSV file beside tables.yaml, whose rows come below the others
    against: dict[str, str] = setting({}, remedy="write ROW: ROW")  # rows to compare; default: all with the first
    measured: dict[str, dict[str, float]] = setting({}, remedy="write PART: {rows: N}")  # settings of flatness.json
    tuning: Tuning | None = setting(None, remedy="write {seeds: [100, 101], test_seeds: [0, 1, 2]}")

    def row_titles(self) -> dict[str, str]:
        """{row: its label}."""
        return {row: value.title for row, value in self.rows.items()}

    def seeds_of(self, column: str) -> int:
        """Number of seeds that a cell of a column should have."""
        return self.columns[column].seeds or self.seeds or USUAL_SEEDS

    def rule_errors(self) -> list[SettingError]:
        return [
            SettingError(
                ("columns",),
                f"Invalid overrides={column.overrides} of column {key}: they must name a data set; add dataset=NAME.",
            )
            for key, column in self.columns.items()
            if not any(override.startswith("dataset=") for override in column.overrides)
        ] + [SettingError(("rows", "tuning"), message) for message in self._tuning_errors()]

    def _tuning_errors(self) -> list[str]:
        errors = []
        tuned = {row: value for row, value in self.rows.items() if value.tune}
        if tuned and self.tuning is None:
            errors.append(
                f"Missing tuning: rows {', '.join(tuned)} are tuned; add tuning: {{seeds: [100, 101], test_seeds: "
                "[0, 1, 2]}."
            )
        if self.tuning is not None and not tuned:
            errors.append("Invalid tuning: no row is tuned; add tune: {optim.lr: [VALUE, VALUE]} to one, or drop it.")
        if self.tuning is not None:
            seeds, test_seeds = self.tuning.seeds, self.tuning.test_seeds
            for key, given in (("seeds", seeds), ("test_seeds", test_seeds)):
                if not given or len(set(given)) < len(given) or min(given) < 0 or max(given) >= 2**32:
                    errors.append(
                        f"Invalid tuning.{key}={given}: one or more different whole numbers from 0 to 4294967295 are "
                        "needed."
                    )
            if both := sorted(set(seeds) & set(test_seeds)):
                errors.append(
                    f"Invalid tuning.test_seeds={test_seeds}: seeds {', '.join(map(str, both))} are tuning seeds too, "
                    "and the runs that chose a setting cannot test it; use other seeds."
                )
        for row, value in tuned.items():
            fixed = {one.lstrip("+").partition("=")[0] for one in value.overrides}
            fixed |= {one.lstrip("+").partition("=")[0] for column in self.columns.values() for one in column.overrides}
            for key, values in value.tune.items():
                if len({one if (number := tuning.number_of(one)) is None else number for one in values}) < 2:
                    errors.append(
                        f"Invalid tune of row {row}: {key}={values}; at least two different values are needed."
                    )
                if key in fixed:
                    errors.append(f"Invalid tune of row {row}: {key} is set by an override too; drop one of them.")
            if value.published_only:
                errors.append(f"Invalid tune of row {row}: it is published_only, so nothing is run; drop one of them.")
        return errors


class Published(Section):
    """The published side of a table."""

    title: str
    setting: str
    source: str | None
    values: dict[str, dict[str, float]]
    spreads: dict[str, dict[str, float]] = setting({}, remedy="leave it out: a value written [NUMBER, SPREAD] has one")
    spread: str | None = None  # what the numbers after ± mean
    notes: list[str] = setting([], remedy="write [TEXT]")  # what else the source says


class Run(NamedTuple):
    """A finished run, from its record."""

    path: Path
    experiment: Experiment
    metrics: Mapping[str, float]  # including those of flatness.json
    train_s: float
    measured: Mapping[str, Mapping[str, Any]]  # settings of each part of flatness.json
    diverged: bool = False  # whether the training diverged, and there is no metric
    machine: str = "an unknown machine"  # its GPUs, or its processor


class Cell(NamedTuple):
    """Values of the runs and of the paper for one row and column, in the column's scale."""

    by_seed: dict[int, float]
    paths: list[Path]
    paper: float | None
    paper_spread: float | None = None
    machines: Sequence[str] = ()  # of the runs, for a column of time or memory
    incomplete: str = ""  # fractions of the answers that were cut, refused or not rated
    tuned: Tuned | None = None  # validation runs of a tuned row

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


class TableData(NamedTuple):
    """One table with its content."""

    name: str
    layout: Layout
    published: Published | None
    cells: dict[tuple[str, str], Cell]
    best: dict[str, str]  # column → the row that is better than all others

    def overrides_of(self, row: str, column: str) -> list[str]:
        """All overrides of a cell without the seed, with the chosen values of a tuned row."""
        overrides = cell_overrides(self.name, self.layout, row, column)
        cell = self.cells.get((row, column))
        chosen = cell.tuned.chosen if cell is not None and cell.tuned is not None else None
        return overrides if chosen is None else [*overrides, *chosen.overrides]

    @property
    def tuned_columns(self) -> list[str]:
        """The columns of tuned rows, one for each validation score."""
        if self.layout.tuning is None:
            return []
        first: dict[tuple[str, ...], str] = {}
        for key, column in self.layout.columns.items():
            first.setdefault((column.tuned_by or column.metric, *column.overrides), key)
        return list(first.values())


def check_folders(results: Path, out: Path) -> None:
    """Check that the folder of runs exists and that the output folder can be written.

    Raises:
        ConfigError: one of them does not hold.
    """
    errors = []
    if not results.is_dir():
        errors.append(f"Invalid --results={results}: no such folder; name a folder of runs.")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        problem = "cannot be written" if nearest.is_dir() else "is a file"
        errors.append(f"Invalid --out={out}: {nearest} {problem}; name another folder.")
    if errors:
        raise ConfigError(errors)


def read_layouts(path: Path) -> dict[str, Layout]:
    """The tables of tables.yaml.

    Raises:
        ConfigError: it lists every key that is missing, unknown or invalid.
    """
    raw = _yaml(path)
    if errors := [error.message for name, layout in raw.items() for error in _part_errors(f"tables.{name}", layout)]:
        raise ConfigError(errors)
    layouts = {name: build_section(f"tables.{name}", Layout, layout) for name, layout in raw.items()}
    for layout in layouts.values():
        if layout.published_rows:
            for name in published_files.read_published(path.parent / layout.published_rows):
                layout.rows[name] = Row(title=published_files.title_of_row(name), published_only=True)
    return layouts


def _part_errors(path: str, layout: Any) -> list[SettingError]:
    """Errors of single rows and columns, by their own keys: a layout's error would be about all rows at once."""
    errors: list[SettingError] = []
    for part, cls in (("rows", Row), ("columns", Column)):
        sections = layout.get(part) if isinstance(layout, Mapping) else None
        for key, section in sections.items() if isinstance(sections, Mapping) else ():
            errors += checked_section(f"{path}.{part}.{key}", cls, section)[1]
    return errors


def read_paper(path: Path) -> tuple[dict[str, Published], list[str]]:
    """The published side of each table, and messages about entries that are left out: without a source, or not numbers.

    Raises:
        ConfigError: the file cannot be read.
    """
    raw = _yaml(path)
    sources, tables = raw.get("sources"), raw.get("tables")
    if not isinstance(sources, dict) or not isinstance(tables, dict):
        raise ConfigError([f"Invalid {path}: it must have the groups sources and tables; fix it."])
    published_tables, problems = {}, []
    for name, table in tables.items():
        values = table.get("values") if isinstance(table, dict) else None
        from_file = isinstance(values, dict) and isinstance(values.get("file"), str)
        try:
            published = build_section(f"paper.{name}", Published, table | {"values": {}} if values else table)
            read = published_files.numbers_of(name, values, path.parent) if from_file else None
        except ConfigError as error:
            problems += error.errors
            continue
        if read is not None:
            (numbers, number_problems), spreads = read, {}
        else:
            numbers, spreads, number_problems = _published_numbers(name, values or {})
        if numbers and published.source not in sources:
            number_problems.append(
                f"Invalid source of paper.{name}: {published.source} is none of {', '.join(sources)}, but a published "
                "number needs a source; name it."
            )
            numbers, spreads = {}, {}
        problems += number_problems
        published_tables[name] = published.model_copy(update={"values": numbers, "spreads": spreads})
    return published_tables, problems


_ByCell = dict[str, dict[str, float]]


def _published_numbers(name: str, values: Any) -> tuple[_ByCell, _ByCell, list[str]]:
    """Numbers and their spreads by row and column, and messages about entries that are no numbers."""
    numbers: _ByCell = {}
    spreads: _ByCell = {}
    problems = []
    for row, by_column in values.items() if isinstance(values, dict) else [("values", values)]:
        if not isinstance(by_column, dict):
            problems.append(f"Invalid paper.{name}.{row}={by_column!r}: it must be numbers by column; fix it.")
            continue
        for column, value in by_column.items():
            pair = value if isinstance(value, list) and len(value) == 2 else [value]
            if not all(map(_is_number, pair)):
                problems.append(f"Invalid paper.{name}.{row}.{column}={value!r}: it must be a number; fix it.")
                continue
            numbers.setdefault(row, {})[column] = float(pair[0])
            if len(pair) == 2:
                spreads.setdefault(row, {})[column] = float(pair[1])
    return numbers, spreads, problems


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and value == value


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError([f"Cannot read {path}: {reason_of(error)}; fix it."]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"Invalid {path}: it must hold groups by name; fix it."])
    return content


def read_runs(results: Path) -> tuple[list[Run], list[str]]:
    """Finished runs below a folder, in the order of their paths, and problems of the others.

    Damaged files are named; the numbers of their run are in its signed record, and still count.
    """
    runs = []
    paths, problems = _records_below(results)
    for path in paths:
        try:
            record = RunRecord.read(path.parent)
            if not record.is_finished:
                problems.append(f"{path.parent} is {record.status}.")
                if (record.error or "").startswith(FloatingPointError.__name__):
                    experiment = parse(record.experiment, run_exp.SUITE)
                    runs.append(Run(path.parent, experiment, {}, 0.0, {}, diverged=True))
                continue
            experiment = parse(record.experiment, run_exp.SUITE)
            metrics = {
                name: value
                for name, value in record.metrics.items()
                if value is not None and not name.startswith("flatness/")  # read from flatness.json instead
            }
            metrics |= _measured(record)
            if wrong := [name for name, value in metrics.items() if not _is_number(value)]:
                raise ValueError(f"{wrong[0]} is not a finite number")
            train_s = float(record.timing.train_s)
            machine = _machine(record)
        except BROKEN as error:
            problems.append(f"{path.parent} has no valid run.json ({type(error).__name__}: {str(error)[:200]}).")
            continue
        if damage := _damage(path.parent, record):
            problems.append(f"{path.parent} is damaged ({'; '.join(damage)}); the numbers of its record count.")
        try:
            measured, more = _flatness(path.with_name("flatness.json"), record.adapter_sha256, experiment.seed)
        except BROKEN as error:
            measured, more = {}, {}
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            problems.append(f"{path.parent} has no valid flatness.json ({reason}); its other numbers count.")
        runs.append(Run(path.parent, experiment, metrics | more, train_s, measured, machine=machine))
    return runs, problems


def _machine(record: RunRecord) -> str:
    if record.env is None:
        return Run._field_defaults["machine"]
    hardware = record.env.hardware
    gpus = [f"{count} × {name}" if count > 1 else name for name, count in Counter(hardware.gpus).items()]
    return ", ".join(gpus) or hardware.cpu


def _measured(record: RunRecord) -> dict[str, float]:
    """{"timing/<key>" or "memory/<key>": value} of a record; `train_and_score_s` is the sum of both times."""
    timing, memory = (group.model_dump() if group else {} for group in (record.timing, record.memory))
    if None not in (times := [timing.get("train_s"), timing.get("score_s")]):
        timing["train_and_score_s"] = sum(times)
    groups = {"timing": timing, "memory": memory}
    return {
        f"{group}/{key}": value
        for group, values in groups.items()
        for key, value in values.items()
        if _is_number(value)
    }


def _records_below(results: Path) -> tuple[list[Path], list[str]]:
    """Paths of everything named run.json, sorted, and messages about folders that cannot be read."""
    paths, problems = [], []

    def on_error(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be read ({error.strerror}): runs below it are not counted.")

    for parent, folders, names in os.walk(results, onerror=on_error):
        if Path(parent) == results:
            folders[:] = [name for name in folders if name not in NOT_RUNS]
        if RECORD_FILE in (*folders, *names):
            paths.append(Path(parent, RECORD_FILE))
        elif "metrics.jsonl" in names and "config.yaml" in names:
            problems.append(f"{parent} has no {RECORD_FILE}: the run has not ended, or its record was deleted.")
    return sorted(paths), problems


def _damage(run: Path, record: RunRecord) -> list[str]:
    """Damage of a run's files and answers; of weights only sizes are compared, and of a lone record only its files."""
    if records.is_alone(run):
        return record.file_damage(run, lambda name: os.path.lexists(run / name))
    return record.damage(run, largest_bytes=_HASHED_BYTES, scores=False)


_HASHED_BYTES = 64 << 20  # larger files are weights, which are hashed when they are loaded


# ConfigError is a ValueError
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def _flatness(path: Path, adapter_sha256: str | None, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Settings of each part, and {"flatness/<measure>": value}; both are empty if the run was not measured.

    Raises:
        ValueError: the file is of other weights, was measured with the noise of the training, or has invalid numbers.
    """
    record = records.read_record(path, "measure again with scripts/flatness.py")
    if record is None:
        return {}, {}
    if record["adapter_sha256"] != adapter_sha256:
        raise ValueError("it was measured on another adapter; measure this one with scripts/flatness.py")
    parts = record["parts"]
    how = {part: dict(values["how"]) for part, values in parts.items()}
    if "rise" in how and "streams" not in how["rise"] and how["rise"].get("seed") == seed:
        raise ValueError(  # an early version drew both from the same streams; those of other seeds differ
            f"its rise was measured with the noise that the training of seed {seed} saw; measure again with "
            "scripts/flatness.py"
        )
    metrics = {}
    for sigma, draws in parts["rise"]["draws"].items() if "rise" in parts else ():
        _validate_numbers(f"rise at σ = {float(sigma):g}", draws)
        metrics[f"flatness/rise_{sigma}"] = statistics.fmean(draws)
    if "hessian" in parts:
        top, samples = parts["hessian"]["top_eigenvalue"], parts["hessian"]["trace_samples"]
        _validate_numbers("hessian", [top, *samples])
        metrics |= {"flatness/top_eigenvalue": top, "flatness/trace": statistics.fmean(samples)}
    if "landscape" in parts:
        at, line, plane = (parts["landscape"][key] for key in ("at", "line", "plane"))
        for numbers in (at, line, *plane):
            _validate_numbers("landscape", numbers)
        if {len(at)} != {len(line), len(plane), *map(len, plane)}:
            raise ValueError(f"its landscape has {len(at)} points, but another number of losses")
    return how, metrics


def _validate_numbers(name: str, values: Any) -> None:
    if not isinstance(values, list) or not values or not all(map(_is_number, values)):
        raise ValueError(f"{name}: they must be finite numbers")


def make(
    layouts: Mapping[str, Layout], papers: Mapping[str, Published], runs: Sequence[Run]
) -> tuple[list[TableData], list[str]]:
    """The tables, and messages about what is left out: duplicate runs, and published numbers without a cell.

    Raises:
        ConfigError: overrides of a row and column do not compose.
    """
    made, problems = [], []
    datasets = {run.experiment.dataset.name for run in runs}
    validated = {run.experiment.dataset.name for run in runs if run.experiment.dataset.evaluate == "validation"}
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        by_identity.setdefault(setting_of(run.experiment), []).append(run)
    for name, layout in layouts.items():
        published = papers.get(name)
        problems += _unplaced(name, layout, published)
        cells = {}
        for row in layout.rows:
            for key, column in layout.columns.items():
                matches, tuned, overrides = [], None, cell_overrides(name, layout, row, key)
                if layout.rows[row].tune:
                    known = by_identity if column.dataset in validated else {}
                    tuned, doubled = _tuned(name, layout, row, key, known)
                    problems += doubled
                    overrides += tuned.chosen.overrides if tuned.chosen else []
                is_run = not layout.rows[row].published_only and (tuned is None or tuned.chosen is not None)
                if column.dataset in datasets and is_run:  # composing takes a while
                    matches = _matches(experiment_of(tuple(overrides)), column.metric, layout, by_identity)
                if layout.tuning is not None:
                    matches = [run for run in matches if run.experiment.seed in layout.tuning.test_seeds]
                by_seed, paths, doubled = _one_a_seed(matches, column)
                problems += doubled
                numbers = (published.values, published.spreads) if published else ({}, {})
                shown = [run for run in matches if run.path in paths]
                cells[row, key] = Cell(
                    by_seed,
                    paths,
                    *(by_row.get(row, {}).get(key) for by_row in numbers),
                    sorted({run.machine for run in shown}) if column.metric.partition("/")[0] in MEASURED else (),
                    _incomplete([run.metrics for run in shown], column.metric.partition("/")[0]),
                    tuned,
                )
        made.append(TableData(name, layout, published, cells, best_rows(layout, cells)))
    return made, list(dict.fromkeys(problems))


def cell_overrides(name: str, layout: Layout, row: str, column: str) -> list[str]:
    """All overrides of a cell of table `name` without the seed."""
    experiment = f"experiment={layout.experiment or name}"
    return [experiment, *layout.rows[row].overrides, *layout.columns[column].overrides]


def _matches(
    experiment: Experiment, metric: str, layout: Layout, by_identity: Mapping[str, Sequence[Run]]
) -> list[Run]:
    """Runs of the experiment's setting, of any seed, that were scored alike."""
    alike = [run for run in by_identity.get(setting_of(experiment), []) if metric in run.metrics]
    return [run for run in alike if _scored_alike(run, experiment, metric, layout)]


def tuning_overrides(name: str, layout: Layout, row: str, column: str) -> list[str]:
    """All overrides of a cell's tuning runs without the seed and the tuned values."""
    return [*cell_overrides(name, layout, row, column), *layout.tuning.overrides, tuning.EVALUATE]


def _tuned(
    name: str, layout: Layout, row: str, key: str, by_identity: Mapping[str, Sequence[Run]]
) -> tuple[Tuned, list[str]]:
    """The validation scores of a cell's grid, and messages about seeds whose runs differ.

    Raises:
        ConfigError: a point of the grid is no valid setting.
    """
    column, seeds = layout.columns[key], layout.tuning.seeds
    metric, problems, points = column.tuned_by or column.metric, [], []
    shows = next((one for one in layout.columns.values() if one.metric == metric), None)
    scale, lower = (shows.scale, shows.lower) if shows else (1.0, metric == tuning.LOSS)
    scored = column.model_copy(update={"metric": metric, "scale": scale})
    base = experiment_of(tuple(tuning_overrides(name, layout, row, key))) if by_identity else None
    for values in tuning.grid(layout.rows[row].tune):
        matches, diverged = [], []
        if base is not None:
            experiment = tuning.with_values(base, values)
            alike = by_identity.get(setting_of(experiment), [])
            diverged = sorted({run.experiment.seed for run in alike if run.diverged and run.experiment.seed in seeds})
            matches = _matches(experiment, metric, layout, by_identity)
            matches = [run for run in matches if run.experiment.seed in seeds]
        by_seed, paths, doubled = _one_a_seed(matches, scored)
        problems += doubled
        points.append(tuning.Point(values, by_seed, paths, [seed for seed in diverged if seed not in by_seed]))
    return Tuned(points, list(seeds), metric, lower), problems


def check_tuning(layouts: Mapping[str, Layout]) -> None:
    """Check every tuned cell before anything runs: its validation score, its keys and values.

    Raises:
        ConfigError: it lists every error, with the cell.
    """
    errors: dict[str, str] = {}  # {message: first cell}
    for name, layout in layouts.items():
        for row, value in layout.rows.items():
            for key in layout.columns if value.tune else ():
                for message in _tuning_errors(name, layout, row, key):
                    errors.setdefault(message, f"tables.{name}, row {row}, column {key}")
    if errors:
        raise ConfigError(f"{cell}: {message}" for message, cell in errors.items())


def _tuning_errors(name: str, layout: Layout, row: str, key: str) -> list[str]:
    """Errors about the tuning runs of one cell."""
    try:
        base = experiment_of(tuple(tuning_overrides(name, layout, row, key)))
    except ConfigError as error:
        return error.errors
    errors, tune = [], layout.rows[row].tune
    metric = layout.columns[key].tuned_by or layout.columns[key].metric
    if metric != tuning.LOSS and metric.partition("/")[0] not in base.eval:
        errors.append(
            f"Invalid tuned_by={metric}: tuning runs have no such validation score; choose {tuning.LOSS}, or a metric "
            f"of eval=[{','.join(base.eval)}]."
        )
    settings = []
    for values in tuning.grid(tune):
        try:
            settings.append(setting_of(tuning.with_values(base, values)))
        except ConfigError as error:
            errors += [message for message in error.errors if message not in errors]
    if not errors and len(set(settings)) < len(settings):
        errors.append(
            f"Invalid tune={tune}: some of its values are the same setting; tune what the training depends on."
        )
    return errors


@cache  # columns may show several metrics of the same runs
def experiment_of(overrides: tuple[str, ...]) -> Experiment:
    """The experiment of a cell's overrides, with seed 0."""
    return run_exp.experiment_of([*overrides, "seed=0"])


def setting_of(experiment: Experiment) -> str:
    return json.dumps({key: value for key, value in experiment.identity().items() if key != "seed"}, sort_keys=True)


def _scored_alike(run: Run, expected: Experiment, metric: str, layout: Layout) -> bool:
    """Whether the metric's benchmark used the same rows and settings; the batch size does not matter.

    Time and memory are those of all benchmarks.
    """
    benchmark, _, of_benchmark = metric.partition("/")
    if not of_benchmark:
        return True  # measured while training
    if benchmark == "flatness":
        part = "rise" if metric.startswith("flatness/rise") else "hessian"
        measured = run.measured.get(part, {})
        return all(measured.get(key) == value for key, value in layout.measured.get(part, {}).items())

    def answer_settings(experiment: Experiment, benchmark: str) -> Any:
        config = experiment.eval.get(benchmark)
        irrelevant = {"batch_size", "judge_url", "judge_key", "folder"}  # settings that no answer depends on
        default = benchmarks.BENCHMARKS[benchmark].Config.model_construct()  # without validation of missing folders
        settings = (config or default).model_dump(mode="json", exclude=irrelevant)
        rows = getattr(experiment.model, "generated_test_rows", None), getattr(experiment.dataset, "test_rows", None)
        return settings, rows

    scored = {*run.experiment.eval, *expected.eval} if benchmark in MEASURED else {benchmark}
    return all(answer_settings(run.experiment, name) == answer_settings(expected, name) for name in scored)


def _one_a_seed(runs: Sequence[Run], column: Column) -> tuple[dict[int, float], list[Path], list[str]]:
    """{seed: value}, the paths of the runs, and messages about seeds whose runs differ, which are left out."""
    seeds: dict[int, list[Run]] = {}
    for run in runs:
        seeds.setdefault(run.experiment.seed, []).append(run)
    by_seed, paths, problems = {}, [], []
    for seed, same in sorted(seeds.items()):
        values = {run.metrics[column.metric] for run in same}
        if len(values) > 1:
            listed = ", ".join(f"{run.path} has {run.metrics[column.metric]}" for run in same)
            problems.append(f"seed {seed} of {column.metric}: {listed}; remove one of them.")
            continue
        if len(same) > 1:
            listed = ", ".join(str(run.path) for run in same)
            problems.append(f"seed {seed} is in several folders with equal numbers: {listed}; counted once.")
        by_seed[seed] = values.pop() * column.scale
        paths.append(same[-1].path)
    return by_seed, paths, problems


_INCOMPLETE = {
    "unfinished": "{:.1%} of the answers cut at max_new_tokens",
    "refused": "{:.1%} refused by the endpoint",
    "unrated": "{:g} not rated by the judge",
}


def _incomplete(runs: Sequence[Mapping[str, float]], benchmark: str) -> str:
    """Returns the fractions of answers that were cut, refused or not rated, as means over runs; "" if all are 0."""
    phrases = []
    for metric, phrase in _INCOMPLETE.items():
        values = [metrics.get(f"{benchmark}/{metric}", 0.0) for metrics in runs]
        if any(values):
            phrases.append(phrase.format(statistics.fmean(values)))
    return ", ".join(phrases)


def _unplaced(name: str, layout: Layout, published: Published | None) -> list[str]:
    if published is None:
        return []
    return [
        f"Invalid paper.{name}: {row}, {column} is not a cell of tables.{name}; name a row and a column of it."
        for row, values in published.values.items()
        for column in values
        if row not in layout.rows or (column not in layout.columns and not (layout.average and column == AVERAGE))
    ]


def differences_of(left: Mapping[int, float], right: Mapping[int, float]) -> list[float]:
    """left − right of each shared seed."""
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> tuple[float, float, float, float, int] | None:
    """left − right over shared seeds: (mean, 95 % interval from, to, p of the paired t-test, seeds).

    None for fewer than three seeds, or if all differences are equal.
    """
    shared = sorted(left.keys() & right.keys())
    differences = differences_of(left, right)
    largest = max((abs(side[seed]) for side in (left, right) for seed in shared), default=0.0)
    if len(shared) < 3 or statistics.stdev(differences) <= 1e-12 * largest:  # equal up to rounding
        return None
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return statistics.fmean(differences), float(low), float(high), float(test.pvalue), len(shared)


def unused(made: Sequence[TableData], runs: Sequence[Run]) -> list[str]:
    """A message about runs whose setting is that of no cell."""
    cells = [cell for table in made for cell in table.cells.values()]
    shown = {path for cell in cells for path in cell.paths}
    shown |= {path for cell in cells if cell.tuned for point in cell.tuned.points for path in point.paths}
    settings = {run.path: setting_of(run.experiment) for run in runs if not run.diverged}
    of_cells = {settings[path] for path in shown}
    others = [path for path, setting in settings.items() if setting not in of_cells]
    if not others:
        return []
    first = ", ".join(map(str, others[:5])) + (" …" if len(others) > 5 else "")
    return [f"{len(others)} runs have settings that belong to no cell of these tables: {first}"]


def best_rows(layout: Layout, cells: Mapping[tuple[str, str], Cell]) -> dict[str, str]:
    """{column: row} for columns in which one row is significantly better than every other row with runs."""
    best = {}
    for column in layout.columns:
        filled = [row for row in layout.rows if cells[row, column].by_seed]
        if len(filled) < 2:
            continue
        sign = -1 if layout.columns[column].lower else 1
        first = max(filled, key=lambda row: sign * cells[row, column].mean)
        tests = [paired(cells[first, column].by_seed, cells[row, column].by_seed) for row in filled if row != first]
        if all(test is not None and sign * test[0] > 0 and test[3] < SIGNIFICANT for test in tests):
            best[column] = first
    return best
