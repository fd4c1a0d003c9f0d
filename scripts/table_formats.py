"""A table as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts import tuning
from scripts.cells import AVERAGE, USUAL_SEEDS, Cell, Column, Layout, TableData, differences_of, paired
from scripts.significance import holm, smallest_detectable


def title_of(made: TableData) -> str:
    """The title of the layout, or that of the published table."""
    return made.layout.title or (made.published.title if made.published else made.name)


def _ours(cell: Cell, column: Column) -> str:
    if cell.mean is None:
        return "missing"
    spread = f" ± {cell.std:.{column.digits}f}" if cell.std is not None else ""
    return f"{cell.mean:.{column.digits}f}{spread} ({len(cell.by_seed)})".replace("-", "−")


def _paper(cell: Cell) -> str:
    spread = "" if cell.paper_spread is None else f" ± {cell.paper_spread:.2f}"
    return "—" if cell.paper is None else f"{cell.paper:.2f}{spread}"


def _difference(cell: Cell) -> str:
    return "—" if cell.mean is None or cell.paper is None else f"{cell.mean - cell.paper:+.2f}".replace("-", "−")


def _mean(values: Iterable[float | None]) -> str:
    numbers = list(values)
    return "—" if not numbers or None in numbers else f"{statistics.fmean(numbers):.2f}"


def _published_average(made: TableData, row: str) -> str:
    number = made.published.values.get(row, {}).get(AVERAGE)
    return "—" if number is None else f"{number:.2f}"


def titles_of(made: TableData) -> list[str]:
    """The titles of the columns."""
    return [column.title for column in made.layout.columns.values()] + (["avg"] if made.layout.average else [])


def lines_of(made: TableData) -> list[tuple[str, list[str], set[int]]]:
    """(label, one text per column, indices of columns in bold): for each row ours, the paper's, and the difference."""
    layout, lines = made.layout, []
    for row, label in layout.row_titles().items():
        cells = [made.cells[row, column] for column in layout.columns]
        bold = {index for index, column in enumerate(layout.columns) if made.best.get(column) == row}
        average = [_mean(cell.mean for cell in cells)] if layout.average else []
        ours = [*map(_ours, cells, layout.columns.values()), *average]
        published_only = layout.rows[row].published_only
        if not published_only:
            lines.append((f"{label}, ours" if made.published else label, ours, bold))
        if layout.rows[row].tune:
            average = ["—"] if layout.average else []
            lines.append((f"{label}, chosen", [*(cell.tuned.status for cell in cells), *average], set()))
        if any(cell.paper is not None for cell in cells):
            # As published: our mean of published numbers is not a published number.
            average = [_published_average(made, row)] if layout.average else []
            papers = [_paper(cell) for cell in cells]
            lines.append((f"{label}, paper", [*papers, *average], set()))
            differences = [*map(_difference, cells), *(["—"] if layout.average else [])]
            if not published_only:
                lines.append((f"{label}, difference", differences, set()))
    return lines


def notes_of(made: TableData) -> list[str]:
    """The notes below a table."""
    notes = [
        "Ours: mean ± sample standard deviation over seeds (their number); bold: better than every other row, p < 0.05."
    ]
    if made.published:
        source = f" Paper: {made.published.source}, as results/paper.yaml has it." if made.published.source else ""
        spread = f" Behind its ±: {made.published.spread}." if made.published.spread else ""
        notes.append(f"Setting: {made.published.setting}.{source}{spread}")
        notes += made.published.notes
    notes += _seeds_note(made.layout)
    notes += _machines_note(made)
    notes += _tuning_notes(made)
    notes += _comparison_notes(made)
    incomplete = [
        f"{made.layout.rows[row].title}, {made.layout.columns[column].title}: {cell.incomplete}"
        for (row, column), cell in made.cells.items()
        if cell.incomplete
    ]
    if incomplete:
        notes.append(f"Incomplete answers, mean over runs: {'; '.join(incomplete)}.")
    return notes


def _machines_note(made: TableData) -> list[str]:
    """The machines that times and memory are of, with the rows of each."""
    rows_of: dict[str, list[str]] = {}
    for (row, _), cell in made.cells.items():
        for machine in cell.machines:
            rows_of.setdefault(machine, []).append(made.layout.rows[row].title)
    parts = [f"{machine} ({', '.join(dict.fromkeys(rows))})" for machine, rows in sorted(rows_of.items())]
    return [f"Time and memory of ours: {'; '.join(parts)}."] if parts else []


