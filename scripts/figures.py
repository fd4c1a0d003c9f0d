"""The figures of the study and of the papers' measures, from the records that the tables are made of: PDF and PNG.

    python -m scripts.figures [NAME ...] [--results DIR] [--out DIR]

sigma_sweep      score against σ of Flat-LoRA, mean and sample standard deviation over seeds; LoRA is σ = 0
rank_sweep       score against the rank, LoRA and Flat-LoRA, in the same way
training_curves  loss of training against the step, mean over seeds and their range, smoothed over 5 logged rows
sharpness        rise of the training loss under the noise of training at several σ, on merged weights, over seeds
landscape        training loss along shared random directions of the full weight space, merged weights, one seed
severity         accuracy on corrupted images against the severity, of models trained on clean ones
pictures         images of LoRA and Flat-LoRA for the same prompts and seeds, from one seed of training
tuning_curves    validation score against the learning rate of each tuned row, mean over tuning seeds; ringed: chosen
cost             time of a step and peak memory, as results/bench/gpu.json has them
peft_suite       GSM8K against peak memory: public results of PEFT's suite, ours by its settings, and the Pareto front
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import string
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from eval.picture_grid import grid_figure
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.record import RunRecord
from flatlora.utils import records
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_atomic
from scripts import cells, tuning
from scripts.arguments import add_folders

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
# Distinguishable with color blindness (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
SMOOTHED_ROWS = 5
STACKED: ContextVar[bool] = ContextVar("STACKED", default=False)


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an invalid layout or an unknown figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(FIGURES)}; all by default")
    add_folders(parser, "RESULTS/tables")
    options = parser.parse_args(words)
    quiet_libraries()
    out = options.out or options.results / "tables"
    try:
        cells.check_folders(options.results, out)
        if unknown := [name for name in options.names if name not in FIGURES]:
            raise ConfigError([f"Unknown figure {name}: known are {', '.join(FIGURES)}." for name in unknown])
        tables = tables_of(options.results)
    except ConfigError as error:
        report_errors(error)
        return 2
    with plt.rc_context(STYLE):
        for name in options.names or FIGURES:
            figure, problem = drawn(name, tables, options.results)
            if figure is None:
                print(f"left out: {name}, {problem}", file=sys.stderr)
                continue
            save(figure, out / name)
            print(f"written: {out / name}.pdf, .png")
    return 0


def tables_of(results: Path) -> dict[str, cells.TableData]:
    """The tables that the figures are drawn from.

    Raises:
        ConfigError: a layout is invalid.
    """
    layouts = cells.read_layouts(cells.LAYOUTS)
    runs, _ = cells.read_runs(results)  # scripts/tables.py reports problems
    papers, _ = cells.read_paper(cells.PAPER)
    names = [*LAYOUTS, *(name for name, layout in layouts.items() if layout.tuning is not None)]
    made, _ = cells.make({name: layouts[name] for name in dict.fromkeys(names)}, papers, runs)
    return {table.name: table for table in made}


def drawn(name: str, tables: Mapping[str, cells.TableData], results: Path) -> tuple[plt.Figure | None, str]:
    """Returns a figure, or None, and why there is none: too few runs, or a broken record."""
    try:
        return FIGURES[name](tables, results), "for which there are too few runs"
    except cells.BROKEN as error:
        plt.close("all")
        return None, f"because a record is broken ({type(error).__name__}: {str(error)[:120]})"


def save(figure: plt.Figure, path: Path) -> None:
    """Write PDF and PNG, with the same bytes each time."""
    for kind, more in (("pdf", {"CreationDate": None, "Producer": None}), ("png", {"Software": None})):
        write_atomic(path.with_suffix(f".{kind}"), as_bytes(figure, kind, more))
    plt.close(figure)


def as_bytes(figure: plt.Figure, kind: str, metadata: Mapping[str, None], dpi: int = 200) -> bytes:
    """The encoded figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def sigma_of(row: cells.Row) -> float | None:
    """σ of a row of the study's layout: 0 for LoRA, that of Flat-LoRA, None for other methods."""
    given = dict(override.split("=") for override in row.overrides)
    sigma = float(given.pop("rho.sigma", 0.05))
    return {(): 0.0, (("rho", "flat"),): sigma}.get(tuple(given.items()))


