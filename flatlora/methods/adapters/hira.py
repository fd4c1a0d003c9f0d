"""HiRA (ICLR 2025): W' = W ⊙ (1 + B·A), so that the change W ⊙ (B·A) has a high rank; B = 0 at the start (PEFT's code).

A and B start as LoRA's. There is no α. PEFT forms W ⊙ (B·A) in every forward, and autograd keeps it until the backward:
as much memory as the adapted weights in the dtype of the products.

The noise of rho=flat is added to W', as in Flat-LoRA, with the row norms of W' = W ⊙ (1 + B·A). W is used twice in
PEFT's forward, W x + (W ⊙ (B·A)) x, and only the first one reads W + ε. In rho.mode=inplace both would, and the noise
of W' would be ε ⊙ (1 + B·A).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from peft import HiraConfig
from torch import nn

from flatlora.config.experiment import Experiment
from flatlora.methods.adapters.computed_start import validate_forwards
from flatlora.methods.adapters.lora import LowRank, LowRankConfig, find_targets, is_transposed
from flatlora.methods.base import ADAPTERS
from flatlora.utils.errors import SettingError


@ADAPTERS.register("hira")
class Hira(LowRank):
    takes_convolutions = False
    needs_dense = True
    not_of_diffusion = "diffusers reads pairs whose product is added to W, and HiRA's is multiplied by it"
    refuses: ClassVar = {
        "bi_lora": "Bi-LoRA's second branch is added to W, and HiRA's layers of PEFT have no such branch",
        "sam_full": "SAM takes the gradient of W', and that of W under HiRA is another: it has the factor 1 + B·A",
    }

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        yield from super().errors(experiment)
        if experiment.flat and experiment.rho.mode == "inplace":
            yield SettingError(
                ("peft", "peft.method", "rho.mode"),
                f"Invalid rho.mode=inplace with peft={experiment.peft.name}: W' = W ⊙ (1 + B·A) would have the noise "
                "ε ⊙ (1 + B·A) instead of ε; use rho.mode=copy or recompute (or auto).",
            )

    def check(self, skeleton: nn.Module, config: LowRankConfig) -> None:
        super().check(skeleton, config)
        reason = "HiRA multiplies by the weight itself, and a layer with its own forward may compute something else"
        validate_forwards(skeleton, find_targets(skeleton, config.target_modules), config.name, reason)

    def peft_config(self, model: nn.Module, config: LowRankConfig) -> HiraConfig:
        return HiraConfig(
            **self.settings(model, config),
            hira_dropout=config.lora_dropout,
            fan_in_fan_out=is_transposed(model, config),
        )
