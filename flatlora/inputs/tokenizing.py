"""Texts as token ids, the same in training and in evaluation.

What a text says is text: "<s>" in a page of HTML strikes a word out and begins no sequence. And a decoder-only model
goes on where its prompt ends, so the end of the sequence that some tokenizers put behind every text
(`add_eos_token=true`) is left off its prompts; an encoder reads the prompt whole, as it was trained to.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Ids of a text; `special` ones around it (a beginning of the sequence) if asked, none for names of them in it."""
    return tokenizer(text, add_special_tokens=special, split_special_tokens=True)["input_ids"]


def appended_ends(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many end-of-sequence tokens the tokenizer puts behind every text."""

    def ends(*, special: bool) -> int:
        ids = text_ids(tokenizer, "a", special=special)
        return next((n for n, token in enumerate(reversed(ids)) if token != tokenizer.eos_token_id), len(ids))

    return ends(special=True) - ends(special=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """{text: id} of all tokens that stand for no text, the longest first."""
    found = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))
