"""Base class of backends with the model's own tokenizer: prompts and chats to token ids, generated ids to answers."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from eval.answers import is_draft_tag
from eval.backends import Completion, Sampling
from flatlora.inputs.chats import ChatEncoder, template_errors
from flatlora.inputs.conversations import Chat
from flatlora.inputs.tokenizing import appended_ends, special_tokens, text_ids
from flatlora.utils.errors import ConfigError

logger = logging.getLogger(__name__)


class Context(NamedTuple):
    """Maximum number of tokens of prompt and answer together (for an encoder-decoder model, of each).

    Beyond `limit`, "learned" positions do not exist, "rotary" ones were not trained, and a "served" answer is cut.
    """

    limit: int
    kind: Literal["learned", "rotary", "served"]


class TokenizedBackend:
    """Generation by token ids; a subclass has `tokenizer`, `ends` and `_generate`.

    Attributes:
        ends: ids of the tokens that end an answer.
        context: limit of the model's context; None: none.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    encoder_decoder = False
    context: Context | None = None
    _warned_of: frozenset[str | None] = frozenset()  # tasks whose prompts are longer than the context

    def prompt_length(self, prompt: str | Chat) -> int:
        return len(self.prompt_ids(prompt))

    def check_lengths(self, lengths: Sequence[int], new_tokens: int, *, task: str | None = None) -> None:
        """Checks that prompts of these lengths with `new_tokens` more fit the model's context; warns once per task.

        Args:
            task: name of the prompts in messages; None: unnamed.

        Raises:
            ConfigError: they do not fit; the message has their number.
        """
        if self.context is None or not lengths:
            return
        limit, kind = self.context
        # The last new token is not fed back to the model.
        read = [max(length, new_tokens) if self.encoder_decoder else length + new_tokens - 1 for length in lengths]
        beyond, alone, longest = sum(n > limit for n in read), sum(n > limit for n in lengths), max(lengths)
        of_task = f" of {task}" if task else ""
        if (kind == "learned" and beyond) or (kind == "served" and longest >= limit):
            raise ConfigError(
                [
                    f"Too long for the model: {beyond} of {len(lengths)} prompts{of_task}, the longest of {longest} "
                    f"tokens, with up to {new_tokens} tokens of an answer; it has positions for {limit} tokens. Lower "
                    "max_new_tokens, leave those rows out, or use a model with a longer context."
                ]
            )
        # Batches (task=None) do not warn again: all prompts of the task were checked before.
        if beyond and not (self._warned_of if task is None else task in self._warned_of):
            self._warned_of |= {task}
            logger.warning(
                "%d of %d prompts%s and their answers of up to %d tokens may be longer than the %d tokens of the "
                "model's context (%d prompts by themselves, the longest of %d tokens): %s.",
                *(beyond, len(lengths), of_task, new_tokens, limit, alone, longest),
                _BEYOND[kind],
            )

    def tokens_left(self, lengths: Sequence[int]) -> int | None:
        """Returns how many new tokens have learned positions after prompts of these lengths; None: any number."""
        if self.context is None or self.context.kind != "learned":
            return None
        # The last new token is not fed back; an encoder-decoder model has separate positions for the answer.
        return self.context.limit if self.encoder_decoder else self.context.limit - max(lengths) + 1

    def generate(
        self, prompts: Sequence[str | Chat], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Returns one completion per prompt.

        Raises:
            ConfigError: a prompt is a chat, and the tokenizer has no chat template.
        """
        return self._generate([self.prompt_ids(prompt) for prompt in prompts], sampling, seeds)

    @functools.cached_property
    def chat_encoder(self) -> ChatEncoder:
        """Converts chats to ids.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if errors := template_errors(self.tokenizer):
            raise ConfigError(errors)
        return ChatEncoder(self.tokenizer)

    def generate_ids(
        self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Returns one completion per list of token ids, in order."""
        return self._generate(prompts, sampling, seeds)

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> list[Completion]:
        """Returns one completion per list of token ids, in order."""
        raise NotImplementedError

    def prompt_ids(self, prompt: str | Chat) -> list[int]:
        """Returns the ids of a prompt: names of special tokens are text, and a decoder's prompt has no end token."""
        if isinstance(prompt, Chat):
            return self.chat_encoder([prompt])[0]
        ids = text_ids(self.tokenizer, prompt)
        return ids[: len(ids) - self._appended_ends]

    @functools.cached_property
    def _appended_ends(self) -> int:
        return 0 if self.encoder_decoder else appended_ends(self.tokenizer)

    def _completion(self, prompt: list[int], ids: list[int], sampling: Sampling) -> Completion:
        """Returns the answer in the ids that follow `prompt`: up to the first end token, and before the first stop."""
        answer = self._before_end(ids)
        text, stopped = sampling.cut(self._text(prompt, answer))
        return Completion(text, len(answer), len(answer) < len(ids) or stopped)

    def _before_end(self, ids: list[int]) -> list[int]:
        return ids[: next((index for index, token in enumerate(ids) if token in self.ends), len(ids))]

    def _text(self, prompt: list[int], answer: list[int]) -> str:
        """Decodes an answer as what it adds to the text of its prompt.

        SentencePiece's decoders drop the first space of a text, so an answer must not be decoded by itself.
        """
        before = [] if self.encoder_decoder else prompt
        start, full = self._decode(before), self._decode([*before, *answer])
        return full.removeprefix(start) if full.startswith(start) else self._decode(answer)

    @functools.cached_property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer and its chat template, without the padding and truncation that calls change."""
        tokenizer, fast = self.tokenizer, getattr(self.tokenizer, "backend_tokenizer", None)
        state: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        if fast is not None:
            state = json.loads(fast.to_str()) | {"padding": None, "truncation": None}
        state |= {"ends": sorted(self.ends), "chat_template": getattr(tokenizer, "chat_template", None)}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def _decode(self, ids: list[int]) -> str:
        """Decodes without special tokens, except tags of thinking parts, which scorers look for.

        Also without "clean up", which would remove spaces before punctuation.
        """
        if (hidden := self._hidden_ids) is not None:
            ids = [token for token in ids if token not in hidden]
        return self.tokenizer.decode(ids, skip_special_tokens=hidden is None, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def _hidden_ids(self) -> frozenset[int] | None:
        """Ids that answers are decoded without; None: all special tokens, as none of them is a thinking part's tag."""
        named = special_tokens(self.tokenizer)
        hidden = {token for name, token in named.items() if not is_draft_tag(name)}
        return None if len(hidden) == len(named) else frozenset(hidden)


_BEYOND = {
    "rotary": "it was not trained on positions beyond, so answers there are unreliable; nothing is cut",
    "served": "an answer that reaches the limit is cut there, and counts as unfinished",
}


def end_ids(*declared: int | Iterable[int] | None) -> frozenset[int]:
    """Returns all end-of-sequence ids of a tokenizer and a generation config, which may have one, several or none."""
    ids: set[int] = set()
    for end in declared:
        ids |= set() if end is None else {end} if isinstance(end, int) else set(end)
    return frozenset(ids)
