"""`ConfigError`, which lists all errors of a configuration, and helpers that format values and reasons in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from flatlora.utils import names
from flatlora.utils.masking import masked


class SettingError(NamedTuple):
    """One error of settings, and the keys that it is about: field names, or full keys such as "peft.lora_r"."""

    keys: tuple[str, ...]
    message: str
    kind: Literal["invalid", "missing", "unknown"] = "invalid"

    def within(self, path: str) -> SettingError:
        """The same error with the keys of a section at `path` of an experiment."""
        return self._replace(keys=tuple(f"{path}.{key}" for key in self.keys)) if path else self


class ConfigError(ValueError):
    """All errors of a configuration; `errors` holds one message per error."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = list(dict.fromkeys(names.printable(masked(message)) for message in errors))
        super().__init__("\n".join(self.errors))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.errors,)  # pickled between ranks; the default would pass the joined text, not the list


_LONGEST_REASON, _LONGEST_VALUE = 1000, 300  # characters


def reason_of(error: BaseException) -> str:
    """The message of a library's exception on one line; all lines are kept, since the last often has the cause.

    A very long message, such as a list of all tensors that do not fit, is shortened to its beginning and end.
    """
    reason, half = " ".join(str(error).split()), _LONGEST_REASON // 2
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:half]} … {reason[-half:]}"
    return reason.rstrip(".") or type(error).__name__


def shown(value: Any) -> str:
    """The repr of a value for a message; a very long one is cut."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one, or None if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
