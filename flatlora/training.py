"""Training: transformers' Trainer with repeatable data order, whole checkpoints and one row of metrics a step."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import AutocastKwargs
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    BaseImageProcessor,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ProgressCallback as TqdmCallback

from flatlora import checkpoint, methods
from flatlora.acceleration import IGNORED, GraphedMicroStep
from flatlora.config import Experiment
from flatlora.distributed import deepspeed_settings, is_main_process, rank, world_size, zero_dtypes, zero_step
from flatlora.files import out_of_space, write_json
from flatlora.lora_linear import fused_throughout
from flatlora.methods import AdapterMethod, Regulariser, Training
from flatlora.models import autocast_dtype
from flatlora.preemption import Preempted, Preemption
from flatlora.results import MetricsLog, RunFolder
from flatlora.saving import BackgroundWriter, to_host
from flatlora.starts import load_adapter, mark_checkpoint

Processor = PreTrainedTokenizerBase | BaseImageProcessor | None  # saved with every checkpoint


def _units(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a micro-batch without its padding, or its pictures."""
    mask = inputs.get("attention_mask")
    return torch.tensor(len(next(iter(inputs.values())))) if mask is None else mask.sum()


class SizedRows(Protocol):
    """A map-style data set that knows the length of each row in tokens."""

    lengths: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Progress(Protocol):
    """Where the training shows how far it is; see `flatlora.console.ProgressBar`."""

    def start(self, total_steps: int, step: int) -> None: ...

    def update(self, step: int, row: dict[str, Any]) -> None: ...

    def stop(self) -> None: ...


@dataclass
class TrainingResult:
    """What a run's training came to, over all processes that had a part in it."""

    metrics: dict[str, float]
    timing: dict[str, float | None]
    steps: int
    perturbation: dict[str, Any] | None
    resumed_from: int | None = None
    dtypes: dict[str, list[str]] | None = None  # of what ZeRO holds, where it does


@dataclass
class Effort:
    """Time that training has taken so far; kept in each checkpoint, so that a resumed run's record has all of it."""

    train_s: float = 0.0
    perturb_s: float = 0.0
    step_s: list[float] = field(default_factory=list)  # of the newest steps
    perturbation: dict[str, Any] | None = None

    @classmethod
    def read(cls, checkpoint_folder: Path | None) -> Effort:
        return cls(**json.loads((checkpoint_folder / _EFFORT_FILE).read_text())) if checkpoint_folder else cls()

    def write(self, checkpoint_folder: Path) -> None:
        write_json(checkpoint_folder / _EFFORT_FILE, asdict(self))


_EFFORT_FILE = "effort.json"
_STEPS_TIMED = 1000  # median over the newest; a checkpoint of a long run stays small


class EpochSampler(Sampler[int]):
    """Row order as a pure function of (seed, epoch), so that a resumed run sees what the killed one would have.

    With `group` > 1, rows are shuffled, cut into runs of 50 groups, and sorted by length inside each run, so that
    the `group` rows of an optimizer step are of like length; the order of the groups is shuffled again.
    """

    def __init__(self, lengths: list[int], seed: int, group: int = 1) -> None:
        self.lengths, self.seed, self.group, self.epoch = lengths, seed, group, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        return iter(self._grouped(order, generator) if self.group > 1 else order)

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        run = 50 * self.group
        runs = [sorted(order[i : i + run], key=self.lengths.__getitem__) for i in range(0, len(order), run)]
        groups = [part[i : i + self.group] for part in runs for i in range(0, len(part), self.group)]
        short = [group for group in groups if len(group) < self.group]
        whole = [group for group in groups if len(group) == self.group]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return [index for group in shuffled + short for index in group]  # a short group last keeps the others aligned


