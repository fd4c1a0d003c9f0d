"""`python -m scripts.bench start`: seconds from the command to the first optimizer step, and where they go.

Flat-LoRA on Llama-2-7B's shape with random weights in a temporary folder, whose files are in the page cache because
they were just written. Two runs in fresh processes: the first finds no compiled kernels and no prepared rows, the
second those of the first. Prints each phase, and how many kernels Triton and numba compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flatlora.runs import environment
from flatlora.utils import files
from scripts.bench_gpu import SHAPE
from scripts.bench_processes import PROJECT, write_model, write_rows

SHAPES = {  # layers, changes of Llama-2-7B's shape, settings of the run
    "llama-2-7b": (32, {}, ["dataset.max_length=1024", "optim.batch_size=32", "trainer.micro_batch_size=2"]),
    "small": (
        2,
        {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4},
        ["dataset.max_length=64", "optim.batch_size=2", "trainer.micro_batch_size=1"],
    ),
}
STEPS = 3
console = Console(highlight=False, width=120)


def run(shape: str, *, out: Path) -> int:
    """Measure, print, and write `start.json` (`start_SHAPE.json` for another shape than Llama-2-7B's) into `out`."""
    layers, changes, words = SHAPES[shape]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root / "model", layers, device.type, **changes)
        write_rows(root / "data", 32 * STEPS)
        runs = [one_run(root, name, words) for name in ("first", "second")]
    report = {
        "command": f"python -m scripts.bench start --shape {shape}",
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "model": {**SHAPE, **changes, "num_hidden_layers": layers},
        "words": words,
        "runs": runs,
    }
    path = out / ("start.json" if shape == "llama-2-7b" else f"start_{shape}.json")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(path, report)
    console.print(table_of(runs, shape))
    console.print(f"written: {path}", soft_wrap=True)
    return 0


def one_run(root: Path, name: str, words: list[str]) -> dict[str, Any]:
    """Runs `STEPS` steps in a fresh process; returns seconds by phase and the number of files that were compiled."""
    caches = {"FLATLORA_CACHE": "cache", "TRITON_CACHE_DIR": "triton", "NUMBA_CACHE_DIR": "numba"}
    env = os.environ | {variable: str(root / folder) for variable, folder in caches.items()}
    command = ["model=llama", f"model.hub_id={root / 'model'}", "dataset=gsm8k", f"data_root={root / 'data'}"]
    command += [f"results_root={root / name}", "wandb.mode=disabled", "wandb.name=run", "dataset.validation_rows=0"]
    command += ["eval=[]", "rho=flat", "rho.sigma=0.05", f"trainer.max_steps={STEPS}", *words]
    before, times = compiled(root), root / f"{name}.json"
    started = time.time()
    script = [sys.executable, "-m", "scripts.start_phases", str(times), str(started)]
    subprocess.run([*script, *command], cwd=PROJECT, env=env, check=True)
    measured = json.loads(times.read_bytes())
    new = {kind: count - before[kind] for kind, count in compiled(root).items()}
    return {"seconds": seconds_of(measured["phases"], measured["ended"]), "compiled": new}


def compiled(root: Path) -> dict[str, int]:
    """Numbers of kernels in the caches: of Triton's machine code, and of functions with numba's."""
    patterns = {"triton": ("*.cubin", "*.hsaco"), "numba": ("*.nbc",)}
    return {kind: sum(len(list((root / kind).rglob(p))) for p in every) for kind, every in patterns.items()}


def seconds_of(phases: dict[str, list[list[float]]], ended: float) -> dict[str, float]:
    """Seconds of each phase; those up to the first step follow one another and add up to "to the first step"."""
    first = {name: calls[0] for name, calls in phases.items()}
    hashed, files_hash = first["hash of the backbone"], first["hash of the files"]
    hashed_after = phases["hash of the backbone"][-1]
    ends = {
        "imports": first["imports"][1],
        "configuration": first["configuration"][1],
        "data and checks": first["data and checks"][1],
        "folder and record": first["weights"][0],
        "weights to the device": first["weights"][1],
        "adapter and kernels": hashed[0],
        "hash of the backbone": hashed[1],
        "trainer": first["step begins"][0],
        "first step": first["step ends"][1],
    }
    seconds = {name: end - begin for (name, end), begin in zip(ends.items(), [0.0, *ends.values()], strict=False)}
    seconds |= {
        "to the first step": ends["first step"],
        "hash of the files, beside the others": files_hash[1] - files_hash[0],
        "hash after training": hashed_after[1] - hashed_after[0],
        "whole run": ended,
    }
    return {name: round(value, 3) for name, value in seconds.items()}


def table_of(runs: list[dict[str, Any]], shape: str) -> Table:
    """The table of phases, with a column for each run."""
    table = Table(title=f"seconds from the command to the first step, {shape}", title_justify="left")
    for column in ("", "first run", "second run"):
        table.add_column(column, justify="right" if column else "left")
    for name in runs[0]["seconds"]:
        table.add_row(
            name, *(f"{each['seconds'][name]:.2f}" for each in runs), end_section=name in ("first step", "whole run")
        )
    for kind in runs[0]["compiled"]:
        table.add_row(f"compiled by {kind}", *(str(each["compiled"][kind]) for each in runs))
    return table
