"""Kill a training run with SIGKILL at random moments, resume it each time, and compare with an undisturbed run.

    python scripts/kill_resume.py [--kills 3] [--seed N] [key=value ...]

Settings go to both runs. Prints the moments, and whether adapter bytes and metrics.jsonl (less the clock's
tokens_per_s) are equal; exit code 1 when they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parents[1]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments; printed")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    try:
        whole, seconds = root / "whole", time.monotonic()
        _command([*DEFAULTS, *options.settings, f"results_root={whole}"]).wait()
        seconds = time.monotonic() - seconds
        killed = root / "killed"
        kills = kill_and_resume([*DEFAULTS, *options.settings, f"results_root={killed}"], options, seconds)
        return report(_only_run(whole), _only_run(killed), kills)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def kill_and_resume(settings: list[str], options: argparse.Namespace, seconds: float) -> int:
    """Start the run, kill it at `options.kills` random moments, let the last one end; the number of real kills."""
    generator, kills = random.Random(options.seed), 0
    print(f"undisturbed run: {seconds:.0f} s; moments drawn from seed {options.seed}")
    for number in range(options.kills):
        process = _command([*settings, "resume=true"])
        moment = generator.uniform(0.3, 0.9) * seconds
        try:
            process.wait(timeout=moment)
            print(f"  {number + 1}. ended by itself before {moment:.1f} s")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            found = sorted(path.name for path in Path(settings[-1].partition("=")[2]).glob("*/*/*/checkpoint-*"))
            print(f"  {number + 1}. SIGKILL after {moment:.1f} s; there then: {', '.join(found) or 'no checkpoint'}")
    if code := _command([*settings, "resume=true"]).wait():
        raise SystemExit(f"the resumed run ended with exit code {code}")
    return kills


def report(whole: Path, killed: Path, kills: int) -> int:
    """Print the comparison; 0 when everything is equal."""
    adapters = [_sha256(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, killed)]
    metrics = [_metrics(folder) for folder in (whole, killed)]
    same_adapter, same_metrics = adapters[0] == adapters[1], metrics[0] == metrics[1]
    print(f"kills: {kills}")
    print(f"adapter bytes:  {'equal' if same_adapter else 'DIFFERENT'} ({adapters[0][:16]}… {adapters[1][:16]}…)")
    print(f"metrics.jsonl:  {'equal' if same_metrics else 'DIFFERENT'} ({len(metrics[0])} and {len(metrics[1])} rows)")
    return 0 if same_adapter and same_metrics else 1


def _command(settings: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "run_exp.py"), *settings], cwd=PROJECT, stderr=subprocess.DEVNULL
    )


def _only_run(root: Path) -> Path:
    return next(path.parent for path in root.glob("*/*/*/run.json"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