def sigma_sweep(study: cells.TableData) -> plt.Figure | None:
    """One panel per column with three or more σ; None if there is none."""
    panels = {}
    for key, column in study.layout.columns.items():
        by_sigma = {sigma_of(layout_row): study.cells[row, key] for row, layout_row in study.layout.rows.items()}
        by_sigma.pop(None, None)
        if (points := points_of(by_sigma)).shape[0] >= 3:
            panels[column.title] = points
    if not panels:
        return None
    figure, axes = panels_of(len(panels))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.errorbar(points[:, 0], points[:, 1], yerr=points[:, 2], marker="o", capsize=3, color=COLORS[0])
        axis.set(title=title, xlabel="σ (0 is LoRA)", ylabel="per cent")
        axis.set_xticks(points[:, 0], [f"{sigma:g}" for sigma in points[:, 0]], rotation=45)
    seeds = seeds_told(list(panels.values()))
    title_of(figure, f"Flat-LoRA's σ, {SMALL}: mean ± std of {seeds} seeds")
    return figure


def rank_sweep(ablation: cells.TableData) -> plt.Figure | None:
    """LoRA and Flat-LoRA against r in one panel; None for fewer than three ranks of either."""
    lines = {}
    for label, method in (("LoRA", ["rho=off"]), ("Flat-LoRA (σ = 0.05)", [])):
        by_rank = {
            rank_of(layout_row, method): ablation.cells[row, "cola"] for row, layout_row in ablation.layout.rows.items()
        }
        by_rank.pop(None, None)
        lines[label] = points_of(by_rank)
    if any(points.shape[0] < 3 for points in lines.values()):
        return None
    figure, (axis,) = panels_of(1, width=4.2)
    for (label, points), color, shift in zip(lines.items(), COLORS, (0.98, 1.02), strict=False):
        style = {"marker": "o", "capsize": 3, "color": color, "label": label}
        axis.errorbar(points[:, 0] * shift, points[:, 1], yerr=points[:, 2], **style)  # shifted, so that all bars show
    axis.set_xscale("log", base=2)
    axis.set_xticks(points[:, 0], [f"{rank:g}" for rank in points[:, 0]])
    axis.minorticks_off()
    axis.set(
        title=f"CoLA, {SMALL}, mean ± std of {seeds_told(lines.values())} seeds", xlabel="rank r", ylabel="per cent"
    )
    axis.title.set_fontsize(9)
    axis.legend()
    return figure


def rank_of(row: cells.Row, method: Sequence[str]) -> int | None:
    """Rank of a row of the ablations whose other overrides are `method`; None for other rows."""
    ranks = [override for override in row.overrides if override.startswith("peft.lora_r=")]
    others = [override for override in row.overrides if override not in ranks]
    return (int(ranks[0].partition("=")[2]) if ranks else 8) if others == method else None


def points_of(by_place: Mapping[float, cells.Cell]) -> np.ndarray:
    """Array (points × 4) of x, mean, sample standard deviation and number of seeds, for cells with runs, sorted."""
    rows = [(place, cell.mean, cell.std or 0.0, len(cell.by_seed)) for place, cell in by_place.items() if cell.by_seed]
    return np.array(sorted(rows)) if rows else np.empty((0, 4))


def seeds_told(points: Iterable[np.ndarray]) -> str:
    """The number of seeds of some points, as text: 5, or 3–5."""
    counts = {int(count) for line in points for count in line[:, 3]}
    return "–".join(str(count) for count in sorted({min(counts), max(counts)}))


