"""Who answers the prompts: greedily in its own words, or by weighing the answers that it is offered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch


class Completion(NamedTuple):
    """One answer."""

    text: str
    tokens: int
    finished: bool  # ended by itself, not by the limit


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


class Backend(Protocol):
    """Greedy text generation, and likelihoods of given answers."""

    batch_size: int

    def describe(self) -> dict[str, Any]:
        """What identifies the model and the way it answers; part of the record."""
        ...

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt."""
        ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[Completion]:
        """One greedy completion for each prompt, in order."""
        ...

    def first_token(self, choice: str) -> int:
        """The id that an answer begins with."""
        ...

    def log_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool = False
    ) -> list[list[float]]:
        """log p(choice, end of sequence | prompt) of each choice of each prompt; of its first token alone if asked."""
        ...
