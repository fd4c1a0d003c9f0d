"""What a method is, and the two registries: `peft` (how an adapter is made) and `rho` (what acts on top of it)."""

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
from flatlora.utils.errors import SettingError
from flatlora.utils.registry import Registry


def _no_batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
    raise RuntimeError(f"{count} batches are needed to start from, and Start(batches=...) was not given.")


@dataclass(frozen=True)
class Start:
    """Where a method begins: what it may look at, and the folder that keeps its initial adapter.

    Args:
        seed: of all random draws.
        folder: the initial adapter of a method that computes one; what is there is used again, so that a resumed run
            starts from the same bytes. None: nothing is kept, and nothing can be converted when the adapter is saved.
        batches: n → the first n micro-batches of training rows on the model's device, this rank's share.
        rank, world_size: of this process.
        resumed: whether a checkpoint of this run is gone on from, which belongs to the start in the folder.
    """

    seed: int
    folder: Path | None = None
    batches: Callable[[int], Iterator[dict[str, torch.Tensor]]] = _no_batches
    rank: int = 0
    world_size: int = 1
    resumed: bool = False


@dataclass(frozen=True)
class Training:
    """What a method may need to know of the training around it."""

    optim: OptimConfig
    seed: int = 0
    accumulation: int = 1  # micro-batches of an optimizer step
    world_size: int = 1
    fused: bool = False  # whether torch's fused optimizers serve the device
    autocast: torch.dtype | None = None  # of the forward passes
    token_mean: bool = True  # the loss is a mean over the step's tokens (causal_lm), not over a micro-batch's

    def adamw_settings(self) -> dict[str, Any]:
        """Keywords of torch.optim.AdamW, but lr and weight decay."""
        betas = (self.optim.adam_beta1, self.optim.adam_beta2)
        return {"betas": betas, "eps": self.optim.adam_epsilon, "fused": self.fused}


