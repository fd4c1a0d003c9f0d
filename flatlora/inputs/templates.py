"""The two prompts of the papers: Flat-LoRA's and LoRA-GA's "Q: … A: ", and the Alpaca form (LoRA-Pro's everywhere)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Template = Literal["qa", "alpaca"]  # a data set may have "none" too: its rows are prompts as they are

_BEGINNING = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."


def prompt(template: str, instruction: str, context: str = "") -> str:
    """The x of a row; `context` is what the instruction speaks of, where the data set has it apart."""
    if template == "none":
        return f"{instruction}\n{context}" if context else instruction
    if template == "qa":
        return f"Q: {instruction}\n{context}\nA: " if context else f"Q: {instruction}\nA: "
    if context:
        return (
            f"{_BEGINNING}, paired with an input that provides further context. {_REQUEST}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return f"{_BEGINNING}. {_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def conversation(template: str, turns: Sequence[str], said: Sequence[str]) -> str:
    """What a model is given to answer the last of several turns, each of the earlier ones with its answer.

    Each turn stands as in training, x and a blank and the answer; the preamble of the Alpaca form comes once.
    """
    text = f"{prompt(template, turns[0])} "
    for answer, turn in zip(said, turns[1:], strict=True):
        following = prompt(template, turn)
        if template == "alpaca":
            following = following.removeprefix(f"{_BEGINNING}. {_REQUEST}\n\n")
        text += f"{answer.strip()}\n\n{following} "
    return text
