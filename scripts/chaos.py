"""Hurt a run of two processes again and again, go on with it each time, and compare with an undisturbed run.

    python -m scripts.chaos [--rounds 20] [--seed N] [--disk DIR] [key=value ...]

Each round is a run of its own that is hurt at a random moment: a rank is killed, the whole job is killed, the newest
checkpoint is corrupted while the job is down, or its disk is full for a while (`--disk` names an empty folder on a
small file system, such as a tmpfs, with room for twice the run's folder; without it that harm is left out). Then it is
resumed until it ends. Prints the harm of each round and whether its adapter equals the undisturbed one; exit code 1
when one does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

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
TRIES = 12  # starts of a round before it is given up
PATIENCE_S = 600


def main(words: list[str] | None = None) -> int:
    """Exit code: 0 all rounds ended with the undisturbed adapter, 1 one did not, 2 a disk that is too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of harms and moments; printed")
    parser.add_argument("--disk", type=Path, help="an empty folder on a small file system of its own")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args(words)
    draw, failed = random.Random(options.seed), 0
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = Path(folder)
        settings = [*SETTINGS, *options.settings]
        begun = time.monotonic()
        code, told = Job(settings, root / "whole").end()
        if code:
            print(told[-2000:])
            return 1
        span, wanted = time.monotonic() - begun, adapter_sha256(root / "whole")
        if options.disk and (message := _too_small(options.disk, root / "whole")):
            print(message)
            return 2
        print(f"undisturbed: {span:.0f} s, adapter {wanted[:12]}", flush=True)
        harms = [kill_a_rank, kill_all, corrupt] + ([fill_the_disk] if options.disk else [])
        for number in range(1, options.rounds + 1):
            harm = harms[(number - 1) % len(harms)]
            place = (options.disk if harm is fill_the_disk else root) / f"round-{number}"
            starts, found = one_round(settings, place, harm, draw, span)
            same = found == wanted
            failed += not same
            result = "equal" if same else f"DIFFERS: {found}"
            print(f"round {number}: {harm.__name__.replace('_', ' ')}, {starts} starts, adapter {result}", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    print(f"{options.rounds} rounds, {failed} failures")
    return 1 if failed else 0


class Job:
    """A started run, with all processes that it starts."""

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
        """The processes that train."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
            return [one for one in found if "RANK" in one.environ()]
        except psutil.Error:
            return []

    def kill(self) -> None:
        """All of them, at once."""
        for one in [*self.ranks(), psutil.Process(self.process.pid)]:
            try:
                one.kill()
            except psutil.Error:
                continue
        self.process.communicate()

    def end(self) -> tuple[int, str]:
        """(exit code, what it said), once it has ended by itself."""
        told, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, told

    def wait(self, seconds: float) -> bool:
        """Whether it still runs so much later."""
        try:
            self.process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            return True


def one_round(settings: list[str], place: Path, harm, draw: random.Random, span: float) -> tuple[int, str]:
    """(number of starts, hash of the adapter at the end, or why there is none)."""
    job = Job(settings, place)
    if job.wait(draw.uniform(0.3, 1.0) * span):
        harm(job, draw)
    else:
        job.process.communicate()
    for starts in range(2, TRIES):
        if _is_finished(place):
            return starts - 1, adapter_sha256(place)
        code, told = Job([*settings, "resume=true"], place).end()
        if code and "Traceback" in told:
            return starts, f"a traceback:\n{told[-3000:]}"
    return TRIES, "not finished"


def _too_small(disk: Path, run: Path) -> str | None:
    need = 2 * sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    free = shutil.disk_usage(disk).free
    if free >= need:
        return None
    return (
        f"Invalid --disk={disk}: {free >> 20} MiB are free there, and twice the run's folder is {need >> 20}; take a "
        "larger one."
    )


def kill_a_rank(job: Job, draw: random.Random) -> None:
    """One of the two; the other must end by itself."""
    ranks = job.ranks()
    if ranks:
        draw.choice(ranks).kill()
    job.end()


def kill_all(job: Job, draw: random.Random) -> None:
    job.kill()


def corrupt(job: Job, draw: random.Random) -> None:
    """Kill all, then change a byte of a file of the newest checkpoint, or cut one, or take one away."""
    job.kill()
    runs = [path.parent for path in job.place.glob("*/*/*/config.yaml")]
    found = checkpoint.checkpoints(runs[0]) if runs else []
    if not found:
        return
    path = draw.choice([one for one in sorted(found[-1].rglob("*")) if one.is_file()])
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
    """Leave no room until the run has failed for it, or ended."""
    ballast = job.place.parent / "ballast"
    with open(ballast, "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass  # full, as it should be
    try:
        job.end()
    finally:
        ballast.unlink()


def _is_finished(place: Path) -> bool:
    records = list(place.glob("*/*/*/run.json"))
    return bool(records) and json.loads(records[0].read_text())["status"] == "finished"


def adapter_sha256(place: Path) -> str:
    """Hash of the trained adapter's bytes."""
    (path,) = place.glob("*/*/*/adapter/adapter_model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
