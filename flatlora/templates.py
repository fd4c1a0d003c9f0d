"""The two prompts of the papers: Flat-LoRA's and LoRA-GA's "Q: … A: ", and the Alpaca form (LoRA-Pro's everywhere)."""

from __future__ import annotations

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
