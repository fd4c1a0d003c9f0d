"""CorDA (NeurIPS 2024): s·B·A starts from singular directions of W·C, where C is the covariance of a layer's inputs.

"kpm" takes the smallest directions, so that those which calibration rows use stay frozen; "ipm" takes the largest, so
that these are learned first. W ← W − s·B₀·A₀. PEFT's code; calibration rows are training rows of the run.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.computed_start import LayerwiseStart
from flatlora.methods.adapters.lora import LoraMethodConfig, reads_images
from flatlora.methods.base import ADAPTERS, Start
from flatlora.utils.errors import ConfigError
from flatlora.utils.labels import IGNORED_LABEL

_KEYS = ("input_ids", "attention_mask", "labels")


class CordaMethodConfig(LoraMethodConfig):
    # Micro-batches, the same on every process.
    corda_batches: int = setting(32, ge=1, le=10**6, remedy="more rows give a better covariance")
    corda_method: Literal["ipm", "kpm"] = "kpm"  # instruction-previewed, or knowledge-preserving (the paper's default)


@ADAPTERS.register("corda")
class Corda(LayerwiseStart):
    Config = CordaMethodConfig
    not_sharded = "PEFT's CorDA reads the whole weight of each layer, and FSDP2 leaves each process a part of it"
    not_of_diffusion = "PEFT's CorDA computes covariances over the tokens of one row of text"

    def check(self, skeleton: nn.Module, config: CordaMethodConfig) -> None:
        super().check(skeleton, config)
        if reads_images(skeleton):
            raise ConfigError(
                [
                    f"Invalid peft={config.name} with {type(skeleton).__name__}: PEFT's CorDA computes covariances "
                    "over the tokens of one row, and an image projection has a single vector; use peft=lora_ga or "
                    "pissa."
                ]
            )

    def settings(self, model: nn.Module, config: CordaMethodConfig) -> dict[str, Any]:
        corda = CordaConfig(corda_method=config.corda_method, verbose=False)
        return super().settings(model, config) | {"corda_config": corda}

    def begin(self, model: nn.Module, config: CordaMethodConfig, start: Start) -> nn.Module:
        from peft.tuners.lora.corda import preprocess_corda  # imports attrs, which PEFT does not depend on

        @torch.no_grad()
        def run_model() -> None:
            decodes = getattr(model.config, "is_encoder_decoder", False)
            for batch in start.batches(config.corda_batches):
                for ids, mask, labels in zip(*(batch[key] for key in _KEYS), strict=True):
                    # Row by row: PEFT's covariance does not support padding.
                    inputs = {"input_ids": ids[mask.bool()][None]}
                    model(**inputs, **({"labels": labels[labels != IGNORED_LABEL][None]} if decodes else {}))

        mode = model.training
        preprocess_corda(model, self.peft_config(model, config), run_model=run_model)
        model.train(mode)
        adapted = super().begin(model, config, start)
        for module in adapted.modules():
            module.__dict__.pop("eigens", None)
        return adapted

    def initialize(self, layer: LoraLayer, config: CordaMethodConfig) -> None:
        layer.corda_init("default", "corda")
