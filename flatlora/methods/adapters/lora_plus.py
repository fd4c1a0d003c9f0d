"""LoRA+ (ICML 2024): B's learning rate is `lr_ratio` times that of A (PEFT's parameter groups, torch's AdamW).

Deviation from PEFT: other trained vectors, such as the bias of a linear head, have A's learning rate. PEFT gives them
B's.
"""

from __future__ import annotations

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.lora import Lora, LoraMethodConfig
from flatlora.methods.base import ADAPTERS, Training


class LoraPlusConfig(LoraMethodConfig):
    lr_ratio: float = setting(16.0, ge=1, le=1e6, remedy="16 is the paper's; 1 is LoRA")


@ADAPTERS.register("lora_plus")
class LoraPlus(Lora):
    Config = LoraPlusConfig
    has_optimizer = True

    def optimizer(self, model: nn.Module, config: LoraPlusConfig, training: Training) -> torch.optim.Optimizer:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=training.optim.lr,
            loraplus_lr_ratio=config.lr_ratio,
            loraplus_weight_decay=training.optim.weight_decay,
            **training.adamw_settings(),
        )
        _move_vectors(optimizer, model, training.optim.lr)
        return optimizer


def _move_vectors(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float) -> None:
    """Move vectors outside of an adapter's B to a group with A's rate, without weight decay as in PEFT."""
    vectors = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 1 and "lora_B" not in n]
    if vectors:
        moved = {id(vector) for vector in vectors}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
        optimizer.add_param_group({"params": vectors, "lr": lr, "weight_decay": 0.0})
