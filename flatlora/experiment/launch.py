"""Entry point: runs one experiment, a sweep or a Hydra command from the command line, and returns an exit code."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatlora.config.experiment import Experiment, parse
from flatlora.experiment import commandline
from flatlora.experiment.run import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, run
from flatlora.experiment.suite import Suite
from flatlora.inputs.rows import gather
from flatlora.runs.record import Memory, RunRecord, Timing
from flatlora.runs.run_folder import RunFolder
from flatlora.train import distributed
from flatlora.utils import console
from flatlora.utils.errors import ConfigError
from flatlora.utils.masking import masked


def main(suite: Suite, words: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0: success; 1: a run failed; 2: invalid configuration; 75: preempted; 130: interrupted.
    """
    words = list(sys.argv[1:] if words is None else words)
    console.quiet_libraries()
    if not os.environ.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}:
        # Micro-batches of joined rows differ in size: blocks of fixed sizes would reserve several times their memory.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    try:
        words = [word for word in words if not word.startswith("--local_rank")]  # deepspeed's launcher adds it
        flags, words = commandline.split_flags(words)
        (flags, own), (settings, notes) = gather(
            lambda: commandline.read_flags(flags), lambda: commandline.rewrite(words)
        )
        if "--hydra-help" in flags:
            print(commandline.FLAGS_HELP)
            return 0
        sweep, settings = "--multirun" in flags, [*own, *settings]
        if sweep:
            settings, more_notes = commandline.name_jobs(settings)
            notes += more_notes
        for note in notes:
            console.console.print(f"rewritten: {note}", markup=False, soft_wrap=True)
        if flags and not sweep:
            shows = {flag.partition("=")[0] for flag in flags} & {"--cfg", "--info", "--help", "--version"}
            return (_show if shows else _hand_to_hydra)(suite, flags, settings)
        jobs = commandline.expand_sweep(settings) if sweep else [settings]
        experiments = experiments_of(suite, jobs)
        if sweep and not all(experiment.dry_run or experiment.plan for experiment in experiments):
            return run_sweep(suite, flags, settings, experiments)
        return max(run(suite, experiment, job) for experiment, job in zip(experiments, jobs, strict=True))
    except ConfigError as error:
        if distributed.is_main_process():
            console.report_errors(error)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        console.console.print("Interrupted before the run began: nothing was written.")
        return EXIT_INTERRUPTED
    except OSError as error:  # of a cache or the run's folder, such as a full or read-only disk
        console.report_failure(error)
        return EXIT_FAILED
    except RuntimeError as raised:
        if (error := distributed.named_loss(raised)) is raised:
            raise
        console.report_failure(error)  # another process was lost before the run began
        return EXIT_FAILED


def run_sweep(suite: Suite, flags: Sequence[str], settings: Sequence[str], experiments: Sequence[Experiment]) -> int:
    """Launches the jobs with Hydra, then prints a summary. A failed job does not stop the others.

    Raises:
        ConfigError: the folder of a job cannot be used; no job was started.
    """
    folders = [RunFolder.of(experiment) for experiment in experiments]
    errors, before = [], []
    for experiment, folder in zip(experiments, folders, strict=True):
        try:
            before.append((folder.is_finished(experiment), folder.record))
        except ConfigError as error:
            errors += error.errors
    if errors:
        raise ConfigError(errors)
    for folder, (finished, _) in zip(folders, before, strict=True):
        if not finished and distributed.is_main_process():
            folder.check_writable()  # before Hydra creates folders there; only the first error is reported
    try:
        _hand_to_hydra(suite, flags, settings)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
        console.console.print("Sweep interrupted: the same command with resume=true does what is left.")
    if not distributed.is_main_process():
        return 0  # only the main process prints the summary
    states, jobs = [], []
    for folder, (finished, old) in zip(folders, before, strict=True):
        try:
            record = folder.record
        except ConfigError as error:  # a broken record does not hide the others
            console.report_errors(error)
            states.append("broken record")
            jobs.append((states[-1], folder.path, None))
            continue
        is_current = record is not None and (finished or record != old)  # an old record is not of this job
        states.append(record.status if is_current else "not run")
        jobs.append((states[-1], folder.path, record if is_current else None))
    _print_sweep(f"Sweep: {states.count('finished')} of {len(folders)} finished", jobs)
    if interrupted:
        return EXIT_INTERRUPTED
    return 0 if set(states) == {"finished"} else EXIT_FAILED


