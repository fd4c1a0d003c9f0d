"""Callbacks that record a training: metrics and time of each step, and the best adapter so far."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from flatlora.methods import Regularizer
from flatlora.runs.metrics_log import MetricsLog
from flatlora.train import checkpoint
from flatlora.train.distributed import check_dtypes, zero_dtypes
from flatlora.utils.deferred import HostCopy, Moment
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_json
from flatlora.utils.plain_files import file_sha256, read_plain
from flatlora.utils.staging import obey_umask, remove

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Progress display of a training; see `flatlora.utils.console.ProgressBar`."""

    def start(self, total_steps: int, step: int) -> None: ...

    def update(self, step: int, row: dict[str, Any]) -> None: ...

    def stop(self) -> None: ...


@dataclass
class TrainingStats:
    """Training time so far; saved in each checkpoint, so that the record of a resumed run includes it."""

    train_s: float = 0.0
    perturb_s: float = 0.0
    step_s: list[float] = field(default_factory=list)  # seconds of each of the newest steps
    reserved_gib: list[float] = field(default_factory=list)  # by torch on the GPU, after each of them; empty without
    perturbation: dict[str, Any] | None = None
    processes: list[dict[str, int]] = field(default_factory=list)  # {"step", "processes"} of each change of the number
    micro_batch_tokens: int | None = None  # most tokens of a micro-batch of joined rows; None if they are padded

    @classmethod
    def read(cls, checkpoint_folder: Path | None) -> TrainingStats:
        """Reads the stats of a checkpoint; zeros for None."""
        if checkpoint_folder is None:
            return cls()
        stats = cls(**json.loads((checkpoint_folder / _EFFORT_FILE).read_text()))
        if not stats.processes:  # an earlier version, which never changed the number
            stats.processes = [{"step": 0, "processes": checkpoint.processes_of(checkpoint_folder)}]
        return stats

    def write(self, checkpoint_folder: Path) -> None:
        write_json(checkpoint_folder / _EFFORT_FILE, asdict(self))


_EFFORT_FILE = "effort.json"
_STEPS_TIMED = 1000  # newest steps whose times are kept, to limit the size of checkpoints


