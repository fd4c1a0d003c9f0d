"""Text-to-image generation by a model in memory, with its adapters; loads the other parts of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatlora.config.sections import DiffusionModelConfig
from flatlora.models import diffusion
from flatlora.utils.precision import Precision, autocast


class DiffusionBackend:
    """Generates images with a model in memory.

    Args:
        model: a `diffusion.TextToImageModel`, with or without a PEFT adapter (not merged, as merging rounds).
        processor: unused; diffusion models have none.
        config, source: settings and folder or hub id of the pipeline that the model is part of.
        precision: autocast of the model; None: none, in the dtype of the weights.
        identity: what identifies the model in generation.json, such as hashes.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: None = None,
        *,
        config: DiffusionModelConfig,
        source: str,
        batch_size: int,
        precision: Precision | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.config, self.source, self.batch_size = model.eval(), config, source, batch_size
        self.precision, self.identity = precision, identity or {}
        self.plain_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = self.plain_model.device
        self._pipeline: Any = None

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "diffusion",
            "batch_size": self.batch_size,
            "autocast": self.precision.label if self.precision else "None",
            "vae": [diffusion.vae_state(self.config), self.config.vae_dtype],
            "device": self.device.type,
            **self.identity,
        }

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> torch.Tensor:
        """Returns B × 3 × H × W, FP32, 0 to 1, on the CPU; `settings` are arguments of `diffusion.sample`."""
        if self._pipeline is None:
            self._pipeline = diffusion.pipeline_of(self.plain_model, self.config, self.source, self.device)
        with autocast(self.device, self.precision):
            return diffusion.sample(self._pipeline, prompts, seeds, **settings)
