"""Prompt templates: "Q: … A: " (Flat-LoRA, LoRA-GA), the Alpaca form (LoRA-Pro), and that of PEFT's own suite.

The template "chat" is the tokenizer's own: the instruction is the turn of a user, see `flatlora.inputs.conversations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Template = Literal["qa", "alpaca", "chat"]  # some data sets also have "none": instructions are used unchanged
MathTemplate = Literal["qa", "alpaca", "step_by_step", "chat"]  # step_by_step is of PEFT's suite

_BEGINNING = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
STEP_BY_STEP = " Think step by step.\nAnswer:"
"""End of a prompt in the template step_by_step, the only one that no blank follows."""


def prompt(template: str, instruction: str, context: str = "") -> str:
    """The x of a row; `context` is the input of the instruction, for data sets with a column for it."""
    if template in ("none", "chat"):
        return f"{instruction}\n{context}" if context else instruction
    if template == "step_by_step":
        return (
            f"Question: {instruction}\n{context}{STEP_BY_STEP}" if context else f"Question: {instruction}{STEP_BY_STEP}"
        )
    if template == "qa":
        return f"Q: {instruction}\n{context}\nA: " if context else f"Q: {instruction}\nA: "
    if context:
        return (
            f"{_BEGINNING}, paired with an input that provides further context. {_REQUEST}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return f"{_BEGINNING}. {_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def conversation(template: str, turns: Sequence[str], said: Sequence[str]) -> str:
    """The prompt for the last of several turns, after the earlier turns and their answers `said`.

    Each turn has the form of training: x, a blank and the answer. The preamble of the Alpaca form is not repeated.
    """
    text = f"{prompt(template, turns[0])} "
    for answer, turn in zip(said, turns[1:], strict=True):
        following = prompt(template, turn)
        if template == "alpaca":
            following = following.removeprefix(f"{_BEGINNING}. {_REQUEST}\n\n")
        text += f"{answer.strip()}\n\n{following} "
    return text
