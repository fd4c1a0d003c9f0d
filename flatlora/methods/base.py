"""Base classes of methods and their two registries: `peft` (adapter methods) and `rho` (regularizers)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import TrainerCallback

from flatlora.config.experiment import Experiment
from flatlora.config.sections import OptimConfig, PeftConfig, RhoConfig
from flatlora.models.family import FAMILIES
from flatlora.utils.errors import SettingError
from flatlora.utils.registry import Registry

_NOT_SHARDED = "this method needs whole weights and gradients, and FSDP2 leaves each process a part of them"


def _no_batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
    raise RuntimeError(f"The initial adapter needs {count} batches, but Start(batches=...) was not given.")


@dataclass(frozen=True)
class Start:
    """What a method may use to initialize its adapter.

    Args:
        seed: seed of all random draws.
        folder: folder of the initial adapter of a method that computes one. A resumed run reads it, so that it starts
            from the same bytes. None: it is not kept, and `save` cannot convert the adapter.
        batches: n → the first n micro-batches of the training rows, on the model's device; the same on every process.
        rank, world_size: rank of this process and number of processes.
        resumed: whether the run continues from a checkpoint, which belongs to the initial adapter in `folder`.
        init_from: folder of a saved adapter whose tensors are the initial ones; None for the method's own.
    """

    seed: int
    folder: Path | None = None
    batches: Callable[[int], Iterator[dict[str, torch.Tensor]]] = _no_batches
    rank: int = 0
    world_size: int = 1
    resumed: bool = False
    init_from: Path | None = None


@dataclass(frozen=True)
class Training:
    """What a method may need to know about the training."""

    optim: OptimConfig
    seed: int = 0
    accumulation: int = 1  # micro-batches per optimizer step
    world_size: int = 1
    fused: bool = False  # whether torch's fused optimizers support the device
    autocast: torch.dtype | None = None  # of the forward passes
    token_mean: bool = True  # whether the loss is the mean over the tokens of a step (causal_lm), not of a micro-batch

    def adamw_settings(self) -> dict[str, Any]:
        """Keyword arguments of torch.optim.AdamW, without lr and weight decay."""
        betas = (self.optim.adam_beta1, self.optim.adam_beta2)
        return {"betas": betas, "eps": self.optim.adam_epsilon, "fused": self.fused}


class AdapterMethod:
    """Makes a backbone trainable. One instance is registered, so it must not hold the state of a run.

    `refuses` maps each rho method that it is incompatible with to the reason.
    """

    Config: ClassVar[type[PeftConfig]] = PeftConfig
    refuses: ClassVar[Mapping[str, str]] = {}
    has_optimizer: ClassVar[bool] = False  # its own, which optim.optimizer does not choose
    reads_gradients: ClassVar[bool] = False  # reads the whole gradient of each parameter before the optimizer step
    adds_loss: ClassVar[bool] = False  # to that of each micro-batch, whose number it must know
    needs_dense: ClassVar[bool] = False  # computes with, moves or trains W, so the backbone must not be packed
    not_of_diffusion: ClassVar[str | None] = None  # why it does not support diffusion models
    not_sharded: ClassVar[str | None] = _NOT_SHARDED  # why it does not support trainer=fsdp; None if it does

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        """Errors about choices of the experiment that are incompatible with this method."""
        peft, model, optim = experiment.peft, experiment.model, experiment.optim
        keys = ("peft", "peft.method")
        reason = refusal(peft.method, experiment.rho.method) if experiment.regularized else None
        if reason:
            yield SettingError(
                (*keys, "rho", "rho.method"),
                f"Invalid rho={experiment.rho.name} with peft={peft.name}: {reason}; use rho=off, or another of the "
                "pairs that python -m flatlora.methods lists.",
            )
        if model.quantize != "none" and self.needs_dense:
            yield SettingError(
                (*keys, "model.quantize"),
                f"Invalid model.quantize={model.quantize} with peft={peft.name}: this method computes with W, "
                "moves part of it or trains it, which needs more than 4 bits; use model.quantize=none, or peft=lora.",
            )
        if self.not_of_diffusion and FAMILIES[model.family].is_diffusion:
            yield SettingError(
                (*keys, "model.family"),
                f"Invalid peft={peft.name} with model={model.name} ({model.family}): {self.not_of_diffusion}; use "
                "peft=lora, or another of the methods that python -m flatlora.methods lists.",
            )
        if self.reads_gradients and experiment.trainer.zero:
            yield _zero_error("peft", peft.name, experiment)
        if self.not_sharded and experiment.trainer.fsdp:
            yield _fsdp_error("peft", peft.name, self.not_sharded, experiment)
        if model.head != "linear":  # a trained head is updated by AdamW
            for key in self.unread_optim_keys(peft):
                if getattr(optim, key) != type(optim).model_fields[key].get_default():
                    yield SettingError(
                        (*keys, f"optim.{key}"),
                        f"Invalid optim.{key}={getattr(optim, key):g} with peft={peft.name}: its optimizer does not "
                        "read this key in this mode; leave it out, or choose another peft.mode.",
                    )
        if optim.optimizer != "adamw" and self.has_optimizer:
            yield SettingError(
                (*keys, "optim.optimizer"),
                f"Invalid optim.optimizer={optim.optimizer} with peft={peft.name}: this method has its own optimizer, "
                "whose moments are not 8-bit; leave optim.optimizer out (peft=lora_pro: peft.moments=bfloat16 halves "
                "their memory).",
            )

    def unread_optim_keys(self, config: PeftConfig) -> Sequence[str]:
        """Keys of `optim` that the method's own optimizer does not read."""
        return ()

    def check(self, skeleton: nn.Module, config: PeftConfig) -> None:
        """Validate the config on the architecture, without weights.

        Raises:
            ConfigError: it does not fit the model (a target matches no layer, a rank is too large).
        """

    def apply(self, model: nn.Module, config: PeftConfig, start: Start) -> nn.Module:
        """Return the model to train, with trainable parameters in FP32 and all others frozen."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module, config: PeftConfig, training: Training) -> torch.optim.Optimizer | None:
        """Return the method's own optimizer; None uses the Trainer's AdamW."""
        return None

    def callbacks(self, model: nn.Module, config: PeftConfig, training: Training) -> list[TrainerCallback]:
        """Return callbacks that the method needs during training."""
        return []

    def save(self, model: nn.Module, config: PeftConfig, folder: Path, start: Start) -> None:
        """Write the adapter (or model) so that it loads on the untouched backbone."""
        model.save_pretrained(folder)


class Regularizer(TrainerCallback):
    """Acts on the training of one run: a callback with further hooks that this suite's Trainer calls."""

    second_gradient = False  # whether the running step takes its gradient again after `ascend`
    reads_rows = False  # whether `weigh_rows` weighs the rows of each micro-batch

    @property
    def state(self) -> object:
        """A value that decides which kernels a micro-step runs; one CUDA graph is captured per value."""
        return None

    @property
    def seconds(self) -> float:
        """Time spent in it so far, in seconds."""
        return 0.0

    def sigma_at(self, step: int) -> float:
        """Strength in optimizer step `step`, for the metrics."""
        raise NotImplementedError

    def ascend(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move the parameters to the point of the second gradient; `.grad` holds the first."""
        raise NotImplementedError

    def descend(self) -> None:
        """Restore the parameters from before `ascend`."""
        raise NotImplementedError

    def finish_gradient(self) -> None:
        """Change the step's complete gradient, before it is clipped."""

    def weigh_rows(self, losses: torch.Tensor) -> torch.Tensor:
        """Weights (rows,) of a micro-batch's rows in its loss, from their losses (rows,); of mean 1 or rescaled."""
        raise NotImplementedError

    def extend_optimizer(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Add parameters that the regularizer trains besides the adapter."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context for an evaluation during training, in which the model is as it will be saved."""
        yield

    def record(self) -> dict[str, Any]:
        """Its entries in run.json."""
        return {}

    def save_state(self, folder: Path) -> None:
        """Write the state that a resume needs to a checkpoint's folder, besides parameters and optimizer state."""

    def close(self) -> None:
        """Undo changes that must not outlive the training; can be called at any time."""


@dataclass(frozen=True)
class Strength:
    """What `rho.sigma` is for a regularizer.

    Args:
        name: what its paper calls it, with the symbol.
        published: source → value; a strength more than five times above or below all of them is warned of.
    """

    name: str
    published: Mapping[str, float]

    def warning(self, option: str, value: float) -> str | None:
        """What to say of a value that is far from all published ones; None for a sensible one."""
        if min(self.published.values()) / 5 <= value <= 5 * max(self.published.values()):
            return None
        known = ", ".join(f"{number:g} ({source})" for source, number in self.published.items())
        return f"rho.sigma={value:g} is the {self.name} of rho={option}, and far from what papers use: {known}."


class RhoMethod:
    """A registered regularizer: its config, and a factory of the object that acts on one run.

    `refuses` maps each adapter method that it is incompatible with to the reason, as `AdapterMethod.refuses` does for
    regularizers; an entry in one of them is enough.
    """

    Config: ClassVar[type[RhoConfig]] = RhoConfig
    refuses: ClassVar[Mapping[str, str]] = {}
    strength: ClassVar[Strength | None] = None  # None: any value is as good as another
    needs_plain_layers: ClassVar[bool] = False  # PEFT's and transformers' own code, whatever trainer.kernels says
    reads_gradients: ClassVar[bool] = False  # as `AdapterMethod.reads_gradients`
    not_sharded: ClassVar[str | None] = _NOT_SHARDED  # as `AdapterMethod.not_sharded`

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        """Errors about choices of the experiment that are incompatible with this regularizer."""
        if self.reads_gradients and experiment.regularized and experiment.trainer.zero:
            yield _zero_error("rho", experiment.rho.name, experiment)
        if self.not_sharded and experiment.regularized and experiment.trainer.fsdp:
            yield _fsdp_error("rho", experiment.rho.name, self.not_sharded, experiment)

    def strength_of(self, config: RhoConfig) -> Strength | None:
        """What `config.sigma` is; options of one method may differ."""
        return self.strength

    def tied_to_processes(self, config: RhoConfig) -> str | None:
        """Why the result depends on the number of processes by more than rounding; None if it does not."""
        return None

    def prepare(self, model: nn.Module, config: RhoConfig, seed: int) -> None:
        """Add parameters that the method trains besides the adapter; called before a checkpoint is loaded."""

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        """Return the object that acts on one run. `model` is the adapted model, `config.sigma` is above 0."""
        raise NotImplementedError


ADAPTERS: Registry[AdapterMethod] = Registry("peft method", "flatlora.methods.adapters")
REGULARIZERS: Registry[RhoMethod] = Registry("rho method", "flatlora.methods.regularizers")


def owners(section: str, key: str) -> list[str]:
    """Methods of a section (peft or rho) whose config has this key, lora or flat first."""
    registry: Registry[Any] = {"peft": ADAPTERS, "rho": REGULARIZERS}[section]
    names = [name for name, method in registry.items() if key in method.Config.model_fields and name != "off"]
    return sorted(names, key=lambda name: (name not in ("lora", "flat"), name))


def refusal(peft_method: str, rho_method: str) -> str | None:
    """Why a pair of methods is incompatible; None if it is not."""
    reason = ADAPTERS[peft_method].refuses.get(rho_method)
    return REGULARIZERS[rho_method].refuses.get(peft_method) if reason is None else reason


def uses_kernels(experiment: Experiment) -> bool:
    """Whether the fast layers and steps of `flatlora.fused` may take part in the training."""
    plain = experiment.regularized and REGULARIZERS[experiment.rho.method].needs_plain_layers
    return experiment.trainer.kernels == "auto" and not plain


def combination_errors(experiment: Experiment) -> list[SettingError]:
    """Errors about choices that are incompatible with the experiment's adapter method or regularizer."""
    return [
        *ADAPTERS[experiment.peft.method].errors(experiment),
        *REGULARIZERS[experiment.rho.method].errors(experiment),
    ]


def _zero_error(section: str, name: str, experiment: Experiment) -> SettingError:
    return SettingError(
        (section, f"{section}.method", "trainer", "trainer.zero"),
        f"Invalid trainer={experiment.trainer.name} with {section}={name}: this method reads the whole gradient of "
        "each parameter before the optimizer step, but ZeRO keeps only a part in each process; use trainer=ddp.",
    )


def _fsdp_error(section: str, name: str, reason: str, experiment: Experiment) -> SettingError:
    return SettingError(
        (section, f"{section}.method", "trainer", "trainer.fsdp"),
        f"Invalid trainer={experiment.trainer.name} with {section}={name}: {reason}; use trainer=ddp.",
    )