@dataclass
class StepRecorder(TrainerCallback):
    """Writes a row of metrics.jsonl per logged step, times steps, shows progress, and stops if a loss is not finite."""

    log: MetricsLog
    progress: Progress | None
    before: TrainingStats  # of the processes that the run is resumed from
    regularizer: Regularizer | None = None
    trainer: Trainer | None = None  # a FlatTrainer, which counts losses and units for the rows
    step_seconds: list[float] = field(default_factory=list)
    reserved_gib: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, list[str]] | None = None  # of what ZeRO holds
    _window_started: Moment | None = None  # start of the first step after the newest row
    _begun: _BegunRow | None = None

    def stats(self) -> TrainingStats:
        """Returns the stats up to now, including those of previous processes."""
        if not self.step_seconds:
            return self.before  # a finished training that was only loaded
        return TrainingStats(
            train_s=self.before.train_s + time.perf_counter() - self._train_started,
            perturb_s=self.before.perturb_s + (self.regularizer.seconds if self.regularizer else 0.0),
            step_s=[*self.before.step_s, *self.step_seconds][-_STEPS_TIMED:],
            reserved_gib=[*self.before.reserved_gib, *self.reserved_gib][-_STEPS_TIMED:],
            perturbation=self.regularizer.record() if self.regularizer else None,
            processes=self.before.processes,
            micro_batch_tokens=self.before.micro_batch_tokens,
        )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._train_started = time.perf_counter()
        self._note_processes(args.world_size, state)
        if args.deepspeed:
            self.dtypes = zero_dtypes(self.trainer.model_wrapped)
            check_dtypes(self.dtypes)
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps  # may change when a run is resumed
        self._steps_per_epoch = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        if state.is_world_process_zero:
            put_back_rows(self.log, state)
        if state.is_world_process_zero and state.max_steps == 1 and args.get_warmup_steps(1):
            logger.warning(
                "The only optimizer step has a learning rate of 0, for the warm-up begins there: nothing is trained. "
                "Set optim.warmup_ratio=0, or train for more steps (trainer.max_steps, optim.epochs)."
            )
        if self.progress:
            self.progress.start(state.max_steps, state.global_step)

    def _note_processes(self, count: int, state: TrainerState) -> None:
        history = self.before.processes
        if history and history[-1]["processes"] == count:
            return
        if history and state.is_world_process_zero:
            logger.warning(
                "The run goes on with another number of processes, %d instead of %d: each step has the same rows, so "
                "results change by rounding alone, unless there is dropout.",
                *(count, history[-1]["processes"]),
            )
        history.append({"step": state.global_step, "processes": count})

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.set_epoch(state.global_step // self._steps_per_epoch)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.step_loss.zero_()
        self._step_started = time.perf_counter()
        if self._window_started is None:
            self._window_started, self._window_step = Moment(args.device), state.global_step
            self.trainer.step_units.zero_()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_seconds.append(time.perf_counter() - self._step_started)
        if args.device.type == "cuda":
            self.reserved_gib.append(round(torch.cuda.memory_reserved(args.device) / 2**30, 3))
        if state.global_step >= state.max_steps:  # the last step is always logged and evaluated
            control.should_log = True
            control.should_evaluate |= self.trainer.eval_dataset is not None

    def begin_row(self, state: TrainerState, learning_rate: float, grad_norm: torch.Tensor | float | None) -> None:
        """Takes the numbers of the current step for a row, without waiting for the device to compute them."""
        trainer = self.trainer
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm, device=trainer.step_loss.device)
        sums = torch.stack([trainer.step_loss, trainer.step_units]).double()
        if trainer.args.world_size > 1:
            sums = trainer.accelerator.reduce(sums, "sum")
        known = {"step": state.global_step, "epoch": state.epoch, "learning_rate": learning_rate}
        window = self._window_started, Moment(trainer.args.device), state.global_step - self._window_step
        numbers = HostCopy(torch.cat([sums, norm.detach().double()[None]]))
        self._begun, self._window_started = _BegunRow(known, numbers, window, len(self.step_seconds)), None

    def finish_row(self) -> dict[str, float] | None:
        """Returns what Trainer would log for the row that was begun, and its time; None if none was begun."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        loss, units, norm = begun.numbers.tolist()
        started, ended, steps = begun.window
        seconds = started.seconds_to(ended)
        self.step_seconds[begun.timed - steps : begun.timed] = [seconds / steps] * steps
        logs = {"loss": loss / self.trainer.args.world_size, "grad_norm": norm} | begun.known
        return logs | {"units": int(units), "units_per_s": round(units / seconds, 1)}

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            row = self._training_row(logs)
        elif "eval_loss" in logs:
            row = {"step": state.global_step, "epoch": state.epoch, "eval_loss": logs["eval_loss"]}
        else:
            return
        state.log_history[-1]["row"] = json.dumps(row)  # saved in checkpoints, as text because these sort keys
        if state.is_world_process_zero:
            self.log.append(row)
        self.last |= row
        if self.progress:
            self.progress.update(row["step"], self.last)
        for key in ("loss", "eval_loss"):
            if not math.isfinite(row.get(key, 0.0)):
                raise FloatingPointError(
                    f"The {key} of step {row['step']} is {row[key]}: training has diverged; lower optim.lr or "
                    "rho.sigma, or set trainer.autocast=none."
                )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.progress:
            self.progress.stop()

    def _training_row(self, logs: dict[str, float]) -> dict[str, Any]:
        unit = self.trainer.family.unit
        return {
            "step": logs["step"],
            "epoch": logs["epoch"],
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "sigma": self.regularizer.sigma_at(logs["step"] - 1) if self.regularizer else 0.0,
            unit: logs["units"],
            f"{unit}_per_s": logs["units_per_s"],
        }


class _BegunRow(NamedTuple):
    known: dict[str, float]
    numbers: HostCopy  # loss, units, norm of the gradient
    window: tuple[Moment, Moment, int]  # begin and end of the steps since the row before, and their number
    timed: int  # number of `StepRecorder.step_seconds` at the end of the window


def rows_of(state: TrainerState) -> list[str] | None:
    """Returns the lines of metrics.jsonl in a checkpoint's state; None if an earlier version saved none."""
    logged = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
    return None if any("row" not in entry for entry in logged) else [entry["row"] for entry in logged]


