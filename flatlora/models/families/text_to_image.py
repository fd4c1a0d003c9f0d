"""Text-to-image: SDXL's UNet, and its text encoders if they are trained.

The other parts of the pipeline encode the rows before training and are not kept in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import has_file

from flatlora.config.sections import DiffusionModelConfig, ModelConfig
from flatlora.inputs.rows import gather, hub_is_reachable
from flatlora.models import diffusion
from flatlora.models.family import FAMILIES, Family, LoadOptions
from flatlora.models.saved_adapters import holds_tensors_of
from flatlora.models.sources import backbone_source, hub_errors
from flatlora.utils.errors import ConfigError

RANDOM_SDXL = "flatlora/random-sdxl"


@FAMILIES.register("text_to_image")
class TextToImage(Family):
    """SDXL. Each row of a micro-batch has a weight; the loss is a weighted sum."""

    label_name = "noise"
    is_diffusion = True
    graphed = True

    def skeleton(self, config: DiffusionModelConfig) -> nn.Module:
        source = backbone_source(config)
        with hub_errors(config):  # size_factor also checks model.vae_id; all errors are reported together
            return gather(lambda: diffusion.skeleton(config, source), lambda: diffusion.size_factor(config, source))[0]

    def weight_files(self, config: DiffusionModelConfig) -> Sequence[str]:
        return diffusion.weight_files(config)

    def commit(self, config: DiffusionModelConfig) -> str | None:
        with hub_errors(config):
            return diffusion.commit_hash(config, backbone_source(config))

    def load(self, config: DiffusionModelConfig, options: LoadOptions) -> nn.Module:
        with hub_errors(config):
            return diffusion.load_model(config, backbone_source(config), options.device)

    def load_trained(self, path: str, config: ModelConfig, options: LoadOptions) -> tuple[nn.Module, Any]:
        raise ConfigError([f"Invalid model folder {path}: of a diffusion model only adapters are trained; name one."])

    def state(self, config: DiffusionModelConfig) -> str:
        """Returns the state of the backbone; with model.vae_id, the state of that VAE is appended after a "+"."""
        state, vae = super().state(config), diffusion.vae_state(config)
        return f"{state}+{vae}" if vae else state

    def complete_adapter(self, folder: Path) -> None:
        diffusion.export_adapter(folder)

    def of_adapter(self, config: DiffusionModelConfig, adapter: Path) -> DiffusionModelConfig:
        """Returns the config with train_text_encoders set if the adapter has tensors for the text encoders."""
        return config.model_copy(update={"train_text_encoders": holds_tensors_of(adapter, diffusion.TEXT_ENCODERS[0])})

    def backend_settings(self, config: DiffusionModelConfig) -> dict[str, Any]:
        """Returns the config and source of the pipeline whose other parts generate images."""
        return {"config": config, "source": backbone_source(config)}


def size_factor(config: DiffusionModelConfig, *, drawn: bool = False) -> int:
    """Returns what both sides of an image must be multiples of, in pixels.

    Args:
        drawn: whether the image is generated, for which diffusers also requires multiples of 8.

    Raises:
        ConfigError: the pipeline cannot be loaded; with a suggested fix.
    """
    with hub_errors(config):
        factor = diffusion.size_factor(config, backbone_source(config))
    return math.lcm(factor, diffusion.DRAWN_FACTOR) if drawn else factor


def size_errors(config: DiffusionModelConfig, sizes: Sequence[tuple[int, int]], *, drawn: bool = False) -> list[str]:
    """Returns errors for image sizes (H, W) that are not multiples of `size_factor`; see there for `drawn`."""
    factor = size_factor(config, drawn=drawn)
    odd = sorted({size for size in sizes if size[0] % factor or size[1] % factor})
    return [
        f"Invalid dataset.resolution or dataset.bucket_step: pictures of {height} × {width} pixels, and both sides "
        f"must be multiples of {factor} for {config.hub_id}; choose such numbers."
        for height, width in odd[:1]
    ]


def warn_of_long_prompts(config: DiffusionModelConfig, prompts: Sequence[str]) -> None:
    """Warns about prompts that the model's tokenizers truncate.

    Raises:
        ConfigError: the tokenizers cannot be loaded; with a suggested fix.
    """
    with hub_errors(config):
        tokenizers = diffusion.load_tokenizers(config, backbone_source(config))
    diffusion.warn_of_long_prompts(tokenizers, prompts)


def described_pipeline(name: str) -> DiffusionModelConfig | None:
    """Returns the config of a pipeline without a run; None for a folder or hub id that is no diffusers pipeline."""
    if name != RANDOM_SDXL and not _is_pipeline(name):
        return None
    embedded = "random-sdxl" if name == RANDOM_SDXL else None
    dtype = "float32" if embedded else "bfloat16"
    return DiffusionModelConfig(name="model", hub_id=name, family="text_to_image", embedded=embedded, dtype=dtype)


def _is_pipeline(name: str) -> bool:
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, diffusion.INDEX))
    return hub_is_reachable() and has_file(name, diffusion.INDEX)
