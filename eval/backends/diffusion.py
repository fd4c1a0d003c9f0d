"""Pictures of prompts by a text-to-image model in memory, with its adapters; the pipeline's other parts are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatlora.config.sections import DiffusionModelConfig
from flatlora.models import diffusion
from flatlora.utils.precision import Precision, autocast


class DiffusionBackend:
    """Draws with a model in memory.

    Args:
        model: a `diffusion.TextToImageModel`, with or without a PEFT adapter (never merged: a merge rounds).
        processor: none.
        config, source: of the pipeline that it is part of.
        precision: how the model computes; None: without autocast, in the weights' own dtype.
        identity: what the record says of the model, such as hashes.
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
        """B × 3 × H × W, FP32, 0 to 1, on the host; `settings` as `diffusion.sample` has them."""
        if self._pipeline is None:
            self._pipeline = diffusion.pipeline_of(self.plain_model, self.config, self.source, self.device)
        with autocast(self.device, self.precision):
            return diffusion.sample(self._pipeline, prompts, seeds, **settings)
