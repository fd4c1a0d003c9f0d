"""`python -m scripts.bench cost`: GPU hours of training every published table, by this suite and by stock libraries.

Every run of a table counts: those of its rows and columns, each once, times its number of seeds. A run's hours are its
optimizer steps (of rows, epochs and batch) times the median step that results/bench/*.json have for its model and
method, at r = 8 whatever the run's rank:

    t5base, clip_b32   families.json: CoLA's rows; CIFAR-like images, epochs after the first
    llama              families.json: GSM8K's rows; without them gpu.json: rows of 1,024 tokens, in micro-batches of 2.
                       Other methods than LoRA and Flat-LoRA take methods.json's ratio to LoRA
    sdxl               sdxl.json: one image of 1,024 px a step

A step of several times as many rows takes as many times as long. Stock libraries have no regularizers and not all
methods, so each run takes their step of plain LoRA: a lower bound. Runs whose model and method were not measured are
named, and counted on neither side. Scoring is not included.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from flatlora.config.experiment import Experiment
from flatlora.experiment.commandline import composed_once
from flatlora.utils import files
from flatlora.utils.console import report_errors
from flatlora.utils.errors import ConfigError, reason_of
from scripts import cells

# Rows of the train splits on the hub, for data sets that are trained on whole.
TRAIN_ROWS = {
    "mnli": 392_702,
    "sst2": 67_349,
    "cola": 8_551,
    "qnli": 104_743,
    "mrpc": 3_668,
    "boolq": 9_427,
    "cb": 250,
    "copa": 400,
    "rte": 2_490,
    "wic": 5_428,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "cars": 8_144,
    "svhn": 73_257,
    "dtd": 3_760,
}
# Methods that have LoRA's step: they differ from it in the initial adapter or its scale.
_LIKE_LORA = ("lora", "rslora", "pissa", "olora", "corda", "eva", "lora_ga")
# Labels of methods.json.
_OF_PEFT = {
    "lora_pro": "LoRA-Pro, BF16 moments",
    "lora_plus": "LoRA+",
    "lora_fa": "LoRA-FA",
    "adalora": "AdaLoRA",
    "dora": "DoRA",
    "hira": "HiRA",
    "delora": "DeLoRA",
}
_OF_RHO = {"off": "LoRA", "flat": "Flat-LoRA", "sam": "LoRA-SAM", "nbar": "nBAR", "bi_lora": "Bi-LoRA"}
_DENSE = "2x1024x16"  # the shape of gpu.json and methods.json with 32 rows a step
console = Console(highlight=False, width=150)


class Rates(NamedTuple):
    """Seconds of an optimizer step of one model.

    Args:
        batch: rows of a step.
        source: the file, and the rows.
        stock: of plain LoRA by stock libraries.
        steps: {method: seconds} of this suite.
    """

    batch: int
    source: str
    stock: float
    steps: Mapping[str, float]


class Cost(NamedTuple):
    """What training a table takes; hours are those of the runs that were measured."""

    runs: int
    measured: int
    steps: int
    ours_h: float
    stock_h: float
    not_measured: Mapping[str, int]  # {what was not measured: runs}


def run(out: Path) -> int:
    """Print the hours of every published table, and write `cost.json` into `out`; returns the exit code."""
    try:
        layouts, (published, _) = cells.read_layouts(cells.LAYOUTS), cells.read_paper(cells.PAPER)
        rates = read_rates(out)
        with composed_once():
            runs = {name: runs_of(name, layouts[name]) for name in published if name in layouts}
    except ConfigError as error:
        report_errors(error)
        return 2
    costs = {name: cost_of(of_table, rates) for name, of_table in runs.items()}
    every = {setting: run for of_table in runs.values() for setting, run in of_table.items()}
    costs["all, each run once"] = cost_of(every, rates)
    console.print(table_of(costs))
    for name, rate in rates.items():
        console.print(f"{name}: {rate.source}; stock {rate.stock:.4f} s, LoRA {rate.steps['LoRA']:.4f} s a step")
    lacking = sorted(costs["all, each run once"].not_measured.items(), key=lambda pair: -pair[1])
    console.print(f"not measured: {'; '.join(f'{what} ({count} runs)' for what, count in lacking)}", soft_wrap=True)
    report = {
        "command": "python -m scripts.bench cost",
        "rates": {name: rate._asdict() for name, rate in rates.items()},
        "tables": {name: cost._asdict() for name, cost in costs.items()},
    }
    files.write_json(out / "cost.json", report)
    console.print(f"written: {out / 'cost.json'}", soft_wrap=True)
    return 0


def read_rates(folder: Path) -> dict[str, Rates]:
    """{model: its rates} of the measurements in a folder.

    Raises:
        ConfigError: a file is broken, or nothing was measured; it lists every error.
    """
    found, errors = {}, []
    for name, read in {"t5base": _t5, "clip_b32": _clip, "llama": _llama, "sdxl": _sdxl}.items():
        try:
            if (rates := read(folder)) is not None:
                found[name] = rates
        except (OSError, ValueError, LookupError, TypeError, AttributeError, statistics.StatisticsError) as error:
            errors.append(f"Broken measurements of {name} in {folder}: {reason_of(error)}; measure again.")
    if not found and not errors:
        errors.append(f"Missing measurements in {folder}: no rate is known; run scripts.bench on a GPU.")
    if errors:
        raise ConfigError(errors)
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _family(folder: Path, key: str) -> tuple[float, dict[str, float]] | None:
    """Seconds of stock's step and of this suite's of a family; None if stock or LoRA was not measured."""
    from scripts.bench_families import FAMILIES

    rows = _read(folder / "families.json").get("families", {}).get(key, {}).get("contenders", {})
    if not {"stock", "LoRA"} <= rows.keys():
        return None
    family = FAMILIES[key]
    if not family.in_tokens:
        seconds = {name: 1 / family.speed(row) for name, row in rows.items()}
    else:  # windows have different rows
        lora = rows["LoRA"]
        tokens = statistics.median(s * rate for s, rate in zip(lora["step_s"], lora["tokens_per_s"], strict=True))
        seconds = {name: tokens / family.speed(row) for name, row in rows.items()}
    steps = {"LoRA": seconds["LoRA"]} | ({"Flat-LoRA": flat} if (flat := seconds.get("Flat-LoRA copy")) else {})
    return seconds["stock"], steps


def _t5(folder: Path) -> Rates | None:
    found = _family(folder, "t5")
    return found and Rates(32, "families.json, CoLA's rows", *found)


def _clip(folder: Path) -> Rates | None:
    found = _family(folder, "clip")
    return found and Rates(128, "families.json, CIFAR-like images", *found)


def _llama(folder: Path) -> Rates | None:
    if found := _family(folder, "text"):
        source, stock, steps = "families.json, GSM8K's rows", *found
    else:
        dense = _read(folder / "gpu.json").get("steps", {}).get(_DENSE)
        if dense is None:
            return None
        source, stock = "gpu.json, rows of 1,024 tokens", _median(dense["PEFT"])
        steps = {"LoRA": _median(dense["LoRA"]), "Flat-LoRA": _median(dense["Flat-LoRA copy"])}
    others = _read(folder / "methods.json").get("steps", {}).get(_DENSE, {})
    ratios = {label: _median(row) / _median(others["LoRA"]) for label, row in others.items() if "step_s" in row}
    return Rates(32, source, stock, {label: ratio * steps["LoRA"] for label, ratio in ratios.items()} | steps)


def _sdxl(folder: Path) -> Rates | None:
    rounds = _read(folder / "sdxl.json").get("rounds")
    if not rounds:
        return None
    stock, lora, flat = (
        statistics.median(_median(row[name]) for row in rounds) for name in ("diffusers", "LoRA", "Flat-LoRA copy")
    )
    return Rates(1, "sdxl.json, images of 1,024 px", stock, {"LoRA": lora, "Flat-LoRA": flat})


def _median(row: Mapping[str, Any]) -> float:
    return statistics.median(row["step_s"])


def runs_of(name: str, layout: cells.Layout) -> dict[str, tuple[Experiment, int]]:
    """{setting: (experiment, seeds)} of a table's cells; columns that show the same runs share them."""
    runs: dict[str, tuple[Experiment, int]] = {}
    for row, value in layout.rows.items():
        for column in () if value.published_only else layout.columns:
            experiment = cells.experiment_of(tuple(cells.cell_overrides(name, layout, row, column)))
            setting, seeds = cells.setting_of(experiment), layout.seeds_of(column)
            runs[setting] = (experiment, max(seeds, runs.get(setting, (None, 0))[1]))
    return runs


