"""rsLoRA (2023): LoRA with s = α/√r instead of α/r, so that a larger r does not slow down learning."""

from __future__ import annotations

from typing import Any

from torch import nn

from flatlora.methods.adapters.lora import Lora, LoraMethodConfig
from flatlora.methods.base import ADAPTERS


@ADAPTERS.register("rslora")
class RankStabilized(Lora):
    def settings(self, model: nn.Module, config: LoraMethodConfig) -> dict[str, Any]:
        return super().settings(model, config) | {"use_rslora": True}
