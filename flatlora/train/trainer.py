"""transformers' Trainer with repeatable data order, whole checkpoints, and the steps that methods ask for."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, TorchDynamoPlugin
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from flatlora.config.experiment import Experiment
from flatlora.fused.acceleration import GraphedMicroStep
from flatlora.fused.lora_linear import fused_throughout
from flatlora.methods import AdapterMethod, Training, uses_kernels
from flatlora.models.family import FAMILIES
from flatlora.models.starts import load_adapter, mark_checkpoint
from flatlora.train import checkpoint
from flatlora.train.distributed import is_main_process, zero_step
from flatlora.train.recorder import StepRecorder, put_back_rows
from flatlora.train.samplers import BucketSampler, EpochSampler
from flatlora.train.saving import BackgroundWriter, to_host
from flatlora.utils.files import out_of_space
from flatlora.utils.labels import IGNORED_LABEL, row_losses
from flatlora.utils.precision import autocast, choose_precision


class FlatTrainer(Trainer):
    """Trainer with `EpochSampler`, complete checkpoints, the method's optimizer, and what the regularizer asks for."""

    def __init__(
        self,
        *args: Any,
        experiment: Experiment,
        method: AdapterMethod,
        data_sha256: str,
        base: str,
        recorder: StepRecorder,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.regularizer = method, recorder.regularizer
        self.family = FAMILIES[experiment.model.family]
        self.model_accepts_loss_kwargs = self.family.token_mean  # else Trainer divides by the number of micro-batches
        self.experiment, self.data_sha256, self.base, self.recorder = experiment, data_sha256, base, recorder
        self.step_loss = torch.zeros((), device=self.args.device)  # of the running optimizer step
        self.step_units = torch.zeros((), device=self.args.device)  # tokens, or images, since the newest row
        self._epoch_sampler: EpochSampler | None = None
        self._micro_batches: list[dict[str, Any]] = []  # of the running step, where its gradient is taken twice
        if self.args.fp16:
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)  # the scaler alone is wanted
        self.writer = BackgroundWriter()
        self._left_to_write: list[Callable[[], None]] = []  # of the checkpoint that is being made
        self.graphed = self._graphed_micro_step()
        self._precision = choose_precision(experiment.trainer.autocast, experiment.model.dtype, self.args.device)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """No torch.compile that $ACCELERATE_DYNAMO_BACKEND alone asks for."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

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
        return autocast(self.args.device, self._precision, cache_enabled)

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
        self.step_units += _units(inputs).to(self.step_units.device)
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
        """The model's own loss, or that of the rows as the regularizer weighs them."""
        if not (self.regularizer and self.regularizer.reads_rows):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        shifted = inputs.get("shift_labels")  # of the tokens whose logits are kept
        labels = inputs["labels"] if shifted is None else shifted
        predicts_next = self.model_accepts_loss_kwargs and shifted is None
        sums, counts = row_losses(outputs.logits, labels, shifted=predicts_next)
        weights = self.regularizer.weigh_rows(sums / counts.clamp_min(1))
        loss = (weights * sums).sum() / (weights * counts).sum().clamp_min(1)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            loss = loss * counts.sum() * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

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
        """Replace the step's gradient by that at the point which the regularizer moves to."""
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
        """Each row in one process alone: accelerate repeats rows until all processes have equally many batches."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            Subset(rows, range(self.args.process_index, len(rows), self.args.world_size)),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # seeds the workers; torch's own generator is the training's
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The sum of all losses over their number: the same for any number of processes and any batch size.

        Deviation from transformers, which takes the mean of the batches' means.
        """
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # sum of losses, their number
        for batch in dataloader:
            if count := _losses_of(batch):
                with self.compute_loss_context_manager():
                    mean = self.model(**self._prepare_inputs(batch)).loss
                totals[0] += mean.double() * count
                totals[1] += count
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        rows = len(dataloader.dataset.dataset)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights of all adapters, and nothing else: Trainer reads one of several, and may change what is trained."""
        if not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        for name in self.model.peft_config:
            folder = Path(resume_from_checkpoint) / ("" if name == "default" else name)
            load_adapter(self.model, folder, name)

    def _graphed_micro_step(self) -> GraphedMicroStep | None:
        """Replayed micro-steps where nothing in them needs the host.

        ZeRO listens to every parameter whose gradient autograd adds up: it must be none.
        """
        machine = self.experiment.trainer
        if not (self._on_gpu and self.family.graphed) or machine.gradient_checkpointing or self.args.fp16:
            return None  # GradScaler wants each loss before its backward
        if machine.zero and not fused_throughout(self.model):
            return None
        return GraphedMicroStep(self._micro_loss, self.model, largest=self.family.largest_graph)

    @property
    def _on_gpu(self) -> bool:
        return uses_kernels(self.experiment) and self.args.device.type == "cuda"

    def _without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On a GPU, where transformers would look at the mask on the host and wait for the device."""
        return self.family.without_mask(inputs) if self._on_gpu else inputs

    def _micro_loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.autocast_smart_context_manager():
            return self.model(**inputs).loss

    def _graphed_training_step(self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        """A micro-step of `GraphedMicroStep`."""
        if not self.model.training:  # after an evaluation; DDP's own flag would not tell
            model.train()
        shares = self.current_gradient_accumulation_steps * self.args.world_size
        static = self.family.graph_inputs(self._prepare_inputs(inputs), items, shares)
        loss = self.graphed(static, state=self.regularizer.state if self.regularizer else None)
        return loss * self.args.world_size  # as Trainer has it, whose mean over processes is that of all tokens

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint of this moment, which counts once its manifest is written; training goes on meanwhile."""
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
        """In the writer's thread: the large files, from copies on the host, and the manifest that makes them count."""
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
                base=self.base,
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


def _units(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of a micro-batch without its padding, or its pictures."""
    mask = inputs.get("attention_mask")
    return torch.tensor(len(next(iter(inputs.values())))) if mask is None else mask.sum()


def _losses_of(batch: Mapping[str, torch.Tensor]) -> int:
    """How many losses a model's loss is the mean of: tokens with a label, or rows."""
    labels = batch.get("shift_labels", batch.get("labels"))
    return len(next(iter(batch.values()))) if labels is None else int((labels != IGNORED_LABEL).sum())


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written after the last step of training."""
    state = json.loads((folder / "trainer_state.json").read_text())
    stopped = state["stateful_callbacks"].get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return stopped or state["global_step"] >= state["max_steps"]


def training_of(experiment: Experiment, arguments: TrainingArguments) -> Training:
    """What a method is told of the training around it."""
    return Training(
        experiment.optim,
        seed=experiment.seed,
        accumulation=arguments.gradient_accumulation_steps,
        world_size=arguments.world_size,
        fused=arguments.device.type == "cuda",
        autocast=choose_precision(experiment.trainer.autocast, experiment.model.dtype, arguments.device).autocast,
        token_mean=FAMILIES[experiment.model.family].token_mean,
    )
