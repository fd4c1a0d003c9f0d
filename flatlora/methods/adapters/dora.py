"""DoRA (ICML 2024): W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖ by rows, m trained (PEFT's code).

The noise of rho=flat is added to W, and the norm is that of W + ε + s·B·A in every rho.mode, as in the published code,
which adds it in place. DoRA scales the noise, like W, by m/‖W + ε + s·B·A‖. So the standard deviation of an element of
row i is σ/√n · m_i, up to a factor of 1/√(1 + σ²), and m_i is the norm of row i of W', as in Flat-LoRA.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.lora import Lora, LoraMethodConfig
from flatlora.methods.base import ADAPTERS


class DoraConfig(LoraMethodConfig):
    lora_dropout: float = setting(0.0, ge=0, le=0, remedy="PEFT's DoRA with dropout does not read W through its layer")


@ADAPTERS.register("dora")
class Dora(Lora):
    Config = DoraConfig
    not_sharded = "its magnitudes begin as the row norms of the whole W"

    def settings(self, model: nn.Module, config: DoraConfig) -> dict[str, Any]:
        return super().settings(model, config) | {"use_dora": True}
