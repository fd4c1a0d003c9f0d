"""One run: trains, evaluates and records the results."""

from __future__ import annotations

import logging
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flatlora import methods
from flatlora.config.experiment import Experiment
from flatlora.config.settings import Section
from flatlora.experiment import plan as planning
from flatlora.experiment.prepare import Inputs, prepare
from flatlora.experiment.suite import Suite
from flatlora.fused import acceleration
from flatlora.inputs.rows import Source
from flatlora.models import hashes, loading, sources
from flatlora.models.clip import Classes
from flatlora.models.family import FAMILIES
from flatlora.models.starts import start_of_checkpoint
from flatlora.runs import environment, run_folder, trackers
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.record import Distributed, Environment, Memory, Parameters, RunRecord
from flatlora.runs.record import Precision as RecordedPrecision
from flatlora.runs.run_folder import RunFolder
from flatlora.runs.trackers import Tracker
from flatlora.train import checkpoint, distributed, training
from flatlora.train.preemption import Preempted
from flatlora.train.recorder import best_error
from flatlora.utils import console, files, records
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.precision import Precision, choose_precision

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130  # 75: try again later (sysexits.h)


def run(suite: Suite, experiment: Experiment, settings: Sequence[str]) -> int:
    """Runs one validated experiment, or prints it or its plan; returns the exit code.

    Args:
        settings: the overrides of the experiment, for processes that this one starts.

    Raises:
        ConfigError: data, model or folder do not fit the experiment; no weight was loaded and nothing written.
    """
    _warn_of_strength(experiment)
    if experiment.dry_run:
        console.print_pairs("Dry run: nothing is loaded or written", describe(suite, experiment))
        return 0
    if experiment.plan:
        console.console.print(planning.shown(planning.plan(suite, experiment), experiment))
        return 0
    if distributed.must_launch(experiment.trainer):
        return distributed.launch(experiment, suite.script, settings)
    distributed.check_launch(experiment)
    device = loading.choose_device(experiment.trainer.device)
    loading.check_matmul_precision(experiment.trainer.matmul_precision, device)
    distributed.initialize(experiment, device)
    distributed.check_agreement(
        {
            "the configuration": experiment.sha256(),
            "the project's code": distributed.code_sha256(),
            "the dtype of matrix products": str(_precision(experiment).products),
        },
        "Start every node with the same command and the same checkout, on CPUs of one kind.",
    )
    folder = RunFolder.of(experiment)
    if distributed.from_main_process(lambda: folder.is_finished(experiment)):
        console.console.print(
            f"{folder.path} is finished already; overwrite=true runs it anew.", markup=False, soft_wrap=True
        )
        return 0
    inputs = prepare(suite, experiment, device)
    distributed.check_agreement(
        {"the training data": inputs.data_sha256}, "Give every node the same files, or pin dataset.revision."
    )
    if inputs.initial is not None:
        distributed.check_agreement(
            {"the adapter of peft.init_from": inputs.initial.record.sha256}, "Give every node the same adapter."
        )

    hashing = None  # while the weights are loaded: both read all of them
    if distributed.is_main_process():
        hashing = ThreadPoolExecutor(1).submit(loading.backbone_state, experiment.model)

    try:
        resume_from = distributed.from_main_process(lambda: _claim(folder, experiment, inputs, hashing.result))
        return execute(suite, experiment, folder, inputs, resume_from, hashing)
    finally:
        folder.close()


def _claim(folder: RunFolder, experiment: Experiment, inputs: Inputs, base: Callable[[], str]) -> Path | None:
    """Opens the folder and returns the checkpoint to resume from. All checks precede the first change.

    Args:
        base: waits for the identity of the backbone.
    """
    folder.open(experiment)
    newest, initial = None, inputs.initial
    if not experiment.overwrite:
        newest = _newest_checkpoint(folder, experiment, inputs, base)
    if initial is not None:
        initial.check_base(experiment.model, base)
        if newest is not None:
            initial.check_resumed(folder.path)
    folder.begin(experiment)
    if initial is not None and newest is None:
        initial.write(folder.path)
    checkpoint.remove_newer(folder.path, newest)
    return newest


def _newest_checkpoint(
    folder: RunFolder, experiment: Experiment, inputs: Inputs, base: Callable[[], str]
) -> Path | None:
    origin = experiment.sha256(), inputs.data_sha256, distributed.world_size(), experiment.trainer.zero
    rho = methods.REGULARIZERS[experiment.rho.method]
    tied = rho.tied_to_processes(experiment.rho) if experiment.regularized else None
    state = base() if checkpoint.checkpoints(folder.path) else None
    newest = checkpoint.latest_good(folder.path, *origin, tied=tied, base=state, also=best_error)
    if newest is None and folder.is_trained:
        raise ConfigError([_nothing_to_score_from(folder, experiment)])
    if newest is not None:
        start_of_checkpoint(newest)  # raises an error if the initial adapter is damaged
    return newest


