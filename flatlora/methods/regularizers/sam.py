"""LoRA-SAM: sharpness-aware minimization in the adapter's space (ICLR 2021, on A and B).

    g = ∇L(θ) over all micro-batches of the step,   θ' = θ + ρ g/‖g‖,   descend from θ along ∇L(θ')      θ: all A and B

A step costs two gradients. ρ is `rho.sigma`. In weight space the perturbation is ρ s (g_B A + B g_A)/‖g‖ + O(ρ²), which
is in the span of A and B: the Flat-LoRA paper's argument against it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from flatlora.config.sections import RhoConfig
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength


@REGULARIZERS.register("sam")
class Sam(RhoMethod):
    strength: ClassVar = Strength("radius ρ", {"Flat-LoRA paper": 0.003, "Bi-LoRA paper": 0.01})
    reads_gradients = True
    not_sharded = None

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        return SamRegularizer(config.sigma)


class SamRegularizer(Regularizer):
    """Moves the trained parameters by ρ g/‖g‖, and back to the same bytes.

    Args:
        radius: ρ > 0.
    """

    second_gradient = True

    def __init__(self, radius: float) -> None:
        self.radius = radius
        self._origins: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds

    def sigma_at(self, step: int) -> float:
        return self.radius

    @torch.no_grad()
    def ascend(self, parameters: Sequence[nn.Parameter]) -> None:
        self._began = time.perf_counter()
        moved = [p for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([p.grad.float().norm() for p in moved]))
        self._origins = [(p, p.detach().clone()) for p in moved]
        factor = self.radius / norm.clamp_min(1e-12)  # for a zero gradient
        for parameter in moved:
            parameter.add_(parameter.grad * factor)

    @torch.no_grad()
    def descend(self) -> None:
        for parameter, origin in self._origins:
            parameter.copy_(origin)
        self._seconds += time.perf_counter() - self._began if self._origins else 0.0
        self._origins = []

    def record(self) -> dict[str, Any]:
        return {"gradients_a_step": 2}

    def close(self) -> None:
        """Restore the parameters after an interrupted step."""
        self.descend()
