"""FlatLoraCallback: Flat-LoRA in any transformers Trainer, including TRL's.

    trainer = Trainer(model=peft_model, ..., callbacks=[FlatLoraCallback(sigma=0.05)])

The weights are perturbed from the start of each optimizer step to its last backward, before the optimizer updates the
adapter. Evaluation, checkpoints and the saved adapter use the untouched backbone. In the modes copy and recompute, so
do all passes without gradients inside a step (generation, a policy's old log-probabilities, a reference model), and an
evaluation after an interrupted step. In the mode inplace these passes read W + ε, and an interrupted step leaves ε in
the weights until `close()` or the next training.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flatlora.perturb.layers import PerturbedLayer, find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils.precision import bf16_support, cpu_features, slow_bf16_warning

logger = logging.getLogger(__name__)

_DRAW = "flatlora_draw"  # key in TrainerState.stateful_callbacks; not a class name, which Trainer would try to restore


class FlatLoraCallback(TrainerCallback):
    """Perturbs every linear and convolution layer with a LoRA, DeLoRA or HiRA adapter in the Trainer's model.

    Args:
        sigma: σ, the `rho` of the published command line (0.05 for language models, 0.15 for CLIP).
        seed: seed of the noise; the Trainer's `args.seed` if None.
        settings: other fields of `NoiseSettings` (mode, ramp, every, interval, resample, per_rank, scale, fan_in).
    """

    def __init__(self, sigma: float, *, seed: int | None = None, **settings: Any) -> None:
        self.sigma, self.seed, self.settings = sigma, seed, settings
        self.perturbation: WeightPerturbation | None = None
        self.noise_sha256: list[str] | None = None  # of the first layer in each process, if there are several
        self._micro_batch, self._step = 0, 0
        self._hooks: list[RemovableHandle] = []
        self._pass: AbstractContextManager | None = None  # context around layers inside reentrant checkpoints

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        layers = find_lora_layers(model)
        if not layers:
            raise ValueError(
                f"FlatLoraCallback found no LoRA layer in {type(model).__name__}: wrap the model with "
                "peft.get_peft_model(model, LoraConfig(...)) before you pass it to the Trainer."
            )
        self._warn_of_slow_products(model, layers[0], args)
        self.close()  # of a training that was interrupted
        self.perturbation = WeightPerturbation(
            layers,
            sigma=self.sigma,
            total_steps=state.max_steps,
            seed=self._seed(args),
            rank=args.process_index,
            world_size=args.world_size,
            training_only=True,
            loss_scaled=args.mixed_precision == "fp16",
            **self.settings,
        )
        self._warn_of_no_noise(state.max_steps)
        self._see_through_checkpointing(model)
        if state.global_step % self._running.noise.every:
            self._restore_draw(args, state)
        else:
            state.stateful_callbacks.pop(_DRAW, None)  # it belongs to a window that has ended

    @property
    def _running(self) -> WeightPerturbation:
        """The perturbation of the current training."""
        if self.perturbation is None:
            raise RuntimeError("FlatLoraCallback has no perturbation before on_train_begin: let a Trainer call it.")
        return self.perturbation

    def _seed(self, args: TrainingArguments) -> int:
        return args.seed if self.seed is None else self.seed

    @staticmethod
    def _warn_of_slow_products(model: nn.Module, layer: PerturbedLayer, args: TrainingArguments) -> None:
        """Warn if the settings make a CPU without BF16 instructions compute in BF16."""
        dtype = layer.weight.dtype
        setting = "bf16=True" if args.bf16 else f"dtype={str(dtype).removeprefix('torch.')}"
        in_bf16 = args.bf16 or dtype == torch.bfloat16
        if in_bf16 and layer.device.type == "cpu" and not bf16_support(cpu_features())[0]:
            remedy = "load the backbone with dtype=flatlora.fast_dtype() and set bf16=False in TrainingArguments"
            logger.warning("%s", slow_bf16_warning(model, setting, remedy))

    def _warn_of_no_noise(self, total_steps: int) -> None:
        """Warn if σ_t is 0 in all steps. Ramps rise, so this is the case if it is 0 in the last window."""
        perturbation = self._running
        last = total_steps - 1
        if self.sigma > 0 and perturbation.sigma_at(last - last % perturbation.noise.interval) == 0:
            logger.warning(
                "sigma=%g has no effect in this training: the %s ramp begins at 0, and with every=%d all %d steps "
                "use its first value; train for more steps, lower `every`, or use ramp=constant.",
                self.sigma,
                perturbation.noise.ramp,
                perturbation.noise.every,
                total_steps,
            )

    def _see_through_checkpointing(self, model: nn.Module) -> None:
        """Let layers inside reentrant checkpoints read the same weights as the pass around them.

        torch runs the first forward of such a checkpoint without gradients, in which layers would read W. The hooks are
        on the models instead of the checkpoints, because TRL's trainers disable and enable these in every step.
        """
        functions = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
        if not any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions):
            return
        entered: list[nn.Module] = []

        def enter(module: nn.Module, args: Any) -> None:
            if not entered:  # inner models are part of the outermost model's pass
                self._pass = self._running.within_pass(gradients=torch.is_grad_enabled())
                self._pass.__enter__()
            entered.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if entered and entered[-1] is module:  # False if a hook before `enter` failed
                entered.pop()
                if not entered:
                    self._leave_pass()

        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                self._hooks.append(module.register_forward_pre_hook(enter))
                self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._running.active and state.global_step == self._step:
            return  # an epoch of streamed rows ended inside an accumulation window, and the same step continues
        self._micro_batch, self._step = 0, state.global_step
        self._running.begin(state.global_step)
        if state.global_step % self._running.noise.every == 0:
            self._keep_draw(args, state)
        if args.world_size > 1 and self.noise_sha256 is None and self._running.perturbed:
            self._compare_noise(args.world_size)

    def _compare_noise(self, world_size: int) -> None:
        """Compare the hash of the first layer's perturbed weight over the processes: shared noise must be equal."""
        digests: list[str] = [""] * world_size
        torch.distributed.all_gather_object(digests, self._running.weight_sha256(0))
        if not self._running.noise.per_rank and len(set(digests)) > 1:
            raise RuntimeError(
                f"The processes perturb {self._running.layers[0].name} with different noise ({digests}), but must "
                "share it: their machines compute differently; use machines of one kind, or rho.per_rank=true."
            )
        self.noise_sha256 = digests

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._micro_batch += 1
        self._running.next_micro_batch(self._micro_batch)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self._running.end()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.perturbation:
            self._running.check_finite()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        try:
            self._running.check_finite()  # up to the last logged step
        finally:
            self.close()

    def close(self) -> None:
        """Remove ε and free the buffers; can be called at any time, such as after an interrupted training."""
        self._leave_pass()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.perturbation:
            self._running.close()

    def _leave_pass(self) -> None:
        if self._pass is not None:
            self._pass.__exit__(None, None, None)
            self._pass = None

    def _keep_draw(self, args: TrainingArguments, state: TrainerState) -> None:
        """Put the draw of a window into the Trainer's state, and so into every checkpoint within the window.

        A file of its own would not do: a callback does not know which folder a training is resumed from, and an earlier
        training may have left another file there.
        """
        tensors = self._running.state_dict()
        if tensors:
            packed = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            state.stateful_callbacks[_DRAW] = {
                "settings": self._settings_of_draw(args),
                "sha256": hashlib.sha256(packed).hexdigest(),
                "tensors": base64.b64encode(packed).decode(),
            }

    def _settings_of_draw(self, args: TrainingArguments) -> dict[str, Any]:
        """The settings that must not change within a window."""
        names = ("sigma", "ramp", "every", "resample", "per_rank", "scale", "fan_in")
        return {"seed": self._seed(args), **{name: getattr(self._running.noise, name) for name in names}}

    def _restore_draw(self, args: TrainingArguments, state: TrainerState) -> None:
        """Continue with the draw of the window that the checkpoint was written in.

        Raises:
            ValueError: the checkpoint has none, or one of other settings or layers.
        """
        draw, settings = state.stateful_callbacks.get(_DRAW), self._settings_of_draw(args)
        if draw is None:
            raise self._cannot_resume(state, "the checkpoint does not contain it (flatlora_draw in trainer_state.json)")
        saved = draw["settings"]
        if differing := [name for name in settings if saved.get(name) != settings[name]]:
            changes = ", ".join(f"{name} was {saved.get(name)!r} and is {settings[name]!r}" for name in differing)
            raise self._cannot_resume(state, f"it was drawn with other settings ({changes})")
        packed = base64.b64decode(draw["tensors"])
        if hashlib.sha256(packed).hexdigest() != draw["sha256"]:
            raise self._cannot_resume(state, "the draw in the checkpoint is broken")
        tensors = load(packed)
        if int(tensors["step"]) != state.global_step - state.global_step % self._running.noise.every:
            raise self._cannot_resume(state, f"the draw in the checkpoint is that of step {int(tensors['step'])}")
        rows = {layer.name: (layer.shape[0],) for layer in self._running.layers}
        if rows != {name: tuple(c.shape) for name, c in tensors.items() if name != "step"}:
            raise self._cannot_resume(state, "it was drawn for other layers")
        self._running.load_state_dict(tensors)

    def _cannot_resume(self, state: TrainerState, reason: str) -> ValueError:
        every = self._running.noise.every
        return ValueError(
            f"Cannot resume at step {state.global_step}, inside a window of every={every} steps that share one ε: "
            f"{reason}; resume with the original settings, or from a checkpoint whose step is a multiple of {every}."
        )


def checkpoint_file(args: TrainingArguments, state: TrainerState, name: str) -> Path:
    """Path of a callback's own file in the checkpoint that a training of this suite resumes from.

    Raises:
        FileNotFoundError: it does not exist; the message lists the folders that were searched.
    """
    folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"Resuming at step {state.global_step} needs {name}, which is in none of {', '.join(map(str, folders))}: set "
        "args.resume_from_checkpoint to the folder of the checkpoint, or resume from another one."
    )
