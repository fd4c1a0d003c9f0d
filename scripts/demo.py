"""`make demo`: the main job on the embedded small model, without a network or a GPU.

Scores SmolLM2-135M zero-shot on generated word problems, then trains LoRA and Flat-LoRA on the same seed through
`run_exp.py`, each in its own process, and prints one table made from the runs' records.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PROJECT = Path(__file__).parents[1]
FOLDER = Path("results") / "flatlora-demo_word_math"
STEPS, TEST_ROWS, SEED = 45, 200, 42
SETTINGS = [
    "wandb.project=flatlora-demo",
    "wandb.mode=disabled",
    "overwrite=true",
    "trainer=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.micro_batch_size=16",
    "optim.lr=2e-3",
    "optim.group_by_length=true",
    "dataset.min_steps=2",
    "dataset.max_steps=2",
    "dataset.max_value=10",
    "dataset.max_answer=60",
    "dataset.train_rows=1000",
    "dataset.validation_rows=0",
    f"dataset.test_rows={TEST_ROWS}",
    "eval.gsm8k.max_new_tokens=128",
    "eval.gsm8k.batch_size=100",
]
RUNS = {"LoRA": ["rho=off"], "Flat-LoRA": ["rho=flat", "rho.sigma=0.05"]}


def main() -> int:
    """Exit code of the demo; non-zero as soon as a part fails."""
    started = time.monotonic()
    console = Console(highlight=False)
    console.print(
        "[bold]Flat-LoRA demo[/]: SmolLM2-135M (a small model) on generated two-step word problems, LoRA and Flat-LoRA "
        "on the same seed. Not a paper's setting: it shows that a run works, repeats, and leaves the backbone alone.\n"
    )
    for part, (name, settings) in enumerate(RUNS.items(), start=1):
        console.print(f"[bold]{part}/3 {name}[/]: train {STEPS} steps, then answer {TEST_ROWS} held-out problems")
        command = [*SETTINGS, *settings, f"seed={SEED}", f"wandb.name={name}"]
        if code := _run([str(PROJECT / "run_exp.py"), *command]):
            return code
    console.print(f"[bold]3/3 zero-shot[/]: the untrained model answers the same {TEST_ROWS} problems")
    folders = {name: FOLDER / name / str(SEED) for name in RUNS}
    zero_shot = FOLDER / "zero-shot"
    shutil.rmtree(PROJECT / zero_shot, ignore_errors=True)
    command = ["HuggingFaceTB/SmolLM2-135M-Instruct", f"rows={folders['LoRA'] / 'test.jsonl'}", f"out={zero_shot}"]
    command += ["max_new_tokens=128", "batch_size=100", "device=cpu"]
    if code := _run(["-m", "eval.gsm8k", *command]):
        return code
    console.print(
        comparison(
            {name: _read(PROJECT / path / "run.json") for name, path in folders.items()},
            _read(PROJECT / zero_shot / "score.json"),
        )
    )
    minutes = (time.monotonic() - started) / 60
    console.print(f"{minutes:.1f} minutes. Records: {FOLDER}/<name>/{SEED}/run.json")
    return 0


def comparison(records: dict[str, dict[str, Any]], zero_shot: dict[str, Any]) -> Table:
    """The demo's table; every number is read from a record."""
    n = zero_shot["n"]
    table = Table(title=f"SmolLM2-135M, {n} held-out problems, exact match", title_justify="left")
    for column in ("", "score", "train loss", "step", "peak memory", "backbone unchanged"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("zero-shot", f"{100 * zero_shot['metrics']['exact_match']:.1f} %", "—", "—", "—", "—")
    for name, record in records.items():
        hashes = record["backbone_sha256"]
        table.add_row(
            name,
            f"{100 * record['metrics']['gsm8k/exact_match']:.1f} %",
            f"{record['metrics']['train_loss']:.3f}",
            f"{record['timing']['step_s_median']:.2f} s",
            f"{record['memory']['peak_rss_gib']:.2f} GiB",
            "yes" if hashes["before"] == hashes["after"] else "NO",
        )
    return table


def _run(arguments: list[str]) -> int:
    return subprocess.run([sys.executable, *arguments], cwd=PROJECT, check=False).returncode


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
