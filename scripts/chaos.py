"""Injects errors into runs of two processes, resumes them, and compares them with an undisturbed run.

    python -m scripts.chaos [--rounds 20] [--seed N] [--disk DIR] [--resize] [trainer=fsdp] [key=value ...]

Each round is a separate run with one error at a random moment: a rank is killed, the whole job is killed, the newest
checkpoint is corrupted while the job is down, or its disk is full for a while (`--disk` names an empty folder on a
small file system, such as a tmpfs, with room for twice the run's folder; without it this error is left out). Then it is
resumed until it ends. Prints the error of each round and whether its adapter equals the undisturbed one; exit code 1
if one does not. With --resize each start has 1, 2 or 4 processes at random, and adapters are equal up to rounding.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from safetensors.torch import load_file

from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.train import checkpoint

PROJECT = Path(__file__).parents[1]

SETTINGS = [
    "trainer=ddp",
    "trainer.gpus=2",
    "trainer.device=cpu",
    "trainer.save_steps=2",
    "trainer.micro_batch_size=2",
    "optim.batch_size=4",
    "rho=flat",
    "dataset.train_rows=48",
    "dataset.validation_rows=4",
    "dataset.test_rows=4",
    "eval=[]",
    "wandb.mode=disabled",
    "wandb.name=run",
]
SIZES = (1, 2, 4)  # numbers of processes with --resize
TOLERANCE = 1e-3  # of the norm of a factor, with --resize
TRIES = 12  # maximum number of starts in a round
PATIENCE_S = 600


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all adapters equal the undisturbed one, else 1; 2 if the disk is too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of errors and moments; printed")
    parser.add_argument("--disk", type=Path, help="an empty folder on a small file system of its own")
    parser.add_argument("--resize", action="store_true", help="start with another number of processes each time")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args(arguments)
    draw, failed = random.Random(options.seed), 0
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = Path(folder)
        changes = [*(["optim.batch_size=8"] if options.resize else []), *options.settings]
        replaced = tuple(f"{word.partition('=')[0]}=" for word in changes)
        settings = [*(word for word in SETTINGS if not word.startswith(replaced)), *changes]
        begun = time.monotonic()
        code, output = Job(settings, root / "whole").end()
        if code:
            print(output[-2000:])
            return 1
        span = time.monotonic() - begun
        if options.disk and (message := _too_small(options.disk, root / "whole")):
            print(message)
            return 2
        print(f"undisturbed: {span:.0f} s", flush=True)
        faults = [kill_a_rank, kill_all, corrupt] + ([fill_the_disk] if options.disk else [])
        for number in range(1, options.rounds + 1):
            fault = faults[(number - 1) % len(faults)]
            round_folder = (options.disk if fault is fill_the_disk else root) / f"round-{number}"
            sizes = SIZES if options.resize else ()
            starts, problem = one_round(settings, round_folder, fault, draw, span, sizes)
            problem = problem or difference(root / "whole", round_folder, TOLERANCE if sizes else 0.0)
            failed += problem is not None
            result = "equal" if problem is None else f"DIFFERS: {problem}"
            print(f"round {number}: {fault.__name__.replace('_', ' ')}, {starts} starts, adapter {result}", flush=True)
            shutil.rmtree(round_folder, ignore_errors=True)
    print(f"{options.rounds} rounds, {failed} failures")
    return 1 if failed else 0


class Job:
    """A started run and its processes."""

    def __init__(self, settings: list[str], place: Path) -> None:
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, "run_exp.py", *settings, f"results_root={place}"],
            cwd=PROJECT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """The training processes."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [child for child in children if "RANK" in child.environ()]
        except psutil.Error:
            return []

    def kill(self) -> None:
        """Kill all processes."""
        for process in [*self.ranks(), psutil.Process(self.process.pid)]:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        """Wait until it ends by itself; returns (exit code, output)."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def wait(self, seconds: float) -> bool:
        """Whether it still runs after this time."""
        try:
            self.process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            return True


def one_round(
    settings: list[str], place: Path, fault, draw: random.Random, span: float, sizes: Sequence[int]
) -> tuple[int, str | None]:
    """Returns (number of starts, why the run has not ended; None if it has).

    Args:
        sizes: numbers of processes to choose from at each start; none keeps that of the settings.
    """

    def resized() -> list[str]:
        if not sizes:
            return settings
        kept = [word for word in settings if not word.startswith("trainer.gpus=")]
        return [*kept, f"trainer.gpus={draw.choice(sizes)}"]

    job = Job(resized(), place)
    if job.wait(draw.uniform(0.3, 1.0) * span):
        fault(job, draw)
    else:
        job.process.communicate()
    for starts in range(2, TRIES):
        if _is_finished(place):
            return starts - 1, None
        code, output = Job([*resized(), "resume=true"], place).end()
        if code and "Traceback" in output:
            return starts, f"a traceback:\n{output[-3000:]}"
    return TRIES, "not finished"


def _too_small(disk: Path, run: Path) -> str | None:
    need = 2 * sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    free = shutil.disk_usage(disk).free
    if free >= need:
        return None
    return (
        f"Invalid --disk={disk}: it has {free >> 20} MiB free, but twice the run's folder is {need >> 20}; use a "
        "larger one."
    )


def kill_a_rank(job: Job, draw: random.Random) -> None:
    """Kill one of the two ranks; the other must end by itself."""
    ranks = job.ranks()
    if ranks:
        draw.choice(ranks).kill()
    job.end()


def kill_all(job: Job, draw: random.Random) -> None:
    job.kill()


def corrupt(job: Job, draw: random.Random) -> None:
    """Kill all, then change a byte of a file of the newest checkpoint, truncate a file, or remove one."""
    job.kill()
    runs = [path.parent for path in job.place.glob("*/*/*/config.yaml")]
    checkpoints = checkpoint.checkpoints(runs[0]) if runs else []
    if not checkpoints:
        return
    path = draw.choice([file for file in sorted(checkpoints[-1].rglob("*")) if file.is_file()])
    data = path.read_bytes()
    way = draw.choice(["change", "cut", "remove"])
    if way == "remove" or not data:
        path.unlink()
    elif way == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        place = draw.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])


def fill_the_disk(job: Job, draw: random.Random) -> None:
    """Fill the disk until the run has failed or ended."""
    ballast = job.place.parent / "ballast"
    with open(ballast, "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass  # full, as intended
    try:
        job.end()
    finally:
        ballast.unlink()


def _is_finished(place: Path) -> bool:
    return any(RunRecord.read(path.parent).is_finished for path in place.glob(f"*/*/*/{RECORD_FILE}"))


def difference(expected: Path, found: Path, tolerance: float) -> str | None:
    """Why the trained adapters of two runs differ; None if no tensor does by more than a share of its norm."""
    paths = [next(place.glob("*/*/*/adapter/adapter_model.safetensors")) for place in (expected, found)]
    wanted, own = map(load_file, paths)
    if wanted.keys() != own.keys():
        return "other tensors"
    for name, tensor in wanted.items():
        if (error := float((own[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))) > tolerance:
            return f"{name} by {error:.1e} of its norm"
    return None


if __name__ == "__main__":
    sys.exit(main())