def _warn_of_strength(experiment: Experiment) -> None:
    strength = methods.REGULARIZERS[experiment.rho.method].strength_of(experiment.rho)
    if strength is None or not experiment.regularized or not distributed.is_main_process():
        return
    if warning := strength.warning(experiment.rho.name, experiment.rho.sigma):
        logger.warning("%s", warning)


def _nothing_to_score_from(folder: RunFolder, experiment: Experiment) -> str:
    names = [f"python -m eval.{name} {folder.path}" for name in experiment.eval]
    damage = folder.damage()
    whole = not any(name.startswith("adapter/") for name in damage)
    remedy = f"score its adapter with {', '.join(names)}, or say overwrite=true" if names else "say overwrite=true"
    details = f" ({'; '.join(damage)})" if damage else ""
    gone = "its checkpoints are damaged" if checkpoint.checkpoints(folder.path) else "its checkpoints are gone"
    return (
        f"{folder.path} is finished{details} and {gone}, so resume=true would train it anew: "
        f"{remedy if whole else 'say overwrite=true'}."
    )


def execute(
    suite: Suite,
    experiment: Experiment,
    folder: RunFolder,
    inputs: Inputs,
    resume_from: Path | None,
    hashing: Future[str] | None,
) -> int:
    """Trains and evaluates, writes run.json in any case, and returns the exit code.

    Args:
        hashing: identity of the backbone, from `loading.backbone_state`; None on processes other than the main one.
    """
    started = time.perf_counter()
    environment.reset_peak_memory()
    # Outside of training (see flatlora.train.preemption), these signals end the run as interrupted.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    record, code, forward = _new_record(experiment), 0, None
    try:
        train_and_score(suite, experiment, folder, inputs, resume_from, record, hashing)
    except KeyboardInterrupt:
        record.status, code = "interrupted", EXIT_INTERRUPTED
        console.console.print("Interrupted: the same command with resume=true goes on from the newest checkpoint.")
    except Preempted as error:
        record.status, code, forward = "interrupted", EXIT_PREEMPTED, error.forward
        console.console.print(
            "Ended by a signal: a checkpoint is written, and the same command with resume=true goes on."
        )
    except ConfigError as error:  # errors that need the weights
        record.error, code = str(error), EXIT_CONFIG
        console.console.print(f"The run failed: {error}", markup=False, soft_wrap=True)
    except Exception as raised:
        error = distributed.named_loss(raised)
        if isinstance(error, torch.OutOfMemoryError):
            error = _out_of_memory(error)
        record.error, code = f"{type(error).__name__}: {error}", EXIT_FAILED
        if not isinstance(error, OSError) and files.out_of_space(error, folder.path):
            error = OSError(f"no space left for {folder.path} ({error}); free some, then go on with resume=true")
        console.report_failure(error)
        if isinstance(raised, torch.OutOfMemoryError):
            _print_plan(suite, experiment)
    record.memory = (record.memory or Memory()).model_copy(update=environment.peak_memory_gib())
    if record.timing:
        record.timing.total_s = round(time.perf_counter() - started, 3)
    if distributed.is_main_process():
        # The run failed before it was needed. Large files may take longer to hash than a cluster waits.
        if record.base is None and hashing.done() and hashing.exception() is None:
            record.base = hashing.result()
        try:
            record.write(folder.path)
            if code == 0:
                backbone = record.backbone_sha256
                unchanged = "unchanged" if backbone.unchanged else "CHANGED"
                summary = "all weights trained" if backbone.before is None else f"backbone {unchanged}"
                console.console.print(f"Finished: {folder.path} ({summary})", markup=False, soft_wrap=True)
        except OSError as error:  # a full disk: older files are kept, and the run can be resumed
            console.report_failure(error)
            code = EXIT_FAILED
    if forward is not None:
        forward()
    return code


