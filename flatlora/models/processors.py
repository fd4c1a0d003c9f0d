"""Tokenizers and image processors of transformers' models."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from flatlora.config.sections import ModelConfig
from flatlora.models.sources import NO_FOREIGN_CODE, hub_errors, source_and_options


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer; a missing padding token is set to the end-of-sequence token.

    Raises:
        ConfigError: the tokenizer cannot be loaded; with a suggested fix.
    """
    source, options = source_and_options(config)
    with hub_errors(config):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **NO_FOREIGN_CODE, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(config: ModelConfig) -> Any:
    """Loads CLIP's image processor in its PIL version: pixels are the same with and without torchvision.

    Raises:
        ConfigError: the processor cannot be loaded; with a suggested fix.
    """
    source, options = source_and_options(config)
    cls = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    with hub_errors(config):
        return cls.from_pretrained(source, **options)
