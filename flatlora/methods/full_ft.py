"""Full fine-tuning: every weight of the backbone is trained, in FP32. The papers' upper baseline."""

from __future__ import annotations

from torch import nn

from flatlora.config import PeftConfig
from flatlora.methods import register


@register("full_ft")
class FullFineTuning:
    Config = PeftConfig

    def check(self, skeleton: nn.Module, config: PeftConfig) -> None:
        """Any model can be trained as a whole."""

    def apply(self, model: nn.Module, config: PeftConfig, seed: int) -> nn.Module:
        model.float()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
