"""Converts chats to token ids: only the chat template adds special tokens; their names in a turn are plain text.

A tokenizer reads the rendered chat as one text, so an "<|im_end|>" in a question would end the turn. Chats with such
names are encoded by a copy of the tokenizer whose special tokens have other names, which replace those of the template.

In training, the answers of the assistant are learned. A template with {% generation %} marks says itself where they
are. For another, an answer begins where the generation prompt after the turns before it ends, and ends where the next
turn begins; white space after the token that ends it is not learned. A template for which this is not so, because it
renders a turn in another way once others follow, is an error.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from flatlora.inputs.conversations import Chat, readable, texts
from flatlora.inputs.tokenizing import special_tokens, tokenizing
from flatlora.utils.errors import reason_of

logger = logging.getLogger(__name__)

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)  # of a template that does not take the turns


def template_errors(tokenizer: PreTrainedTokenizerBase, key: str = "template") -> list[str]:
    """Returns an error if a tokenizer has no chat template."""
    if getattr(tokenizer, "chat_template", None) is not None:
        return []
    return [
        f"Invalid {key}=chat: the tokenizer of {tokenizer.name_or_path} has no chat template; use another template, a "
        "model that was tuned for chats, or a folder of the model with a chat_template.jinja in it."
    ]


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of the text of the chat template; of several, that of their names and texts as JSON."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Learned(NamedTuple):
    """Token ids of a chat, up to the last one with a loss."""

    ids: list[int]
    has_loss: list[bool]


class _Layout(NamedTuple):
    """A rendered chat with placeholders for special tokens, and where in it the prompt ends and answers are."""

    text: str
    prompt: int
    spans: list[tuple[int, int]]


class ChatEncoder:
    """Token ids of chats: those of `apply_chat_template`, if no turn contains the name of a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._names = list(special_tokens(tokenizer))
        self._any_name = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def __call__(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Returns the ids of each prompt; warns of names that a slow tokenizer can only read as special tokens."""
        names = [sorted({name for text in texts(chat) for name in self._any_name.findall(text)}) for chat in chats]
        if any(names) and not self.tokenizer.is_fast:
            counts = sorted(Counter(name for in_chat in names for name in in_chat).items())
            logger.warning(
                "The turns of chats contain names of special tokens (%s), which this tokenizer can only read as those "
                "tokens; remove them.",
                ", ".join(f"{name} in {count}" for name, count in counts),
            )
        return [
            self._text_ids(chat) if in_chat and self.tokenizer.is_fast else self._prompt(chat, tokenize=True)
            for chat, in_chat in zip(chats, names, strict=True)
        ]

    def learned(self, chats: Sequence[Chat], *, whole: bool = False) -> list[Learned | str]:
        """Returns the ids of each conversation, which ends with an answer, or why it cannot be learned.

        The ids begin with those of its prompt, as `__call__` has them, so that an evaluation continues exactly what was
        learned. A token that would span prompt and answer is split.

        Args:
            whole: whether all tokens have a loss, not only the answers.
        """
        every = [readable(chat.messages) for chat in chats]
        layouts = tokenizing(self.tokenizer, every, lambda: [self._layout(chat, whole=whole) for chat in chats])
        valid = [layout for layout in layouts if isinstance(layout, _Layout)]
        parts = [part for text, end, _ in valid for part in (text, text[:end], text[end:])]
        encode = functools.partial(self._renamed.encode_batch, parts, add_special_tokens=False)
        encodings = iter(tokenizing(self.tokenizer, parts, encode))
        return [layout if isinstance(layout, str) else _learned(layout, *_three(encodings)) for layout in layouts]

    def _layout(self, chat: Chat, *, whole: bool) -> _Layout | str:
        marked = chat._replace(messages=self.marked(chat.messages), tools=self.marked(chat.tools))
        try:
            asked = self._render(Chat(marked.messages[:-1], marked.tools), prompt=True)
            text, spans = self._answers(marked)
        except _Unclear as error:
            return str(error)
        except _ERRORS as error:
            return f"the chat template does not take it ({reason_of(error)})"
        if not text.startswith(asked):
            return (
                "the chat template's generation prompt is not how it begins the last answer, so that an evaluation "
                "would not ask what was learned"
            )
        spans = [(0, len(text))] if whole else [span for span in spans if span[0] < span[1]]
        if not spans:
            return "the chat template renders no answer of the assistant"
        places = sorted({0, len(asked), len(text), *(place for span in spans for place in span)})
        coded, moved = "", {0: 0}
        for start, end in itertools.pairwise(places):
            coded += self._coded(text[start:end])
            moved[end] = len(coded)
        return _Layout(coded, moved[len(asked)], [(moved[start], moved[end]) for start, end in spans])

    def _answers(self, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
        """Returns a rendered conversation, and where the assistant's answers are in it.

        Raises:
            _Unclear: the template does not render the beginning of a chat as it renders all of it, and has no marks,
                or there are answers that are not learned.
        """
        template = self.tokenizer.get_chat_template(None, chat.tools)
        if _MARKS.search(template):
            (text,), (spans,) = render_jinja_template(
                [chat.messages],
                tools=chat.tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            context_end = self._context_end(chat, text)
            return text, [span for span in spans if span[1] > context_end]
        text, spans = self._render(chat, prompt=False), []
        for number in _learned_turns(chat):
            before = self._render(Chat(chat.messages[:number], chat.tools), prompt=True)
            until = self._render(Chat(chat.messages[: number + 1], chat.tools), prompt=False)
            if not (until.startswith(before) and text.startswith(until)):
                raise _Unclear(
                    f"the chat template has no {{% generation %}} marks, and turn {number + 1} is rendered in another "
                    "way after its generation prompt or before further turns, so that answers cannot be told apart; "
                    "mark them in the template, or make each answer a row of its own"
                )
            answer = until[len(before) :].rstrip()
            ended = any(answer.endswith(name) for name in self._names)
            spans.append((len(before), len(before) + len(answer) if ended else len(until)))
        return text, spans

    def _context_end(self, chat: Chat, text: str) -> int:
        """Returns where the generation prompt of the first answer that is learned ends in a rendered conversation.

        Raises:
            _Unclear: it is rendered in another way there.
        """
        if not chat.context_turns:
            return 0
        before = self._render(Chat(chat.messages[: _learned_turns(chat)[0]], chat.tools), prompt=True)
        if not text.startswith(before):
            raise _Unclear(
                "the chat template renders the turns before the completion in another way once it follows, so that "
                "earlier answers cannot be told apart from it; put all turns into messages, where each is learned"
            )
        return len(before)

    def _render(self, chat: Chat, *, prompt: bool, tokenize: bool = False) -> Any:
        options = {"tokenize": tokenize, "add_generation_prompt": prompt, "return_dict": tokenize}
        rendered = self.tokenizer.apply_chat_template(list(chat.messages), tools=chat.tools, **options)
        return rendered["input_ids"] if tokenize else rendered

    def _prompt(self, chat: Chat, *, tokenize: bool) -> Any:
        rendered = functools.partial(self._render, chat, prompt=True, tokenize=tokenize)
        return tokenizing(self.tokenizer, [readable(chat.messages)], rendered)  # the template may never end either

    def _text_ids(self, chat: Chat) -> list[int]:
        """Returns the ids of a chat whose turns contain names of special tokens, which are encoded as text."""
        marked = Chat(self.marked(chat.messages), self.marked(chat.tools))
        return self.rendered_ids(self._prompt(marked, tokenize=False))

    def marked(self, value: Any) -> Any:
        """Returns messages or tools with placeholders for the names of special tokens in them, for `rendered_ids`."""
        if isinstance(value, str):
            return self._replaced(value, _as_text)
        if isinstance(value, dict):
            return {self.marked(key): self.marked(part) for key, part in value.items()}
        return [self.marked(part) for part in value] if isinstance(value, list | tuple) else value

    def unmarked(self, text: str) -> str:
        """Returns a text with the names of special tokens in place of the placeholders of `marked`."""
        for index, name in enumerate(self._names):
            text = text.replace(_as_text(index), name)
        return text

    def rendered_ids(self, text: str) -> list[int]:
        """Returns the ids of a rendered chat: its names of special tokens are those tokens, placeholders are text."""
        text = self._coded(text)
        encode = functools.partial(self._renamed.encode_batch_fast, [text], add_special_tokens=False)
        return tokenizing(self.tokenizer, [text], encode)[0].ids

    def _coded(self, text: str) -> str:
        """Returns a rendered chat as `_renamed` reads it."""
        return self.unmarked(self._replaced(text, _as_token))

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


def _learned_turns(chat: Chat) -> list[int]:
    """Returns the numbers of the turns that are answers to learn."""
    return [
        number
        for number, turn in enumerate(chat.messages)
        if turn["role"] == "assistant" and number >= chat.context_turns
    ]


class _Unclear(Exception):
    """It is not clear which part of a rendered chat the assistant wrote."""


def _three(encodings: Any) -> tuple[Any, Any, Any]:
    return next(encodings), next(encodings), next(encodings)


def _learned(layout: _Layout, whole: Any, prompt: Any, rest: Any) -> Learned:
    """Joins the encodings of a chat, of its prompt, and of what follows the prompt."""
    if whole.ids[: len(prompt.ids)] == prompt.ids:
        ids, offsets = whole.ids, whole.offsets
    else:  # a token would span both
        ids = prompt.ids + rest.ids
        offsets = prompt.offsets + [(start + layout.prompt, end + layout.prompt) for start, end in rest.offsets]
    has_loss = [any(start < last and end > first for first, last in layout.spans) for start, end in offsets]
    count = max((index + 1 for index, learned in enumerate(has_loss) if learned), default=0)
    return Learned(ids[:count], has_loss[:count])
