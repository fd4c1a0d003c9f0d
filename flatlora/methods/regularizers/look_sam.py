"""LookSAM on the adapter (CVPR 2022): SAM's second gradient in one optimizer step of `every`, reused in the others.

    t mod k = 0:  g at θ, g_s at θ + ρ g/‖g‖,   g_v = g_s − (g_s·g/‖g‖²) g,   descend along g_s
    else:         descend along g + α (‖g‖/‖g_v‖) g_v                                          θ: all A and B

g_v is the part of SAM's gradient across the plain one, which changes slowly. ρ is `rho.sigma`, k `rho.every` (5 in the
Bi-LoRA paper), α `rho.reuse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flatlora.config.sections import RhoConfig
from flatlora.config.settings import MOST_STEPS, setting
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.methods.regularizers.sam import SamRegularizer
from flatlora.perturb.callback import checkpoint_file

STATE_FILE = "look_sam.safetensors"


class LookSamConfig(RhoConfig):
    every: int = setting(5, ge=1, le=MOST_STEPS, remedy="1 is rho=sam; 5 is the Bi-LoRA paper's")
    reuse: float = setting(0.7, ge=0, le=1e6, remedy="the weight of the reused part of SAM's gradient")


@REGULARIZERS.register("look_sam")
class LookSam(RhoMethod):
    Config = LookSamConfig
    strength: ClassVar = Strength("radius ρ", {"Bi-LoRA paper, of SAM": 0.01})
    reads_gradients: ClassVar[bool] = True
    not_sharded: ClassVar[str | None] = None

    def regularizer(self, model: nn.Module, config: LookSamConfig, seed: int) -> Regularizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return LookSamRegularizer(trained, config.sigma, config.every, config.reuse)


class LookSamRegularizer(SamRegularizer):
    """SAM in one step of `every`; the other steps add what it found across their own gradient.

    Args:
        parameters: all that is trained.
        radius: ρ > 0.
        every: k ≥ 1.
        reuse: α ≥ 0.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], radius: float, every: int, reuse: float) -> None:
        super().__init__(radius)
        self.parameters = parameters
        self.every, self.reuse = every, reuse
        self._step = 0
        self._first: list[torch.Tensor] = []  # g of the running step
        self._across: list[torch.Tensor] = []  # g_v

    @property
    def second_gradient(self) -> bool:  # type: ignore[override]  # in some steps alone
        return self._step % self.every == 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._step = state.global_step
        if not self.second_gradient:
            kept = load_file(checkpoint_file(args, state, STATE_FILE), device=str(args.device))
            self._across = [kept[str(number)] for number in range(len(kept))]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._step = state.global_step

    def ascend(self, parameters: Sequence[nn.Parameter]) -> None:
        super().ascend(parameters)
        self._first = [parameter.grad.detach().clone() for parameter, _ in self._origins]

    @torch.no_grad()
    def descend(self) -> None:
        if self._first and self._origins:
            second = [parameter.grad for parameter, _ in self._origins]
            along = _dot(second, self._first) / _dot(self._first, self._first).clamp_min(1e-24)
            self._across = [s - along * g for s, g in zip(second, self._first, strict=True)]
            self._first = []
        super().descend()

    @torch.no_grad()
    def finish_gradient(self) -> None:
        if self.second_gradient:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        ratio = (_dot(gradients, gradients) / _dot(self._across, self._across).clamp_min(1e-24)).sqrt()
        for gradient, across in zip(gradients, self._across, strict=True):
            gradient.add_(across * (self.reuse * ratio))

    def record(self) -> dict[str, Any]:
        return {"gradients_a_step": 1 + 1 / self.every}

    def save_state(self, folder: Path) -> None:
        save_file({str(number): part.contiguous() for number, part in enumerate(self._across)}, folder / STATE_FILE)


def _dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([(a.float() * b.float()).sum() for a, b in zip(left, right, strict=True)]).sum()
