"""Tokenization of texts, the same in training and in evaluation.

Names of special tokens inside a text are text: "<s>" in HTML is a tag and does not begin a sequence. A decoder-only
model continues its prompt, so the end-of-sequence token that some tokenizers append to every text
(`add_eos_token=true`) is removed from its prompts; an encoder keeps it, as in its pretraining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from transformers import BatchEncoding, PreTrainedTokenizerBase

from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.time_limit import in_time

_LEAST_SECONDS, _LETTERS_PER_SECOND = 60.0, 10_000  # a hundredth of the usual speed
T = TypeVar("T")


def tokenizing(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], work: Callable[[], T]) -> T:
    """Returns the result of `work`, which tokenizes `texts`, within a time limit.

    The regular expressions of a tokenizer.json can backtrack for years, which no signal interrupts, and the loops of a
    chat template can have as many rounds.

    Raises:
        ConfigError: it takes longer, or the tokenizer's library gives up.
    """
    letters = sum(map(len, texts))
    seconds = _LEAST_SECONDS + letters / _LETTERS_PER_SECOND
    try:
        return in_time(work, seconds)
    except TimeoutError as error:
        cause, reason = error, f"it takes more than {seconds:.0f} s for {letters:,} letters"
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library in Rust, which derives it from BaseException
            raise
        cause, reason = error, reason_of(error)
    raise ConfigError(
        [
            f"Invalid tokenizer of {tokenizer.name_or_path}: {reason}; mend the regular expressions in its "
            "tokenizer.json or its chat template, or name another model."
        ]
    ) from cause


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> BatchEncoding:
    """`tokenizer(texts, ...)` within a time limit; raises as `tokenizing`."""
    return tokenizing(tokenizer, texts, lambda: tokenizer(list(texts), **options))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Ids of a text; names of special tokens inside it are text.

    Args:
        special: whether to add the special tokens around it, such as the beginning of the sequence.

    Raises:
        ConfigError: as `tokenizing`.
    """
    return tokenized(tokenizer, [text], add_special_tokens=special, split_special_tokens=True)["input_ids"][0]


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
