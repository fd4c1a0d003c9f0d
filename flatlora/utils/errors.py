"""The exception that lists every error at once, and how values and reasons are written in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from flatlora.utils import names
from flatlora.utils.masking import masked


class SettingError(NamedTuple):
    """One error of settings, and the keys that it is about: names of fields, or whole ones such as "peft.lora_r"."""

    keys: tuple[str, ...]
    message: str
    kind: Literal["invalid", "missing", "unknown"] = "invalid"

    def within(self, path: str) -> SettingError:
        """The same error with the keys of a section at `path` of an experiment."""
        return self._replace(keys=tuple(f"{path}.{key}" for key in self.keys)) if path else self


class ConfigError(ValueError):
    """Every error of a configuration at once; `errors` holds one line each."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = list(dict.fromkeys(names.printable(masked(message)) for message in errors))
        super().__init__("\n".join(self.errors))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.errors,)  # to travel between ranks: unpickling passes the text, not the list


_LONGEST_REASON, _LONGEST_VALUE = 1000, 300  # characters


def reason_of(error: BaseException) -> str:
    """What a library says of its error, on one line: the cause often stands in the last of several.

    Of a very long one, such as a list of all tensors that do not fit, the beginning and the end.
    """
    reason, half = " ".join(str(error).split()), _LONGEST_REASON // 2
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:half]} … {reason[-half:]}"
    return reason.rstrip(".") or type(error).__name__


def shown(value: Any) -> str:
    """A value in a message: of a very long one, the beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one, None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
