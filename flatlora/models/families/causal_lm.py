"""Decoder-only language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from flatlora.fused.acceleration import GRAPH_TOKENS
from flatlora.models.family import FAMILIES, padded
from flatlora.models.language import LanguageModel
from flatlora.utils.labels import IGNORED_LABEL

# Encoders that transformers also loads as causal models; without is_decoder their attention is bidirectional.
_BIDIRECTIONAL = {"bert-generation", *(MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
# Models whose loss in transformers compares a token's logits with that token, such as the decoders of BART and Marian.
_UNSHIFTED = {
    *("cpmant", "trocr", "whisper"),
    *(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
_GRAPH_LENGTHS = 64  # tokens; lengths are rounded up to a multiple of it, to capture fewer graphs


@FAMILIES.register("causal_lm")
class CausalLM(LanguageModel):
    """Decoder-only models. Rows are padded on the right, so tokens with a loss need no mask to ignore padding."""

    auto = transformers.AutoModelForCausalLM
    peft_task = "CAUSAL_LM"
    token_mean = True
    graphed = True
    largest_graph = GRAPH_TOKENS

    def mismatch(self, described: PreTrainedConfig) -> str | None:
        if getattr(described, "is_encoder_decoder", False):
            return "it is an encoder-decoder; use model.family=seq2seq, or name a decoder-only model"
        if described.model_type == "xlnet":
            return "it predicts tokens in permuted order and sees those that follow; name a decoder-only model"
        if described.model_type in _UNSHIFTED:
            return "its loss in transformers does not shift labels: it would learn to repeat; name a decoder-only model"
        decodes = getattr(described, "is_decoder", False) or getattr(described, "causal", False)
        if described.model_type in _BIDIRECTIONAL and not decodes:
            return "it is an encoder, whose tokens see those that follow; use model=encoder, or a decoder-only model"
        return None

    def without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: inputs[key] for key in ("input_ids", "labels")}

    def graph_inputs(
        self, inputs: dict[str, torch.Tensor], items: torch.Tensor, shares: int, positions: int | None
    ) -> dict[str, torch.Tensor]:
        """Pads inputs on the right to a multiple of `_GRAPH_LENGTHS` tokens."""
        ids = inputs["input_ids"]
        return {
            "input_ids": padded(ids, _GRAPH_LENGTHS, positions),
            "labels": padded(inputs["labels"], _GRAPH_LENGTHS, positions, value=IGNORED_LABEL),
            "num_items_in_batch": torch.as_tensor(items, device=ids.device),
        }
