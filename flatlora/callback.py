"""FlatLoraCallback: Flat-LoRA in any transformers Trainer (TRL's too) by one line.

    trainer = Trainer(model=peft_model, ..., callbacks=[FlatLoraCallback(sigma=0.05)])

ε is put on at the start of each optimizer step, before its first micro-batch, and taken away after its last backward,
before the optimizer moves the adapter; evaluation, checkpoints and the saved adapter see the untouched backbone. So
do, inside a step, all passes without gradients (generation, a policy's old log-probabilities, a reference model) and
an evaluation after an interrupted step; not in rho.mode=inplace, where they read W + ε, and where an interrupted step
leaves ε in the weights until `close()` or the next training.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flatlora.layers import find_lora_layers
from flatlora.perturbation import WeightPerturbation
from flatlora.precision import bf16_support, cpu_features, slow_bf16_warning

logger = logging.getLogger(__name__)

STATE_FILE = "flatlora.safetensors"


class FlatLoraCallback(TrainerCallback):
    """Perturbs every LoRA-wrapped linear layer of the Trainer's model.

    Args:
        sigma: σ, the `rho` of the published command line (0.05 for language models, 0.15 for CLIP).
        seed: seed of the noise; the Trainer's `args.seed` when None.
        settings: passed on to `WeightPerturbation` (mode, ramp, every, resample, per_rank, scale, fan_in).
    """

    def __init__(self, sigma: float, *, seed: int | None = None, **settings: Any) -> None:
        self.sigma, self.seed, self.settings = sigma, seed, settings
        self.perturbation: WeightPerturbation | None = None
        self.noise_sha256: list[str] | None = None  # of each process's first layer, where there are several
        self._micro_batch = 0
        self._checkpointing: list[tuple[nn.Module, Any]] = []  # modules whose checkpointing is wrapped, with their own

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        layers = find_lora_layers(model)
        if not layers:
            raise ValueError(
                f"FlatLoraCallback found no LoRA layer in {type(model).__name__}: wrap the model with "
                "peft.get_peft_model(model, LoraConfig(...)) before you give it to the Trainer."
            )
        self._warn_of_slow_products(model, layers[0].weight, args)
        self.close()  # of a training that was interrupted
        self.perturbation = WeightPerturbation(
            layers,
            sigma=self.sigma,
            total_steps=state.max_steps,
            seed=args.seed if self.seed is None else self.seed,
            rank=args.process_index,
            world_size=args.world_size,
            training_only=True,
            **self.settings,
        )
        self._see_through_checkpointing(model)
        if state.global_step % self.perturbation.every:
            self.perturbation.load_state_dict(load_file(checkpoint_file(args, state, STATE_FILE)))

    @staticmethod
    def _warn_of_slow_products(model: nn.Module, weight: torch.Tensor, args: TrainingArguments) -> None:
        """Name what makes a CPU compute in BF16 that has no instructions for it."""
        setting = "bf16=True" if args.bf16 else f"dtype={str(weight.dtype).removeprefix('torch.')}"
        in_bf16 = args.bf16 or weight.dtype == torch.bfloat16
        if in_bf16 and weight.is_cpu and not bf16_support(cpu_features())[0]:
            remedy = "load the backbone with dtype=flatlora.fast_dtype() and leave bf16 out of TrainingArguments"
            logger.warning("%s", slow_bf16_warning(model, setting, remedy))

    def _see_through_checkpointing(self, model: nn.Module) -> None:
        """Let layers inside reentrant checkpoints read what the pass around them reads.

        torch runs the first forward of such a checkpoint without gradients, which elsewhere means W.
        """
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if getattr(function, "keywords", {}).get("use_reentrant"):
                self._checkpointing.append((module, function))
                module._gradient_checkpointing_func = _ReentrantCheckpoint(function, self.perturbation)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._micro_batch = 0
        self.perturbation.begin(state.global_step)
        if args.world_size > 1 and self.noise_sha256 is None and self.perturbation.perturbed:
            self._compare_noise(args.world_size)

    def _compare_noise(self, world_size: int) -> None:
        """Hash what each process reads in the first layer: shared noise is the same everywhere, or the run is void."""
        told: list[str] = [""] * world_size
        torch.distributed.all_gather_object(told, self.perturbation.weight_sha256(0))
        if not self.perturbation.per_rank and len(set(told)) > 1:
            raise RuntimeError(
                f"The processes perturb {self.perturbation.layers[0].name} by different noise ({told}), which is to be "
                "shared: they run on machines that compute differently; use alike ones, or rho.per_rank=true."
            )
        self.noise_sha256 = told

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._micro_batch += 1
        self.perturbation.next_micro_batch(self._micro_batch)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.perturbation.end()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.perturbation:
            self.perturbation.check_finite()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            self.save_state(folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """Take ε away and free the buffers, wherever training stopped; harmless at any time."""
        for module, function in self._checkpointing:
            module._gradient_checkpointing_func = function
        self._checkpointing = []
        if self.perturbation:
            self.perturbation.close()

    def save_state(self, folder: Path) -> None:
        """Write what a resume inside an `every` window needs; nothing when there is nothing to keep."""
        tensors = self.perturbation.state_dict() if self.perturbation else {}
        if tensors and not (folder / STATE_FILE).exists():
            save_file(tensors, folder / STATE_FILE)


class _ReentrantCheckpoint:
    """A module's `_gradient_checkpointing_func` whose layers know whether the pass around it takes gradients."""

    def __init__(self, function: Any, perturbation: WeightPerturbation) -> None:
        self.function, self.perturbation = function, perturbation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.perturbation.within_pass(gradients=torch.is_grad_enabled()):
            return self.function(*args, **kwargs)


def checkpoint_file(args: TrainingArguments, state: TrainerState, name: str) -> Path:
    """A callback's own file in the checkpoint that a training goes on from.

    Raises:
        FileNotFoundError: it is not there; with where it was looked for.
    """
    folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"Resuming at step {state.global_step} needs {name}, which is in none of {', '.join(map(str, folders))}: set "
        "args.resume_from_checkpoint to the checkpoint's folder, or resume from another one (with rho.every, a step "
        "that is a multiple of it needs none)."
    )
