"""Writes one HTML page of everything in results/: tables, figures, and each run's configuration and environment.

    python -m scripts.report [--results DIR] [--out FILE]     writes RESULTS/tables/report.html

The page is self-contained and needs no network; its links lead to the raw files.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml

from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_atomic
from scripts import cells, figures
from scripts.arguments import add_folders
from scripts.table_formats import COMPARED, comparisons, lines_of, notes_of, title_of, titles_of

TEMPLATE = Path(__file__).with_name("report.html.j2")
SECTIONS = ("model", "dataset", "peft", "rho", "optim", "trainer")


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an invalid layout or published number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser, "RESULTS/tables/report.html")
    options = parser.parse_args(words)
    quiet_libraries()
    out = options.out or options.results / "tables/report.html"
    try:
        cells.check_folders(options.results, out.parent)
        if out.is_dir():
            raise ConfigError([f"Invalid --out={out}: it is a folder; name a file, such as {out / 'report.html'}."])
        page = render(options.results, out.parent)
    except ConfigError as error:
        report_errors(error)
        return 2
    write_atomic(out, page)
    print(f"written: {out}")
    return 0


def render(results: Path, home: Path) -> str:
    """The HTML of the page.

    Args:
        home: folder of the page, for relative links.

    Raises:
        ConfigError: a layout or published number is invalid.
    """
    layouts, (papers, left_out) = cells.read_layouts(cells.LAYOUTS), cells.read_paper(cells.PAPER)
    runs, problems = cells.read_runs(results)
    made, more = cells.make(layouts, papers, runs)
    finished = [run for run in runs if not run.diverged]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        tables=[table_of(table) for table in made],
        figures=figure_entries({table.name: table for table in made}, results),
        groups=groups_of(finished, home),
        problems=[*left_out, *problems, *more, *cells.unused(made, runs)],
        count=len(finished),
    )


def table_of(made: cells.TableData) -> dict[str, Any]:
    """The values of one table for the template."""
    return {
        "name": made.name,
        "title": title_of(made),
        "columns": titles_of(made),
        "lines": lines_of(made),
        "notes": notes_of(made),
        "compared": COMPARED,
        "comparisons": comparisons(made),
        "filled": any(cell.by_seed for cell in made.cells.values()),
    }


def figure_entries(tables: Mapping[str, cells.TableData], results: Path) -> list[dict[str, str]]:
    """Each figure twice, as data URIs: with panels in a row, and in a column for narrow screens."""
    captions = dict(line.split(maxsplit=1) for line in (figures.__doc__ or "").splitlines() if line[:1].islower())
    entries = []
    for name in figures.FIGURES:
        shapes = [_data_uri(name, tables, results, stacked=stacked) for stacked in (False, True)]
        if None not in shapes:
            entries.append({"name": name, "wide": shapes[0], "narrow": shapes[1], "caption": captions[name]})
    return entries


def _data_uri(name: str, tables: Mapping[str, cells.TableData], results: Path, *, stacked: bool) -> str | None:
    token = figures.STACKED.set(stacked)
    try:
        with figures.plt.rc_context(figures.STYLE):
            figure, _ = figures.drawn(name, tables, results)  # scripts/figures.py reports why there is none
            if figure is None:
                return None
            content = figures.as_bytes(figure, "png", {"Software": None}, dpi=160)
            figures.plt.close(figure)
    finally:
        figures.STACKED.reset(token)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def groups_of(runs: Iterable[cells.Run], home: Path) -> list[dict[str, Any]]:
    """Runs grouped by configuration: the configuration, and each seed's numbers, code, machine and files."""
    groups: dict[Path, dict[str, Any]] = {}
    for run in runs:
        record = RunRecord.read(run.path)
        experiment = run.experiment
        group = groups.setdefault(
            run.path.parent,
            {
                "title": f"{experiment.dataset.name}: {experiment.run_name()}",
                "config": yaml.safe_dump({name: record.experiment[name] for name in SECTIONS}, sort_keys=False),
                "environment": yaml.safe_dump(record.env and record.env.model_dump(), sort_keys=False),
                "runs": [],
            },
        )
        scores = {name: value for name, value in run.metrics.items() if name.partition("/")[0] not in cells.MEASURED}
        headline = {name: value for name, value in scores.items() if "/" in name and isinstance(value, float)}
        group["runs"].append(
            {
                "seed": experiment.seed,
                "metrics": ", ".join(f"{name} {value:.4g}" for name, value in headline.items()),
                "loss": f"{run.metrics['train_loss']:.4f}" if "train_loss" in run.metrics else "—",
                "minutes": f"{run.train_s / 60:.1f}",
                "code": record.git_sha or "—",
                "adapter": (record.adapter_sha256 or "—")[:12],
                "files": _links(run.path, home),
            }
        )
    return list(groups.values())


def _links(run: Path, home: Path) -> list[tuple[str, str]]:
    """(name, address relative to the page) of a run's raw files that exist."""
    names = (RECORD_FILE, "metrics.jsonl", "flatness.json", "config.yaml")
    present = [name for name in names if (run / name).is_file()]
    return [(name, quote(Path(os.path.relpath(run / name, home)).as_posix())) for name in present]


if __name__ == "__main__":
    sys.exit(main())