def _seeds_note(layout: Layout) -> list[str]:
    """The numbers of seeds that the layout names; empty if it names none."""
    own = [f"{column.title} {column.seeds}" for column in layout.columns.values() if column.seeds is not None]
    if layout.seeds is None and not own:
        return []
    of_columns = f" ({', '.join(own)})" if own else ""
    return [f"Seeds per cell in the paper: {layout.seeds or USUAL_SEEDS}{of_columns}."]


def _tuning_notes(made: TableData) -> list[str]:
    """How rows were tuned, and the values that were tried."""
    how = made.layout.tuning
    if how is None:
        return []
    overrides = f" ({' '.join(how.overrides)})" if how.overrides else ""
    rows_of: dict[str, list[str]] = {}
    for row in made.layout.rows.values():
        if row.tune:
            values = "; ".join(f"{key} {', '.join(map(str, grid))}" for key, grid in row.tune.items())
            rows_of.setdefault(values, []).append(row.title)
    tried = [f"{values} ({', '.join(titles)})" for values, titles in rows_of.items()]
    notes = [
        f"Chosen: the values with the best mean score on validation rows{overrides} over seeds "
        f"{tuning.seeds_text(how.seeds)}. Then trained with them and scored on test rows: seeds "
        f"{tuning.seeds_text(how.test_seeds)}, as all rows here.",
        f"Tried: {'. '.join(tried)}.",
    ]
    for key, column in made.layout.columns.items():
        if column.tuned_by and any(made.cells[row, key].tuned for row in made.layout.rows):
            notes.append(f"{column.title}: chosen by {column.tuned_by}.")
    if any(cell.tuned and cell.tuned.at_edge for cell in made.cells.values()):
        notes.append("(edge): the smallest or largest of the values tried, so a better one may lie outside.")
    return notes


class Comparison(NamedTuple):
    """A paired comparison of two rows in one column, in the column's scale."""

    row: str
    baseline: str
    column: str
    mean: float
    low: float  # 95 % interval
    high: float
    p: float
    seeds: int
    detectable: float  # smallest true difference that this test finds with 80 % power


def comparisons_of(made: TableData) -> list[Comparison]:
    """Paired comparisons of each row with its `against`, over the seeds that both have."""
    first, *others = [row for row in made.layout.rows if not row.startswith("full_ft")]
    found = []
    for row, baseline in (made.layout.against or dict.fromkeys(others, first)).items():
        for key in made.layout.columns:
            both = made.cells[row, key].by_seed, made.cells[baseline, key].by_seed
            test = paired(*both)
            if test is not None:
                detectable = smallest_detectable(statistics.stdev(differences_of(*both)), test[-1])
                found.append(Comparison(row, baseline, key, *test, detectable))
    return found


COMPARED = ["paired over seeds", "", "difference", "95 % interval", "p", "p (Holm)", "detectable", "seeds"]


def comparisons(made: TableData) -> list[list[str]]:
    """The texts of `comparisons_of`, one line each, with p corrected for all of them."""
    found, lines = comparisons_of(made), []
    for one, corrected in zip(found, holm([one.p for one in found]), strict=True):
        column, rows = made.layout.columns[one.column], made.layout.rows
        mean, low, high = (f"{value:+.{column.digits}f}" for value in (one.mean, one.low, one.high))
        texts = [mean, f"{low} to {high}", _p(one.p), _p(corrected), f"{one.detectable:.{column.digits}f}"]
        names = [f"{rows[one.row].title} − {rows[one.baseline].title}", column.title]
        lines.append([*names, *(text.replace("-", "−") for text in texts), str(one.seeds)])
    return lines


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _comparison_notes(made: TableData) -> list[str]:
    """What the p-values and detectable differences are, with the range of the latter by column."""
    found = comparisons_of(made)
    if not found:
        return []
    ranges = []
    for key, column in made.layout.columns.items():
        values = sorted(one.detectable for one in found if one.column == key)
        if values:
            low, high = (f"{value:.{column.digits}f}" for value in (values[0], values[-1]))
            ranges.append(f"{column.title} {low}" + (f" to {high}" if low != high else ""))
    return [
        f"p (Holm): Holm's correction over the {len(found)} paired comparisons of this table.",
        "Detectable: the smallest true difference that a paired t-test at 5 % finds with 80 % power, from the observed "
        f"standard deviation of the differences and the number of seeds: {', '.join(ranges)}.",
    ]