def put_back_rows(log: MetricsLog, state: TrainerState) -> None:
    """Restores the rows of metrics.jsonl from a checkpoint's state and removes later ones."""
    kept = rows_of(state)
    log.rewind(state.global_step, kept)
    logged = sum("loss" in entry or "eval_loss" in entry for entry in state.log_history)
    if kept is None and len(log.rows()) < logged:
        logger.warning(
            "%s has %d of %d rows up to step %d, and the checkpoint is of a version that kept none: the losses of "
            "run.json are those of the rest.",
            *(log.path, len(log.rows()), logged, state.global_step),
        )


class BestModel(TrainerCallback):
    """Keeps the adapter with the lowest validation loss in `best/`; of equal losses the earlier step counts.

    Previous bests are kept as long as there is a checkpoint at which they were the best, for runs resumed from it. Each
    checkpoint holds the `best.json` of its step, with hashes.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep  # keep: number of checkpoints that the run keeps

    def begin_from(self, checkpoint_folder: Path | None) -> None:
        """Restores best.json from a checkpoint that `best_error` accepted; None removes the folder."""
        if checkpoint_folder is None:
            remove(self.folder)
        elif bests := _bests_of(checkpoint_folder):
            self._write(bests)

    def save_state(self, checkpoint_folder: Path) -> None:
        """Saves best.json in a checkpoint."""
        if bests := self._bests():
            write_json(checkpoint_folder / _BEST_FILE, bests)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.should_save:
            self._write([best for best in self._bests() if best["step"] <= state.global_step])

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs) -> None:
        bests = self._bests()
        if not args.should_save or (bests and bests[-1]["eval_loss"] <= metrics["eval_loss"]):
            return
        self.folder.mkdir(exist_ok=True)
        name = f"step-{state.global_step}.safetensors"
        tensors = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        save_file(tensors, self.folder / name)
        obey_umask(self.folder / name)
        sha256 = file_sha256(self.folder / name, flush=True)
        bests.append({"step": state.global_step, "eval_loss": metrics["eval_loss"], "file": name, "sha256": sha256})
        kept = checkpoint.checkpoints(self.folder.parent)[-self.keep :]
        oldest = checkpoint.step_of(kept[0]) if kept else 0
        newest_then = max((i for i, best in enumerate(bests) if best["step"] <= oldest), default=0)
        self._write(bests[newest_then:])

    def read(self) -> dict[str, Any] | None:
        """Returns {"step", "eval_loss", "file", "sha256"} of the best adapter so far; None if there is none."""
        bests = self._bests()
        return bests[-1] if bests else None

    def restore(self, model: nn.Module) -> int | None:
        """Loads the best parameters into the model and returns their step; None if there are none."""
        best = self.read()
        if best is None:
            return None
        tensors = load_file(self.folder / best["file"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in tensors:
                    parameter.copy_(tensors[name])
        return best["step"]

    def _bests(self) -> list[dict[str, Any]]:
        return _bests_of(self.folder)

    def _write(self, bests: list[dict[str, Any]]) -> None:
        if not self.folder.is_dir():
            return
        write_json(self.folder / _BEST_FILE, bests)
        names = {best["file"] for best in bests}
        for file in self.folder.glob("step-*.safetensors"):
            if file.name not in names:
                file.unlink()


_BEST_FILE, _MOST_BYTES = "best.json", 1 << 24


def _bests_of(folder: Path) -> list[dict[str, Any]]:
    """Reads best.json, oldest best first; empty if there is none.

    Raises:
        ConfigError: the file is broken.
    """
    path = folder / _BEST_FILE
    try:
        bests = json.loads(read_plain(path, _MOST_BYTES))
        return [{"step": best["step"], "eval_loss": best["eval_loss"], "file": best["file"], **best} for best in bests]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError([f"Broken record {path}: {reason_of(error)}; put it back, or say overwrite=true."]) from error


def best_error(checkpoint_folder: Path) -> str | None:
    """Returns why a valid checkpoint cannot be resumed: an adapter in `best/` is damaged; None if all are intact."""
    folder = checkpoint_folder.parent / "best"
    for best in _bests_of(checkpoint_folder):
        try:
            if best.get("sha256") not in (None, file_sha256(folder / best["file"])):  # None: an earlier version
                return f"best/{best['file']} of its time is not what was written"
        except FileNotFoundError:
            return f"best/{best['file']} of its time is missing"
        except OSError as error:
            return f"best/{best['file']} of its time cannot be read ({error.strerror})"
    return None


class SaveAtStop(TrainerCallback):
    """Saves a checkpoint when early stopping ends the training, so that a run killed while scoring can be resumed."""

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        control.should_save |= control.should_training_stop
