"""Writes the papers' tables and our own from the records of runs: Markdown, LaTeX (booktabs) and CSV.

    python -m scripts.tables [NAME ...] [--results DIR] [--out DIR]     writes NAME.md, NAME.tex, NAME.csv
    python -m scripts.tables status [NAME ...] [--seeds N]              seeds that cells have and lack, hours to fill
    python -m scripts.tables commands [NAME ...] [--seeds N]            the command of each cell

results/tables.yaml defines the tables and their numbers of seeds, which --seeds replaces; results/paper.yaml has the
published numbers. A run counts for a cell if its
configuration is the cell's, for any seed; runs that are broken, unfinished, duplicated or of another setting are named
and left out. The best of a column is bold only if it is better than every other row by a paired t-test over shared
seeds.

A table with `tuning` has seeds of its own: `commands` first gives the tuning runs that are missing, which are scored on
validation rows, and once all are there the test runs of the chosen settings (scripts/tuning.py).
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Shown

from flatlora.config.experiment import Experiment
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_atomic
from scripts import tuning
from scripts.arguments import add_folders, positive
from scripts.cells import (
    LAYOUTS,
    PAPER,
    Layout,
    Run,
    TableData,
    cell_overrides,
    check_folders,
    check_tuning,
    experiment_of,
    make,
    read_layouts,
    read_paper,
    read_runs,
    setting_of,
    tuning_overrides,
    unused,
)
from scripts.table_formats import as_csv, latex, markdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an invalid layout or published number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tables, all by default; status or commands may come first")
    add_folders(parser, "RESULTS/tables")
    parser.add_argument("--seeds", type=positive, help="seeds per cell, for status and commands; default: the table's")
    options = parser.parse_args(arguments)
    quiet_libraries()
    action, names = "write", options.names
    if names[:1] in (["status"], ["commands"]):
        action, *names = names
    out = options.out or options.results / "tables"
    try:
        layouts, (papers, left_out) = read_layouts(LAYOUTS), read_paper(PAPER)
        if unknown := [name for name in names if name not in layouts]:
            raise ConfigError([f"Unknown table {name}: known are {', '.join(layouts)}." for name in unknown])
        asked = {name: layouts[name] for name in names or layouts}
        tuned = {name: layout for name, layout in asked.items() if layout.tuning is not None}
        check_tuning(tuned)
        if action != "commands" or tuned:
            check_folders(options.results, out)
            runs, problems = read_runs(options.results)
            made, more = make(tuned if action == "commands" else asked, papers, runs)
        if action == "commands":
            untuned = {name: layout for name, layout in asked.items() if name not in tuned}
            lines = commands(untuned, options.seeds)
            print("\n".join([*lines, *(line for table in made for line in tuned_commands(table))] if tuned else lines))
            return 0
    except ConfigError as error:
        report_errors(error)
        return 2
    for problem in [*left_out, *problems, *more, *unused(made, runs)]:
        print(f"left out: {problem}", file=sys.stderr)
    if action == "status":
        print_status(made, runs, options.seeds)
        return 0
    for table in made:
        for suffix, text in (("md", markdown(table)), ("tex", latex(table)), ("csv", as_csv(table, options.results))):
            write_atomic(out / f"{table.name}.{suffix}", text)
        print(f"written: {out / table.name}.md, .tex, .csv")
    return 0


def commands(layouts: Mapping[str, Layout], seeds: int | None = None) -> list[str]:
    """Shell lines with the command of each cell; columns that show the same runs share one, with the most seeds.

    Args:
        seeds: per cell; None takes those of the layouts.
    """
    titles_of: dict[tuple[str, ...], list[str]] = {}
    seeds_of: dict[tuple[str, ...], int] = {}
    for name, layout in layouts.items():
        rows = [row for row, value in layout.rows.items() if not value.published_only]
        for row, column in itertools.product(rows, layout.columns):
            overrides = (*cell_overrides(name, layout, row, column), *layout.also)
            title = f"# {name}, {layout.rows[row].title}, {layout.columns[column].title}"
            titles_of.setdefault(overrides, []).append(title)
            seeds_of[overrides] = max(seeds_of.get(overrides, 1), seeds or layout.seeds_of(column))
    lines = []
    for overrides, titles in titles_of.items():
        count = seeds_of[overrides]
        several = ["-m"] if count > 1 else []
        last = f"seed={','.join(map(str, range(count)))}"
        lines += [*titles, shlex.join(["python", "run_exp.py", *several, *overrides, last])]
    for name, layout in layouts.items():
        lines += [f"# {name}, of the finished runs", *layout.then] if layout.then else []
    return lines


def tuned_commands(made: TableData) -> list[str]:
    """Shell lines with the runs that the cells of a tuned table lack; columns that show the same runs share them."""
    titles_of: dict[tuple[str, ...], list[str]] = {}
    for (row, column), cell in made.cells.items():
        if made.layout.rows[row].published_only:
            continue
        test_seeds = [seed for seed in made.layout.tuning.test_seeds if seed not in cell.by_seed]
        if cell.tuned is not None and cell.tuned.chosen is None:
            sweeps = tuning.sweeps(cell.tuned.missing)
            overrides = tuning_overrides(made.name, made.layout, row, column)
            state = f"{cell.tuned.status}, then {len(test_seeds)} test runs"
        else:
            sweeps, overrides = [([], test_seeds)] if test_seeds else [], made.overrides_of(row, column)
            state = "" if cell.tuned is None else f"chosen {cell.tuned.status}; "
            state += f"{len(test_seeds)} test runs are missing" if test_seeds else "complete"
        lines = []
        for swept, seeds in sweeps:
            words = [*overrides, *swept, f"seed={','.join(map(str, seeds))}"]
            many = len(seeds) > 1 or any("," in word.partition("=")[2] for word in swept)
            lines.append(shlex.join(["python", "run_exp.py", *(["-m"] if many else []), *words]))
        title = f"# {made.name}, {made.layout.rows[row].title}, {made.layout.columns[column].title}: {state}"
        titles_of.setdefault(tuple(lines) or (title,), []).append(title)
    return [line for lines, titles in titles_of.items() for line in dict.fromkeys([*titles, *lines])]


def print_status(made: Sequence[TableData], runs: Sequence[Run], seeds: int | None = None) -> None:
    """Print for each cell the number of seeds that it has and lacks, and the hours of these, from similar runs.

    Args:
        seeds: per cell; None takes those of the layouts.
    """
    title = f"Cells of {seeds} seeds" if seeds else "Cells, by the seeds of their tables"
    shown = Shown(title=title, title_justify="left")
    for column in ("table", "row", "column", "seeds", "missing", "hours"):
        shown.add_column(
            column, justify="right" if column in ("seeds", "missing", "hours") else "left", overflow="fold"
        )
    hours_of: dict[tuple[str, ...], float | None] = {}  # of one run
    missing_of: dict[tuple[str, ...], int] = {}  # several columns may show the same runs
    for table in made:
        for row, key in table.cells:
            if table.layout.rows[row].published_only:
                continue
            for title, done, missing, overrides in _needed(table, row, key, seeds):
                hours = _hours(overrides, table.layout.columns[key].dataset, runs) if missing else 0.0
                if missing >= missing_of.get(tuple(overrides), 0):
                    hours_of[tuple(overrides)], missing_of[tuple(overrides)] = hours, missing
                estimate = "—" if not missing else "?" if hours is None else f"{missing * hours:.2f}"
                column = table.layout.columns[key].title
                shown.add_row(table.name, title, column, str(done), str(missing), estimate)
    Console(highlight=False).print(shown)
    unknown = sum(missing for overrides, missing in missing_of.items() if hours_of[overrides] is None)
    total = sum(missing * (hours_of[overrides] or 0.0) for overrides, missing in missing_of.items())
    unmeasured = f"; {unknown} runs have no similar run to estimate from (?)" if unknown else ""
    print(f"{total:.2f} hours of training for cells with similar runs{unmeasured}.")


def _needed(table: TableData, row: str, key: str, seeds: int | None) -> list[tuple[str, int, int, list[str]]]:
    """(title, runs that are there, runs that are missing, overrides) of a cell's runs, and of its tuning runs."""
    cell, tuned, title = table.cells[row, key], table.cells[row, key].tuned, table.layout.rows[row].title
    tuning_of = table.layout.tuning
    wanted = (seeds or table.layout.seeds_of(key)) if tuning_of is None else len(tuning_of.test_seeds)
    needed = [(title, len(cell.by_seed), max(0, wanted - len(cell.by_seed)), table.overrides_of(row, key))]
    if tuned is not None:
        missing = sum(len(lacking) for _, lacking in tuned.missing)
        done = len(tuned.points) * len(tuned.seeds) - missing
        needed.insert(0, (f"{title}, tuning", done, missing, tuning_overrides(table.name, table.layout, row, key)))
    return needed


def _hours(overrides: Sequence[str], dataset: str, runs: Sequence[Run]) -> float | None:
    """Hours of one run of a cell: the median of its own runs or, if there are none, of its model and data set."""
    if dataset not in {run.experiment.dataset.name for run in runs}:
        return None
    experiment = experiment_of(tuple(overrides))
    alike = [run for run in runs if not run.diverged and _duration_key(run.experiment) == _duration_key(experiment)]
    exact = [run for run in alike if setting_of(run.experiment) == setting_of(experiment)]
    times = [run.train_s for run in exact or alike]
    return statistics.median(times) / 3600 if times else None


def _duration_key(experiment: Experiment) -> tuple[Any, ...]:
    """What the time of a training depends on most; runs with and without held-out rows take about the same."""
    rows = experiment.dataset.model_dump(exclude={"evaluate", "validation_rows", "subset"})
    return experiment.model, rows, experiment.optim.epochs, experiment.peft.name, experiment.trainer.max_steps


if __name__ == "__main__":
    sys.exit(main())
