"""Rescaling and normalizing of images on the device, with the bits of an image processor.

Both depend only on a pixel's byte and channel, so they are looked up in a table that the processor itself makes. It
gives the processor's bits on every device; arithmetic need not, as processors differ in their order of operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def pixel_table(processor: Any) -> torch.Tensor:
    """What an image processor of transformers makes of each byte of each channel, float32, C × 256."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.stack([ramp] * 3, axis=-1)
    pixels = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
    return pixels.flatten(1).float()


def normalized(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rescaled and normalized images, float32, from UINT8 pixels (… × C × H × W) and `pixel_table`."""
    starts = 256 * torch.arange(len(table), dtype=torch.int32, device=pixels.device)
    return table.flatten()[pixels.int() + starts[:, None, None]]