class AdapterMethod:
    """How a backbone becomes trainable; one instance is registered, so it holds no state of a run.

    `refuses` names the rho methods that it does not go with, and why.
    """

    Config: ClassVar[type[PeftConfig]] = PeftConfig
    refuses: ClassVar[Mapping[str, str]] = {}
    has_optimizer: ClassVar[bool] = False  # one of its own, which optim.optimizer does not choose
    reads_gradients: ClassVar[bool] = False  # whole ones, of every parameter, between backward and optimizer step
    needs_dense: ClassVar[bool] = False  # it computes with W, moves or trains it: a packed backbone will not do
    not_of_diffusion: ClassVar[str | None] = None  # why it does not go with a diffusion model

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        """Choices of the experiment that do not go with this method."""
        peft, model, optim = experiment.peft, experiment.model, experiment.optim
        keys = ("peft", "peft.method")
        reason = self.refuses.get(experiment.rho.method) if experiment.regularized else None
        if reason:
            yield SettingError(
                (*keys, "rho", "rho.method"),
                f"Invalid rho={experiment.rho.name} with peft={peft.name}: {reason}; use rho=off, or another of the "
                "pairs that python -m flatlora.methods lists.",
            )
        if model.quantize != "none" and self.needs_dense:
            yield SettingError(
                (*keys, "model.quantize"),
                f"Invalid model.quantize={model.quantize} with peft={peft.name}: that method computes its start from "
                "W, moves part of it or trains it, which 4 bits cannot hold; use model.quantize=none, or peft=lora.",
            )
        if model.family == "sdxl" and self.not_of_diffusion:
            yield SettingError(
                (*keys, "model.family"),
                f"Invalid peft={peft.name} with model={model.name} (sdxl): {self.not_of_diffusion}; use peft=lora, or "
                "another of the methods that python -m flatlora.methods lists.",
            )
        if self.reads_gradients and experiment.trainer.zero:
            yield _zero_error("peft", peft.name, experiment)
        if model.head != "linear":  # a head that is trained besides moves by AdamW
            for key in self.unread_optim_keys(peft):
                if getattr(optim, key) != type(optim).model_fields[key].get_default():
                    yield SettingError(
                        (*keys, f"optim.{key}"),
                        f"Invalid optim.{key}={getattr(optim, key):g} with peft={peft.name}: its optimizer, as it is "
                        "set here, does not read the key; leave it out, or choose a peft.mode that does.",
                    )
        if optim.optimizer != "adamw" and self.has_optimizer:
            yield SettingError(
                (*keys, "optim.optimizer"),
                f"Invalid optim.optimizer={optim.optimizer} with peft={peft.name}: that method has an optimizer of its "
                "own, whose moments are not 8-bit; leave optim.optimizer out (peft=lora_pro: peft.moments=bfloat16 "
                "halves them).",
            )

    def unread_optim_keys(self, config: PeftConfig) -> Sequence[str]:
        """Keys of optim that the method's own optimizer of adapters does not read."""
        return ()

    def check(self, skeleton: nn.Module, config: PeftConfig) -> None:
        """Try the config on the architecture without weights.

        Raises:
            ConfigError: it does not fit this model (a target that matches nothing, a rank too large).
        """

    def apply(self, model: nn.Module, config: PeftConfig, start: Start) -> nn.Module:
        """The model to train, trainable parameters in FP32 and all others frozen."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module, config: PeftConfig, training: Training) -> torch.optim.Optimizer | None:
        """The method's own optimizer; None takes the Trainer's AdamW."""
        return None

    def callbacks(self, model: nn.Module, config: PeftConfig, training: Training) -> list[TrainerCallback]:
        """What must happen during the training."""
        return []

    def save(self, model: nn.Module, config: PeftConfig, folder: Path, start: Start) -> None:
        """Write the adapter (or model) so that it loads on the untouched backbone."""
        model.save_pretrained(folder)


class Regularizer(TrainerCallback):
    """What acts on a run besides its loss; one instance a run. A callback, with more hooks that the Trainer calls."""

    second_gradient = False  # whether the running step takes its gradient again after `ascend`
    reads_rows = False  # whether `weigh_rows` weighs the rows of each micro-batch

    @property
    def state(self) -> object:
        """What decides which kernels a micro-step runs: a graph is captured for each value."""
        return None

    @property
    def seconds(self) -> float:
        """Time spent in it so far."""
        return 0.0

    def sigma_at(self, step: int) -> float:
        """Strength in an optimizer step, for the metrics."""
        raise NotImplementedError

    def ascend(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move to where the second gradient is taken; `.grad` holds the first."""
        raise NotImplementedError

    def descend(self) -> None:
        """Move back to where the step began."""
        raise NotImplementedError

    def finish_gradient(self, parameters: Sequence[nn.Parameter]) -> None:
        """Change the step's complete gradient, before it is clipped."""

    def weigh_rows(self, losses: torch.Tensor) -> torch.Tensor:
        """Weights (rows,) of a micro-batch's rows in its loss, from their losses (rows,); of mean 1 or rescaled."""
        raise NotImplementedError

    def extend_optimizer(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Add what is trained besides the adapter."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation in the middle of training: the model as it will be saved."""
        yield

    def record(self) -> dict[str, Any]:
        """What of it belongs into run.json."""
        return {}

    def save_state(self, folder: Path) -> None:
        """Write into a checkpoint what a resume needs; nothing where parameters and optimizer hold it all."""

    def close(self) -> None:
        """Undo what must not outlive the training; harmless at any time."""


@dataclass(frozen=True)
class Strength:
    """What `rho.sigma` is for a regularizer.

    Args:
        name: what its paper calls it, with the symbol.
        published: source → value; a strength more than ten times above or below all of them is warned of.
    """

    name: str
    published: Mapping[str, float]

    def warning(self, option: str, value: float) -> str | None:
        """What to say of a value that is far from all published ones; None for a sensible one."""
        if min(self.published.values()) / 10 <= value <= 10 * max(self.published.values()):
            return None
        known = ", ".join(f"{number:g} ({source})" for source, number in self.published.items())
        return f"rho.sigma={value:g} is the {self.name} of rho={option}, and far from what papers use: {known}."


class RhoMethod:
    """A registered regularizer: its config, and how one is made for a run."""

    Config: ClassVar[type[RhoConfig]] = RhoConfig
    strength: ClassVar[Strength | None] = None  # None: any value is as good as another
    needs_plain_layers: ClassVar[bool] = False  # PEFT's and transformers' own code, whatever trainer.kernels says
    reads_gradients: ClassVar[bool] = False  # as `AdapterMethod.reads_gradients`

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        """Choices of the experiment that do not go with this regularizer."""
        if self.reads_gradients and experiment.regularized and experiment.trainer.zero:
            yield _zero_error("rho", experiment.rho.name, experiment)

    def prepare(self, model: nn.Module, config: RhoConfig, seed: int) -> None:
        """Add to the adapted model what the method trains besides; before a checkpoint is loaded."""

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        raise NotImplementedError


ADAPTERS: Registry[AdapterMethod] = Registry("peft method", "flatlora.methods.adapters")
REGULARIZERS: Registry[RhoMethod] = Registry("rho method", "flatlora.methods.regularizers")


def owners(section: str, key: str) -> list[str]:
    """Methods of a section (peft or rho) whose config has this key, the plainest first."""
    registry: Registry[Any] = {"peft": ADAPTERS, "rho": REGULARIZERS}[section]
    found = [name for name, one in registry.items() if key in one.Config.model_fields and name != "off"]
    return sorted(found, key=lambda name: (name not in ("lora", "flat"), name))


def refusal(peft_method: str, rho_method: str) -> str | None:
    """Why a pair is not run; None where it is."""
    return ADAPTERS[peft_method].refuses.get(rho_method)


def uses_kernels(experiment: Experiment) -> bool:
    """Whether the fast layers and steps of `flatlora.fused` may take part in the training."""
    plain = experiment.regularized and REGULARIZERS[experiment.rho.method].needs_plain_layers
    return experiment.trainer.kernels == "auto" and not plain


def combination_errors(experiment: Experiment) -> list[SettingError]:
    """Choices that do not go with the experiment's adapter method and regularizer."""
    return [
        *ADAPTERS[experiment.peft.method].errors(experiment),
        *REGULARIZERS[experiment.rho.method].errors(experiment),
    ]


def _zero_error(section: str, name: str, experiment: Experiment) -> SettingError:
    return SettingError(
        (section, f"{section}.method", "trainer", "trainer.zero"),
        f"Invalid trainer={experiment.trainer.name} with {section}={name}: that method reads the whole gradient of "
        "each parameter before the optimizer step, and ZeRO leaves each process a share of it; use trainer=ddp.",
    )