def train_and_score(
    suite: Suite,
    experiment: Experiment,
    folder: RunFolder,
    inputs: Inputs,
    resume_from: Path | None,
    record: RunRecord,
    hashing: Future[str] | None,
) -> None:
    """The run itself; fills `record` as it goes. See `execute` for `hashing`."""
    base = partial(distributed.from_main_process, lambda: hashing.result())  # called equally often by every process
    kind = suite.kind(experiment)
    classes = kind.classes(inputs.rows)
    if distributed.is_main_process():
        kind.save(folder.path, inputs.rows)
    inputs = replace(inputs, rows=kind.encode(experiment, inputs.rows, inputs.device, base))
    precision = choose_precision(experiment.trainer.autocast, experiment.model.dtype, inputs.device)
    record.precision = RecordedPrecision(**precision.record())
    if distributed.is_main_process():
        console.console.print(f"precision: {precision}", markup=False, soft_wrap=True)
    start = _start(experiment, folder, inputs, resume_from)
    model = _model(experiment, inputs, classes, start, record)
    record.data_sha256 = inputs.data_sha256
    record.init_from = inputs.initial.record if inputs.initial else None
    record.chat_template_sha256 = kind.chat_template_sha256(inputs.rows)
    with trackers.tracking(experiment, folder.path, record.metrics) as pages:
        outcome = training.train(
            experiment,
            model,
            inputs.processor,
            inputs.rows.train,
            inputs.rows.validation,
            inputs.collate,
            folder,
            data_sha256=inputs.data_sha256,
            base=lambda: hashing.result(),
            log=MetricsLog(folder.path / "metrics.jsonl", pages),
            resume_from=resume_from,
            progress=console.ProgressBar(f"train {experiment.run_name()}") if distributed.is_main_process() else None,
        )
        record.base = base()
        record.backbone_sha256.after = hashes.backbone_sha256(model)
        record.adapter_sha256 = hashes.trainable_sha256(model)
        _note_outcome(record, outcome, experiment)
        training.check_invariants(experiment, model, record.backbone_sha256)
        if distributed.is_main_process():
            _save(experiment, model, inputs, folder, start)
            before = time.perf_counter()
            record.metrics.update(score(suite, experiment, model, inputs, folder, record.base, pages))
            record.timing.score_s = round(time.perf_counter() - before, 3)
            record.weights_sha256 = hashes.weights_sha256(folder.adapter)
            record.files = records.hash_files(folder.path)
    record.status = "finished"


def _out_of_memory(error: torch.OutOfMemoryError) -> MemoryError:
    first = str(error).strip().partition("\n")[0]
    return MemoryError(
        f"{first} A smaller trainer.micro_batch_size or trainer.micro_batch_tokens, "
        "trainer.gradient_checkpointing=true and rho.mode=recompute need less; trainer=fsdp divides the weights, and "
        "fsdp_offload keeps them on the host."
    )


def _print_plan(suite: Suite, experiment: Experiment) -> None:
    """Prints the memory of a training step and what fits which GPU, or why that is not known."""
    if not distributed.is_main_process():
        return
    try:
        console.console.print(planning.shown(planning.plan(suite, experiment), experiment))
    except Exception as error:  # the run has failed already, and its record is still to be written
        console.console.print(f"Its memory is not planned: {reason_of(error)}", markup=False, soft_wrap=True)


def _model(
    experiment: Experiment, inputs: Inputs, classes: Classes | None, start: methods.Start, record: RunRecord
) -> nn.Module:
    """Loads the backbone and returns the model to train; notes its kernels, sizes and hash in `record`."""
    shards = distributed.world_size() if experiment.trainer.fsdp else 1
    offload = experiment.trainer.fsdp and experiment.trainer.offload
    options = {"autocast": experiment.trainer.autocast, "head_seed": experiment.seed}
    backbone = loading.load_backbone(
        experiment.model, inputs.device, classes, shards=shards, offload=offload, **options
    )
    model = methods.ADAPTERS[experiment.peft.method].apply(backbone, experiment.peft, start)
    if experiment.regularized:
        methods.REGULARIZERS[experiment.rho.method].prepare(model, experiment.rho, experiment.seed)
    if methods.uses_kernels(experiment):
        record.kernels = acceleration.accelerate(model, inputs.device)
    record.params = Parameters(**loading.parameter_counts(model))
    record.backbone_sha256.before = hashes.backbone_sha256(model)
    if distributed.world_size() > 1:  # the second hash is of all weights in full fine-tuning
        distributed.check_agreement(
            {"the backbone": record.backbone_sha256.before, "the adapter's start": hashes.trainable_sha256(model)},
            "Give every node the same weights, or pin model.revision.",
        )
        distributed.check_agreement(
            {"the fast paths": "; ".join(record.kernels)}, "Install the same packages on every node."
        )
    return model


def _note_outcome(record: RunRecord, outcome: training.TrainingResult, experiment: Experiment) -> None:
    record.timing, record.perturbation = outcome.timing, outcome.perturbation
    record.memory = _reserved(outcome.reserved_gib)
    record.resumed_from = outcome.resumed_from
    if outcome.micro_batch_tokens:
        record.kernels.append(f"micro-batches of up to {outcome.micro_batch_tokens} tokens")
    record.distributed = Distributed(
        processes=distributed.world_size(),
        zero=experiment.trainer.zero,
        dtypes=outcome.dtypes,
        history=outcome.processes,
    )
    record.metrics.update(outcome.metrics)