def panels_of(count: int, width: float = 3.4, height: float = 2.6) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure with `count` panels in a row; if `STACKED` is set, in a column, for narrow screens."""
    if STACKED.get():
        shape, size = (count, 1), (4.2, height * count)
    else:
        shape, size = (1, count), (max(width * count, 4.2), height)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def title_of(figure: plt.Figure, text: str) -> None:
    """A title above all panels, as wide as they are."""
    figure.suptitle(textwrap.fill(text, int(figure.get_figwidth() * 15)), fontsize=9)


def legend_below(figure: plt.Figure, axes: Iterable[plt.Axes]) -> None:
    """One legend for all panels."""
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(2, int(figure.get_figwidth() / 2))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(columns, len(handles)))


def first_of_methods(layout: cells.Layout) -> list[str]:
    """The first row of each pair of peft and rho."""
    rows: dict[tuple[str, ...], str] = {}
    for row, layout_row in layout.rows.items():
        rows.setdefault(tuple(word for word in layout_row.overrides if word.startswith(("peft=", "rho="))), row)
    return list(rows.values())


def training_curves(study: cells.TableData) -> plt.Figure | None:
    """One panel per data set, one line per method (Flat-LoRA at the paper's σ); None if no run has metrics."""
    panels: dict[str, Mapping[str, np.ndarray]] = {}
    for key, column in study.layout.columns.items():
        if key == "matthews":
            continue  # the same runs as CoLA's accuracy
        rows = [row for row in first_of_methods(study.layout) if study.cells[row, key].by_seed]
        lines = {study.layout.rows[row].title: curves_of(study.cells[row, key].paths) for row in rows}
        if lines := {label: line for label, line in lines.items() if line.size}:
            panels[column.title] = lines
    if not panels:
        return None
    figure, axes = panels_of(len(panels), height=2.8)
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, line in lines.items():
            color = COLORS[labels.index(label)]
            steps, losses = line[0, :, 0], line[:, :, 1]
            axis.plot(steps, losses.mean(0), color=color, label=label, linewidth=1.2)
            axis.fill_between(steps, losses.min(0), losses.max(0), color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="optimizer step", ylabel="training loss", yscale="log")
    legend_below(figure, axes)
    return figure


def curves_of(paths: Sequence[Path]) -> np.ndarray:
    """Array (seeds × rows × 2) of steps and smoothed losses.

    Runs whose metrics are broken, too short, or of other steps than most others are named and left out.
    """
    curves: dict[Path, np.ndarray] = {}
    for path in paths:
        try:
            curves[path] = _curve(path / "metrics.jsonl")
        except cells.BROKEN as error:
            print(f"left out: the curve of {path} ({type(error).__name__}: {str(error)[:120]})", file=sys.stderr)
    if not curves:
        return np.empty((0, 0, 2))
    (steps, _), *_ = Counter(curve[:, 0].tobytes() for curve in curves.values()).most_common()
    for path in [path for path, curve in curves.items() if curve[:, 0].tobytes() != steps]:
        print(f"left out: the curve of {path}, which has other steps than the other seeds'", file=sys.stderr)
        del curves[path]
    return np.stack(list(curves.values()))


def _curve(path: Path) -> np.ndarray:
    """Array (rows × 2) of one run.

    Raises:
        ValueError: there are too few rows, rows without numbers, or rows that the run did not write.
    """
    record = RunRecord.read(path.parent)
    if record and (damage := record.file_damage(path.parent, lambda name: name == "metrics.jsonl")):
        raise ValueError(damage[0])
    rows = [(float(row["step"]), float(row["loss"])) for row in MetricsLog(path).rows() if "loss" in row]
    if len(rows) < SMOOTHED_ROWS:
        raise ValueError(f"{len(rows)} rows have a loss, but {SMOOTHED_ROWS} are needed")
    steps, losses = np.array(rows).T
    smooth = np.convolve(losses, np.ones(SMOOTHED_ROWS) / SMOOTHED_ROWS, mode="valid")
    return np.stack([steps[SMOOTHED_ROWS - 1 :], smooth], axis=1)


def sharpness(flatness: cells.TableData) -> plt.Figure | None:
    """Expected rise against σ, one line per row: mean over seeds with its 95 % interval; None without measures."""
    lines, counts = {}, set()
    for row, label in flatness.layout.row_titles().items():
        seeds = [measures_of(path)["rise"]["draws"] for path in flatness.cells[row, "rise05"].paths]
        if len(seeds) < 2:
            continue
        shared = sorted(set.intersection(*map(set, seeds)), key=float)  # the σ that every seed was measured at
        lines[label] = np.array([(float(sigma), *mean_and_interval(seeds, sigma)) for sigma in shared])
        counts.add(len(seeds))
    if not lines:
        return None
    figure, (axis,) = panels_of(1, width=4.2, height=3.0)
    for (label, points), color in zip(lines.items(), COLORS, strict=False):
        style = {"marker": "o", "capsize": 3, "color": color, "label": label, "linewidth": 1.2}
        axis.errorbar(points[:, 0], points[:, 1], yerr=points[:, 2], **style)
    axis.set_yscale("symlog", linthresh=0.01)
    sigmas = sorted({float(sigma) for points in lines.values() for sigma in points[:, 0]})
    axis.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas])
    axis.set(xlabel="σ of the noise that is added", ylabel="rise of the training loss")
    seed_counts = "–".join(map(str, sorted({min(counts), max(counts)})))
    axis.set_title(f"CoLA, {SMALL}: mean of {seed_counts} seeds, 95 % interval", fontsize=9)
    axis.legend()
    return figure


