"""DeLoRA (ICLR 2025): the directions of a low-rank update are trained apart from its strength λ (PEFT's code).

    W' = W + λ/r · Σ_k b_k a_k / (‖b_k‖ ‖a_k‖) · diag(w)      a_k: rows of A, b_k: columns of B, w_j = ‖W_:,j‖

A starts as LoRA's, B = 0, and λ, one number a layer, is trained from `delora_lambda`. There is no α. Norms below 1e-4
count as 1e-4, so that B = 0 gives no update; after the first step it has the strength λ. Deviation of PEFT from the
authors' description: w has a norm for each column, where theirs is one ‖W‖ a layer. Deviation from PEFT: w is computed
in FP32 on a BF16 backbone too, so that it is the same on every machine.

PEFT's documentation recommends learning rates 10 to 100 times as large as LoRA's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from peft import DeloraConfig
from peft.tuners.delora.layer import DeloraLayer
from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.lora import LowRank, LowRankConfig, validate_not_transposed
from flatlora.methods.base import ADAPTERS, Start

_SCALE = (
    "DeLoRA's update has the strength λ however small B is, which starts at 0, so that a radius or noise in A and B "
    "has no size in W"
)
_BAR = "BAR rescales A and B against each other, and DeLoRA normalizes both"


class DeloraMethodConfig(LowRankConfig):
    delora_lambda: float = setting(15.0, gt=0, le=1e6, remedy="15 is PEFT's default")


@ADAPTERS.register("delora")
class Delora(LowRank):
    Config = DeloraMethodConfig
    takes_convolutions = False
    needs_dense = True
    not_of_diffusion = "diffusers reads pairs A and B, and DeLoRA's update is normalized"
    refuses: ClassVar = {
        **dict.fromkeys(("sam", "esam", "look_sam", "rwp_lora"), _SCALE),
        **dict.fromkeys(("nbar", "obar"), _BAR),
        "bi_lora": "Bi-LoRA's second branch is s·B·A, and DeLoRA's layers of PEFT have no such branch",
    }

    def check(self, skeleton: nn.Module, config: DeloraMethodConfig) -> None:
        super().check(skeleton, config)
        remedy = "use peft=dora, which trains directions apart from magnitudes too"
        validate_not_transposed(skeleton, config, "PEFT's DeLoRA", remedy)

    def apply(self, model: nn.Module, config: DeloraMethodConfig, start: Start) -> nn.Module:
        adapted = super().apply(model, config, start)
        for module in adapted.modules():
            if isinstance(module, DeloraLayer):
                weight = module.get_base_layer().weight.detach()
                module.delora_w_norm["default"] = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        return adapted

    def peft_config(self, model: nn.Module, config: DeloraMethodConfig) -> DeloraConfig:
        return DeloraConfig(
            **self.settings(model, config),
            delora_lambda=config.delora_lambda,
            module_dropout=config.lora_dropout,  # PEFT applies it to the elements of x
        )
