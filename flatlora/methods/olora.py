"""OLoRA (2024): W = Q R; B₀ = Q[:, :r] has orthonormal columns, A₀ = R[:r], W ← W − s·B₀·A₀ (PEFT's code)."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer

from flatlora.methods.base import register
from flatlora.methods.computed_start import ComputedStart
from flatlora.methods.lora import LoraMethodConfig


@register("olora")
class Olora(ComputedStart):
    def initialise(self, layer: LoraLayer, config: LoraMethodConfig) -> None:
        layer.olora_init("default")
