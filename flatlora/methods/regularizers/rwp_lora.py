"""RWP_LoRA: random perturbation of the adapter's own factors, a baseline of the Bi-LoRA paper.

    L(A + ε_A, B + ε_B) descends from (A, B),   ε ~ N(0, ρ²) in each entry, drawn anew in each optimizer step

ρ is `rho.sigma`. In the weights' space the perturbation has a rank of at most 2r, unlike Flat-LoRA's and that of
rho=rwp_full. All ranks and micro-batches of a step share one draw.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from flatlora.config.sections import RhoConfig
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.noise import host, philox
from flatlora.optim.lora_pro import product_pairs


@REGULARIZERS.register("rwp_lora")
class RwpLora(RhoMethod):
    strength: ClassVar = Strength("standard deviation ρ", {"Bi-LoRA paper, Qwen2.5-14B": 0.0316})
    not_sharded = None

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        return RwpLoraRegularizer(model, config.sigma, seed)


class RwpLoraRegularizer(Regularizer):
    """Adds noise to A and B at the start of each optimizer step and restores their bytes before the update.

    Args:
        model: PEFT model with LoRA or HiRA layers.
        sigma: ρ > 0.
    """

    def __init__(self, model: nn.Module, sigma: float, seed: int) -> None:
        self.sigma = sigma
        self.factors = {
            f"{pair.name}.{factor}": parameter
            for pair in product_pairs(model)
            for factor, parameter in (("lora_A", pair.A), ("lora_B", pair.B))
        }
        self._keys = {name: philox.layer_key(seed, name) for name in self.factors}
        self._origins: dict[str, torch.Tensor] = {}

    def sigma_at(self, step: int) -> float:
        return self.sigma

    @torch.no_grad()
    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._origins:
            return  # an epoch of streamed rows ended inside the step
        for name, factor in self.factors.items():
            self._origins[name] = factor.detach().clone()
            factor.add_(host.normal_like(factor, self._keys[name], state.global_step, 0), alpha=self.sigma)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.close()

    def record(self) -> dict[str, Any]:
        return {"factors": len(self.factors)}

    @torch.no_grad()
    def close(self) -> None:
        for name, origin in self._origins.items():
            self.factors[name].copy_(origin)
        self._origins = {}
