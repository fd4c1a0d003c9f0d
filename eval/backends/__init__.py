"""Who answers the prompts: in its own words, or by weighing the answers that it is offered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch

Messages = Sequence[Mapping[str, str]]  # [{"role", "content"}, …]


class Completion(NamedTuple):
    """One answer."""

    text: str
    tokens: int
    finished: bool  # ended by itself, not by the limit
    refusal: str | None = None  # why an endpoint does not answer this request, in its own words


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. Temperature 0 is greedy, whatever the model's own generation_config.json asks for."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # an answer ends before the first of these
    stop_in_body: bool = False  # only one that goes on with a function's body; others, such as a fence, are whole

    def cut(self, text: str) -> tuple[str, bool]:
        """(the answer before its first stop, whether there was one)."""
        return (text, False) if self.stop_in_body and not is_body(text) else cut_at(text, self.stop)

    def describe(self) -> dict[str, Any]:
        """For the record: what decides the answers; greedy ones without what they do not read."""
        settings = asdict(self) | {"stop": list(self.stop)}
        unread = {"top_p", "temperature"} if self.temperature == 0 else set()
        unread |= {key for key in ("stop", "stop_in_body") if not settings[key]}
        return {key: value for key, value in settings.items() if key not in unread}


def is_body(text: str) -> bool:
    """Whether a text begins with an indented line, as what goes on with a function's body does, and with no fence."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    return first.startswith(("  ", "\t")) and not first.lstrip().startswith(("```", "~~~"))


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first of the stops, whether there was one)."""
    places = [place for one in stop if (place := text.find(one)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class ImageBackend(Protocol):
    """Class scores of images."""

    batch_size: int
    processor: Any  # of pictures, as the model was trained with

    def describe(self) -> dict[str, Any]:
        """What identifies the model and the way it answers; part of the record."""
        ...

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """B × 3 × H × W → B × classes, FP32, on the host."""
        ...


class Generator(Protocol):
    """Text generation.

    A backend whose answers depend on their own prompts alone, such as an endpoint, may have `each(work, items)` too:
    (item, what `work` makes of it) as they end, several at a time. Its rows are then asked one by one, not in batches.
    One that makes a batch's answers token by token may have `on_token`, to be set: called with the number of each.
    One that knows the model's context may have `check_lengths(lengths of prompts, new tokens)`, a ConfigError where the
    model cannot take them; it is called before the first batch. It then has `chat_length(chat)` too, in tokens, and
    `tokens_left(lengths)`: for how many new tokens there is room after prompts of these lengths, None for any number.
    """

    batch_size: int

    def describe(self) -> dict[str, Any]:
        """What identifies the model and the way it answers; part of the record."""
        ...

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt."""
        ...

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """One completion for each prompt, in order; `seeds`, one a prompt, decide what is drawn at a temperature."""
        ...

    def chat(
        self, chats: Sequence[Messages], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """One reply to each chat, in the form that the model's tokenizer has for chats."""
        ...


class Backend(Generator, Protocol):
    """Text generation, and likelihoods of given answers."""

    def check_choices(self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool) -> None:
        """See before the first batch that `log_likelihoods` can read these; a ConfigError where it cannot."""
        ...

    def first_token(self, choice: str) -> int:
        """The id that an answer begins with."""
        ...

    def log_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool = False
    ) -> list[list[float]]:
        """log p(choice, end of sequence | prompt) of each choice of each prompt; of its first token alone if asked."""
        ...
