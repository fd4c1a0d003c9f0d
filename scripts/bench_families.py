"""`python -m scripts.bench families`: the models of the papers against stock transformers, PEFT and Liger's kernels.

    t5       a step of T5-base's shape on CoLA, against transformers' Trainer and PEFT; see bench_training.py
    clip     epochs of CLIP ViT-B/32's shape on CIFAR-like PNGs, against the same with 0 and 12 workers
    text     a step of Llama-2-7B's shape on GSM8K's rows, against the same, and with Liger's kernels
    answers  greedy answers of Llama-2-7B's shape by backend hf, against `generate`; see bench_answers.py

--only t5,text/LoRA measures some families, or some contenders of one. Results are written after each contender, to
families.json; those that the file has already are kept if they are of the same GPU and version of torch. --draw prints
the tables and draws families.png from the file alone.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
from rich.table import Table

from flatlora.inputs.rows import gather
from flatlora.runs import environment
from flatlora.utils import files
from flatlora.utils.console import report_errors
from flatlora.utils.errors import ConfigError, nearest, reason_of
from scripts.bench_answers import ANSWERS
from scripts.bench_gpu import console
from scripts.bench_training import CLIP, T5, TEXT, Place

matplotlib.use("Agg")
from matplotlib import pyplot

NAME = "families.json"
Row = dict[str, Any]


class Family(Protocol):
    """What is compared for one kind of model; see `bench_training.TrainingFamily` for the fields."""

    title: str
    model: str
    rows: str
    contenders: Mapping[str, Any] | Sequence[str]
    compared: Sequence[str]
    other_rows: Sequence[str]

    def check(self, place: Place) -> None: ...

    def write(self, place: Place) -> None: ...

    def measure(self, name: str, place: Place) -> Row: ...

    def speed(self, row: Mapping[str, Any]) -> float: ...

    def shown(self, row: Mapping[str, Any]) -> dict[str, str]: ...


FAMILIES: dict[str, Family] = {"t5": T5, "clip": CLIP, "text": TEXT, "answers": ANSWERS}


def run(
    only: str | None,
    *,
    out: Path,
    command: str,
    data_root: str | None,
    device: str = "cuda",
    families: Mapping[str, Family] = FAMILIES,
) -> int:
    """Measure, print, write `families.json` and `families.png` into `out`; returns the exit code.

    0: success; 1: a contender failed, and the others were measured; 2: the command line or a file is invalid.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = {key: Place(Path(folder) / key, device, data_root) for key in families}
        try:
            chosen, unknown = select(only, families)
            old, *_ = gather(
                lambda: read_report(out / NAME),
                *(lambda k=key: families[k].check(places[k]) for key in chosen),
                lambda: raise_if(unknown),
            )
        except ConfigError as error:
            report_errors(error)
            return 2
        report, failed = begin_report(old, families), False
        for key, name in ((key, name) for key, names in chosen.items() for name in names):
            try:
                row = measured(families[key], name, places[key])
            except Exception:  # such as too little memory, or no Liger: the others are still measured
                console.print(f"  {key}/{name} failed:\n{traceback.format_exc()}", soft_wrap=True, markup=False)
                failed = True
                continue
            console.print(f"  {key}/{name}: {described(families[key], row)}", soft_wrap=True, markup=False)
            add_row(report, key, name, row | {"command": command, "git_sha": environment.git_sha()}, families)
            out.mkdir(parents=True, exist_ok=True)
            files.write_json(out / NAME, report)  # after each contender, to keep what is measured
    show(report, out, families)
    return int(failed)


def measured(family: Family, name: str, place: Place) -> Row:
    """Measures a contender; the first of a family writes its files."""
    if not place.folder.exists():
        place.folder.mkdir()
        family.write(place)
    return family.measure(name, place)


def draw(out: Path, families: Mapping[str, Family] = FAMILIES) -> int:
    """Print the tables of `families.json` in `out` and draw its chart; returns the exit code, 2 without such a file."""
    try:
        report = read_report(out / NAME)
        if report is None:
            raise ConfigError([f"Missing {out / NAME}: nothing was measured; run it without --draw on a GPU."])
    except ConfigError as error:
        report_errors(error)
        return 2
    show(report, out, families)
    return 0


def show(report: Mapping[str, Any], out: Path, families: Mapping[str, Family]) -> None:
    for key, family in families.items():
        if rows := report["families"].get(key, {}).get("contenders"):
            console.print(table_of(family, rows))
    if not report["families"]:
        return
    written = [out / NAME]
    if speedups := speedups_of(report, families):
        plot(speedups, device_of(report["env"]), out / "families.png")
        written.append(out / "families.png")
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


def raise_if(errors: Sequence[str]) -> None:
    if errors:
        raise ConfigError(errors)


