"""Encoder-decoder language models, such as T5.

Their `forward` accepts any keyword argument and ignores `num_items_in_batch`: the loss is the mean over a micro-batch
(`token_mean` is False).
"""

from __future__ import annotations

import transformers
from transformers import PreTrainedConfig

from flatlora.models.family import FAMILIES
from flatlora.models.language import LanguageModel


@FAMILIES.register("seq2seq")
class Seq2Seq(LanguageModel):
    """Encoder-decoder models: the encoder reads the prompt, the decoder generates the answer."""

    auto = transformers.AutoModelForSeq2SeqLM
    encoder_decoder = True
    peft_task = "SEQ_2_SEQ_LM"

    def mismatch(self, described: PreTrainedConfig) -> str | None:
        if getattr(described, "is_encoder_decoder", False):
            return None
        return "it has no encoder and decoder; use model.family=causal_lm, or name a T5"