def _print_sweep(title: str, jobs: Sequence[tuple[str, Path, RunRecord | None]]) -> None:
    """Prints a table with one row per job, (state, folder, record), to standard output."""
    parent = Path(os.path.commonpath([folder.parent.parent for _, folder, _ in jobs]))
    table = Table(title=Text(f"{title}, under {parent}"), title_justify="left")
    table.add_column("state", no_wrap=True)
    table.add_column("run", overflow="fold")
    for column in ("first loss", "last losses", "score", "step", "peak memory", "backbone"):
        table.add_column(column, justify="right", no_wrap=True)
    for state, folder, record in jobs:
        cells = _sweep_cells(record) if record else ["—"] * 6
        table.add_row(state, Text(str(folder.relative_to(parent))), *cells)
    printer = Console(highlight=False)
    # rich assumes 80 columns for a file or a pipe.
    (printer if printer.is_terminal else Console(highlight=False, width=150)).print(table)


def _sweep_cells(record: RunRecord) -> list[str]:
    metrics, hashes = record.metrics, record.backbone_sha256
    timing, memory = record.timing or Timing(), record.memory or Memory()
    scores = [value for name, value in metrics.items() if "/" in name and not name.endswith("/n")]  # the first is shown
    numbers = [
        (metrics.get("first_loss"), "{:.3f}"),
        (metrics.get("train_loss"), "{:.3f}"),
        (scores[0] if scores else None, "{:.3f}"),
        (timing.step_s_median, "{:.2f} s"),
        (memory.peak_gpu_gib or memory.peak_rss_gib, "{:.2f} GiB"),
    ]
    backbone = "trained" if hashes.before is None else "unchanged"
    if not hashes.unchanged:
        backbone = "CHANGED" if hashes.after else "—"
    return [text.format(value) if value is not None else "—" for value, text in numbers] + [backbone]


def experiment_of(suite: Suite, settings: Sequence[str]) -> Experiment:
    """Returns the typed experiment of canonical command-line settings.

    Raises:
        ConfigError: see `parse`; or optim.epochs is set on the command line and trainer.max_steps ends the run. Epochs
            from an option file may be cut short by max_steps.
    """
    experiment = parse(commandline.compose_config(suite.conf_dir, settings), suite)
    steps = experiment.trainer.max_steps
    if steps is not None and any(word.lstrip("+").startswith("optim.epochs=") for word in settings):
        message = (
            f"Invalid optim.epochs={experiment.optim.epochs:g} with trainer.max_steps={steps}: the run ends after "
            "max_steps, however many epochs that is; leave one of them out, or set trainer.max_steps=null."
        )
        raise ConfigError([message])
    return experiment


def experiments_of(suite: Suite, jobs: Sequence[Sequence[str]]) -> list[Experiment]:
    """Returns `experiment_of` for each job of a sweep.

    Raises:
        ConfigError: with the errors of all jobs; or two jobs have the same folder.
    """
    experiments, errors = [], []
    with commandline.composed_once():
        for job in jobs:
            try:
                experiments.append(experiment_of(suite, job))
            except ConfigError as error:
                errors += error.errors
    folders = [RunFolder.of(experiment).path for experiment in experiments]
    errors += [
        f"Two jobs of the sweep would write to {folder}: drop the value that is swept twice, or let wandb.name or seed "
        "differ."
        for folder in sorted({folder for folder in folders if folders.count(folder) > 1})
    ]
    if errors:
        raise ConfigError(errors)
    return experiments


def _show(suite: Suite, flags: Sequence[str], settings: Sequence[str]) -> int:
    """Prints what Hydra shows for --help, --cfg job and the like, with passwords masked; returns the exit code."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            return _hand_to_hydra(suite, flags, settings)
    finally:
        print(masked(shown.getvalue()), end="")


def _hand_to_hydra(suite: Suite, flags: Sequence[str], settings: Sequence[str]) -> int:
    """Runs Hydra with one job or a sweep; returns the highest exit code of the jobs in this process."""
    sys.argv = [sys.argv[0], *flags, *commandline.force_add(settings)]
    if any(flag.startswith("--info") for flag in flags):  # Hydra logs it to the root logger with its own handler
        logging.getLogger().handlers.clear()
    exit_codes: list[int] = []  # Hydra discards the return value of a job

    @hydra.main(config_path=str(suite.conf_dir), config_name="config", version_base="1.3")
    def job(config: DictConfig) -> int:
        code = _run_job(suite, config)
        if code in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
            raise KeyboardInterrupt  # stops the remaining jobs, too
        exit_codes.append(code)
        return code

    with commandline.hydra_errors(), commandline.parsed_once():
        job()
    return max(exit_codes, default=0)


def _run_job(suite: Suite, config: DictConfig) -> int:
    try:
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:
            commandline.mask_record(Path(hydra_config.sweep.dir))
        if hydra_config.runtime.choices.get("hydra/launcher") == "joblib":  # Ray gives its runs their GPUs
            distributed.claim_gpu(distributed.gpu_count())
        settings = list(hydra_config.overrides.task)
        return run(suite, parse(OmegaConf.to_container(config, resolve=True), suite), settings)
    except ConfigError as error:
        console.report_errors(error)
        return EXIT_CONFIG
