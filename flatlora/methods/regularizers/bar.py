"""nBAR and oBAR: SAM's implicit regularization of balancedness, made explicit (NeurIPS 2024).

SAM on a product B·A changes ½(‖A‖² − ‖B‖²) by ρ(‖g_A‖² − ‖g_B‖²)/‖g‖. BAR does so without a second gradient: before
each optimizer step every pair is rescaled,

    nbar    A ← (1 ± αη) A,   B ← (1 ∓ αη) B,   + for A where ‖g_A‖ ≥ ‖g_B‖
    obar    the same,                           + for A where ‖A‖ < ‖B‖

so that B·A is unchanged to first order in αη. α starts at `rho.sigma` and decreases linearly to zero over the run; η is
the learning rate of the step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from flatlora.config.sections import RhoConfig
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.optim.lora_pro import Pair, product_pairs

_STRENGTH = Strength("α", {"Bi-LoRA paper, after the BAR paper": 0.25})


@REGULARIZERS.register("nbar")
class NBar(RhoMethod):
    strength: ClassVar = _STRENGTH
    reads_gradients = True
    not_sharded = None

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        return BarRegularizer(product_pairs(model), config.sigma, by="gradient")


@REGULARIZERS.register("obar")
class OBar(RhoMethod):
    strength: ClassVar = _STRENGTH
    reads_gradients = True
    not_sharded = None

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        return BarRegularizer(product_pairs(model), config.sigma, by="norm")


class BarRegularizer(Regularizer):
    """Rescales every pair before each optimizer step.

    Args:
        pairs: trained factors; see `product_pairs`.
        alpha: α > 0 at the first step.
        by: "gradient" (nBAR) or "norm" (oBAR).
    """

    def __init__(self, pairs: list[Pair], alpha: float, *, by: str) -> None:
        self.pairs, self.alpha, self.by, self._steps = pairs, alpha, by, 1

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._steps = state.max_steps

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.rescale(self.sigma_at(state.global_step), optimizer.param_groups[0]["lr"])

    def sigma_at(self, step: int) -> float:
        return self.alpha * (1 - step / self._steps)

    @torch.no_grad()
    def rescale(self, alpha: float, lr: float) -> None:
        """Rescale all pairs once with this α and η, without synchronizing with the host."""
        for pair in self.pairs:
            if pair.A.grad is None or pair.B.grad is None:
                continue
            by_gradient = self.by == "gradient"
            grows = pair.A.grad.norm() >= pair.B.grad.norm() if by_gradient else pair.A.norm() < pair.B.norm()
            change = torch.where(grows, alpha * lr, -alpha * lr)
            pair.A.mul_(1 + change)
            pair.B.mul_(1 - change)

    def record(self) -> dict[str, Any]:
        return {"pairs": len(self.pairs)}
