"""transformers' Trainer with reproducible data order, complete checkpoints, and the training steps of our methods."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import AutocastKwargs, TorchDynamoPlugin
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from flatlora.config.experiment import Experiment
from flatlora.fused.acceleration import GraphedMicroStep
from flatlora.fused.lora_linear import fused_throughout
from flatlora.fused.varlen import joins_rows, moved, pack, tokens_that_fit
from flatlora.methods import ADAPTERS, AdapterMethod, Training, uses_kernels
from flatlora.models.family import FAMILIES, LOSS_SCALE
from flatlora.models.fit import position_tables
from flatlora.models.starts import load_adapter, mark_checkpoint
from flatlora.train import checkpoint
from flatlora.train.distributed import is_main_process, largest, replicate_adapter, zero_step
from flatlora.train.recorder import StepRecorder, put_back_rows
from flatlora.train.samplers import BucketSampler, EpochSampler
from flatlora.train.saving import BackgroundWriter, to_host
from flatlora.utils.files import out_of_space
from flatlora.utils.labels import IGNORED_LABEL, row_losses
from flatlora.utils.precision import autocast, choose_precision, float32_matmul_precision
from flatlora.utils.shards import is_sharded, reshard

logger = logging.getLogger(__name__)


class FlatTrainer(Trainer):
    """Trainer with `EpochSampler`, complete checkpoints, the method's optimizer, and the regularizer's gradients."""

    def __init__(
        self,
        *args: Any,
        experiment: Experiment,
        method: AdapterMethod,
        data_sha256: str,
        base: Callable[[], str],
        recorder: StepRecorder,
        joined: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.regularizer = method, recorder.regularizer
        self.family = FAMILIES[experiment.model.family]
        self.model_accepts_loss_kwargs = self.family.token_mean  # else Trainer divides by the number of micro-batches
        self.experiment, self.data_sha256, self.base, self.recorder = experiment, data_sha256, base, recorder
        self.step_loss = torch.zeros((), device=self.args.device)  # of the current optimizer step
        self.step_units = torch.zeros((), device=self.args.device)  # tokens or images since the last logged row
        self._epoch_sampler: EpochSampler | None = None
        self._micro_batches: list[dict[str, Any]] = []  # of the current step, if its gradient is computed twice
        self._surplus = 0  # micro-batches that are repeated at the end of an epoch, over all processes
        self._repeated: dict[str, Any] | None = None  # micro-batch of the current step that does not count
        self._joined = joined  # whether a batch is all rows of a step, which are joined into micro-batches
        self._shares = 1.0  # micro-batches of the current step that count, divided by the number of processes
        if self.args.fp16:
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)  # only the loss scaler is used
        self._sharded = experiment.trainer.fsdp and self.args.world_size > 1  # a forward needs all processes
        self.writer = BackgroundWriter()
        self._left_to_write: list[Callable[[], None]] = []  # of the current checkpoint, for the writer thread
        self.graphed = self._graphed_micro_step()
        self._positions = min(position_tables(self.model).values(), default=None) if self.graphed else None
        self._precision = choose_precision(experiment.trainer.autocast, experiment.model.dtype, self.args.device)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Turns off torch.compile, which $ACCELERATE_DYNAMO_BACKEND would turn on."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leaves a sharded model as it was loaded: its shares may be on the host."""
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> DataLoader:
        """Returns Trainer's loader; several processes get the micro-batches that one gets, in turn.

        accelerate fills a short last micro-batch with rows of the epoch's beginning, unless the batch size is None:
        then it only repeats whole micro-batches, for processes that have none left. `get_batch_samples` discounts them.
        """
        loader = super().get_train_dataloader()
        if self._joined:
            loader.device = None  # rows are joined on the host
        if self.args.world_size > 1:
            loader.batch_sampler.batch_size = None
            self._surplus = -loader.batch_sampler.total_length % self.args.world_size
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """Returns this process's micro-batches of a step and the number of labels of all; repeated ones have none."""
        batches, processes = list(itertools.islice(epoch_iterator, num_batches)), self.args.world_size
        surplus = self._surplus if self.accelerator.gradient_state.end_of_dataloader else 0
        self._shares = (len(batches) * processes - surplus) / processes
        self._repeated = batches[-1] if self.args.process_index >= processes - surplus else None
        if self._repeated is not None and self.family.token_mean:
            _drop_labels(self._repeated)
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> torch.Tensor | int | None:
        if not self._joined:
            return super()._get_num_items_in_batch(batch_samples, device)
        items = sum((batch["shift_labels"] != IGNORED_LABEL).sum() for batch in batch_samples)
        items = moved({"items": items}, device)["items"]  # in Trainer's code the host waits for the copy
        if self.args.world_size > 1:
            torch.distributed.all_reduce(items)
        return items

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
        """Sets the epoch of the sampler directly: accelerate does not reach it in a resumed, sharded loader."""
        self._epoch_sampler.set_epoch(epoch)
        if hasattr(self.train_dataset, "begin_epoch"):  # rows with random samples in each epoch
            self.train_dataset.begin_epoch(epoch)

    # A step of Trainer's walks through all modules five times (parameters(), zero_grad(), num_parameters()): 20 ms for
    # T5-base with LoRA, where its kernels take 30. The list of parameters does not change while a model is trained.

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        wrapped = super()._wrap_model(model, *args, **kwargs)
        if self._sharded and wrapped is self.model:
            wrapped = replicate_adapter(wrapped)
        self._parameters = list(wrapped.parameters())
        if not self.experiment.trainer.zero:  # DeepSpeed's engine zeroes more than .grad
            # Not a method of this object: the model outlives it, and would keep the optimizer's state in memory.
            wrapped.zero_grad = functools.partial(_drop_gradients, self._parameters)
        return wrapped

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        return self.accelerator.clip_grad_norm_(self._parameters, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0: nothing reads Trainer's estimate, for which it counts all parameters in every micro-step."""
        return 0

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        *args: Any,
        learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Logs a step while a GPU computes the next one; Trainer waits for the step, and the GPU then for the host.

        All rows are complete before an evaluation, a checkpoint and the end.
        """
        control, step = self.control, self.state.global_step
        # A row ends at each checkpoint, so that a resumed run counts the tokens of whole rows.
        due = (control.should_log or control.should_save) and step > self._globalstep_last_logged
        self._log_begun_row()
        control = self.control
        if due:
            self._globalstep_last_logged = step
            self.recorder.begin_row(self.state, learning_rate, grad_norm)
        control.should_log = False
        if (
            not self._logs_later
            or step >= self.state.max_steps
            or control.should_evaluate
            or control.should_save
            or control.should_training_stop
        ):
            self._log_begun_row()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    @property
    def _logs_later(self) -> bool:
        """Whether a step is logged while the device computes the next one; a CPU has computed it by then."""
        return self.args.device.type == "cuda"

    def _log_begun_row(self) -> None:
        if logs := self.recorder.finish_row():
            self.state.log_history.append(logs)
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Returns trainer.autocast as a context manager; unlike bf16=True, it does not convert all logits to FP32."""
        return autocast(self.args.device, self._precision, cache_enabled)

    def train_or_load(self, resume_from: Path | None) -> None:
        """Trains, or only loads a checkpoint of the last step, after which `train` would run one more step."""
        if resume_from is None or not _is_complete(resume_from):
            self.model.train()  # the backbone was loaded in evaluation mode
            try:
                self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            finally:
                self.writer.join()
            self.writer.check()
            return
        self._load_from_checkpoint(str(resume_from))
        self.state = TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
        if is_main_process():
            put_back_rows(self.recorder.log, self.state)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.method.optimizer(
                self.model, self.experiment.peft, training_of(self.experiment, self.args)
            )
            self.optimizer = super().create_optimizer(model)
            if self.regularizer:
                self.regularizer.extend_optimizer(self.optimizer, self.args.learning_rate)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.writer.check()
        if inputs is not self._repeated:
            self.step_units += _units(inputs)
        loss = self._micro_step(model, inputs, num_items_in_batch)
        self.step_loss += loss
        last = self.accelerator.gradient_state.sync_gradients
        if last:
            self._sum_gradients(model)
        if self.regularizer and self.regularizer.second_gradient:
            self._micro_batches.append(inputs)
            if last:
                self._take_gradient_anew(model, num_items_in_batch)
        if self.regularizer and last:
            self.regularizer.finish_gradient()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Returns the model's own loss, or the loss of the rows weighted by the regularizer."""
        if not (self.regularizer and self.regularizer.reads_rows):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        shifted = inputs.get("shift_labels")  # labels of the tokens whose logits are computed
        labels = inputs["labels"] if shifted is None else shifted
        predicts_next = self.model_accepts_loss_kwargs and shifted is None
        sums, counts = row_losses(outputs.logits, labels, shifted=predicts_next)
        weights = self.regularizer.weigh_rows(sums / counts.clamp_min(1))
        loss = (weights * sums).sum() / (weights * counts).sum().clamp_min(1)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            loss = loss * counts.sum() * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _sum_gradients(self, model: nn.Module) -> None:
        """Reduces gradients over processes once per step; only for graphed micro-steps, which bypass DDP's hooks."""
        if self.graphed is None:
            return
        if self.experiment.trainer.zero:
            zero_step(model, self.graphed.gradient)
        elif self.args.world_size > 1:
            torch.distributed.all_reduce(self.graphed.gradient)

    def _micro_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """Runs forward and backward of a micro-batch, accumulates gradients and returns the loss.

        Families without `token_mean` divide it by the number of micro-batches; a repeated one has a loss of zero, and
        takes part because all processes must reduce the gradients.
        """
        self.current_gradient_accumulation_steps = math.inf if inputs is self._repeated else self._shares
        with float32_matmul_precision(self.experiment.trainer.matmul_precision):
            if self.graphed is None:
                return super().training_step(model, self._without_mask(inputs), num_items_in_batch)
            if self._joined:
                return self._joined_training_step(model, inputs, num_items_in_batch)
            return self._graphed_training_step(model, inputs, num_items_in_batch)

    def _take_gradient_anew(self, model: nn.Module, num_items_in_batch: Any) -> None:
        """Replaces the step's gradient by the one at the point that the regularizer moves the weights to."""
        micro_batches, self._micro_batches = self._micro_batches, []
        trained = [p for p in model.parameters() if p.requires_grad]
        self.regularizer.ascend(trained)
        if self.graphed is None:
            self.model.zero_grad()
        else:
            self.graphed.restart()
        for number, inputs in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                self._micro_step(model, inputs, num_items_in_batch)
        self._sum_gradients(model)
        self.regularizer.descend()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "evaluating"):
                    stack.enter_context(callback.evaluating())
            return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Returns a loader of this process's rows, without accelerate, which repeats rows to even out the batches."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            Subset(rows, range(self.args.process_index, len(rows), self.args.world_size)),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # seeds the workers, to leave the global generator to training
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Computes the mean over all losses, which is independent of the number of processes and the batch size.

        transformers takes the mean of the batches' means instead.
        """
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # sum and number of losses
        for batch in self._evened_out(dataloader):
            count = _losses_of(batch)
            if count or self._sharded:
                with self.compute_loss_context_manager():
                    mean = self.model(**self._prepare_inputs(batch)).loss
            if count:
                totals[0] += mean.double() * count
                totals[1] += count
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self._sharded:
            reshard(self.model)  # on all processes, as saving does on the main one
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        rows = len(dataloader.dataset.dataset)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _evened_out(self, dataloader: DataLoader) -> Iterator[dict[str, Any]]:
        """Yields the batches; then one without labels if the weights are sharded and other processes have one more."""
        yield from dataloader
        rows = dataloader.dataset.dataset
        most = math.ceil(math.ceil(len(rows) / self.args.world_size) / dataloader.batch_size)
        if self._sharded and len(dataloader) < most:
            batch = self.data_collator([rows[0]])
            _drop_labels(batch)
            yield batch

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights of all adapters; Trainer loads only one, and may change which parameters are trained."""
        if not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        for name in self.model.peft_config:
            folder = Path(resume_from_checkpoint) / ("" if name == "default" else name)
            load_adapter(self.model, folder, name)

    def _load_rng_state(self, folder: str | None) -> None:
        """Restores this process's random generators, which dropout reads.

        The generators of another number of processes do not fit: then each is seeded by (seed, step, rank).
        """
        if folder is None or checkpoint.processes_of(Path(folder)) == self.args.world_size:
            super()._load_rng_state(folder)
            return
        words = np.random.SeedSequence([self.args.seed, self.state.global_step, self.args.process_index])
        set_seed(int(words.generate_state(1)[0]))

    def _graphed_micro_step(self) -> GraphedMicroStep | None:
        """Returns CUDA-graph micro-steps; None if a micro-step needs the host.

        ZeRO hooks into every parameter whose gradient autograd accumulates, so there must be none: all are fused.
        """
        machine = self.experiment.trainer
        if not (self._on_gpu and self.family.graphed) or machine.gradient_checkpointing or self.args.fp16:
            return None  # GradScaler scales each loss before its backward
        if machine.zero and not fused_throughout(self.model):
            return None
        largest_graph = 0 if self._sharded else self.family.largest_graph  # FSDP2 gathers weights from the host
        return GraphedMicroStep(self._micro_loss, self.model, largest=largest_graph)

    @property
    def _on_gpu(self) -> bool:
        return uses_kernels(self.experiment) and self.args.device.type == "cuda"

    def _without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Drops the attention mask on a GPU, where transformers would inspect it on the host and synchronize."""
        return self.family.without_mask(inputs) if self._on_gpu else inputs

    def _micro_loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        given = {key: value for key, value in inputs.items() if key != LOSS_SCALE}
        with self.autocast_smart_context_manager():
            loss = self.model(**given).loss
        return loss * inputs[LOSS_SCALE] if LOSS_SCALE in inputs else loss

    def _graphed_training_step(self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        """Runs a micro-step with `GraphedMicroStep`."""
        self._back_to_training(model)
        shares = self.current_gradient_accumulation_steps * self.args.world_size
        static = self.family.graph_inputs(self._prepare_inputs(inputs), items, shares, self._positions)
        loss = self.graphed(static, state=self.regularizer.state if self.regularizer else None)
        return loss * self.args.world_size  # as in Trainer: the mean over processes is the mean over all tokens

    def _joined_training_step(self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        """Runs the micro-steps of a whole optimizer step with `GraphedMicroStep`."""
        self._back_to_training(model)
        device, total = self.args.device, torch.zeros_like(self.step_loss)
        micro_batches = pack(inputs, self._most_tokens(items))
        if self._sharded:  # all processes gather the weights equally often
            missing = largest(len(micro_batches)) - len(micro_batches)
            micro_batches += missing * _without_loss(inputs)
        for each in micro_batches:
            static = moved(each, device) | {"num_items_in_batch": items}
            total += self.graphed(static, state=self.regularizer.state if self.regularizer else None)
        return total * self.args.world_size

    def _most_tokens(self, items: torch.Tensor) -> int:
        """Returns the limit of a micro-batch: the setting, that of the run before it was resumed, or by memory."""
        stats, setting = self.recorder.before, self.experiment.trainer.micro_batch_tokens
        if stats.micro_batch_tokens is None:
            stats.micro_batch_tokens = setting or self._tokens_that_fit(items)
        return stats.micro_batch_tokens

    def _tokens_that_fit(self, items: torch.Tensor) -> int:
        """Returns the limit by memory, that of the process with the least: the record, and a resumed run, have one."""
        device = self.args.device
        most = tokens_that_fit(
            lambda inputs: self._micro_loss(inputs | {"num_items_in_batch": items}), self.model, device
        )
        if self.args.world_size == 1:
            return most
        least = torch.tensor(most, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)

    def _back_to_training(self, model: nn.Module) -> None:
        if not self.model.training:  # after an evaluation, which DDP's own flag does not show
            model.train()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint asynchronously; it is valid once its manifest is written."""
        self.writer.wait()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        consolidate = getattr(getattr(self.optimizer, "optimizer", self.optimizer), "consolidate_state_dict", None)
        with self._removed_if_broken(folder):
            if consolidate is not None:
                consolidate()
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.recorder.stats().write(folder)
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "save_state"):
                        callback.save_state(folder)
                mark_checkpoint(folder, folder.parent / "start")
            self.accelerator.wait_for_everyone()
        left, self._left_to_write = self._left_to_write, []
        if self.args.should_save:
            self.writer.start(functools.partial(self._finish_checkpoint, folder, left))

    def _finish_checkpoint(self, folder: Path, left: Sequence[Callable[[], None]]) -> None:
        """Writes the large files from copies on the host, and then the manifest; runs in the writer's thread."""
        with self._removed_if_broken(folder):
            for write in left:
                write()
            self.recorder.log.flush()
            checkpoint.write_manifest(
                folder,
                step=checkpoint.step_of(folder),
                config_sha256=self.experiment.sha256(),
                data_sha256=self.data_sha256,
                world_size=self.args.world_size,
                zero=self.experiment.trainer.zero,
                base=self.base(),
            )
            checkpoint.rotate(folder.parent, self.experiment.trainer.save_total_limit)

    @contextlib.contextmanager
    def _removed_if_broken(self, folder: Path) -> Iterator[None]:
        """Deletes a checkpoint folder if writing it in the block fails."""
        try:
            yield
        except BaseException as error:
            full = isinstance(error, Exception) and out_of_space(error, folder)
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # frees space on a full disk
            if full:
                raise OSError(f"no space left for {folder}; free some, then go on with resume=true") from error
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves rank 0's weights: they are complete under ZeRO-2 too, for which Trainer copies them all to the host."""
        if self.args.should_save:
            self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if isinstance(self.model, PeftModel):  # small, and PEFT decides which tensors are saved
            self.model.create_or_update_model_card = lambda folder: None  # half of the time of a checkpoint
            try:
                super()._save(output_dir, state_dict)
            finally:
                del self.model.create_or_update_model_card
            return
        weights, folder = to_host(self.model.state_dict()), Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.processing_class.save_pretrained(folder)
        self._left_to_write.append(lambda: self.model.save_pretrained(folder, state_dict=weights))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # each process writes its own shard
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            state, folder = to_host(self.optimizer.state_dict()), Path(output_dir)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            self._left_to_write.append(lambda: torch.save(state, folder / OPTIMIZER_NAME))


