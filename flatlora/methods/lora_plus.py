"""LoRA+ (ICML 2024): LoRA whose B learns `lr_ratio` times faster than A (PEFT's groups, torch's AdamW)."""

from __future__ import annotations

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from flatlora.config import setting
from flatlora.methods.base import Training, register
from flatlora.methods.lora import Lora, LoraMethodConfig


class LoraPlusConfig(LoraMethodConfig):
    lr_ratio: float = setting(16.0, ge=1, remedy="16 is the paper's; 1 is LoRA")


@register("lora_plus")
class LoraPlus(Lora):
    Config = LoraPlusConfig
    has_optimizer = True

    def optimizer(self, model: nn.Module, config: LoraPlusConfig, training: Training) -> torch.optim.Optimizer:
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=training.optim.lr,
            loraplus_lr_ratio=config.lr_ratio,
            loraplus_weight_decay=training.optim.weight_decay,
            **training.adamw_settings(),
        )
