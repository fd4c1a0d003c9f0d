"""Full fine-tuning: every weight of the backbone is trained, in FP32. The papers' upper baseline."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from flatlora.config.sections import PeftConfig
from flatlora.methods.base import ADAPTERS, AdapterMethod, Start

_NO_BACKBONE = "Flat-LoRA perturbs a frozen backbone under an adapter, and full fine-tuning has neither"
_NO_PAIR = "there is no pair of factors in full fine-tuning"


@ADAPTERS.register("full_ft")
class FullFineTuning(AdapterMethod):
    refuses: ClassVar = {
        "flat": _NO_BACKBONE,
        "sam_full": "it moves a frozen backbone under an adapter; under full fine-tuning rho=sam moves all weights",
        **dict.fromkeys(("nbar", "obar", "bi_lora", "rwp_lora"), _NO_PAIR),
    }
    needs_dense = True
    not_of_diffusion = "of a diffusion model only an adapter is saved, and this method has none"

    def apply(self, model: nn.Module, config: PeftConfig, start: Start) -> nn.Module:
        model.float()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
