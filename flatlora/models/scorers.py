"""Models that score images and are never trained: CLIP with both encoders, and an image captioner."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import CLIPModel, PreTrainedTokenizerBase

from flatlora.config.sections import ModelConfig
from flatlora.models.loading import check_weights
from flatlora.models.processors import load_image_processor, load_tokenizer
from flatlora.models.sources import NO_FOREIGN_CODE, hub_errors, load_whole, source_and_options


class _ScorerConfig(ModelConfig):
    hub_setting: ClassVar[str] = "eval.text_to_image.clip"


class _CaptionerConfig(ModelConfig):
    hub_setting: ClassVar[str] = "eval.text_to_image.captioner"


def scorer_config(name: str) -> ModelConfig:
    """Returns the config of a CLIP with both encoders by its hub id or folder."""
    embedded = "random-clip" if name == "flatlora/random-clip" else None
    return _ScorerConfig(name="clip", hub_id=name, family="clip", dtype="float32", embedded=embedded)


def check_clip(name: str) -> None:
    """Checks that all files that `load_clip` reads exist.

    Raises:
        ConfigError: as `check_weights`.
    """
    config = scorer_config(name)
    check_weights(config, torch.device("cpu"))
    load_tokenizer(config)
    load_image_processor(config)


def load_clip(name: str, device: torch.device) -> tuple[CLIPModel, PreTrainedTokenizerBase, Any]:
    """Loads a CLIP with both encoders in FP32, frozen, its tokenizer and its image processor.

    Raises:
        ConfigError: they cannot be loaded; with a suggested fix.
    """
    config = scorer_config(name)
    source, options = source_and_options(config)
    model = load_whole(config, transformers.CLIPModel, source, dtype=torch.float32, **options)
    return model.requires_grad_(False).eval().to(device), load_tokenizer(config), load_image_processor(config)


def _captioner_config(name: str) -> ModelConfig:
    return _CaptionerConfig(name="captioner", hub_id=name, family="causal_lm", dtype="float32")


def check_captioner(name: str) -> None:
    """Checks that all files that `load_captioner` reads exist.

    Raises:
        ConfigError: as `check_weights`.
    """
    check_weights(_captioner_config(name), torch.device("cpu"))
    with hub_errors(_captioner_config(name)):
        transformers.AutoProcessor.from_pretrained(name, **NO_FOREIGN_CODE)


def load_captioner(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    """Loads an image-captioning model in FP32 and its processor.

    Raises:
        ConfigError: they cannot be loaded; with a suggested fix.
    """
    config = _captioner_config(name)
    auto = transformers.AutoModelForImageTextToText
    model = load_whole(config, auto, name, dtype=torch.float32, **NO_FOREIGN_CODE)
    with hub_errors(config):
        processor = transformers.AutoProcessor.from_pretrained(name, **NO_FOREIGN_CODE)
    return model.eval().to(device), processor
