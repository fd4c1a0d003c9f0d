"""PiSSA (NeurIPS 2024): s·B·A starts as the best rank-r approximation of W = U S Vᵀ, and the rest of W is frozen.

A₀ = √(S_r/s) V_rᵀ,   B₀ = U_r √(S_r/s),   W ← W − s·B₀·A₀        (PEFT's code)
"""

from __future__ import annotations

from peft.tuners.lora import LoraLayer

from flatlora.config.settings import setting
from flatlora.methods.adapters.computed_start import LayerwiseStart
from flatlora.methods.adapters.lora import LoraMethodConfig
from flatlora.methods.base import ADAPTERS


class PissaConfig(LoraMethodConfig):
    niter: int | None = setting(
        None, ge=1, le=1000, remedy="null computes the exact SVD; 4 to 16 iterations give a fast approximation"
    )


@ADAPTERS.register("pissa")
class Pissa(LayerwiseStart):
    Config = PissaConfig

    def initialize(self, layer: LoraLayer, config: PissaConfig) -> None:
        layer.pissa_init("default", "pissa" if config.niter is None else f"pissa_niter_{config.niter}")
