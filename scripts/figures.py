"""The figures of the study, from the records that the tables are made of: PDF and PNG.

    python scripts/figures.py [--results DIR] [--out DIR]

sigma_sweep      score against σ of Flat-LoRA, mean and sample standard deviation over seeds; LoRA is σ = 0
training_curves  loss of training against the step, mean over seeds and their range, smoothed over 5 logged rows
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT))

from flatlora.config import ConfigError  # noqa: E402
from flatlora.console import quiet_libraries, report_faults  # noqa: E402
from flatlora.results import MetricsLog  # noqa: E402
from scripts import tables  # noqa: E402

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "flatlora",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")  # told apart by all
SMOOTHED_ROWS = 5


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 drawn, 2 a layout that is not in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=PROJECT / "results")
    parser.add_argument("--out", type=Path, help="RESULTS/tables by default")
    options = parser.parse_args(words)
    quiet_libraries()
    try:
        layouts = tables.read_layouts(PROJECT / "results/tables.yaml")
        runs, _ = tables.read_runs(options.results)
        (study,), _ = tables.make({"study": layouts["study"]}, {}, runs)
    except ConfigError as error:
        report_faults(error)
        return 2
    out = options.out or options.results / "tables"
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, figure in (("sigma_sweep", sigma_sweep(study)), ("training_curves", training_curves(study))):
            if figure is None:
                print(f"left out: {name}, for which there are too few runs", file=sys.stderr)
                continue
            save(figure, out / name)
            print(f"written: {out / name}.pdf, .png")
    return 0


def save(figure: plt.Figure, path: Path) -> None:
    """PDF and PNG, the same bytes each time."""
    figure.savefig(path.with_suffix(".pdf"), bbox_inches="tight", metadata={"CreationDate": None, "Producer": None})
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight", dpi=200, metadata={"Software": None})
    plt.close(figure)


def sigma_of(row: str) -> float | None:
    """σ of a row of the study's layout: 0 for LoRA, Flat-LoRA's own; None for other methods."""
    name, *more = row.split()
    if name == "lora":
        return 0.0
    given = [word.partition("=")[2] for word in more if word.startswith("rho.sigma=")]
    return float(given[0]) if given else 0.05 if name == "flat_lora" else None


def sigma_sweep(study: tables.Made) -> plt.Figure | None:
    """One panel a column that has three σ or more; None where there is none."""
    panels = {}
    for key, column in study.layout.columns.items():
        cells = [(sigma_of(row), study.cells[row, key]) for row in study.layout.rows if sigma_of(row) is not None]
        points = sorted((sigma, cell.mean, cell.std or 0.0, len(cell.by_seed)) for sigma, cell in cells if cell.by_seed)
        if len(points) >= 3:
            panels[column.title] = np.array(points)
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.6), squeeze=False, layout="constrained")
    for axis, (title, points) in zip(axes[0], panels.items(), strict=True):
        axis.errorbar(points[:, 0], points[:, 1], yerr=points[:, 2], marker="o", capsize=3, color=COLOURS[0])
        axis.set(title=title, xlabel="σ (0 is LoRA)", ylabel="per cent")
        axis.set_xticks(points[:, 0], [f"{sigma:g}" for sigma in points[:, 0]], rotation=45)
    seeds = sorted({int(count) for points in panels.values() for count in points[:, 3]})
    figure.suptitle(f"Flat-LoRA's σ, SmolLM2-135M: mean ± std of {'–'.join(map(str, seeds))} seeds", fontsize=9)
    return figure


def training_curves(study: tables.Made) -> plt.Figure | None:
    """One panel a data set, one line a method (Flat-LoRA at the paper's σ); None where no run has metrics."""
    panels: dict[str, Mapping[str, np.ndarray]] = {}
    for key, column in study.layout.columns.items():
        if key == "matthews":
            continue  # the runs of CoLA once more
        rows = [row for row in study.layout.rows if " " not in row and study.cells[row, key].by_seed]
        lines = {study.layout.rows[row]: curves_of(study.cells[row, key].paths) for row in rows}
        if lines := {label: line for label, line in lines.items() if line.size}:
            panels[column.title] = lines
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8), squeeze=False, layout="constrained")
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, line in lines.items():
            colour = COLOURS[labels.index(label)]
            steps, losses = line[0, :, 0], line[:, :, 1]
            axis.plot(steps, losses.mean(0), color=colour, label=label, linewidth=1.2)
            axis.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="optimizer step", ylabel="training loss", yscale="log")
    handles = {text: line for axis in axes[0] for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def curves_of(paths: Sequence[Path]) -> np.ndarray:
    """(seeds × rows × 2) of steps and smoothed losses; empty where the runs did not log the same steps."""
    curves = []
    for path in paths:
        rows = [row for row in MetricsLog(path / "metrics.jsonl").rows() if "loss" in row]
        losses = np.array([row["loss"] for row in rows])
        if len(losses) < SMOOTHED_ROWS:
            return np.empty((0, 0, 2))
        smooth = np.convolve(losses, np.ones(SMOOTHED_ROWS) / SMOOTHED_ROWS, mode="valid")
        curves.append(np.stack([[row["step"] for row in rows][SMOOTHED_ROWS - 1 :], smooth], axis=1))
    alike = len({curve[:, 0].tobytes() for curve in curves}) == 1
    return np.stack(curves) if alike else np.empty((0, 0, 2))


if __name__ == "__main__":
    sys.exit(main())
