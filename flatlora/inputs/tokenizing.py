"""Tokenization of texts, the same in training and in evaluation.

Names of special tokens inside a text are text: "<s>" in HTML is a tag and does not begin a sequence. A decoder-only
model continues its prompt, so the end-of-sequence token that some tokenizers append to every text
(`add_eos_token=true`) is removed from its prompts; an encoder keeps it, as in its pretraining.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Ids of a text; names of special tokens inside it are text.

    Args:
        special: whether to add the special tokens around it, such as the beginning of the sequence.
    """
    return tokenizer(text, add_special_tokens=special, split_special_tokens=True)["input_ids"]


def appended_ends(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of end-of-sequence tokens that the tokenizer appends to every text."""

    def ends(*, special: bool) -> int:
        ids = text_ids(tokenizer, "a", special=special)
        return next((n for n, token in enumerate(reversed(ids)) if token != tokenizer.eos_token_id), len(ids))

    return ends(special=True) - ends(special=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """{name: id} of all special tokens, the longest names first."""
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return dict(sorted(tokens.items(), key=lambda pair: -len(pair[0])))