def markdown(made: TableData) -> str:
    """The table, and the paired differences below it."""
    titles = titles_of(made)
    lines = [f"# {title_of(made)}", "", _md_row(["", *titles]), _md_row(["---", *["---:"] * len(titles)])]
    for label, texts, bold in lines_of(made):
        lines.append(_md_row([label, *(f"**{text}**" if index in bold else text for index, text in enumerate(texts))]))
    lines += ["", *(f"{note}  " for note in notes_of(made))]
    if rows := comparisons(made):
        lines += ["", _md_row(COMPARED), _md_row(["---", "---", *["---:"] * (len(COMPARED) - 2)]), *map(_md_row, rows)]
    if points := _validation_scores(made):
        titles = ["validation scores", "", "setting", "mean", "seeds"]
        lines += ["", _md_row(titles), _md_row(["---", "---", "---", "---:", "---:"]), *map(_md_row, points)]
    return "\n".join(lines) + "\n"


def _validation_scores(made: TableData) -> list[list[str]]:
    """One line per tuned setting with runs: row, column, setting, mean, seeds; the chosen one is bold."""
    lines = []
    for (row, key), cell in made.cells.items():
        for point in cell.tuned.points if cell.tuned and key in made.tuned_columns else ():
            if not (point.by_seed or point.diverged):
                continue
            column, chosen = made.layout.columns[key], point is cell.tuned.chosen
            mean = "diverged" if point.mean is None else f"{point.mean:.4g}"
            setting, mean = (f"**{text}**" if chosen else text for text in (point.label, mean.replace("-", "−")))
            lines.append([made.layout.rows[row].title, column.title, setting, mean, str(len(point.by_seed))])
    return lines


def _md_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def latex(made: TableData) -> str:
    """A table environment for booktabs."""
    titles = titles_of(made)
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * len(titles)}}}", r"\toprule"]
    lines += [" & ".join(["", *map(_tex, titles)]) + r" \\", r"\midrule"]
    for label, texts, bold in lines_of(made):
        shown = [rf"\textbf{{{_tex(text)}}}" if index in bold else _tex(text) for index, text in enumerate(texts)]
        lines.append(" & ".join([_tex(label), *shown]) + r" \\")
    notes = " ".join(_tex(note) for note in notes_of(made))
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_tex(title_of(made))}. {notes}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


_TEX = {
    "±": r"$\pm$",
    "−": "$-$",
    "—": "--",
    "σ": r"$\sigma$",
    "α": r"$\alpha$",
    "ρ": r"$\rho$",
    "²": "$^2$",
    "<": "$<$",
    "%": r"\%",
    "_": r"\_",
    "ε": r"$\varepsilon$",
}
_TEX |= {character: rf"\{character}" for character in "&#$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def as_csv(made: TableData, results: Path) -> str:
    """One line per cell, with the paths of its runs."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    tuned = ["chosen", "validation"] if made.layout.tuning is not None else []
    columns = ["table", "row", "column", "mean", "std", "n", "seeds", "paper", "difference", "best", "runs"]
    writer.writerow([*columns, *tuned])
    for (row, column), cell in made.cells.items():
        both = cell.mean is not None and cell.paper is not None
        runs = [str(path.relative_to(results)) if path.is_relative_to(results) else str(path) for path in cell.paths]
        writer.writerow(
            [
                made.name,
                made.layout.rows[row].title,
                column,
                *("" if value is None else f"{value:.4f}" for value in (cell.mean, cell.std)),
                len(cell.by_seed),
                " ".join(map(str, cell.by_seed)),
                "" if cell.paper is None else cell.paper,
                f"{cell.mean - cell.paper:.4f}" if both else "",
                made.best.get(column) == row,
                " ".join(runs),
                *(_chosen(cell) if tuned else []),
            ]
        )
    return buffer.getvalue()


def _chosen(cell: Cell) -> list[str]:
    """The chosen overrides of a cell, and their mean validation score; empty texts if there are none."""
    point = cell.tuned.chosen if cell.tuned else None
    return ["", ""] if point is None else [" ".join(point.overrides), f"{point.mean:.4f}"]
