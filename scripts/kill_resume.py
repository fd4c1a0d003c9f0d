"""Kills a training run with SIGKILL at random moments, resumes it each time, and compares it with an undisturbed run.

    python -m scripts.kill_resume [--kills 3] [--seed N] [key=value ...]

Settings apply to both runs. Prints the moments, and whether adapter bytes and metrics.jsonl (without tokens_per_s,
which depends on the clock) are equal; exit code 1 if they are not, or if a kill came too late.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.forked import ForkedRun, start_server

DEFAULTS = [
    "rho=flat",
    "trainer.max_steps=12",
    "trainer.save_steps=2",
    "optim.batch_size=4",
    "trainer.micro_batch_size=2",
    "peft.lora_dropout=0.1",
    "dataset.train_rows=36",
    "dataset.validation_rows=4",
    "dataset.test_rows=4",
    "eval=[]",
    "wandb.mode=disabled",
    "wandb.name=run",
]


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the moments; printed")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args(words)
    root = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    try:
        start_server()  # first, because the moments depend on the startup time
        whole, killed = root / "whole", root / "killed"
        startup_s, total_s = undisturbed([*DEFAULTS, *options.settings, f"results_root={whole}"], whole)
        print(f"undisturbed run: {total_s:.0f} s, {startup_s:.0f} s of it before the first step is recorded")
        moments = draw_moments(len(_metrics(_only_run(whole))), startup_s, total_s, options.kills, options.seed)
        listed = ", ".join(f"{delay_s:.2f} s after row {row}" for row, delay_s in moments)
        print(f"moments drawn from seed {options.seed}: {listed}")
        kills = kill_and_resume([*DEFAULTS, *options.settings, f"results_root={killed}"], killed, moments)
        return report(_only_run(whole), _only_run(killed), kills, options.kills)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def draw_moments(rows: int, startup_s: float, total_s: float, kills: int, seed: int) -> list[tuple[int, float]]:
    """(row of metrics.jsonl, seconds after it) of each kill, each in its own share of the rows.

    Rows instead of seconds since the start, because a faster run might have ended by then.
    """
    generator, step_s = random.Random(seed), (total_s - startup_s) / rows
    moments = []
    for number in range(kills):
        first, last = number * rows // kills, max(number * rows // kills, (number + 1) * rows // kills - 3)
        row = generator.randint(first, last)
        moments.append((row, generator.uniform(0.3, 0.9) * startup_s if row == 0 else generator.uniform(0, step_s)))
    return moments


def undisturbed(settings: list[str], root: Path) -> tuple[float, float]:
    """Run to the end; returns seconds until the first row of metrics.jsonl, and in total."""
    started, startup_s = time.monotonic(), 0.0
    process = _command(settings, root)
    while process.poll() is None:
        if not startup_s and list(root.glob("*/*/*/metrics.jsonl")):
            startup_s = time.monotonic() - started
        time.sleep(0.2)
    _raise_failure(process)
    return startup_s, time.monotonic() - started


def kill_and_resume(settings: list[str], root: Path, moments: list[tuple[int, float]]) -> int:
    """Start or resume the run and kill it at each moment, then let it end; returns the number of kills."""
    kills = 0
    for number, (row, delay_s) in enumerate(moments, start=1):
        process = _command([*settings, "resume=true"], root)
        while process.poll() is None and _rows_written(root) < row:
            time.sleep(0.01)
        if process.wait(delay_s) is not None:
            print(f"  {number}. ended by itself before row {row} and {delay_s:.2f} s")
            _raise_failure(process)
        else:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            checkpoints = sorted(path.name for path in root.glob("*/*/*/checkpoint-*"))
            checkpoints = ", ".join(checkpoints) or "no checkpoint"
            print(f"  {number}. SIGKILL {delay_s:.2f} s after row {row}; checkpoints at that time: {checkpoints}")
    process = _command([*settings, "resume=true"], root)
    process.wait()
    _raise_failure(process)
    return kills


def report(whole: Path, killed: Path, kills: int, wanted: int) -> int:
    """Print the comparison; returns 0 if everything is equal and every kill hit the run."""
    adapters = [_sha256(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed)]
    metrics = [_metrics(folder) for folder in (whole, killed)]
    same_adapter, same_metrics = adapters[0] == adapters[1], metrics[0] == metrics[1]
    print(f"kills: {kills}" + ("" if kills == wanted else f" of {wanted}: too few; run it again"))
    print(f"adapter bytes:  {'equal' if same_adapter else 'DIFFERENT'} ({adapters[0][:16]}… {adapters[1][:16]}…)")
    print(f"metrics.jsonl:  {'equal' if same_metrics else 'DIFFERENT'} ({len(metrics[0])} and {len(metrics[1])} rows)")
    return 0 if same_adapter and same_metrics and kills == wanted else 1


def _command(settings: list[str], root: Path) -> ForkedRun:
    return ForkedRun(settings, root.with_suffix(".log"))


def _raise_failure(process: ForkedRun) -> None:
    if process.poll():
        tail = process.log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"the run ended with exit code {process.poll()}:\n{tail}")


def _rows_written(root: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in root.glob("*/*/*/metrics.jsonl"))


def _only_run(root: Path) -> Path:
    return next(path.parent for path in root.glob("*/*/*/run.json"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