def mean_and_interval(seeds: Sequence[Mapping[str, list[float]]], sigma: str) -> tuple[float, float]:
    """Mean over seeds of a rise, and half the width of its 95 % interval (Student's t)."""
    rises = [statistics.fmean(draws[sigma]) for draws in seeds]
    half = stats.t.ppf(0.975, len(rises) - 1) * statistics.stdev(rises) / len(rises) ** 0.5
    return statistics.fmean(rises), half


def landscape(flatness: cells.TableData) -> plt.Figure | None:
    """A panel of lines, and one of contours per row, for the first seed with measures of all rows, else None."""
    by_row = {}
    for row, label in flatness.layout.row_titles().items():
        cell = flatness.cells[row, "rise05"]
        measures = {seed: measures_of(path) for seed, path in zip(cell.by_seed, cell.paths, strict=True)}
        by_row[label] = {seed: parts["landscape"] for seed, parts in measures.items() if "landscape" in parts}
    shared = set.intersection(*map(set, by_row.values())) if by_row else set()
    if not shared or len({json.dumps(seeds[min(shared)]["how"]) for seeds in by_row.values()}) > 1:
        return None
    measured = {label: seeds[min(shared)] for label, seeds in by_row.items()}
    figure, (first, *axes) = panels_of(1 + len(measured), width=2.6, height=2.9)
    for (label, part), color in zip(measured.items(), COLORS, strict=False):
        first.plot(part["at"], part["line"], color=color, label=label, linewidth=1.2)
    ticks = [min(part["at"]), 0, max(part["at"])]
    first.set(xlabel="along d₁", ylabel="training loss", yscale="log", xticks=ticks)
    planes = [np.array(part["plane"]) for part in measured.values()]
    levels = np.geomspace(min(plane.min() for plane in planes), max(plane.max() for plane in planes), 13)
    for axis, (label, part), plane in zip(axes, measured.items(), planes, strict=True):
        lines = axis.contour(part["at"], part["at"], plane.T, levels=levels, cmap="viridis", linewidths=0.9, norm="log")
        axis.clabel(lines, levels[::3], fmt="%.2f", fontsize=6)
        axis.plot(0, 0, "+", color="black", markersize=5)
        axis.set(xlabel="along d₁", ylabel="along d₂", aspect="equal", xticks=ticks, yticks=ticks)
        axis.set_title(label, fontsize=9)
    legend_below(figure, [first])
    seed = min(shared)
    title_of(figure, f"CoLA, {SMALL}, seed {seed}: shared filter-normalized directions, 1 is the length of W'")
    return figure


def measures_of(path: Path) -> dict[str, Any]:
    """The parts of a run's flatness.json."""
    return records.read_record(path / "flatness.json")["parts"]


def severity(corruptions: cells.TableData) -> plt.Figure | None:
    """Accuracy against severity, one line per row, with the clean accuracy at 0; None if no row has all severities."""
    lines = {}
    for row, label in corruptions.layout.row_titles().items():
        points = points_of({place: corruptions.cells[row, key] for place, key in enumerate(corruptions.layout.columns)})
        if len(points) == len(corruptions.layout.columns):
            lines[label] = points
    if not lines:
        return None
    figure, (axis,) = panels_of(1, width=4.2, height=3.0)
    for (label, points), color in zip(lines.items(), COLORS, strict=False):
        axis.errorbar(points[:, 0], points[:, 1], yerr=points[:, 2], marker="o", capsize=3, color=color, label=label)
    axis.set_xticks(points[:, 0], ["clean", *(f"{place:g}" for place in points[1:, 0])])
    axis.set(xlabel="severity", ylabel="top-1, per cent")
    axis.set_title(f"{corruptions.layout.title}: mean ± std of {seeds_told(lines.values())} seeds", fontsize=9)
    axis.legend()
    return figure


