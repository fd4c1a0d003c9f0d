"""OLoRA (2024): W = Q R; B₀ = Q[:, :r] has orthonormal columns, A₀ = R[:r], W ← W − s·B₀·A₀ (PEFT's code)."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn

from flatlora.methods.adapters.computed_start import LayerwiseStart
from flatlora.methods.adapters.lora import LoraMethodConfig, validate_not_transposed
from flatlora.methods.base import ADAPTERS


@ADAPTERS.register("olora")
class Olora(LayerwiseStart):
    def check(self, skeleton: nn.Module, config: LoraMethodConfig) -> None:
        super().check(skeleton, config)
        validate_not_transposed(skeleton, config, "PEFT's OLoRA", "use peft=pissa, which starts from W too")

    def initialize(self, layer: LoraLayer, config: LoraMethodConfig) -> None:
        layer.olora_init("default")
