"""How PEFT's own suite (method_comparison/MetaMathQA of its repository) reads and compares an answer.

It reads the prompt and the answer together, in MetaMathQA's form ("The answer is: 18") or GSM8K's ("#### 18"):

- Of `_MARKS`, the first one of the list that the text has announces the answer, at its last occurrence; without one
  there is no answer.
- The answer is the rest of that line, without the blanks, full stops, "!", "?", "$" and "%" at its ends.
- Decimal numbers and fractions a/b are compared as floats, everything else as text. So "1,000" is not 1000, and
  "18 apples" is not 18: `eval.gsm8k.parse_answer` reads both as people mean them.
"""

from __future__ import annotations

from decimal import Decimal

_MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def answer_of(text: str) -> str | None:
    """The answer that a text announces; None without one."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in _MARKS if mark in text), None)
    if mark is None:
        return None
    line, *_ = text[text.rindex(mark) + len(mark) :].strip().split("\n")
    return line.strip(" .!?$%")


def number_in(answer: str) -> float | None:
    """The value of a decimal number or of a fraction a/b; None for any other text."""
    parts = answer.split("/")
    if len(parts) > 2:
        return None
    try:
        over, *under = (Decimal(part.strip()) for part in parts)
        return float(over / under[0] if under else over)
    except (ArithmeticError, ValueError):  # no number, or a division by zero
        return None


def is_right(text: str, reference: str) -> bool:
    """Whether a prompt with its answer announces the answer of the reference.

    Raises:
        ValueError: the reference announces none.
    """
    answer, expected = answer_of(text), answer_of(reference)
    if expected is None:
        raise ValueError(f"No answer is announced in the reference {reference[-60:]!r}.")
    if answer is None:
        return False
    left, right = number_in(answer), number_in(expected)
    return left == right if None not in (left, right) else (left, answer) == (right, expected)
