"""Pictures of prompts by a denoiser in memory, with its adapters in place; the other parts are loaded to it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatlora import diffusion
from flatlora.config import DiffusionModelConfig


class DiffusionBackend:
    """Draws with a model in memory.

    Args:
        model: a `diffusion.Denoiser`, with or without a PEFT adapter (never merged: a merge rounds).
        processor: none.
        config, source: of the pipeline that it is part of.
        autocast_dtype: dtype of the matrix products, None for the weights' own.
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
        autocast_dtype: torch.dtype | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.config, self.source, self.batch_size = model.eval(), config, source, batch_size
        self.autocast_dtype, self.identity = autocast_dtype, identity or {}
        self.denoiser = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = self.denoiser.device
        self._pipeline: Any = None

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "diffusion",
            "batch_size": self.batch_size,
            "autocast": str(self.autocast_dtype),
            "vae": [diffusion.vae_state(self.config), self.config.vae_dtype],
            "device": self.device.type,
            **self.identity,
        }

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int], **settings: Any) -> torch.Tensor:
        """B × 3 × H × W, FP32, 0 to 1, on the host; `settings` as `diffusion.sample` has them."""
        if self._pipeline is None:
            self._pipeline = diffusion.pipeline_of(self.denoiser, self.config, self.source, self.device)
        plain = contextlib.nullcontext()
        with torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else plain:
            return diffusion.sample(self._pipeline, prompts, seeds, **settings)
