"""LoRA-FA (2023): A stays frozen and B's gradient becomes s⁻² g_B (AAᵀ)⁻¹, the nearest to the full one.

PEFT's optimizer, which multiplies with (AAᵀ)⁻¹ under BF16 autocast where the machine has it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from flatlora.methods.base import Start, Training, register
from flatlora.methods.lora import Lora, LoraMethodConfig


@register("lora_fa")
class LoraFA(Lora):
    refuses: ClassVar = {
        "nbar": "BAR rescales A and B against each other, and LoRA-FA's A is frozen",
        "obar": "BAR rescales A and B against each other, and LoRA-FA's A is frozen",
        "bi_lora": "LoRA-FA's optimizer freezes every A, and Bi-LoRA trains two",
    }
    has_optimizer = True

    def apply(self, model: nn.Module, config: LoraMethodConfig, start: Start) -> nn.Module:
        adapted = super().apply(model, config, start)
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return adapted

    def optimizer(self, model: nn.Module, config: LoraMethodConfig, training: Training) -> torch.optim.Optimizer:
        adapter: LoraConfig = model.peft_config["default"]
        optimizer = create_lorafa_optimizer(
            model,
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lr=training.optim.lr,
            weight_decay=training.optim.weight_decay,
        )
        for group in optimizer.param_groups:  # PEFT leaves these at its own defaults
            group["betas"] = (training.optim.adam_beta1, training.optim.adam_beta2)
            group["eps"] = training.optim.adam_epsilon
        return optimizer
