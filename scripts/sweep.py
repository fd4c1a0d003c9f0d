"""Prints the status of a sweep, or the file of a run on several nodes of a cluster.

    python -m scripts.sweep status [-m] OVERRIDES …        the overrides of run_exp.py
    python -m scripts.sweep sbatch [--nodes 2] [--gpus 8] [--time 24:00:00] [--partition P] [--python PATH] OVERRIDES …
    python -m scripts.sweep kubernetes --image IMAGE --claim VOLUME [--nodes 2] [--gpus 8] OVERRIDES …

status  one row per run: done, running, interrupted, failed (with the reason) or missing; progress, and time left.
        The same sweep with resume=true continues those that are not done. Exit code 0 if all are done.
sbatch  prints a file for `sbatch`: torchrun on every node with one rendezvous, and SIGTERM two minutes before the end.
        An interrupted run is queued again and continues from its checkpoint.
kubernetes  prints the manifest of a Job for `kubectl apply -f -`, with a pod for each node. One that is evicted has two
        minutes for a checkpoint, and is created anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatlora.config.experiment import Experiment
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.run_folder import RunFolder
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError, reason_of
from scripts.cluster_files import ClusterRun, experiments, kubernetes_manifest, sbatch_file


class State(NamedTuple):
    """The state of one run."""

    name: str
    share: float | None  # of its training that is done
    seconds_left: float | None
    reason: str


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all runs are done (or the file is printed), 1 if some are not, 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status")
    status.add_argument("-m", "--multirun", action="store_true", help="accepted as in run_exp.py; has no effect")
    sbatch, kubernetes = commands.add_parser("sbatch"), commands.add_parser("kubernetes")
    for command in (sbatch, kubernetes):
        command.add_argument("--nodes", type=int, default=1)
        command.add_argument("--gpus", type=int, default=8, help="per node")
    sbatch.add_argument("--time", default="24:00:00")
    sbatch.add_argument("--partition")
    sbatch.add_argument("--python", default=sys.executable)
    kubernetes.add_argument("--image", required=True, help="built from the Dockerfile")
    kubernetes.add_argument("--claim", required=True, help="PersistentVolumeClaim that all pods can write to")
    options, rest = parser.parse_known_args(words)
    quiet_libraries()
    try:
        if options.command == "status":
            return print_status(rest)
        run = ClusterRun.of(rest, options.nodes, options.gpus)
        if options.command == "sbatch":
            print(sbatch_file(run, options.time, options.partition, options.python))
        else:
            print(kubernetes_manifest(run, options.image, options.claim), end="")
        return 0
    except ConfigError as error:
        report_errors(error)
        return 2


def print_status(words: Sequence[str]) -> int:
    folders = [(RunFolder.of(experiment), experiment) for experiment in experiments(words)]
    parent = Path(os.path.commonpath([folder.path.parent.parent for folder, _ in folders]))
    table = Table(title_justify="left")
    for column in ("state", "run", "trained", "time left", "why"):
        justify = "right" if column in ("trained", "time left") else "left"
        table.add_column(column, justify=justify, no_wrap=column == "state", overflow="fold")
    states = []
    for folder, experiment in folders:
        state = state_of(folder, experiment)
        states.append(state.name)
        share = "—" if state.share is None else f"{state.share:.0%}"
        left = "—" if state.seconds_left is None else _duration(state.seconds_left)
        table.add_row(state.name, Text(str(folder.path.relative_to(parent))), share, left, Text(state.reason))
    table.title = f"Sweep: {states.count('done')} of {len(states)} done, under {parent}"
    printer = Console(highlight=False)
    (printer if printer.is_terminal else Console(highlight=False, width=170)).print(table)
    return 0 if set(states) == {"done"} else 1


def state_of(folder: RunFolder, experiment: Experiment) -> State:
    """The state of one run, from its files."""
    if not folder.is_run:
        return State("missing", None, None, "")
    running = folder.in_use
    try:
        record = folder.record
        share = _share(folder.path, experiment)
    except (ConfigError, OSError, KeyError, TypeError) as error:
        return State("failed", None, None, f"a record is broken: {reason_of(error)}")
    if running:
        begun = (folder.path / "config.yaml").lstat().st_mtime
        spent = time.time() - begun
        return State("running", share, spent / share - spent if share else None, "")
    if record is None:
        return State("interrupted", share, None, "it was killed: there is no record")
    if record.is_finished:
        return State("done", 1.0, None, "")
    return State(record.status, share, None, record.error or "")


def _share(path: Path, experiment: Experiment) -> float:
    rows = MetricsLog(path / "metrics.jsonl").rows()
    if not rows:
        return 0.0
    if experiment.trainer.max_steps is not None:
        return min(1.0, rows[-1]["step"] / experiment.trainer.max_steps)
    return min(1.0, rows[-1]["epoch"] / experiment.optim.epochs)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


if __name__ == "__main__":
    sys.exit(main())