def select(only: str | None, families: Mapping[str, Family]) -> tuple[dict[str, list[str]], list[str]]:
    """{family: its contenders, in their order} of --only (None selects all), and an error for every unknown name."""
    known = {key: list(family.contenders) for key, family in families.items()}
    words = list(known) if only is None else only.split(",")
    names = [*known, *(f"{key}/{name}" for key, contenders in known.items() for name in contenders)]
    chosen: dict[str, set[str]] = {key: set() for key in known}
    errors = []
    for word in words:
        key, _, name = word.partition("/")
        if word in known:
            chosen[key] |= {*known[key]}
        elif name in known.get(key, ()):
            chosen[key].add(name)
        else:
            near = nearest(word, names)
            hint = f"did you mean {near}? " if near else ""
            errors.append(f"Invalid --only={word}: {hint}Families are {', '.join(known)}; a contender is FAMILY/NAME.")
    return {key: [name for name in known[key] if name in names] for key, names in chosen.items() if names}, errors


def read_report(path: Path) -> dict[str, Any] | None:
    """The results of earlier measurements; None if there are none.

    Raises:
        ConfigError: the file is not one that `run` writes.
    """
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_bytes())
        device_of(report["env"])
        for part in report["families"].values():
            for key in ("model", "rows", "contenders"):
                part[key]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            [f"Cannot read {path}: {reason_of(error)}; its results would be lost: move it away, or name another --out."]
        ) from error
    return report


def begin_report(old: Mapping[str, Any] | None, families: Mapping[str, Family]) -> dict[str, Any]:
    """A report with this environment and what `old` has of the same GPUs, version of torch, models and rows."""
    report: dict[str, Any] = {"env": environment.environment(), "families": {}}
    if old is None:
        return report
    if device_of(old["env"]) != device_of(report["env"]):
        dropped = ", ".join(old["families"])
        console.print(
            f"left out: {dropped}, which were measured on {device_of(old['env'])}; this is {device_of(report['env'])}",
            soft_wrap=True,
        )
        return report
    for key, part in old["families"].items():
        if key in families and (part["model"], part["rows"]) == (families[key].model, families[key].rows):
            report["families"][key] = part
        else:
            console.print(f"left out: {key}, which was measured on another model or other rows", soft_wrap=True)
    return report


def device_of(env: Mapping[str, Any]) -> str:
    """The GPUs (or the processor) and the version of torch: what results must share to be compared."""
    hardware = env["hardware"]
    return f"{', '.join(hardware['gpus']) or hardware['cpu']}, torch {env['versions']['torch']}"


def add_row(report: dict[str, Any], key: str, name: str, row: Row, families: Mapping[str, Family]) -> None:
    """Add a contender's results in the family's order."""
    family = families[key]
    part = report["families"].setdefault(key, {"model": family.model, "rows": family.rows, "contenders": {}})
    rows = part["contenders"] | {name: row}
    part["contenders"] = {known: rows[known] for known in family.contenders if known in rows}


def described(family: Family, row: Row) -> str:
    cells = [f"{cell} {column}" for column, cell in family.shown(row).items() if cell != "—"]
    return "; ".join([*cells, *([row["clock_and_power"]] if "clock_and_power" in row else [])])


def table_of(family: Family, rows: Mapping[str, Row]) -> Table:
    """The table of a family; ratios are times, so that less is faster."""
    table = Table(title=f"{family.title}; medians", title_justify="left")
    compared = [name for name in family.compared if name in rows]
    columns = list(family.shown(next(iter(rows.values()))))
    for column in ("", *columns, *(f"to {name}" for name in compared), "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        ratios = [f"{family.speed(rows[base]) / family.speed(row):.3f}" for base in compared]
        peak = f"{row['peak_gib']:.2f}" if "peak_gib" in row else "—"
        table.add_row(name, *family.shown(row).values(), *ratios, peak)
    return table


def speedups_of(report: Mapping[str, Any], families: Mapping[str, Family]) -> dict[str, dict[str, float]]:
    """{title of a family: {contender: its speed divided by stock's}}, of families whose stock was measured."""
    speedups = {}
    for key, family in families.items():
        rows = report["families"].get(key, {}).get("contenders", {})
        if "stock" in rows:
            base = family.speed(rows["stock"])
            shown = {name: row for name, row in rows.items() if name not in family.other_rows}
            speedups[family.title] = {name: family.speed(row) / base for name, row in shown.items()}
    return speedups


def plot(speedups: Mapping[str, Mapping[str, float]], device: str, path: Path) -> None:
    """Draw a bar for each contender, in groups of families."""
    bars = sum(map(len, speedups.values())) + len(speedups)
    figure, axes = pyplot.subplots(figsize=(7.2, 0.22 * bars + 0.9), layout="constrained")
    place, ticks = 0.0, {}
    for title, ratios in speedups.items():
        axes.text(0, place, f" {title}", va="center", fontsize=9, fontweight="bold")
        for name, ratio in ratios.items():
            place += 1
            axes.barh(place, ratio, height=0.8, color=_color(name))
            axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
            ticks[place] = name
        place += 1
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set(xlabel=f"speed, stock transformers + PEFT = 1 ({device})", ylim=(place - 0.4, -0.7))
    axes.margins(x=0.1)
    axes.axvline(1, color="0.75", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _color(name: str) -> str:
    """Distinguishable with color blindness (Okabe and Ito): gray is stock, orange is Flat-LoRA."""
    return "#999999" if name.startswith("stock") else "#d55e00" if name.startswith("Flat-LoRA") else "#0072b2"