def _save(experiment: Experiment, model: nn.Module, inputs: Inputs, folder: RunFolder, start: methods.Start) -> None:
    """Writes adapter/ with its processor, whole or not at all."""
    with files.write_folder(folder.adapter) as staging:
        methods.ADAPTERS[experiment.peft.method].save(model, experiment.peft, staging, start)
        if inputs.processor is not None:
            inputs.processor.save_pretrained(staging)
        loading.complete_adapter(experiment.model, staging)


def _reserved(reserved_gib: Sequence[float]) -> Memory:
    """Returns the mean and the 99th percentile of GPU memory over steps; None without a GPU."""
    if not reserved_gib:
        return Memory()
    mean, high = statistics.fmean(reserved_gib), float(np.percentile(reserved_gib, 99))
    return Memory(reserved_mean_gib=round(mean, 3), reserved_p99_gib=round(high, 3))


def _start(experiment: Experiment, folder: RunFolder, inputs: Inputs, resume_from: Path | None) -> methods.Start:
    return methods.Start(
        experiment.seed,
        folder.path / "start",
        training.calibration_batches(experiment, inputs.rows.train, inputs.collate, inputs.device),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        resumed=resume_from is not None,
        init_from=inputs.initial.folder if inputs.initial else None,
    )


def score(
    suite: Suite,
    experiment: Experiment,
    model: nn.Module,
    inputs: Inputs,
    folder: RunFolder,
    base: str,
    pages: Sequence[Tracker],
) -> dict[str, Any]:
    """Scores all benchmarks of `eval=[...]`; returns {"<benchmark>/<metric>": value}."""
    metrics = {}
    classes = suite.kind(experiment).classes(inputs.rows)
    identity = loading.weights_identity(str(folder.adapter), experiment.model, classes, base) if experiment.eval else {}
    backend_class = suite.backends[experiment.dataset.kind]
    for name, config in experiment.eval.items():
        backend = backend_class(
            model,
            inputs.processor,
            batch_size=config.batch_size,
            precision=choose_precision(experiment.trainer.autocast, experiment.model.dtype, inputs.device),
            identity=identity,
            **FAMILIES[experiment.model.family].backend_settings(experiment.model),
        )
        with run_folder.answering(folder.path / "eval" / name, wait=True):
            result = suite.evaluate(name, backend, inputs.asked[name], folder.path / "eval" / name, config)
        suite.print_score(name, result)
        picture = suite.benchmarks[name].picture
        if picture is not None and (path := folder.path / "eval" / name / picture).is_file():
            for page in pages:
                page.show(f"{name}/pictures", path)
        metrics |= {f"{name}/{metric}": value for metric, value in result["metrics"].items()}
    return metrics


def describe(suite: Suite, experiment: Experiment) -> list[tuple[str, str]]:
    """Returns (name, description) pairs of what a run would do and load, for a dry run."""
    loader, optim = suite.datasets[experiment.dataset.loader], experiment.optim
    stored = any(isinstance(source, Source) for source in loader.sources(experiment.dataset))  # not own or generated
    source = f" from {experiment.data_root or 'hub'}" if stored else ""
    return [
        ("run folder", str(RunFolder.of(experiment).path)),
        ("model", sources.describe_source(experiment.model)),
        ("dataset", f"{experiment.dataset.name}: {loader.describe(experiment.dataset)}{source}"),
        ("peft", _settings(experiment.peft)),
        ("rho", _settings(experiment.rho) if experiment.regularized else "off: no perturbation"),
        ("optim", _settings(optim)),
        ("trainer", _settings(experiment.trainer)),
        ("precision", str(_precision(experiment))),
        ("eval", ", ".join(f"{name} ({_settings(config)})" for name, config in experiment.eval.items()) or "none"),
        ("seed", str(experiment.seed)),
        ("config", f"sha256 {experiment.sha256()}"),
    ]


def _precision(experiment: Experiment) -> Precision:
    """Returns the precision of a run on this machine; for trainer.device=cuda that of a GPU, even if there is none."""
    on_gpu = experiment.trainer.device == "cuda" or (experiment.trainer.device == "auto" and torch.cuda.is_available())
    return choose_precision(experiment.trainer.autocast, experiment.model.dtype, "cuda" if on_gpu else "cpu")


def _settings(section: Section) -> str:
    return " ".join(f"{key}={value}" for key, value in section.model_dump(mode="json").items() if value is not None)


def _new_record(experiment: Experiment) -> RunRecord:
    """Returns the record at the start of a run, with the status "failed" until the run ends otherwise."""
    return RunRecord(
        status="failed",
        experiment=experiment.model_dump(mode="json"),
        seed=experiment.seed,
        config_sha256=experiment.sha256(),
        tensor_hash=hashes.TENSOR_HASH,
        git_sha=environment.git_sha(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        env=Environment(**environment.environment()),
    )