def pictures(sdxl: cells.TableData) -> plt.Figure | None:
    """Images of every row, for the smallest seed that all rows with images have; None if fewer than two rows have any.

    Only complete run folders have images; records that are kept alone do not.
    """
    folders: dict[str, dict[int, Path]] = {}
    for row, label in sdxl.layout.row_titles().items():
        paths = {int(path.name): path / "eval/text_to_image" for path in sdxl.cells[row, "image_text"].paths}
        if with_images := {seed: path for seed, path in paths.items() if (path / "images").is_dir()}:
            folders[label] = with_images
    shared = set.intersection(*map(set, folders.values())) if len(folders) > 1 else set()
    if not shared:
        return None
    shown = [(label, by_seed[min(shared)]) for label, by_seed in folders.items()]
    return grid_figure([(label, path, MetricsLog(path / "predictions.jsonl").rows()) for label, path in shown])


def tuning_curves(tables: Iterable[cells.TableData]) -> plt.Figure | None:
    """A panel per table and validation score, a line per row with two or more values; None if there is no such row."""
    panels = [
        (made, key)
        for made in tables
        for key in made.tuned_columns
        if any(len(points) > 1 for _, points, _ in lines_of_tuning(made, key))
    ]
    if not panels:
        return None
    figure, axes = panels_of(len(panels), width=4.6, height=5.0)
    styles = [(color, line) for line in ("-", "--", ":") for color in COLORS]
    for axis, (made, key) in zip(axes, panels, strict=True):
        for (label, points, chosen), (color, line) in zip(lines_of_tuning(made, key), styles, strict=False):
            if len(points) < 2:
                continue
            axis.plot(*zip(*points, strict=True), line, marker=".", color=color, label=label, linewidth=1.1)
            if chosen is not None:
                axis.plot(*chosen, "o", color=color, markersize=8, fillstyle="none")
        axis.set_xscale("log")
        (tried, *_) = next(row.tune for row in made.layout.rows.values() if row.tune)
        axis.set(xlabel=tried, ylabel=f"validation, {made.layout.columns[key].title}")
        axis.set_title(made.layout.columns[key].title, fontsize=9)
    legend_below(figure, axes[:1])
    title_of(figure, "Validation scores of the tuning runs, at the best of a row's other values; ringed: chosen")
    return figure


Curve = tuple[str, list[tuple[float, float]], tuple[float, float] | None]  # label, (value, mean score), the chosen one


def lines_of_tuning(made: cells.TableData, key: str) -> list[Curve]:
    """The mean validation score against the first tuned key, the best over the others, of each tuned row.

    Points without all of their seeds are left out: means over other seeds do not compare.
    """
    lines = []
    for row, value in made.layout.rows.items():
        tuned = made.cells[row, key].tuned
        if tuned is None:
            continue
        first, best = next(iter(value.tune)), {}
        for point in tuned.points:
            number = tuning.number_of(point.values[first])
            if number is not None and point.mean is not None and not point.missing(tuned.seeds):
                better = min if tuned.lower else max
                best[number] = better(point.mean, best.get(number, point.mean))
        chosen = tuned.chosen and (tuning.number_of(tuned.chosen.values[first]), tuned.chosen.mean)
        lines.append((value.title, sorted(best.items()), chosen))
    return lines


def cost(results: Path) -> plt.Figure | None:
    """Median step time and peak memory of each contender, a group of bars per shape; None without the record."""
    path = results / "bench/gpu.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_bytes())
    shapes, ways = record["steps"], [way for way in WAYS if all(way in times for times in record["steps"].values())]
    figure, (time, memory) = panels_of(2, width=4.0, height=3.0)
    for number, (way, color) in enumerate(zip(ways, COLORS, strict=False)):
        places = np.arange(len(shapes)) + (number - (len(ways) - 1) / 2) * 0.8 / len(ways)
        style = {"width": 0.8 / len(ways), "color": color, "label": way, "zorder": 2}
        time.bar(places, [statistics.median(times[way]["step_s"]) for times in shapes.values()], **style)
        memory.bar(places, [times[way]["peak_gib"] for times in shapes.values()], **style)
    for axis, label in ((time, "s per step, median"), (memory, "peak memory, GiB")):
        axis.set_xticks(range(len(shapes)), [name.replace("x", "×") for name in shapes])
        axis.set(xlabel="micro-batch × tokens × accumulation", ylabel=label)
        axis.grid(axis="x", visible=False)
    (gpu, *_) = record["env"]["hardware"]["gpus"]
    title_of(figure, f"{record['model']}; {gpu}")
    legend_below(figure, [time])
    return figure