def cost_of(runs: Mapping[str, tuple[Experiment, int]], rates: Mapping[str, Rates]) -> Cost:
    """Sums up the runs of a table."""
    total, measured, steps, ours, stock, lacking = 0, 0, 0, 0.0, 0.0, Counter()
    for experiment, seeds in runs.values():
        total += seeds
        count, of_model, method = steps_of(experiment), rates.get(experiment.model.name), method_of(experiment)
        if reason := _unmeasured(experiment, count, of_model, method):
            lacking[reason] += seeds
            continue
        measured += seeds
        steps += seeds * count
        hours = seeds * count * (experiment.optim.batch_size // of_model.batch) / 3600  # of a step of one second
        ours += hours * of_model.steps[method]
        stock += hours * of_model.stock
    return Cost(total, measured, steps, ours, stock, dict(lacking))


def _unmeasured(experiment: Experiment, steps: int | None, rates: Rates | None, method: str) -> str | None:
    """What was not measured of a run; None if all was."""
    model, batch = experiment.model, experiment.optim.batch_size
    if rates is None:
        return model.name
    if model.quantize != "none":
        return f"{model.name} with quantize={model.quantize}"
    if batch % rates.batch:
        return f"{model.name} with batch_size={batch}"
    if method not in rates.steps:
        return f"{model.name} with {method}"
    return f"the number of rows of {experiment.dataset.name}" if steps is None else None


def method_of(experiment: Experiment) -> str:
    """The label of a run's method among those that were measured, or else its settings."""
    peft, rho = experiment.peft.method, experiment.rho.method if experiment.regularized else "off"
    if peft in _LIKE_LORA and rho in _OF_RHO:
        return _OF_RHO[rho]
    if peft in _OF_PEFT and rho == "off":
        return _OF_PEFT[peft]
    return f"peft={peft}" + ("" if rho == "off" else f" rho={rho}")


def steps_of(experiment: Experiment) -> int | None:
    """Optimizer steps of a run, as transformers' Trainer counts them; None if the number of rows is not known."""
    optim, machine, dataset = experiment.optim, experiment.trainer, experiment.dataset
    if machine.max_steps is not None:
        return machine.max_steps
    rows = getattr(dataset, "train_rows", None)
    if rows is None:
        if dataset.name not in TRAIN_ROWS:
            return None
        rows = TRAIN_ROWS[dataset.name] - dataset.validation_rows
    accumulation = optim.batch_size // machine.micro_batch_size
    return math.ceil(optim.epochs * math.ceil(math.ceil(rows / machine.micro_batch_size) / accumulation))


def table_of(costs: Mapping[str, Cost]) -> Table:
    table = Table(title="GPU hours of training, all seeds", title_justify="left")
    for column in ("table", "runs", "measured", "steps", "this suite", "stock, at least", "ratio"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for name, cost in costs.items():
        counts = (str(cost.runs), str(cost.measured))
        if not cost.measured:
            table.add_row(name, *counts, "—", "not measured", "not measured", "—")
            continue
        hours = f"{cost.ours_h:,.1f} h", f"{cost.stock_h:,.1f} h"
        table.add_row(name, *counts, f"{cost.steps:,}", *hours, f"{cost.ours_h / cost.stock_h:.3f}")
    return table