class BucketSampler(EpochSampler):
    """`EpochSampler` whose micro-batches are of rows of one bucket each: of pictures of one size, that is.

    Where a bucket's rows do not fill the last of its micro-batches, the first of that epoch's order are taken again.
    """

    def __init__(self, buckets: Sequence[Hashable], seed: int, micro_batch: int) -> None:
        super().__init__([1] * len(buckets), seed)
        self.buckets, self.micro_batch = buckets, micro_batch

    def __len__(self) -> int:
        return sum(self._filled(count) for count in Counter(self.buckets).values())

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        by_bucket: dict[Hashable, list[int]] = {}
        for row in order:
            by_bucket.setdefault(self.buckets[row], []).append(row)
        batches = []
        for rows in by_bucket.values():
            filled = list(itertools.islice(itertools.cycle(rows), self._filled(len(rows))))
            batches += [filled[i : i + self.micro_batch] for i in range(0, len(filled), self.micro_batch)]
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[place]

    def _filled(self, rows: int) -> int:
        return -(-rows // self.micro_batch) * self.micro_batch


_GRAPH_LENGTHS = 64  # lengths are rounded up to a multiple of it: one captured graph for each


class FlatTrainer(Trainer):
    """Trainer with `EpochSampler`, sealed checkpoints, the method's optimizer, and what the regulariser asks for."""

    def __init__(
        self,
        *args: Any,
        experiment: Experiment,
        method: AdapterMethod,
        data_sha256: str,
        recorder: StepRecorder,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.regulariser = method, recorder.regulariser
        # An encoder-decoder's forward takes any keyword and ignores the token count of the whole batch: its loss is the
        # mean of a micro-batch, which Trainer must then divide by the number of micro-batches.
        self.model_accepts_loss_kwargs = experiment.model.family == "causal_lm"
        self.experiment, self.data_sha256, self.recorder = experiment, data_sha256, recorder
        self.step_loss = torch.zeros((), device=self.args.device)  # of the running optimizer step
        self.step_units = torch.zeros((), device=self.args.device)  # tokens, or images, since the newest row
        self._epoch_sampler: EpochSampler | None = None
        self._micro_batches: list[dict[str, Any]] = []  # of the running step, where its gradient is taken twice
        if self.args.fp16:
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)  # the scaler alone is wanted
        self.writer = BackgroundWriter()
        self._left_to_write: list[Callable[[], None]] = []  # of the checkpoint that is being made
        self.graphed = self._graphed_micro_step()
        self._autocast_dtype = autocast_dtype(experiment.trainer.autocast, experiment.model.dtype)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if len(set(getattr(dataset, "buckets", ()))) > 1:
            micro_batch = self.experiment.trainer.micro_batch_size
            self._epoch_sampler = BucketSampler(dataset.buckets, self.args.seed, micro_batch)
            return self._epoch_sampler
        group = self.experiment.optim.batch_size if self.experiment.optim.group_by_length else 1
        self._epoch_sampler = EpochSampler(dataset.lengths, self.args.seed, group)
        return self._epoch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler directly: accelerate does not reach it through a resumed, sharded loader."""
        self._epoch_sampler.set_epoch(epoch)
        if hasattr(self.train_dataset, "begin_epoch"):  # rows that draw something anew in each
            self.train_dataset.begin_epoch(epoch)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Autocast around the loss alone: TrainingArguments' bf16 would copy all logits to FP32 besides."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, self._autocast_dtype, cache_enabled=cache_enabled)

    def train_or_load(self, resume_from: Path | None) -> None:
        """Train to the end, or only read a checkpoint that was written there: `train` would run one step more."""
        if resume_from is None or not _is_complete(resume_from):
            self.model.train()  # loaded for inference, and PEFT's wrapper alone says otherwise
            try:
                self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            finally:
                self.writer.join()
            self.writer.check()
            return
        self._load_from_checkpoint(str(resume_from))
        self.state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
        if is_main_process():
            self.recorder.log.rewind(self.state.global_step)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.method.optimizer(
                self.model, self.experiment.peft, training_of(self.experiment, self.args)
            )
            self.optimizer = super().create_optimizer(model)
            if self.regulariser:
                self.regulariser.extend_optimizer(self.optimizer, self.args.learning_rate)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.writer.check()
        self.step_units += _units(inputs).to(self.step_units.device)
        loss = self._micro_step(model, inputs, num_items_in_batch)
        self.step_loss += loss
        last = self.accelerator.gradient_state.sync_gradients
        if last:
            self._sum_gradients(model)
        if self.regulariser and self.regulariser.second_gradient:
            self._micro_batches.append(inputs)
            if last:
                self._take_gradient_anew(model, num_items_in_batch)
        return loss

    def _sum_gradients(self, model: nn.Module) -> None:
        """Over the processes, once a step: graphed micro-steps leave theirs in one buffer, past all hooks."""
        if self.graphed is None:
            return
        if self.experiment.trainer.zero:
            zero_step(model, self.graphed.gradient)
        elif self.args.world_size > 1:
            torch.distributed.all_reduce(self.graphed.gradient)

    def _micro_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Loss of a micro-batch, its gradients added to the parameters'."""
        if self.graphed is None:
            return super().training_step(model, self._without_mask(inputs), num_items_in_batch)
        return self._graphed_training_step(model, inputs, num_items_in_batch)

    def _take_gradient_anew(self, model: nn.Module, num_items_in_batch: Any) -> None:
        """Replace the step's gradient by that at the point which the regulariser moves to."""
        micro_batches, self._micro_batches = self._micro_batches, []
        trained = [p for p in model.parameters() if p.requires_grad]
        self.regulariser.ascend(trained)
        if self.graphed is None:
            self.model.zero_grad()
        else:
            self.graphed.restart()
        for number, inputs in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                self._micro_step(model, inputs, num_items_in_batch)
        self._sum_gradients(model)
        self.regulariser.descend()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "evaluating"):
                    stack.enter_context(callback.evaluating())
            return super().evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights of all adapters, and nothing else: Trainer reads one of several, and may change what is trained."""
        if not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        for name in self.model.peft_config:
            folder = Path(resume_from_checkpoint) / ("" if name == "default" else name)
            load_adapter(self.model, folder, name)

    def _graphed_micro_step(self) -> GraphedMicroStep | None:
        """Replayed micro-steps where nothing in them needs the host: a decoder-only or a diffusion model on GPUs.

        ZeRO listens to every parameter whose gradient autograd adds up: it must be none.
        """
        machine, diffusion = self.experiment.trainer, self._on_gpu and self.experiment.model.family == "sdxl"
        if not (self._needs_no_mask or diffusion) or machine.gradient_checkpointing or self.args.fp16:
            return None  # GradScaler wants each loss before its backward
        if machine.zero and not fused_throughout(self.model):
            return None
        if diffusion:
            return GraphedMicroStep(self._denoising_loss, self.model, largest=None)
        return GraphedMicroStep(self._micro_loss, self.model)

    @property
    def _on_gpu(self) -> bool:
        return self.experiment.trainer.kernels == "auto" and self.args.device.type == "cuda"

    @property
    def _needs_no_mask(self) -> bool:
        """Rows are padded on the right, so that a causal model needs no mask: no token with a loss sees the padding."""
        return self._on_gpu and self.experiment.model.family == "causal_lm"

    def _without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On a GPU, where transformers would look at the mask on the host and wait for the device."""
        return {key: inputs[key] for key in ("input_ids", "labels")} if self._needs_no_mask else inputs

    def _micro_loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.autocast_smart_context_manager():
            return self.model(
                input_ids=inputs["input_ids"], labels=inputs["labels"], num_items_in_batch=inputs["items"]
            ).loss

    def _denoising_loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.autocast_smart_context_manager():
            return self.model(**inputs).loss

    def _graphed_training_step(self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        """A micro-step of `GraphedMicroStep`."""
        if not self.model.training:  # after an evaluation; DDP's own flag would not tell
            model.train()
        static = self._static_inputs(self._prepare_inputs(inputs), items)
        loss = self.graphed(static, state=self.regulariser.state if self.regulariser else None)
        return loss * self.args.world_size  # as Trainer has it, whose mean over processes is that of all tokens

    def _static_inputs(self, inputs: dict[str, Any], items: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a captured micro-step reads, the step's mean in it.

        Rows of a diffusion model are weighted. Lengths of text are rounded up, which `_needs_no_mask` allows.
        """
        if self.experiment.model.family == "sdxl":
            shares = self.current_gradient_accumulation_steps * self.args.world_size
            return {**inputs, "weights": inputs["weights"] / shares}
        missing = -inputs["input_ids"].shape[1] % _GRAPH_LENGTHS
        return {
            "input_ids": nn.functional.pad(inputs["input_ids"], (0, missing)),
            "labels": nn.functional.pad(inputs["labels"], (0, missing), value=IGNORED),
            "items": torch.as_tensor(items, device=self.args.device),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of this moment, which counts once the writer has sealed it; training goes on meanwhile."""
        self.writer.wait()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        consolidate = getattr(getattr(self.optimizer, "optimizer", self.optimizer), "consolidate_state_dict", None)
        with self._removed_if_broken(folder):
            if consolidate is not None:
                consolidate()
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.recorder.effort().write(folder)
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "save_state"):
                        callback.save_state(folder)
                mark_checkpoint(folder, folder.parent / "start")
            self.accelerator.wait_for_everyone()
        left, self._left_to_write = self._left_to_write, []
        if self.args.should_save:
            self.writer.start(functools.partial(self._finish_checkpoint, folder, left))

    def _finish_checkpoint(self, folder: Path, left: Sequence[Callable[[], None]]) -> None:
        """In the writer's thread: the large files, from copies on the host, and the seal that makes them all count."""
        with self._removed_if_broken(folder):
            for write in left:
                write()
            checkpoint.seal(
                folder,
                step=checkpoint.step_of(folder),
                config_sha256=self.experiment.sha256(),
                data_sha256=self.data_sha256,
                world_size=self.args.world_size,
                zero=self.experiment.trainer.zero,
            )
            checkpoint.rotate(folder.parent, self.experiment.trainer.save_total_limit)

    @contextlib.contextmanager
    def _removed_if_broken(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            full = isinstance(error, Exception) and out_of_space(error, folder)
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # a full disk gets its room back
            if full:
                raise OSError(f"no space left for {folder}; free some, then go on with resume=true") from error
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every process has whole weights, also under ZeRO-2, for which Trainer would copy all of them to the host."""
        if self.args.should_save:
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if isinstance(self.model, PeftModel):  # small, and what its file holds depends on more than tensors
            super()._save(output_dir, state_dict)
            return
        weights, folder = to_host(self.model.state_dict()), Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.processing_class.save_pretrained(folder)
        self._left_to_write.append(lambda: self.model.save_pretrained(folder, state_dict=weights))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # each process's engine writes its own share
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            state, folder = to_host(self.optimizer.state_dict()), Path(output_dir)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            self._left_to_write.append(lambda: torch.save(state, folder / OPTIMIZER_NAME))


@dataclass
class StepRecorder(TrainerCallback):
    """One row of metrics.jsonl a logged step, step times, the progress display, and the stop at a broken loss."""

    log: MetricsLog
    progress: Progress | None
    before: Effort  # of the processes before this one
    regulariser: Regulariser | None = None
    trainer: FlatTrainer | None = None
    step_seconds: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, list[str]] | None = None  # of what ZeRO holds
    _window_started: float | None = None  # when the first step after the newest row began

    def effort(self) -> Effort:
        """All time up to now, that of the processes before included."""
        if not self.step_seconds:
            return self.before  # a finished training, read back
        return Effort(
            train_s=self.before.train_s + time.perf_counter() - self._train_started,
            perturb_s=self.before.perturb_s + (self.regulariser.seconds if self.regulariser else 0.0),
            step_s=[*self.before.step_s, *self.step_seconds][-_STEPS_TIMED:],
            perturbation=self.regulariser.record() if self.regulariser else None,
        )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._train_started = time.perf_counter()
        if args.deepspeed:
            self.dtypes = zero_dtypes(self.trainer.model_wrapped)
            check_dtypes(self.dtypes)
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps  # may change when a run is resumed
        self._steps_per_epoch = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        if state.is_world_process_zero:
            self.log.rewind(state.global_step)
        if self.progress:
            self.progress.start(state.max_steps, state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.set_epoch(state.global_step // self._steps_per_epoch)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.step_loss.zero_()
        self._step_started = time.perf_counter()
        if self._window_started is None:
            self._window_started, self._window_step = self._step_started, state.global_step
            self.trainer.step_units.zero_()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.step_seconds.append(time.perf_counter() - self._step_started)
        if state.global_step >= state.max_steps:  # the last step is logged and evaluated, wherever it falls
            control.should_log = True
            control.should_evaluate |= self.trainer.eval_dataset is not None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            row = self._training_row(args, state, logs)
        elif "eval_loss" in logs:
            row = {"step": state.global_step, "epoch": state.epoch, "eval_loss": logs["eval_loss"]}
        else:
            return
        if state.is_world_process_zero:
            self.log.append(row)
        self.last |= row
        if self.progress:
            self.progress.update(state.global_step, self.last)
        for key in ("loss", "eval_loss"):
            if not math.isfinite(row.get(key, 0.0)):
                raise FloatingPointError(
                    f"The {key} of step {state.global_step} is {row[key]}: training has diverged; lower optim.lr or "
                    "rho.sigma, or set trainer.autocast=none."
                )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.progress:
            self.progress.stop()

    def _training_row(self, args, state, logs: dict[str, float]) -> dict[str, Any]:
        totals = torch.stack([self.trainer.step_loss, self.trainer.step_units]).double()
        totals = self.trainer.accelerator.reduce(totals, "sum") if args.world_size > 1 else totals
        loss, units = totals[0].item() / args.world_size, totals[1].item()
        # Only now, with the numbers on the host, has the device done what the steps since the last row gave it.
        seconds = time.perf_counter() - self._window_started
        steps, self._window_started = state.global_step - self._window_step, None
        self.step_seconds[-steps:] = [seconds / steps] * steps
        rate = "tokens_per_s" if self.trainer.experiment.dataset.kind == "text" else "images_per_s"
        sigma = self.regulariser.sigma_at(state.global_step - 1) if self.regulariser else 0.0
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": loss,
            "lr": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "sigma": sigma,
            rate: round(units / seconds, 1),
        }


class BestModel(TrainerCallback):
    """Keeps the adapter of the lowest validation loss in `best/`; ties go to the earlier step.

    Those that were best before it are kept for as long as a checkpoint is there that was written in their time: a run
    resumed from it must find the best of then.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep  # checkpoints that the run keeps

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
        bests.append({"step": state.global_step, "eval_loss": metrics["eval_loss"], "file": name})
        kept = checkpoint.checkpoints(self.folder.parent)[-self.keep :]
        oldest = checkpoint.step_of(kept[0]) if kept else 0
        newest_then = max((i for i, best in enumerate(bests) if best["step"] <= oldest), default=0)
        self._write(bests[newest_then:])

    def read(self) -> dict[str, Any] | None:
        """{"step", "eval_loss", "file"} of the best so far."""
        bests = self._bests()
        return bests[-1] if bests else None

    def restore(self, model: nn.Module) -> int | None:
        """Put the best parameters back; returns their step."""
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
        path = self.folder / "best.json"
        return json.loads(path.read_text()) if path.is_file() else []

    def _write(self, bests: list[dict[str, Any]]) -> None:
        if not self.folder.is_dir():
            return
        write_json(self.folder / "best.json", bests)
        names = {best["file"] for best in bests}
        for file in self.folder.glob("step-*.safetensors"):
            if file.name not in names:
                file.unlink()


class SaveAtStop(TrainerCallback):
    """A checkpoint where early stopping ends the training: a kill while scoring must not cost the whole of it."""

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        control.should_save |= control.should_training_stop


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
    log: MetricsLog,
    resume_from: Path | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train `model` in place to the end, from the checkpoint `resume_from` if there is one.

    Raises:
        FloatingPointError: the loss or a weight is NaN or infinite.
        Preempted: a signal asked for an end; the newest checkpoint is whole.
    """
    method, regulariser = methods.method(experiment.peft.method), None
    if experiment.regularised:
        regulariser = methods.rho(experiment.rho.method).regulariser(model, experiment.rho, experiment.seed)
    optim, has_validation = experiment.optim, len(validation_rows) > 0
    arguments = training_arguments(experiment, run.path, train_rows=len(train_rows), has_validation=has_validation)
    if len(set(getattr(validation_rows, "buckets", ()))) > 1:
        arguments.per_device_eval_batch_size = 1  # pictures of several sizes make no batch
    keeps_best = optim.best_model and has_validation
    best = BestModel(run.path / "best", experiment.trainer.save_total_limit) if keeps_best else None
    recorder = StepRecorder(log, progress, Effort.read(resume_from), regulariser)
    of_method = method.callbacks(model, experiment.peft, training_of(experiment, arguments))
    callbacks = [one for one in (recorder, best, *of_method, regulariser) if one]  # best before what asks for a save
    if optim.early_stopping_patience and has_validation:
        callbacks += [EarlyStoppingCallback(optim.early_stopping_patience), SaveAtStop()]
    preemption = Preemption()
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
        recorder=recorder,
    )
    for unwanted in (PrinterCallback, TqdmCallback):
        trainer.remove_callback(unwanted)
    recorder.trainer, preemption.accelerator = trainer, trainer.accelerator
    try:
        with preemption:
            trainer.train_or_load(resume_from)
            trainer.accelerator.wait_for_everyone()  # none ends before the newest checkpoint is sealed
            if preemption.stopped or preemption.asked(arguments):  # after the last step too: scoring may take hours
                raise Preempted(preemption.hand_on)
        effort = recorder.effort()
        if best:
            best_step = best.restore(model)
    finally:
        if progress:
            progress.stop()
        if regulariser:
            regulariser.close()  # whatever went wrong, the backbone is W again
        if trainer.graphed:
            trainer.graphed.close()
    kept = {"best_step": best_step, "eval_loss": best.read()["eval_loss"]} if best else {}
    return TrainingResult(
        metrics=_metrics(log) | kept,
        timing=_timing(effort, log),
        steps=trainer.state.global_step,
        perturbation=effort.perturbation,
        resumed_from=checkpoint.step_of(resume_from) if resume_from else None,
        dtypes=recorder.dtypes,
    )


def training_of(experiment: Experiment, arguments: TrainingArguments) -> Training:
    """What a method is told of the training around it."""
    return Training(
        experiment.optim,
        seed=experiment.seed,
        accumulation=arguments.gradient_accumulation_steps,
        world_size=arguments.world_size,
        fused=arguments.device.type == "cuda",
        token_mean=experiment.model.family == "causal_lm",
    )


def calibration_batches(
    experiment: Experiment,
    rows: SizedRows,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    device: torch.device,
) -> Callable[[int], Iterator[dict[str, torch.Tensor]]]:
    """n → the first n micro-batches that this rank would train on if rows were not grouped by length.

    Fewer where the rows do not suffice; each n gives the same batches again.
    """

    def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
        size = experiment.trainer.micro_batch_size
        order = list(EpochSampler(rows.lengths, experiment.seed))
        shares = [order[i : i + size] for i in range(0, len(order), size)][rank() :: world_size()]
        if len(order) < size * world_size():
            shares = [order]  # so few rows that every rank looks at all of them
        for share in shares[:count]:
            batch = collate([rows[i] for i in share])
            yield {key: value.to(device) for key, value in batch.items()}

    return batches


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written after the last step of training."""
    state = json.loads((folder / "trainer_state.json").read_text())
    stopped = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return stopped or state["global_step"] >= state["max_steps"]


def training_arguments(
    experiment: Experiment, output_dir: Path, *, train_rows: int, has_validation: bool
) -> TrainingArguments:
    """transformers' arguments for an experiment. Logging, progress and checkpoint rotation are ours.

    Epochs are written as steps: at an epoch's end Trainer would save first and evaluate afterwards, and a run killed
    in between would lose that evaluation; by steps it evaluates, then saves.
    """
    optim, machine = experiment.optim, experiment.trainer
    processes = world_size()
    on_gpu = machine.device != "cpu" and torch.cuda.is_available()
    accumulation = optim.batch_size // (machine.micro_batch_size * processes)
    epoch_steps = max(1, math.ceil(math.ceil(train_rows / (machine.micro_batch_size * processes)) / accumulation))
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        seed=experiment.seed,
        full_determinism=machine.deterministic and on_gpu,
        use_cpu=not on_gpu,
        per_device_train_batch_size=machine.micro_batch_size,
        per_device_eval_batch_size=machine.eval_batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=optim.epochs,
        max_steps=machine.max_steps or -1,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.lr_schedule if optim.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=optim.warmup_ratio,  # below 1: a share of all steps
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
        dataloader_num_workers=machine.num_workers,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu, "use_configured_state": bool(machine.zero)},
        ddp_find_unused_parameters=False,
        ddp_timeout=machine.timeout_s,
        deepspeed=deepspeed_settings(machine),
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["noise"] if experiment.dataset.kind == "captioned" else None,  # what marks a row that has a loss
        fp16=on_gpu and experiment.model.family == "sdxl" and experiment.model.dtype == "float16",  # for its GradScaler
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process is one device: Trainer would wrap the model in nn.DataParallel
    return arguments


_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}  # as transformers names them


