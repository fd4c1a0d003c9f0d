"""`make demo`: trains and scores the embedded small model, without a network or a GPU.

Trains LoRA and Flat-LoRA on generated word problems with the same seed through `run_exp.py`, scores both and the
untrained model on the same held-out problems, and prints one table from the runs' records. The first line says how long
this takes on this machine, estimated from measured steps.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import run_exp
from eval import command
from flatlora import methods
from flatlora.experiment.run import EXIT_CONFIG, EXIT_FAILED
from flatlora.fused import acceleration
from flatlora.models import loading
from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.utils import precision
from flatlora.utils.console import quiet_libraries, report_errors, report_failure
from flatlora.utils.errors import ConfigError
from flatlora.utils.records import read_record
from scripts import bench

PROJECT = Path(__file__).parents[1]

FOLDER = Path("results") / "flatlora-demo_word_math"
STEPS, TEST_ROWS, SEED = 10, 200, 42
ANSWERS = ["max_new_tokens=32", "batch_size=50"]  # solutions have at most 31 tokens and an end of sequence
ANSWERING_STEPS = 30  # answering 3 × 200 problems takes as long as this number of training steps
SETTINGS = [
    "wandb.project=flatlora-demo",
    "wandb.mode=disabled",
    "overwrite=true",
    "trainer=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.micro_batch_size=16",
    "optim.lr=4e-3",
    "optim.warmup_ratio=0",
    "optim.group_by_length=true",
    "dataset.min_steps=2",
    "dataset.max_steps=2",
    "dataset.max_value=6",
    "dataset.max_answer=30",
    "dataset.train_rows=1000",
    "dataset.validation_rows=0",
    f"dataset.test_rows={TEST_ROWS}",
    *(f"eval.gsm8k.{setting}" for setting in ANSWERS),
]
RUNS = {"LoRA": ["rho=off"], "Flat-LoRA": ["rho=flat", "rho.sigma=0.05"]}


def main() -> int:
    """Returns the exit code; the demo stops at the first part that fails."""
    started = time.monotonic()
    os.chdir(PROJECT)
    quiet_libraries()
    console = Console(highlight=False)
    try:
        with console.status("Measuring a step of training on this machine"):
            seconds, how = measured_steps()
    except ConfigError as error:
        report_errors(error)
        return EXIT_CONFIG
    except OSError as error:  # of a cache, such as a full disk
        report_failure(error)
        return EXIT_FAILED
    minutes = (time.monotonic() - started) / 60 + expected_minutes(seconds)
    console.print(f"[bold]Flat-LoRA demo[/]: about {minutes:.0f} minutes on this machine ({how}).")
    console.print(
        "SmolLM2-135M (a small model) on generated two-step word problems, LoRA and Flat-LoRA with the same seed. This "
        "is not a paper's setting: it shows that a run works, repeats, and leaves the backbone unchanged.\n"
    )
    for part, (name, settings) in enumerate(RUNS.items(), start=1):
        console.print(f"[bold]{part}/3 {name}[/]: train {STEPS} steps, then answer {TEST_ROWS} held-out problems")
        if code := run_exp.main([*SETTINGS, *settings, f"seed={SEED}", f"wandb.name={name}"]):
            return code
    console.print(f"[bold]3/3 zero-shot[/]: the untrained model answers the same {TEST_ROWS} problems")
    folders = {name: FOLDER / name / str(SEED) for name in RUNS}
    zero_shot = FOLDER / "zero-shot"
    shutil.rmtree(zero_shot, ignore_errors=True)
    words = ["HuggingFaceTB/SmolLM2-135M-Instruct", f"rows={folders['LoRA'] / 'test.jsonl'}", f"out={zero_shot}"]
    if code := command.main("gsm8k", [*words, *ANSWERS, "device=cpu"]):
        return code
    records = {name: RunRecord.read(path) for name, path in folders.items()}
    console.print(comparison(records, read_record(zero_shot / "score.json")))
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes. Records: {FOLDER}/<name>/{SEED}/{RECORD_FILE}")
    return 0


def measured_steps() -> tuple[dict[str, float], str]:
    """Seconds of an optimizer step of LoRA and of Flat-LoRA, and a description of how this CPU computes them."""
    experiment = run_exp.experiment_of([*SETTINGS, *RUNS["Flat-LoRA"]])
    device = torch.device("cpu")
    inputs = run_exp.prepare(experiment, device)
    backbone = loading.load_backbone(experiment.model, device)
    model = methods.ADAPTERS["lora"].apply(backbone, experiment.peft, methods.Start(SEED)).train()
    acceleration.accelerate(model, device)
    rows = inputs.rows.train
    middle = sorted(range(len(rows)), key=rows.lengths.__getitem__)[len(rows) // 2 :][:16]  # rows of median length
    two, batch = (inputs.collate([rows[index] for index in some]) for some in (middle[:2], middle))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6)
    perturbation = bench.new_perturbation(model, "copy", seed=SEED)  # compiles the noise kernels
    before = perturbation.seconds
    bench.optimizer_step(model, two, optimizer, perturbation, 1)
    noise = perturbation.seconds - before
    perturbation.close()
    begun = time.perf_counter()
    bench.optimizer_step(model, batch, optimizer, None, 1)
    step = time.perf_counter() - begun
    seconds = {"LoRA": step, "Flat-LoRA": step + noise}
    chosen = precision.choose_precision(experiment.trainer.autocast, experiment.model.dtype, device)
    name = str(chosen.products).removeprefix("torch.")
    return seconds, f"{seconds['LoRA']:.1f} s a step, products in {name}"


def expected_minutes(seconds: dict[str, float]) -> float:
    """Estimated minutes of all training and answering, from measured seconds per step."""
    return (STEPS * (seconds["LoRA"] + seconds["Flat-LoRA"]) + ANSWERING_STEPS * seconds["LoRA"]) / 60


def comparison(records: dict[str, RunRecord], zero_shot: dict[str, Any]) -> Table:
    """The demo's table; every number is read from a record."""
    n = zero_shot["n"]
    table = Table(title=f"SmolLM2-135M, {n} held-out problems, exact match", title_justify="left")
    for column in ("", "score", "train loss", "step", "peak memory", "backbone unchanged"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("zero-shot", f"{100 * zero_shot['metrics']['exact_match']:.1f} %", "—", "—", "—", "—")
    for name, record in records.items():
        table.add_row(
            name,
            f"{100 * record.metrics['gsm8k/exact_match']:.1f} %",
            f"{record.metrics['train_loss']:.3f}",
            f"{record.timing.step_s_median:.2f} s",
            f"{record.memory.peak_rss_gib:.2f} GiB",
            "yes" if record.backbone_sha256.unchanged else "NO",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
