"""DoRA (ICML 2024): W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖ by rows, m trained (PEFT's code).

The noise of rho=flat lies on W, and the norm is that of W + ε + s·B·A in every rho.mode, as in the published code that
moves W itself. Noise is scaled with W by m/‖W + ε + s·B·A‖, so one entry's std is σ/√n · m_i up to a factor of
1/√(1 + σ²): m_i is the norm of that row of W', as the method asks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.lora import Lora, LoraMethodConfig
from flatlora.methods.base import ADAPTERS


class DoraConfig(LoraMethodConfig):
    lora_dropout: float = setting(0.0, ge=0, le=0, remedy="PEFT's DoRA with dropout reads W past its own layer")


@ADAPTERS.register("dora")
class Dora(Lora):
    Config = DoraConfig

    def settings(self, model: nn.Module, config: DoraConfig) -> dict[str, Any]:
        return super().settings(model, config) | {"use_dora": True}
