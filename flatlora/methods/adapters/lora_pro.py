"""LoRA-Pro (2024) as a method of the suite; flatlora/optim/lora_pro.py has the optimizer and its equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.lora import Lora, LoraMethodConfig
from flatlora.methods.base import ADAPTERS, Training
from flatlora.optim.lora_pro import LoRAPro
from flatlora.utils.errors import SettingError


class LoraProConfig(LoraMethodConfig):
    mode: Literal["adamw", "sgd"] = "adamw"
    moments: Literal["float32", "bfloat16"] = setting("float32", remedy="bfloat16 halves the memory")
    damping: float = setting(1e-8, gt=0, le=1000, remedy="1e-8 as published")
    shard_moments: bool = True  # each pair's moments are kept on one process

    def rule_errors(self) -> list[SettingError]:
        errors = super().rule_errors()
        if self.mode == "sgd" and (self.moments != "float32" or not self.shard_moments):
            errors.append(
                SettingError(
                    ("moments", "shard_moments", "mode"),
                    f"Invalid peft.moments={self.moments}, peft.shard_moments={self.shard_moments} with peft.mode=sgd: "
                    "this mode has no moments; leave them out, or use peft.mode=adamw.",
                )
            )
        return errors


_SAM = "LoRA-Pro's closed form holds for gradients taken where A and B stand, and SAM takes them elsewhere"


@ADAPTERS.register("lora_pro")
class LoraPro(Lora):
    Config = LoraProConfig
    takes_convolutions = False
    reads_gradients = True  # it combines the gradients of a pair
    refuses: ClassVar = {
        "bi_lora": "LoRA-Pro's optimizer moves one pair a layer, and Bi-LoRA has two that pull apart",
        "sam": _SAM,
        "look_sam": _SAM,
        "esam": _SAM,
    }
    has_optimizer = True

    def unread_optim_keys(self, config: LoraProConfig) -> Sequence[str]:
        return ("adam_beta1", "adam_beta2", "adam_epsilon") if config.mode == "sgd" else ()

    def optimizer(self, model: nn.Module, config: LoraProConfig, training: Training) -> LoRAPro:
        optim = training.optim
        return LoRAPro(
            model,
            optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.weight_decay,
            mode=config.mode,
            moments=config.moments,
            damping=config.damping,
            seed=training.seed,
            loss_scaled=True,  # FP16 is trained with a scaled loss or is an error
            shard=config.shard_moments and training.world_size > 1,
        )
