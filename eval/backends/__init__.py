"""Who answers the prompts. A backend has `describe()` and `generate(prompts, max_new_tokens)`, greedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Completion(NamedTuple):
    """One answer."""

    text: str
    tokens: int
    finished: bool  # ended by itself, not by the limit


class Backend(Protocol):
    """Greedy text generation."""

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
