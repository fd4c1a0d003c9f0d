"""Chats as token ids: special tokens are those that the tokenizer's template writes, and what a turn says is text.

A tokenizer reads the rendered chat as one text, where an "<|im_end|>" in a question would end the turn. Chats with such
names go to a copy of the tokenizer whose special tokens have other names, which stand in for the template's own.
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
from flatlora.inputs.tokenizing import special_tokens

logger = logging.getLogger(__name__)


class ChatEncoder:
    """Ids of chats, as `apply_chat_template` gives them where no turn holds the name of a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._names = list(special_tokens(tokenizer))
        self._any_name = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def __call__(self, chats: Sequence[Messages]) -> list[list[int]]:
        """Warns of names that a tokenizer in Python can read as the tokens alone."""
        names = [sorted({name for turn in chat for name in self._any_name.findall(turn["content"])}) for chat in chats]
        if any(names) and not self.tokenizer.is_fast:
            counts = sorted(Counter(name for in_chat in names for name in in_chat).items())
            logger.warning(
                "Names of special tokens stand in the turns of chats (%s): this tokenizer can read them as the tokens "
                "alone; take them out.",
                ", ".join(f"{name} in {count}" for name, count in counts),
            )
        return [
            self._text_ids(chat) if in_chat and self.tokenizer.is_fast else self._render(chat, tokenize=True)
            for chat, in_chat in zip(chats, names, strict=True)
        ]

    def _render(self, chat: Messages, *, tokenize: bool) -> Any:
        options = {"tokenize": tokenize, "add_generation_prompt": True, "return_dict": tokenize}
        rendered = self.tokenizer.apply_chat_template(list(chat), **options)
        return rendered["input_ids"] if tokenize else rendered

    def _text_ids(self, chat: Messages) -> list[int]:
        """Ids of a chat whose turns hold names of special tokens, none of them read as the token."""
        marked = [{**turn, "content": self._replaced(turn["content"], _as_text)} for turn in chat]
        text = self._replaced(self._render(marked, tokenize=False), _as_token)
        for place, name in enumerate(self._names):
            text = text.replace(_as_text(place), name)
        return self._renamed.encode(text, add_special_tokens=False).ids

    def _replaced(self, text: str, code: Callable[[int], str]) -> str:
        return self._any_name.sub(lambda match: code(self._names.index(match[0])), text)

    @functools.cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with the same ids and text, its special tokens called by their codes."""
        codes = {name: _as_token(place) for place, name in enumerate(self._names)}
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
        state |= {"post_processor": None, "padding": None, "truncation": None}  # of single texts
        return Tokenizer.from_str(json.dumps(state))


def _as_token(place: int) -> str:
    """What stands for a special token of the template; no text holds Unicode's noncharacters."""
    return f"\ufdd0{place}\ufdd1"


def _as_text(place: int) -> str:
    """What stands for the name of a special token in a turn."""
    return f"\ufdd2{place}\ufdd3"
