"""The papers' tables and our own, from the records of runs: Markdown, LaTeX (booktabs) and CSV.

    python scripts/tables.py [NAME ...] [--results DIR] [--out DIR]     writes NAME.md, NAME.tex, NAME.csv
    python scripts/tables.py status [NAME ...] [--seeds 3]              cells with runs, cells without, hours to fill

results/tables.yaml says what stands in a table, results/paper.yaml what was published. A run counts for a cell if its
configuration is the cell's, whatever the seed; what is broken, unfinished, doubled or of another setting is named and
left out. The best of a column is bold only if it is better than every other row by a paired t-test over shared seeds.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table as Shown
from scipy import stats

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))

import run_exp  # noqa: E402
from flatlora.config import ConfigError, Experiment, Section, build_section, parse, setting  # noqa: E402
from flatlora.console import quiet_libraries, report_faults  # noqa: E402
from flatlora.files import write_atomic  # noqa: E402

SIGNIFICANT = 0.05
NOT_RUNS = ("bench", "tables", "sweeps")  # folders of results/ that hold no run


class Column(Section):
    """One column: what is added to a row's words, and which metric of run.json is shown, times `scale`."""

    title: str
    words: list[str]
    metric: str
    scale: float


class Layout(Section):
    """One table. A row is a file of conf/experiment/TABLE/, perhaps with more words behind it."""

    rows: dict[str, str]
    columns: dict[str, Column]
    title: str | None = None  # the published table's by default
    average: bool = True
    against: dict[str, str] = setting({}, remedy="write ROW: ROW")  # rows compared; else all with the first LoRA row


class Published(Section):
    """The published side of a table."""

    title: str
    setting: str
    source: str | None
    values: dict[str, dict[str, float]]


class Run(NamedTuple):
    """A finished run as its record tells it."""

    path: Path
    experiment: Experiment
    metrics: Mapping[str, float]
    train_s: float


class Cell(NamedTuple):
    """What runs and paper say of one row and column, in the column's scale."""

    by_seed: dict[int, float]
    paths: list[Path]
    paper: float | None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


class Made(NamedTuple):
    """One table with all that stands in it."""

    name: str
    layout: Layout
    published: Published | None
    cells: dict[tuple[str, str], Cell]
    best: dict[str, str]  # column → the row that is better than all others


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 made or shown, 2 a layout or published number that is not in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all tables by default; the word status shows what is missing")
    parser.add_argument("--results", type=Path, default=PROJECT / "results")
    parser.add_argument("--out", type=Path, help="RESULTS/tables by default")
    parser.add_argument("--seeds", type=int, default=3, help="of each cell, for status")
    options = parser.parse_args(words)
    quiet_libraries()
    if not options.results.is_dir():
        report_faults(ConfigError([f"Invalid --results={options.results}: no such folder; name one that runs are in."]))
        return 2
    status = options.names[:1] == ["status"]
    names = options.names[1:] if status else options.names
    try:
        layouts, papers = read_layouts(PROJECT / "results/tables.yaml"), read_paper(PROJECT / "results/paper.yaml")
        if unknown := [name for name in names if name not in layouts]:
            raise ConfigError([f"Unknown table {name}: known are {', '.join(layouts)}." for name in unknown])
        runs, problems = read_runs(options.results)
        made, more = make({name: layouts[name] for name in names or layouts}, papers, runs)
    except ConfigError as error:
        report_faults(error)
        return 2
    for problem in [*problems, *more, *_unused(made, runs)]:
        print(f"left out: {problem}", file=sys.stderr)
    if status:
        print_status(made, runs, options.seeds)
        return 0
    out = options.out or options.results / "tables"
    for one in made:
        for suffix, text in (("md", markdown(one)), ("tex", latex(one)), ("csv", as_csv(one, options.results))):
            write_atomic(out / f"{one.name}.{suffix}", text)
        print(f"written: {out / one.name}.md, .tex, .csv")
    return 0


def read_layouts(path: Path) -> dict[str, Layout]:
    """The tables of tables.yaml.

    Raises:
        ConfigError: every key that is missing, unknown or of another kind.
    """
    return {name: build_section(f"tables.{name}", Layout, raw) for name, raw in _yaml(path).items()}


