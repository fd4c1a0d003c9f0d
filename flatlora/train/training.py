"""Trains one run: sets up transformers' arguments and the trainer, collects the results and checks invariants."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    BaseImageProcessor,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback as TqdmCallback

from flatlora import methods
from flatlora.config.experiment import Experiment
from flatlora.config.sections import TrainerConfig
from flatlora.models.family import FAMILIES
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.record import BackboneHashes, Timing
from flatlora.runs.run_folder import RunFolder
from flatlora.train import checkpoint
from flatlora.train.distributed import deepspeed_settings, is_main_process, world_size
from flatlora.train.preemption import Preempted, Preemption
from flatlora.train.recorder import BestModel, Progress, SaveAtStop, StepRecorder, TrainingStats
from flatlora.train.samplers import EpochSampler
from flatlora.train.trainer import FlatTrainer, training_of, trains_on_joined_rows

Processor = PreTrainedTokenizerBase | BaseImageProcessor | None  # saved with every checkpoint


class SizedRows(Protocol):
    """A map-style dataset with the length of each row in tokens."""

    lengths: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass
class TrainingResult:
    """Results of a run's training, including the processes that it was resumed from."""

    metrics: dict[str, float]
    timing: Timing
    reserved_gib: list[float]  # after each of the newest steps; empty without a GPU
    steps: int
    perturbation: dict[str, Any] | None
    resumed_from: int | None = None
    dtypes: dict[str, list[str]] | None = None  # of what ZeRO holds; None without ZeRO
    processes: list[dict[str, int]] = field(default_factory=list)  # as `TrainingStats.processes`
    micro_batch_tokens: int | None = None  # as `TrainingStats.micro_batch_tokens`


