"""Converts chats to token ids: only the chat template adds special tokens; their names in a turn are plain text.

A tokenizer reads the rendered chat as one text, so an "<|im_end|>" in a question would end the turn. Chats with such
names are encoded by a copy of the tokenizer whose special tokens have other names, which replace those of the template.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from eval.backends import Messages
from flatlora.inputs.tokenizing import special_tokens, tokenizing

logger = logging.getLogger(__name__)


class ChatEncoder:
    """Token ids of chats: those of `apply_chat_template`, if no turn contains the name of a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._names = list(special_tokens(tokenizer))
        self._any_name = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def __call__(self, chats: Sequence[Messages]) -> list[list[int]]:
        """Returns the ids of each chat; warns of names that a slow tokenizer can only read as special tokens."""
        names = [sorted({name for turn in chat for name in self._any_name.findall(turn["content"])}) for chat in chats]
        if any(names) and not self.tokenizer.is_fast:
            counts = sorted(Counter(name for in_chat in names for name in in_chat).items())
            logger.warning(
                "The turns of chats contain names of special tokens (%s), which this tokenizer can only read as those "
                "tokens; remove them.",
                ", ".join(f"{name} in {count}" for name, count in counts),
            )
        return [
            self._text_ids(chat) if in_chat and self.tokenizer.is_fast else self._render(chat, tokenize=True)
            for chat, in_chat in zip(chats, names, strict=True)
        ]

    def _render(self, chat: Messages, *, tokenize: bool) -> Any:
        options = {"tokenize": tokenize, "add_generation_prompt": True, "return_dict": tokenize}
        texts = [turn["content"] for turn in chat]  # the template may never end either
        rendered = tokenizing(self.tokenizer, texts, lambda: self.tokenizer.apply_chat_template(list(chat), **options))
        return rendered["input_ids"] if tokenize else rendered

    def _text_ids(self, chat: Messages) -> list[int]:
        """Returns the ids of a chat whose turns contain names of special tokens, which are encoded as text."""
        return self.rendered_ids(self._render(self.marked(chat), tokenize=False))

    def marked(self, chat: Messages) -> list[dict[str, str]]:
        """Returns the chat with placeholders for the names of special tokens in its turns, for `rendered_ids`."""
        return [{**turn, "content": self._replaced(turn["content"], _as_text)} for turn in chat]

    def unmarked(self, text: str) -> str:
        """Returns a text with the names of special tokens in place of the placeholders of `marked`."""
        for index, name in enumerate(self._names):
            text = text.replace(_as_text(index), name)
        return text

    def rendered_ids(self, text: str) -> list[int]:
        """Returns the ids of a rendered chat: its names of special tokens are those tokens, placeholders are text."""
        text = self.unmarked(self._replaced(text, _as_token))
        encode = functools.partial(self._renamed.encode_batch_fast, [text], add_special_tokens=False)
        return tokenizing(self.tokenizer, [text], encode)[0].ids

    def _replaced(self, text: str, code: Callable[[int], str]) -> str:
        return self._any_name.sub(lambda match: code(self._names.index(match[0])), text)

    @functools.cached_property
    def _renamed(self) -> Tokenizer:
        """A tokenizer with the same ids and vocabulary, whose special tokens are named by `_as_token`."""
        codes = {name: _as_token(index) for index, name in enumerate(self._names)}
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        model, vocabulary = state["model"], state["model"]["vocab"]
        for token in state["added_tokens"]:
            token["content"] = codes.get(token["content"], token["content"])
        if isinstance(vocabulary, dict):
            model["vocab"] = {codes.get(name, name): number for name, number in vocabulary.items()}
        else:  # Unigram's
            model["vocab"] = [[codes.get(name, name), score] for name, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = codes.get(model["unk_token"], model["unk_token"])
        state |= {"post_processor": None, "padding": None, "truncation": None}  # these are for other uses
        return Tokenizer.from_str(json.dumps(state))


def _as_token(index: int) -> str:
    """Returns the placeholder of a special token of the template: noncharacters of Unicode, which texts do not have."""
    return f"\ufdd0{index}\ufdd1"


def _as_text(index: int) -> str:
    """Returns the placeholder of a special token's name in a turn."""
    return f"\ufdd2{index}\ufdd3"