def _metrics(log: MetricsLog) -> dict[str, float]:
    """What a run's rows come to."""
    found = {
        "first_loss": next((row["loss"] for row in log.rows() if "loss" in row), None),
        "train_loss": _mean_of_last_losses(log),
        "eval_loss": _last(log, "eval_loss"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _last(log: MetricsLog, key: str) -> float | None:
    return next((row[key] for row in reversed(log.rows()) if key in row), None)


def _mean_of_last_losses(log: MetricsLog, rows: int = 10) -> float | None:
    """Training loss of a run: one step's is too noisy to compare runs by."""
    losses = [row["loss"] for row in log.rows() if "loss" in row][-rows:]
    return statistics.fmean(losses) if losses else None


def _timing(effort: Effort, log: MetricsLog) -> dict[str, float | None]:
    rates = {
        key: statistics.median(found)
        for key in ("tokens_per_s", "images_per_s")
        if (found := [row[key] for row in log.rows() if key in row])
    }
    return {
        "train_s": round(effort.train_s, 3),
        "step_s_median": round(statistics.median(effort.step_s), 4) if effort.step_s else None,
        **({key: round(rate, 1) for key, rate in rates.items()} or {"tokens_per_s": None}),
        "perturb_s": round(effort.perturb_s, 3),
    }


def check_dtypes(found: Mapping[str, list[str]]) -> None:
    """What ZeRO holds of the trained parameters is FP32.

    Raises:
        RuntimeError: something is not.
    """
    lowered = {name: found[name] for name in ("trained", "masters", "gradients") if found[name] != ["float32"]}
    if lowered:
        raise RuntimeError(f"ZeRO does not keep what is trained in FP32 ({lowered}): use another DeepSpeed.")


def check_invariants(experiment: Experiment, model: nn.Module, backbone_sha256: dict[str, str | None]) -> None:
    """What must hold after every run: the backbone's bytes are untouched, what was trained is FP32 and finite.

    Raises:
        RuntimeError: one of them does not; the run must not count.
    """
    drifts = experiment.flat and experiment.rho.mode == "inplace"
    if backbone_sha256["before"] != backbone_sha256["after"] and not drifts:
        raise RuntimeError(
            f"The frozen backbone changed during training (SHA-256 {backbone_sha256['before']} before, "
            f"{backbone_sha256['after']} after): something wrote to its weights; the adapter fits neither."
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