def read_paper(path: Path) -> dict[str, Published]:
    """The published side of each table.

    Raises:
        ConfigError: a number without a source that is listed, or what `read_layouts` refuses.
    """
    raw = _yaml(path)
    found = {name: build_section(f"paper.{name}", Published, one) for name, one in raw.get("tables", {}).items()}
    faults = [
        f"Invalid source of {name} in {path}: {one.source} is none of {', '.join(raw['sources'])}; a published number "
        "needs one."
        for name, one in found.items()
        if one.values and one.source not in raw["sources"]
    ]
    if faults:
        raise ConfigError(faults)
    return found


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"Cannot read {path}: {str(error).splitlines()[0]}; mend it."]) from error


def read_runs(results: Path) -> tuple[list[Run], list[str]]:
    """Finished runs below a folder, in the order of their paths, and what is wrong with the others."""
    runs, problems = [], []
    for path in sorted(results.rglob("run.json")):
        if path.relative_to(results).parts[0] in NOT_RUNS:
            continue
        try:
            record = json.loads(path.read_bytes())
            if record["status"] != "finished":
                problems.append(f"{path.parent} is {record['status']}.")
                continue
            experiment = parse(record["experiment"], run_exp.REGISTRY)
            metrics = {name: value for name, value in record["metrics"].items() if value is not None}
            if not all(math.isfinite(value) for value in metrics.values()):
                raise ValueError("a metric is not finite")
            runs.append(Run(path.parent, experiment, metrics, float(record["timing"]["train_s"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # ConfigError is a ValueError
            problems.append(f"{path.parent} has no good run.json ({type(error).__name__}: {str(error)[:120]}).")
    return runs, problems


def make(
    layouts: Mapping[str, Layout], papers: Mapping[str, Published], runs: Sequence[Run]
) -> tuple[list[Made], list[str]]:
    """The tables, and the runs of a cell that contradict each other.

    Raises:
        ConfigError: a row or column whose words do not compose, or a published number of no row or column.
    """
    made, problems, faults = [], [], []
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        by_identity.setdefault(_setting(run.experiment), []).append(run)
    for name, layout in layouts.items():
        published = papers.get(name)
        faults += _unplaced(name, layout, published)
        cells = {}
        for row in layout.rows:
            for key, column in layout.columns.items():
                experiment = run_exp.experiment_of([*words_of(name, row, column), "seed=0"])
                found = [
                    run
                    for run in by_identity.get(_setting(experiment), [])
                    if _scored_alike(run.experiment, experiment, column.metric) and column.metric in run.metrics
                ]
                by_seed, paths, doubled = _one_a_seed(found, column)
                problems += doubled
                paper = published.values.get(row, {}).get(key) if published else None
                cells[row, key] = Cell(by_seed, paths, paper)
        made.append(Made(name, layout, published, cells, best_rows(layout, cells)))
    if faults:
        raise ConfigError(faults)
    return made, list(dict.fromkeys(problems))


def words_of(table: str, row: str, column: Column) -> list[str]:
    """The command line of a cell, less the seed."""
    experiment, *more = row.split()
    return [f"experiment={table}/{experiment}", *more, *column.words]


def _setting(experiment: Experiment) -> str:
    return json.dumps({key: value for key, value in experiment.identity().items() if key != "seed"}, sort_keys=True)


def _scored_alike(run: Experiment, wanted: Experiment, metric: str) -> bool:
    """Whether the metric's benchmark asked the same rows in the same way; how many at a time does not matter."""
    benchmark = metric.partition("/")[0]

    def asked(experiment: Experiment) -> Any:
        config = experiment.eval.get(benchmark)
        how = {"batch_size", "judge_url"}  # and where the judge is: no answer depends on them
        settings = config.model_dump(mode="json", exclude=how) if config else None
        rows = getattr(experiment.model, "generated_test_rows", None), getattr(experiment.dataset, "test_rows", None)
        return settings, rows

    return asked(run) == asked(wanted)


def _one_a_seed(found: Sequence[Run], column: Column) -> tuple[dict[int, float], list[Path], list[str]]:
    """{seed: value}, the runs that gave them, and seeds that are left out: their runs differ."""
    seeds: dict[int, list[Run]] = {}
    for run in found:
        seeds.setdefault(run.experiment.seed, []).append(run)
    by_seed, paths, problems = {}, [], []
    for seed, same in sorted(seeds.items()):
        values = {run.metrics[column.metric] for run in same}
        if len(values) > 1:
            told = ", ".join(f"{run.path} has {run.metrics[column.metric]}" for run in same)
            problems.append(f"seed {seed} of {column.metric}: {told}; take one away.")
            continue
        by_seed[seed] = values.pop() * column.scale
        paths.append(same[-1].path)
    return by_seed, paths, problems


def _unplaced(name: str, layout: Layout, published: Published | None) -> list[str]:
    if published is None:
        return []
    return [
        f"Invalid paper.{name}: {row}, {column} is no cell of tables.{name}; name a row and a column of it."
        for row, values in published.values.items()
        for column in values
        if row not in layout.rows or column not in layout.columns
    ]


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> tuple[float, float, float, float, int] | None:
    """left − right over shared seeds: (mean, 95 % interval from, to, p of the paired t-test, seeds).

    None for fewer than three seeds, or where all differences are equal.
    """
    shared = sorted(left.keys() & right.keys())
    differences = [left[seed] - right[seed] for seed in shared]
    if len(shared) < 3 or statistics.stdev(differences) == 0:
        return None
    found = stats.ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(0.95)
    return statistics.fmean(differences), float(low), float(high), float(found.pvalue), len(shared)


def best_rows(layout: Layout, cells: Mapping[tuple[str, str], Cell]) -> dict[str, str]:
    """{column: row} where one row is better than every other one that has runs, and not by chance."""
    best = {}
    for column in layout.columns:
        filled = [row for row in layout.rows if cells[row, column].by_seed]
        if len(filled) < 2:
            continue
        first = max(filled, key=lambda row: cells[row, column].mean)
        tests = [paired(cells[first, column].by_seed, cells[row, column].by_seed) for row in filled if row != first]
        if all(test is not None and test[0] > 0 and test[3] < SIGNIFICANT for test in tests):
            best[column] = first
    return best


def _title(made: Made) -> str:
    return made.layout.title or (made.published.title if made.published else made.name)


def _ours(cell: Cell) -> str:
    if cell.mean is None:
        return "missing"
    spread = f" ± {cell.std:.2f}" if cell.std is not None else ""
    return f"{cell.mean:.2f}{spread} ({len(cell.by_seed)})"


def _difference(cell: Cell) -> str:
    return "—" if cell.mean is None or cell.paper is None else f"{cell.mean - cell.paper:+.2f}".replace("-", "−")


def _mean(values: Iterable[float | None]) -> str:
    found = list(values)
    return "—" if not found or None in found else f"{statistics.fmean(found):.2f}"


def lines_of(made: Made) -> list[tuple[str, list[str], set[int]]]:
    """(label, one text a column, columns in bold): of each row ours, then the paper's and the difference."""
    layout, lines = made.layout, []
    for row, label in layout.rows.items():
        cells = [made.cells[row, column] for column in layout.columns]
        bold = {place for place, column in enumerate(layout.columns) if made.best.get(column) == row}
        average = [_mean(cell.mean for cell in cells)] if layout.average else []
        lines.append((f"{label}, ours" if made.published else label, [*map(_ours, cells), *average], bold))
        if any(cell.paper is not None for cell in cells):
            average = ["—"] if layout.average else []  # a mean of ours of published numbers is not published
            papers = ["—" if cell.paper is None else f"{cell.paper:.2f}" for cell in cells]
            lines.append((f"{label}, paper", [*papers, *average], set()))
            differences = [*map(_difference, cells), *(["—"] if layout.average else [])]
            lines.append((f"{label}, difference", differences, set()))
    return lines


def _notes(made: Made) -> list[str]:
    notes = [
        "Ours: mean ± sample standard deviation over seeds (their number); bold: better than every other row, p < 0.05."
    ]
    if made.published:
        source = f" Paper: {made.published.source}, as results/paper.yaml has it." if made.published.source else ""
        notes.append(f"Setting: {made.published.setting}.{source}")
    return notes


def comparisons(made: Made) -> list[list[str]]:
    """Each row against its `against`, over the seeds that both have: one line a column."""
    first, *others = [row for row in made.layout.rows if not row.startswith("full_ft")]
    lines = []
    for row, baseline in (made.layout.against or dict.fromkeys(others, first)).items():
        for key, column in made.layout.columns.items():
            test = paired(made.cells[row, key].by_seed, made.cells[baseline, key].by_seed)
            if test is not None:
                mean, low, high, p, seeds = test
                interval = f"{low:+.2f} to {high:+.2f}"
                told = [f"{mean:+.2f}", interval, "< 0.001" if p < 0.001 else f"{p:.3f}", str(seeds)]
                names = [f"{made.layout.rows[row]} − {made.layout.rows[baseline]}", column.title]
                lines.append([*names, *(text.replace("-", "−") for text in told)])
    return lines


def markdown(made: Made) -> str:
    """The table, and the paired differences below it."""
    titles = [column.title for column in made.layout.columns.values()] + (["avg"] if made.layout.average else [])
    lines = [f"# {_title(made)}", "", _md_row(["", *titles]), _md_row(["---", *["---:"] * len(titles)])]
    for label, texts, bold in lines_of(made):
        lines.append(_md_row([label, *(f"**{text}**" if place in bold else text for place, text in enumerate(texts))]))
    lines += ["", *(f"{note}  " for note in _notes(made))]
    if found := comparisons(made):
        head = ["paired over seeds", "", "difference", "95 % interval", "p", "seeds"]
        lines += ["", _md_row(head), _md_row(["---", "---", *["---:"] * 4]), *map(_md_row, found)]
    return "\n".join(lines) + "\n"


def _md_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def latex(made: Made) -> str:
    """A table environment for booktabs."""
    titles = [column.title for column in made.layout.columns.values()] + (["avg"] if made.layout.average else [])
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * len(titles)}}}", r"\toprule"]
    lines += [" & ".join(["", *map(_tex, titles)]) + r" \\", r"\midrule"]
    for label, texts, bold in lines_of(made):
        shown = [rf"\textbf{{{_tex(text)}}}" if place in bold else _tex(text) for place, text in enumerate(texts)]
        lines.append(" & ".join([_tex(label), *shown]) + r" \\")
    notes = " ".join(_tex(note) for note in _notes(made))
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_tex(_title(made))}. {notes}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


