"""Class scores with a CLIP classifier in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from eval.backends import check_numbers
from eval.backends.in_memory import InMemoryBackend
from flatlora.inputs.pixels import normalized, pixel_table
from flatlora.utils.precision import autocast


class CLIPBackend(InMemoryBackend):
    """Classifies images with a model in memory.

    Args:
        model: pixel_values → logits.
        processor: image processor of the model.
        settings: those of `InMemoryBackend`.
    """

    name = "clip"

    def __init__(self, model: nn.Module, processor: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.processor = processor

    @functools.cached_property
    def table(self) -> torch.Tensor:
        return pixel_table(self.processor).to(self.device)

    @torch.inference_mode()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """B × 3 × H × W, UINT8 or normalized → B × classes, FP32, on the CPU; raises as `check_numbers`."""
        pixels = pixel_values.to(self.device)
        if not pixels.is_floating_point():
            pixels = normalized(pixels, self.table)
        with autocast(self.device, self.precision):
            logits = self.model(pixel_values=pixels).logits.float().cpu()
        check_numbers(logits)
        return logits