def peft_suite(suite: cells.TableData) -> plt.Figure | None:
    """Accuracy against memory, a mark per row, in two panels: all, and the upper left part; None without public rows.

    The Pareto front joins rows that are more accurate than every row with as little memory. Ours are means over seeds.
    """
    public, ours = places_of(suite, "paper"), places_of(suite, "mean")
    if not public:
        return None
    front = pareto_front(public | ours)
    figure, axes = panels_of(2, width=4.4, height=3.8 if STACKED.get() else 5.0)  # with a long legend
    line = np.array([(public | ours)[title] for title in front])
    for axis in axes:
        axis.plot(*zip(*public.values(), strict=True), "o", color=COLORS[6], markersize=3, label="public, one seed")
        style = {"where": "post", "color": COLORS[7], "linewidth": 0.8, "zorder": 1}
        axis.step(line[:, 0], line[:, 1], label="Pareto front", **style)
        for (title, place), marker, color in zip(ours.items(), _MARKERS, itertools.cycle(COLORS[:6]), strict=False):
            axis.plot(*place, marker, color=color, markersize=6, label=f"{title}, ours")
        axis.set(xlabel="peak memory, GiB", ylabel="GSM8K, per cent")
    axes[0].set_title("all", fontsize=9)
    axes[1].set_title("its upper left part", fontsize=9)
    if upper := [place for place in (public | ours).values() if _is_upper(place)]:
        (left, bottom), (right, top) = np.min(upper, axis=0), np.max(upper, axis=0)
        axes[1].set(xlim=(left - 0.4, right + 0.3), ylim=(bottom - 0.5, top + 1))
    letter_points(axes, {title: public[title] for title in (*_NAMED, *front) if title in public})
    title_of(figure, suite.published.title if suite.published else suite.name)
    legend_below(figure, axes)
    return figure


_MARKERS = "sD^v<>Pp*Xhd"
_NAMED = ("lora/rank32", "lora/rank32-dora", "full-finetuning/lr_0.00001")


def places_of(suite: cells.TableData, side: str) -> dict[str, tuple[float, float]]:
    """{title of a row: (memory, accuracy)} of the rows that have both; `side` is paper or mean."""
    rows = {
        value.title: tuple(getattr(suite.cells[row, column], side) for column in ("memory", "gsm8k"))
        for row, value in suite.layout.rows.items()
    }
    return {title: place for title, place in rows.items() if None not in place}


def _is_upper(place: tuple[float, float]) -> bool:
    return place[0] <= 26 and place[1] >= 40


def letter_points(axes: Sequence[plt.Axes], points: Mapping[str, tuple[float, float]]) -> None:
    """Puts a letter beside each point, in the panel with more room, and its name into the legend."""
    for letter, title in zip(string.ascii_letters, sorted(points, key=lambda name: points[name][1]), strict=False):
        place, style = points[title], {"markeredgewidth": 0, "linestyle": "", "color": COLORS[7]}
        axes[0].plot([], [], marker=rf"$\mathrm{{{letter}}}$", label=title, **style)
        for axis in axes if _is_upper(place) else axes[:1]:
            axis.plot(*place, "o", color=COLORS[7], markersize=3)
        offset = {"xytext": (-3, 4), "textcoords": "offset points", "ha": "right"}
        axes[_is_upper(place)].annotate(letter, place, fontsize=9, **offset)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (cost, gain) with more gain than every point that costs as little, from low to high cost."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


SMALL = "SmolLM2-135M"
WAYS = ("PEFT", "PEFT+Liger", "published", "LoRA", "Flat-LoRA copy", "Flat-LoRA recompute")
LAYOUTS = ("study", "ablation", "flatness", "corruptions", "sdxl", "peft_suite")
FIGURES: Mapping[str, Callable[[Mapping[str, cells.TableData], Path], plt.Figure | None]] = {
    "sigma_sweep": lambda tables, results: sigma_sweep(tables["study"]),
    "rank_sweep": lambda tables, results: rank_sweep(tables["ablation"]),
    "training_curves": lambda tables, results: training_curves(tables["study"]),
    "sharpness": lambda tables, results: sharpness(tables["flatness"]),
    "landscape": lambda tables, results: landscape(tables["flatness"]),
    "severity": lambda tables, results: severity(tables["corruptions"]),
    "pictures": lambda tables, results: pictures(tables["sdxl"]),
    "tuning_curves": lambda tables, results: tuning_curves(tables.values()),
    "cost": lambda tables, results: cost(results),
    "peft_suite": lambda tables, results: peft_suite(tables["peft_suite"]),
}


if __name__ == "__main__":
    sys.exit(main())
