"""Text-to-image generation by a model in memory, with its adapters; loads the other parts of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eval.backends.in_memory import InMemoryBackend
from flatlora.config.sections import DiffusionModelConfig
from flatlora.models import diffusion
from flatlora.utils.precision import autocast


class DiffusionBackend(InMemoryBackend):
    """Generates images with a model in memory.

    Args:
        model: a `diffusion.TextToImageModel`.
        processor: unused; diffusion models have none.
        config, source: settings and folder or hub id of the pipeline that the model is part of.
        settings: those of `InMemoryBackend`.
    """

    name = "diffusion"

    def __init__(
        self,
        model: nn.Module,
        processor: None = None,
        *,
        config: DiffusionModelConfig,
        source: str,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self.config, self.source = config, source
        self.plain_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._pipeline: Any = None

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"vae": [diffusion.vae_state(self.config), self.config.vae_dtype]}

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> torch.Tensor:
        """Returns B × 3 × H × W, FP32, 0 to 1, on the CPU; `settings` are arguments of `diffusion.sample`."""
        if self._pipeline is None:
            self._pipeline = diffusion.pipeline_of(self.plain_model, self.config, self.source, self.device)
        with autocast(self.device, self.precision):
            return diffusion.sample(self._pipeline, prompts, seeds, **settings)
