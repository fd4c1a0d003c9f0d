"""Interfaces of the backends: text generation, likelihoods of given answers, and image classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch

from flatlora.inputs.conversations import Chat


class Completion(NamedTuple):
    """One answer."""

    text: str
    tokens: int
    finished: bool  # ended by the model, not by the token limit
    refusal: str | None = None  # the endpoint's message if it does not answer this request


@dataclass(frozen=True)
class Sampling:
    """Decoding settings. Temperature 0 is greedy; the model's own generation_config.json is ignored."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # an answer ends before the first of these
    stop_in_body: bool = False  # `stop` applies only to answers that continue a function's body, see `is_body`

    def cut(self, text: str) -> tuple[str, bool]:
        """Returns (the answer before its first stop, whether there was one)."""
        return (text, False) if self.stop_in_body and not is_body(text) else cut_at(text, self.stop)

    def describe(self) -> dict[str, Any]:
        """Returns the settings that affect the answers, for generation.json."""
        settings = asdict(self) | {"stop": list(self.stop)}
        unread = {"top_p", "temperature"} if self.temperature == 0 else set()
        unread |= {key for key in ("stop", "stop_in_body") if not settings[key]}
        return {key: value for key, value in settings.items() if key not in unread}


def is_body(text: str) -> bool:
    """Whether a text begins with an indented line that is no fence, as the rest of a function's body does."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    return first.startswith(("  ", "\t")) and not first.lstrip().startswith(("```", "~~~"))


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Returns (the text before the first of the stops, whether there was one)."""
    starts = [start for string in stop if (start := text.find(string)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def check_numbers(scores: torch.Tensor) -> None:
    """Checks the logits or likelihoods of a model; in FP16, activations can overflow although all weights are finite.

    Raises:
        FloatingPointError: one is NaN, so that the largest would be an arbitrary one.
    """
    if scores.isnan().any():
        raise FloatingPointError(
            "the model computes NaN instead of scores: its activations overflow, or its weights have diverged; use "
            "dtype=float32 or bfloat16, or a checkpoint of an earlier step"
        )


class ImageBackend(Protocol):
    """Image classification."""

    batch_size: int
    processor: Any  # image processor that the model was trained with

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the model and its settings, for generation.json."""
        ...

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """B × 3 × H × W, UINT8 or normalized → B × classes, FP32, on the CPU."""
        ...


class Generator(Protocol):
    """Text generation.

    Optional members:
        each(work, items): yields (item, work(item)) as they finish, several at a time. For backends whose answers do
            not depend on the rest of a batch, such as endpoints; rows are then answered one by one, not in batches.
        on_token: callback that is set from outside and called with the index of each token of a batch.
        check_lengths(lengths of prompts, new tokens): raises a ConfigError if the model's context is too short; called
            before the first batch. A backend that has it also has the next one.
        tokens_left(lengths): number of new tokens that fit after prompts of these lengths; None for any number.
    """

    batch_size: int

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the model and its settings, for generation.json."""
        ...

    def prompt_length(self, prompt: str | Chat) -> int:
        """Returns the number of tokens of a prompt."""
        ...

    def generate(
        self, prompts: Sequence[str | Chat], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Returns one completion per prompt, in order; `seeds`, one per prompt, are used at a temperature above 0.

        A chat is formatted with the chat template of the model's tokenizer.
        """
        ...


class Backend(Generator, Protocol):
    """Text generation, and likelihoods of given answers."""

    def check_choices(self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool) -> None:
        """Checks before the first batch that `log_likelihoods` can read these; raises a ConfigError if it cannot."""
        ...

    def first_token(self, choice: str) -> int:
        """Returns the id of the first token of an answer."""
        ...

    def log_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool = False
    ) -> list[list[float]]:
        """Returns log p(choice, end of sequence | prompt) for each choice of each prompt.

        `first_token` takes only the first token of each choice, without the end of the sequence.
        """
        ...
