"""A table as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.cells import USUAL_SEEDS, Cell, Column, Layout, TableData, paired


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
        if any(cell.paper is not None for cell in cells):
            average = ["—"] if layout.average else []  # our mean of published numbers is not a published number
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


COMPARED = ["paired over seeds", "", "difference", "95 % interval", "p", "seeds"]


def comparisons(made: TableData) -> list[list[str]]:
    """Paired comparisons of each row with its `against`, over the seeds that both have: one line per column."""
    first, *others = [row for row in made.layout.rows if not row.startswith("full_ft")]
    lines = []
    for row, baseline in (made.layout.against or dict.fromkeys(others, first)).items():
        for key, column in made.layout.columns.items():
            test = paired(made.cells[row, key].by_seed, made.cells[baseline, key].by_seed)
            if test is not None:
                mean, low, high, p, seeds = test
                mean, low, high = (f"{value:+.{column.digits}f}" for value in (mean, low, high))
                texts = [mean, f"{low} to {high}", "< 0.001" if p < 0.001 else f"{p:.3f}", str(seeds)]
                names = [f"{made.layout.rows[row].title} − {made.layout.rows[baseline].title}", column.title]
                lines.append([*names, *(text.replace("-", "−") for text in texts)])
    return lines


def markdown(made: TableData) -> str:
    """The table, and the paired differences below it."""
    titles = titles_of(made)
    lines = [f"# {title_of(made)}", "", _md_row(["", *titles]), _md_row(["---", *["---:"] * len(titles)])]
    for label, texts, bold in lines_of(made):
        lines.append(_md_row([label, *(f"**{text}**" if index in bold else text for index, text in enumerate(texts))]))
    lines += ["", *(f"{note}  " for note in notes_of(made))]
    if rows := comparisons(made):
        lines += ["", _md_row(COMPARED), _md_row(["---", "---", *["---:"] * 4]), *map(_md_row, rows)]
    return "\n".join(lines) + "\n"


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
    writer.writerow(["table", "row", "column", "mean", "std", "n", "seeds", "paper", "difference", "best", "runs"])
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
            ]
        )
    return buffer.getvalue()
