"""Class scores with a CLIP classifier in memory."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


class CLIPBackend:
    """Scores with a model in memory.

    Args:
        model: pixel_values → logits, with or without a PEFT adapter (never merged: a merge rounds).
        processor: image processor of the model.
        autocast_dtype: dtype of the matrix products, None for the weights' own.
        identity: what the record says of the model, such as hashes.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        batch_size: int,
        autocast_dtype: torch.dtype | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.autocast_dtype, self.identity = autocast_dtype, identity or {}
        self.device = next(model.parameters()).device

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "clip",
            "batch_size": self.batch_size,
            "autocast": str(self.autocast_dtype),
            "device": self.device.type,
            **self.identity,
        }

    @torch.inference_mode()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        plain = contextlib.nullcontext()
        with torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else plain:
            return self.model(pixel_values=pixel_values.to(self.device)).logits.float().cpu()
