"""OLoRA (2024): W = Q R; B₀ = Q[:, :r] has orthonormal columns, A₀ = R[:r], W ← W − s·B₀·A₀ (PEFT's code)."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora.methods.adapters.computed_start import LayerwiseStart
from flatlora.methods.adapters.lora import LoraMethodConfig, find_targets
from flatlora.methods.base import ADAPTERS
from flatlora.utils.errors import ConfigError


@ADAPTERS.register("olora")
class Olora(LayerwiseStart):
    def check(self, skeleton: nn.Module, config: LoraMethodConfig) -> None:
        super().check(skeleton, config)
        targets = find_targets(skeleton, config.target_modules)
        transposed = [name for name in targets if isinstance(skeleton.get_submodule(name), Conv1D)]
        if transposed:
            raise ConfigError(
                [
                    f"Invalid peft={config.name} with {transposed[0]}: PEFT's OLoRA does not support weights that are "
                    "stored transposed (Conv1D); use peft=pissa, which starts from W too."
                ]
            )

    def initialize(self, layer: LoraLayer, config: LoraMethodConfig) -> None:
        layer.olora_init("default")
