"""Encoder-decoder language models, such as T5.

Their `forward` accepts any keyword argument and ignores `num_items_in_batch`: the loss is the mean over a micro-batch
(`token_mean` is False).
"""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedConfig

from flatlora.models.family import FAMILIES, padded
from flatlora.models.language import LanguageModel
from flatlora.utils.labels import IGNORED_LABEL

_GRAPH_LENGTHS = 8  # tokens; the lengths of prompts and answers are rounded up to a multiple of it


@FAMILIES.register("seq2seq")
class Seq2Seq(LanguageModel):
    """Encoder-decoder models: the encoder reads the prompt, the decoder generates the answer."""

    auto = transformers.AutoModelForSeq2SeqLM
    encoder_decoder = True
    peft_task = "SEQ_2_SEQ_LM"
    graphed = True

    def mismatch(self, described: PreTrainedConfig) -> str | None:
        if getattr(described, "is_encoder_decoder", False):
            return None
        return "it has no encoder and decoder; use model.family=causal_lm, or name a T5"

    def graph_inputs(
        self, inputs: dict[str, torch.Tensor], items: torch.Tensor, shares: int, positions: int | None
    ) -> dict[str, torch.Tensor]:
        """Pads prompts and answers on the right; the mask hides a prompt's padding, and an answer's has no loss."""
        values = {"labels": IGNORED_LABEL}
        rows = {key: padded(ids, _GRAPH_LENGTHS, positions, values.get(key, 0)) for key, ids in inputs.items()}
        return super().graph_inputs(rows, items, shares, positions)
