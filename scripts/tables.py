"""The papers' tables and our own, from the records of runs: Markdown, LaTeX (booktabs) and CSV.

    python -m scripts.tables [NAME ...] [--results DIR] [--out DIR]     writes NAME.md, NAME.tex, NAME.csv
    python -m scripts.tables status [NAME ...] [--seeds 3]              cells with runs, cells without, hours to fill

results/tables.yaml says what stands in a table, results/paper.yaml what was published. A run counts for a cell if its
configuration is the cell's, whatever the seed; what is broken, unfinished, doubled or of another setting is named and
left out. The best of a column is bold only if it is better than every other row by a paired t-test over shared seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Shown

from flatlora.utils.console import quiet_libraries, report_faults
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_atomic
from scripts.arguments import add_folders, positive
from scripts.cells import (
    LAYOUTS,
    PAPER,
    Made,
    Run,
    check_folders,
    experiment_of,
    make,
    read_layouts,
    read_paper,
    read_runs,
    setting_of,
    unused,
)
from scripts.table_formats import as_csv, latex, markdown


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 made or shown, 2 a layout or published number that is not in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all tables by default; the word status shows what is missing")
    add_folders(parser, "RESULTS/tables")
    parser.add_argument("--seeds", type=positive, default=3, help="of each cell, for status")
    options = parser.parse_args(words)
    quiet_libraries()
    status = options.names[:1] == ["status"]
    names = options.names[1:] if status else options.names
    out = options.out or options.results / "tables"
    try:
        check_folders(options.results, out)
        layouts, (papers, left_out) = read_layouts(LAYOUTS), read_paper(PAPER)
        if unknown := [name for name in names if name not in layouts]:
            raise ConfigError([f"Unknown table {name}: known are {', '.join(layouts)}." for name in unknown])
        runs, problems = read_runs(options.results)
        made, more = make({name: layouts[name] for name in names or layouts}, papers, runs)
    except ConfigError as error:
        report_faults(error)
        return 2
    for problem in [*left_out, *problems, *more, *unused(made, runs)]:
        print(f"left out: {problem}", file=sys.stderr)
    if status:
        print_status(made, runs, options.seeds)
        return 0
    for one in made:
        for suffix, text in (("md", markdown(one)), ("tex", latex(one)), ("csv", as_csv(one, options.results))):
            write_atomic(out / f"{one.name}.{suffix}", text)
        print(f"written: {out / one.name}.md, .tex, .csv")
    return 0


def print_status(made: Sequence[Made], runs: Sequence[Run], seeds: int) -> None:
    """Each cell: how many seeds it has, how many it lacks, and the hours that these take by the runs of its kind."""
    shown = Shown(title=f"Cells of {seeds} seeds", title_justify="left")
    for column in ("table", "row", "column", "seeds", "missing", "hours"):
        shown.add_column(
            column, justify="right" if column in ("seeds", "missing", "hours") else "left", overflow="fold"
        )
    total, unknown, counted = 0.0, 0, set()
    for one in made:
        for (row, key), cell in one.cells.items():
            missing = max(0, seeds - len(cell.by_seed))
            hours = _hours(one, row, key, runs) if missing else 0.0
            words = tuple(one.words_of(row, key))
            if words not in counted:  # several columns may show the same runs
                unknown += missing if hours is None else 0
                total += missing * (hours or 0.0)
            counted.add(words)
            told = "—" if not missing else "?" if hours is None else f"{missing * hours:.2f}"
            shown.add_row(
                one.name,
                one.layout.rows[row],
                one.layout.columns[key].title,
                str(len(cell.by_seed)),
                str(missing),
                told,
            )
    Console(highlight=False).print(shown)
    never = f"; {unknown} runs of a kind that never was (?)" if unknown else ""
    print(f"{total:.2f} hours of training for cells whose kind was measured{never}.")


def _hours(made: Made, row: str, key: str, runs: Sequence[Run]) -> float | None:
    """Of one run of a cell: the median of those with its model and data set, of the same row where there are some."""
    if made.layout.columns[key].dataset not in {run.experiment.dataset.name for run in runs}:
        return None
    experiment = experiment_of(tuple(made.words_of(row, key)))
    alike = [
        run
        for run in runs
        if (run.experiment.model, run.experiment.dataset, run.experiment.optim.epochs, run.experiment.peft.name)
        == (experiment.model, experiment.dataset, experiment.optim.epochs, experiment.peft.name)
        and run.experiment.trainer.max_steps == experiment.trainer.max_steps
    ]
    exact = [run for run in alike if setting_of(run.experiment) == setting_of(experiment)]
    times = [run.train_s for run in exact or alike]
    return statistics.median(times) / 3600 if times else None


if __name__ == "__main__":
    sys.exit(main())
