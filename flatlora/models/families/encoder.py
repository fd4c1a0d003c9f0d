"""Encoders with a head that classifies texts, such as RoBERTa and DeBERTa on GLUE.

The head is drawn from the run's seed where the files hold none, trained whole beside the adapter, and saved with it
(PEFT's `modules_to_save`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from flatlora.config.sections import ModelConfig
from flatlora.models.clip import Classes
from flatlora.models.family import FAMILIES, LoadOptions
from flatlora.models.language import LanguageModel

_ENCODERS = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


@FAMILIES.register("encoder")
class Encoder(LanguageModel):
    """Text classification; `options.classes` are the classes of the head, and of config.json without them."""

    auto = transformers.AutoModelForSequenceClassification
    peft_task = "SEQ_CLS"

    def mismatch(self, described: PreTrainedConfig) -> str | None:
        if getattr(described, "is_encoder_decoder", False):
            return "it is an encoder-decoder; use model=seq2seq, or name an encoder such as a RoBERTa"
        if described.model_type not in _ENCODERS or getattr(described, "is_decoder", False):
            return "it is no encoder with a classifier; use model=causal_lm, or name one such as a RoBERTa"
        return None

    def skeleton(self, config: ModelConfig) -> nn.Module:
        return _with_trained_head(super().skeleton(config))

    def load(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        settings = {}
        if options.classes is not None:
            names = dict(enumerate(options.classes.names))
            settings = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
            settings["problem_type"] = "single_label_classification"  # else the loss is that of the files' own head
        devices = [options.device] if options.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(options.head_seed or 0)
            model = self.read(config, options.device, new_head=options.head_seed is not None, **settings)
        return _with_trained_head(model)

    def classes_of_run(self, run: Path) -> Classes:
        return Classes.of_run(run)


def _with_trained_head(model: nn.Module) -> nn.Module:
    """Names all modules around the base model in `trained_modules`, such as a classifier and its pooler.

    They are trained in FP32, whatever the dtype of the base model's states.
    """
    model.trained_modules = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    for name in model.trained_modules:
        model.get_submodule(name).register_forward_pre_hook(_in_dtype_of_weights)
    return model


def _in_dtype_of_weights(module: nn.Module, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(state.to(dtype) for state in states)
