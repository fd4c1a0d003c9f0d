"""EVA (2024): A starts from the principal directions of each layer's inputs (for tokens with a label), B = 0, and W is
unchanged (PEFT's code).
"""

from __future__ import annotations

from typing import Any

from peft import initialize_lora_eva_weights
from peft.tuners.lora.config import EvaConfig
from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.computed_start import ComputedStart
from flatlora.methods.adapters.lora import LoraMethodConfig, rank_setting, reads_images, seeded
from flatlora.methods.base import ADAPTERS, Start
from flatlora.models.fit import is_text_classifier
from flatlora.utils.errors import ConfigError
from flatlora.utils.labels import IGNORED_LABEL


class EvaMethodConfig(LoraMethodConfig):
    # Micro-batches, gone through until the directions stand still; the same on every process.
    eva_batches: int = setting(32, ge=1, le=10**6, remedy="32 are usual")


@ADAPTERS.register("eva")
class Eva(ComputedStart):
    Config = EvaMethodConfig
    moves_weights = False
    not_sharded = "PEFT's EVA decides in each process when to stop, and with FSDP2 all must run the model equally often"
    not_of_diffusion = "PEFT's EVA needs tokens with a label"

    def check(self, skeleton: nn.Module, config: EvaMethodConfig) -> None:
        super().check(skeleton, config)
        encoder_decoder = getattr(skeleton.config, "is_encoder_decoder", False)
        if encoder_decoder or reads_images(skeleton) or is_text_classifier(skeleton):
            raise ConfigError(
                [
                    f"Invalid peft={config.name} with {type(skeleton).__name__}: PEFT's EVA only supports "
                    "decoder-only language models; use peft=corda or lora_ga, which start from data too."
                ]
            )

    def settings(self, model: nn.Module, config: EvaMethodConfig) -> dict[str, Any]:
        eva = EvaConfig(rho=1.0)  # equal ranks: redistributed ones would not fit a resumed run
        return super().settings(model, config) | {"init_lora_weights": "eva", "eva_config": eva}

    def begin(self, model: nn.Module, config: EvaMethodConfig, start: Start) -> nn.Module:
        adapted = self.adapt(model, config, start)
        mode = adapted.training
        rank = adapted.peft_config["default"].r
        candidates = [
            {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            for batch in start.batches(config.eva_batches)
        ]
        # PEFT loops forever over micro-batches that have fewer labels than the rank.
        batches = [batch for batch in candidates if (batch["labels"] != IGNORED_LABEL).sum() >= rank]
        if not batches:
            raise ConfigError(
                [
                    f"Invalid peft={config.name} with {rank_setting(config)}: none of {len(candidates)} micro-batches "
                    "has so many tokens with a label, which the directions are computed from; raise "
                    "trainer.micro_batch_size."
                ]
            )
        with seeded(start.seed, adapted):
            initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted.train(mode)