def _drop_gradients(parameters: Sequence[nn.Parameter], set_to_none: bool = True) -> None:
    """`nn.Module.zero_grad` of a list of parameters."""
    for parameter in parameters:
        parameter.grad = None


def _units(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | int:
    """Returns the number of tokens without padding, or of images, in a micro-batch."""
    mask = inputs.get("attention_mask")
    return len(next(iter(inputs.values()))) if mask is None else mask.sum()


def _drop_labels(batch: dict[str, Any]) -> None:
    for name in batch.keys() & {"labels", "shift_labels"}:
        batch[name] = torch.full_like(batch[name], IGNORED_LABEL)


def _without_loss(batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Returns a joined micro-batch of the first row without labels, whose loss and gradients are zero."""
    row = {name: tensor[:1] for name, tensor in batch.items()}
    _drop_labels(row)
    return pack(row, row["attention_mask"].numel())


def _losses_of(batch: Mapping[str, torch.Tensor]) -> int:
    """Returns the number of losses that a model's loss is the mean of: tokens with a label, or rows."""
    labels = batch.get("shift_labels", batch.get("labels"))
    return len(next(iter(batch.values()))) if labels is None else int((labels != IGNORED_LABEL).sum())


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written after the last step of training."""
    state = json.loads((folder / "trainer_state.json").read_text())
    stopped = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return stopped or state["global_step"] >= state["max_steps"]


def trains_on_joined_rows(experiment: Experiment, model: nn.Module) -> bool:
    """Whether the rows of a step are joined into micro-batches of trainer.micro_batch_tokens, without padding."""
    machine, joined = experiment.trainer, joins_rows(model) and may_join_rows(experiment)
    if machine.micro_batch_tokens and not joined:
        logger.warning(
            "trainer.micro_batch_tokens=%d has no effect: rows are joined only for a decoder-only model in BF16 on a "
            "GPU, with trainer.kernels=auto and without ZeRO, gradient checkpointing, rho.resample=micro_batch "
            "and AdaLoRA; micro-batches have trainer.micro_batch_size=%d rows.",
            *(machine.micro_batch_tokens, machine.micro_batch_size),
        )
    return joined


def may_join_rows(experiment: Experiment) -> bool:
    """Whether the settings allow joined rows; the model must too (`joins_rows`)."""
    machine = experiment.trainer
    return (
        machine.micro_batch_tokens != 0
        and not (machine.gradient_checkpointing or machine.zero)
        and getattr(experiment.rho, "resample", "step") == "step"  # else ε belongs to micro-batches of rows
        and not ADAPTERS[experiment.peft.method].adds_loss
    )


def training_of(experiment: Experiment, arguments: TrainingArguments) -> Training:
    """Returns the properties of the training that a method depends on."""
    return Training(
        experiment.optim,
        seed=experiment.seed,
        accumulation=arguments.gradient_accumulation_steps,
        world_size=arguments.world_size,
        fused=arguments.device.type == "cuda",
        autocast=choose_precision(experiment.trainer.autocast, experiment.model.dtype, arguments.device).autocast,
        token_mean=FAMILIES[experiment.model.family].token_mean,
    )