def train(
    experiment: Experiment,
    model: nn.Module,
    processor: Processor,
    train_rows: SizedRows,
    validation_rows: SizedRows,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    run: RunFolder,
    *,
    data_sha256: str,
    base: Callable[[], str],
    log: MetricsLog,
    resume_from: Path | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Trains `model` in place, starting from the checkpoint `resume_from` if it is given.

    Args:
        data_sha256: identity of the rows, which a resumed run must match, as it must that of the backbone.
        base: waits for the identity of the backbone, when the main process writes a checkpoint; its files may still be
            hashed in the first steps.

    Raises:
        FloatingPointError: the loss or a weight is NaN or infinite.
        Preempted: a signal stopped the training; the newest checkpoint is complete.
    """
    method, regularizer = methods.ADAPTERS[experiment.peft.method], None
    if experiment.regularized:
        regularizer = methods.REGULARIZERS[experiment.rho.method].regularizer(model, experiment.rho, experiment.seed)
    optim, has_validation = experiment.optim, len(validation_rows) > 0
    before = TrainingStats.read(resume_from)
    # A run goes on as it began: rows were padded by an earlier version, or where nothing joins them.
    joined = trains_on_joined_rows(experiment, model) and (resume_from is None or before.micro_batch_tokens is not None)
    arguments = _arguments_for(experiment, run, train_rows, validation_rows, joined=joined)
    best = _best_model(experiment, run, resume_from) if optim.best_model and has_validation else None
    recorder, preemption = StepRecorder(log, progress, before, regularizer), Preemption()
    of_method = method.callbacks(model, experiment.peft, training_of(experiment, arguments))
    # `best` comes before callbacks that request a save, so that the checkpoint holds its best.json.
    callbacks = [callback for callback in (recorder, best, *of_method, regularizer) if callback]
    if optim.early_stopping_patience and has_validation:
        callbacks += [EarlyStoppingCallback(optim.early_stopping_patience), SaveAtStop()]
    trainer = FlatTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows if has_validation else None,
        data_collator=collate,
        processing_class=processor,
        callbacks=[*callbacks, preemption],
        experiment=experiment,
        method=method,
        data_sha256=data_sha256,
        base=base,
        recorder=recorder,
        joined=joined,
    )
    for unwanted in (PrinterCallback, TqdmCallback):
        trainer.remove_callback(unwanted)
    recorder.trainer = trainer
    stats, best_step = _run_to_the_end(trainer, model, best, preemption, resume_from)
    kept = {"best_step": best_step, "eval_loss": best.read()["eval_loss"]} if best else {}
    return _result(trainer, stats, _metrics(log) | kept, _timing(stats, log), resume_from)


def _result(
    trainer: FlatTrainer, stats: TrainingStats, metrics: dict[str, float], timing: Timing, resume_from: Path | None
) -> TrainingResult:
    return TrainingResult(
        metrics=metrics,
        timing=timing,
        reserved_gib=stats.reserved_gib,
        steps=trainer.state.global_step,
        perturbation=stats.perturbation,
        resumed_from=checkpoint.step_of(resume_from) if resume_from else None,
        dtypes=trainer.recorder.dtypes,
        processes=stats.processes,
        micro_batch_tokens=stats.micro_batch_tokens,
    )


def _arguments_for(
    experiment: Experiment, run: RunFolder, train_rows: SizedRows, validation_rows: SizedRows, *, joined: bool
) -> TrainingArguments:
    """`training_arguments`, with what depends on the rows themselves."""
    counts = {"train_rows": len(train_rows), "has_validation": len(validation_rows) > 0}
    arguments = training_arguments(experiment, run.path, **counts, joined=joined)
    arguments.dataloader_num_workers = loader_workers(experiment.trainer, train_rows)
    if len(set(getattr(validation_rows, "buckets", ()))) > 1:
        arguments.per_device_eval_batch_size = 1  # images of different sizes cannot be batched
    return arguments


def _best_model(experiment: Experiment, run: RunFolder, resume_from: Path | None) -> BestModel:
    best = BestModel(run.path / "best", experiment.trainer.save_total_limit)
    if is_main_process():
        best.begin_from(resume_from)
    return best


def _run_to_the_end(
    trainer: FlatTrainer, model: nn.Module, best: BestModel | None, preemption: Preemption, resume_from: Path | None
) -> tuple[TrainingStats, int | None]:
    """Returns timing statistics, and the step of the best parameters if these were restored."""
    recorder = trainer.recorder
    try:
        with preemption:
            trainer.train_or_load(resume_from)
            trainer.accelerator.wait_for_everyone()  # until the newest checkpoint is complete
            if preemption.stopped or preemption.asked():  # also after the last step: scoring may take hours
                raise Preempted(preemption.forward)
        return recorder.stats(), best.restore(model) if best else None
    finally:
        if recorder.progress:
            recorder.progress.stop()
        if recorder.regularizer:
            recorder.regularizer.close()  # restores W, also after an error
        if trainer.graphed:
            trainer.graphed.close()


def calibration_batches(
    experiment: Experiment,
    rows: SizedRows,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    device: torch.device,
) -> Callable[[int], Iterator[dict[str, torch.Tensor]]]:
    """Returns a function of n that yields the first n micro-batches of the rows, without grouping by length.

    It yields fewer if there are not enough rows, and the same batches in every call and on every process.
    """

    def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
        size = experiment.trainer.micro_batch_size
        order = list(EpochSampler(rows.lengths, experiment.seed))[: count * size]
        for first in range(0, len(order), size):
            batch = collate([rows[i] for i in order[first : first + size]])
            yield {key: value.to(device) for key, value in batch.items()}

    return batches


def training_arguments(
    experiment: Experiment, output_dir: Path, *, train_rows: int, has_validation: bool, joined: bool = False
) -> TrainingArguments:
    """Returns transformers' arguments for an experiment. Logging, progress and checkpoint rotation are our own.

    Evaluation and saving once per epoch are given in steps: Trainer evaluates before saving at a step, but after it at
    the end of an epoch, where a run killed in between would lose the evaluation. If rows are `joined`, the loader gives
    all rows of a step at once, and `FlatTrainer` makes micro-batches of them.
    """
    optim, machine = experiment.optim, experiment.trainer
    processes = world_size()
    on_gpu = machine.device != "cpu" and torch.cuda.is_available()
    label_name = FAMILIES[experiment.model.family].label_name
    micro_batch = optim.batch_size // processes if joined else machine.micro_batch_size
    accumulation = optim.batch_size // (micro_batch * processes)
    epoch_steps = max(1, math.ceil(math.ceil(train_rows / (micro_batch * processes)) / accumulation))
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        seed=experiment.seed,
        full_determinism=machine.deterministic and on_gpu,
        use_cpu=not on_gpu,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=machine.eval_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=optim.epochs,
        max_steps=machine.max_steps or -1,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.lr_schedule if optim.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=optim.warmup_ratio,  # a value below 1 is a fraction of all steps
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_epsilon=optim.adam_epsilon,
        max_grad_norm=optim.max_grad_norm,
        optim=_OPTIMIZERS[optim.optimizer] + ("_fused" if on_gpu and optim.optimizer == "adamw" else ""),
        gradient_checkpointing=machine.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if machine.gradient_checkpointing else None,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=optim.eval_steps or epoch_steps,
        save_strategy="steps",
        save_steps=machine.save_steps or epoch_steps,
        restore_callback_states_from_checkpoint=optim.early_stopping_patience is not None,
        metric_for_best_model="eval_loss" if has_validation else None,
        greater_is_better=False if has_validation else None,
        logging_strategy="steps",
        logging_steps=machine.logging_steps,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu, "use_configured_state": bool(machine.zero)},
        ddp_find_unused_parameters=False,
        ddp_timeout=machine.timeout_s,
        deepspeed=deepspeed_settings(machine),
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=[label_name] if label_name else None,  # the input without which there is no loss
        fp16=on_gpu and experiment.model.traits.scales_loss and experiment.model.dtype == "float16",  # for GradScaler
        disable_tqdm=True,
        report_to=[],
    )
    # Overrides $ACCELERATE_MIXED_PRECISION, set by `accelerate launch` or its default_config.yaml, which would run the
    # whole model under autocast; `FlatTrainer` applies trainer.autocast around the loss.
    arguments.mixed_precision = "fp16" if arguments.fp16 else "no"
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one device per process; else Trainer wraps the model in nn.DataParallel
    return arguments


def loader_workers(machine: TrainerConfig, rows: SizedRows) -> int:
    """Returns trainer.num_workers; if it is null, one per core (at most 12) for images that are decoded, else 0.

    There are fewer if their batches, two of each worker, would fill half of the shared memory: a container has 64 MiB.
    """
    if machine.num_workers is not None:
        return machine.num_workers
    row_bytes = getattr(rows, "bytes_to_decode", 0)
    if not row_bytes or multiprocessing.get_context().get_start_method() != "fork":  # others pickle the rows
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = shutil.disk_usage("/dev/shm").free // (4 * machine.micro_batch_size * row_bytes)
    return min(cores, 12, room)


_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}  # transformers' names


def _metrics(log: MetricsLog) -> dict[str, float]:
    """Returns the final metrics of a run, from its rows."""
    metrics = {
        "first_loss": next((row["loss"] for row in log.rows() if "loss" in row), None),
        "train_loss": _mean_of_last_losses(log),
        "eval_loss": _last(log, "eval_loss"),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def _last(log: MetricsLog, key: str) -> float | None:
    return next((row[key] for row in reversed(log.rows()) if key in row), None)


def _mean_of_last_losses(log: MetricsLog, rows: int = 10) -> float | None:
    """Returns the mean loss of the last rows; that of a single step is too noisy to compare runs."""
    losses = [row["loss"] for row in log.rows() if "loss" in row][-rows:]
    return statistics.fmean(losses) if losses else None


def _timing(stats: TrainingStats, log: MetricsLog) -> Timing:
    rates = {
        key: round(statistics.median(values), 1)
        for key in ("tokens_per_s", "images_per_s")
        if (values := [row[key] for row in log.rows() if key in row])
    }
    return Timing(
        train_s=round(stats.train_s, 3),
        step_s_median=round(statistics.median(stats.step_s), 4) if stats.step_s else None,
        perturb_s=round(stats.perturb_s, 3),
        **rates,
    )


def check_invariants(experiment: Experiment, model: nn.Module, backbone: BackboneHashes) -> None:
    """Checks after training that the backbone is unchanged and that trained parameters are FP32 and finite.

    Raises:
        RuntimeError: the backbone changed, or a trained parameter is not FP32.
        FloatingPointError: a trained parameter holds NaN or infinity.
    """
    drifts = experiment.flat and experiment.rho.mode == "inplace"
    if not (backbone.unchanged or drifts):
        raise RuntimeError(
            f"The frozen backbone changed during training (SHA-256 {backbone.before} before, "
            f"{backbone.after} after): something wrote to its weights; the adapter fits neither."
        )
    lowered = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if lowered:
        raise RuntimeError(f"{len(lowered)} trained parameters are not FP32 any more, {lowered[0]} among them.")
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"{len(broken)} trained parameters hold NaN or infinity, {broken[0]} among them: training has diverged; "
            "lower optim.lr or rho.sigma."
        )