_TEX = {"±": r"$\pm$", "−": "$-$", "—": "--", "σ": r"$\sigma$", "α": r"$\alpha$", "<": "$<$", "%": r"\%", "_": r"\_"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def as_csv(made: Made, results: Path) -> str:
    """One line a cell, with the runs that made it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "std", "n", "seeds", "paper", "difference", "best", "runs"])
    for (row, column), cell in made.cells.items():
        both = cell.mean is not None and cell.paper is not None
        runs = [str(path.relative_to(results)) if path.is_relative_to(results) else str(path) for path in cell.paths]
        writer.writerow(
            [
                made.name,
                made.layout.rows[row],
                column,
                *("" if value is None else f"{value:.4f}" for value in (cell.mean, cell.std)),
                len(cell.by_seed),
                " ".join(map(str, cell.by_seed)),
                "" if cell.paper is None else cell.paper,
                f"{cell.mean - cell.paper:.4f}" if both else "",
                made.best.get(column) == row,
                " ".join(runs),
            ]
        )
    return buffer.getvalue()


def _unused(made: Sequence[Made], runs: Sequence[Run]) -> list[str]:
    used = {path for one in made for cell in one.cells.values() for path in cell.paths}
    others = [run.path for run in runs if run.path not in used]
    return [f"{len(others)} runs are of other settings than these tables' cells, {others[0]} first."] if others else []


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
            words = tuple(words_of(one.name, row, one.layout.columns[key]))
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
    print(
        f"{total:.2f} hours of training for cells whose kind was measured; {unknown} runs of a kind that never was (?)."
    )


def _hours(made: Made, row: str, key: str, runs: Sequence[Run]) -> float | None:
    """Of one run of a cell: the median of those with its model and data set, of the same row where there are some."""
    experiment = run_exp.experiment_of([*words_of(made.name, row, made.layout.columns[key]), "seed=0"])
    alike = [
        run
        for run in runs
        if (run.experiment.model, run.experiment.dataset, run.experiment.optim.epochs, run.experiment.peft.name)
        == (experiment.model, experiment.dataset, experiment.optim.epochs, experiment.peft.name)
        and run.experiment.trainer.max_steps == experiment.trainer.max_steps
    ]
    exact = [run for run in alike if _setting(run.experiment) == _setting(experiment)]
    times = [run.train_s for run in exact or alike]
    return statistics.median(times) / 3600 if times else None


if __name__ == "__main__":
    sys.exit(main())
