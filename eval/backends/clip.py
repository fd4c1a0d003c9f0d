"""Class scores with a CLIP classifier in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from eval.backends import check_numbers
from flatlora.inputs.pixels import normalized, pixel_table
from flatlora.utils.precision import Precision, autocast


class CLIPBackend:
    """Classifies images with a model in memory.

    Args:
        model: pixel_values → logits, with or without a PEFT adapter (not merged, as merging rounds).
        processor: image processor of the model.
        precision: autocast of the model; None: none, in the dtype of the weights.
        identity: what identifies the model in generation.json, such as hashes.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        batch_size: int,
        precision: Precision | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.precision, self.identity = precision, identity or {}
        self.device = next(model.parameters()).device

    @functools.cached_property
    def table(self) -> torch.Tensor:
        return pixel_table(self.processor).to(self.device)

    def describe(self) -> dict[str, Any]:
        return {
            "backend": "clip",
            "batch_size": self.batch_size,
            "autocast": self.precision.label if self.precision else "None",
            "device": self.device.type,
            **self.identity,
        }

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
