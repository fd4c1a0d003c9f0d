"""How a section of the configuration is declared, and how faults of its keys are described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flatlora.utils.errors import ConfigError, nearest, shown


@dataclass(frozen=True)
class NoSection:
    """Stands in raw data where a section should be, and says why there is none."""

    faults: tuple[str, ...]


def setting(default: Any = ..., *, remedy: str = "", **rules: Any) -> Any:
    """A config field whose error message ends with `remedy`; numbers must be finite."""
    return Field(default, json_schema_extra={"remedy": remedy}, **rules)


class Section(BaseModel):
    """Base of every config section: typed, frozen, no unknown key, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def rule_faults(self) -> list[str]:
        """Faults in how this section's own keys go together."""
        return []


T = TypeVar("T", bound=Section)

# Upper bounds that nothing sensible reaches: what lies above fails late, hangs, or takes all of the machine.
MOST_ROWS = 10**9
MOST_TOKENS = 2**20
MOST_BATCH = 2**20
MOST_STEPS = 2**32 - 1
MOST_SECONDS = 7 * 86_400
MOST_PIXELS = 2**14  # of a side


def build_section(path: str, cls: type[T], raw: Mapping[str, Any]) -> T:
    """One typed section by itself, for a command that needs no whole experiment.

    Raises:
        ConfigError: every fault of its keys and of how they go together.
    """
    faults: list[str] = []
    section = _build_section(path, cls, raw, faults, set())
    faults += section.rule_faults() if section is not None and not faults else []
    if faults:
        raise ConfigError(faults)
    return section


def _build_section(path: str, cls: type[Section], value: Any, faults: list[str], faulty: set[str]) -> Any:
    """The section, with faulty keys noted and put back to their defaults so that later rules still run; or None."""
    if not isinstance(value, Mapping):
        faults.append(f"Invalid {path}={value!r}: it is a group of settings; set one of them, as in {path}.KEY=VALUE.")
        faulty.add(path)
        return None
    value = dict(value)
    for _ in range(2):
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            for detail in error.errors():
                name = str(detail["loc"][0])
                key = f"{path}.{name}" if path else name
                if key not in faulty:  # else its fault is known, and this one only follows from it
                    faults.append(_describe(key, cls, detail, value.get(name)))
                faulty.add(key)
                value.pop(name, None)
    faulty.add(path)
    return None


_RULES = {
    "greater_than": "it must be > {gt:.12g}",
    "greater_than_equal": "it must be ≥ {ge:.12g}",
    "less_than": "it must be < {lt:.12g}",
    "less_than_equal": "it must be ≤ {le:.12g}",
    "finite_number": "it must be a finite number",
    "literal_error": "it must be one of {expected}",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "bool_type": "it must be true or false",
    "string_type": "it must be text",
    "string_too_short": "it must not be empty",
}


def _describe(key: str, cls: type[Section], detail: Mapping[str, Any], value: Any) -> str:
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return _unknown_key(key, cls.model_fields)
    if detail["type"] == "missing":
        return f"Missing {key}: this key has no default; set {key}=VALUE."
    if len(detail["loc"]) > 1:  # inside a list, or one of the forms of a union
        rule = "it has none of the forms that this key takes"
    elif detail["type"] in _RULES:
        rule = _RULES[detail["type"]].format(**detail.get("ctx", {}))
    else:
        rule = detail["msg"][0].lower() + detail["msg"][1:]
    field = cls.model_fields.get(name)
    remedy = ((field.json_schema_extra or {}) if field else {}).get("remedy", "")
    if detail["type"] == "string_type" and isinstance(value, int | float):
        remedy = f"""on the command line a number is text in two kinds of quotes: {key}="'{value}'\""""
    if detail["type"] == "string_type" and isinstance(value, list | Mapping):
        remedy = f"""on the command line text with brackets or braces stands in two kinds of quotes: {key}="'[…]'\""""
    return f"Invalid {key}={shown(value)}: {rule}" + (f"; {remedy}." if remedy else ".")


def _unknown_key(key: str, known: Iterable[str]) -> str:
    head, _, name = key.rpartition(".")
    prefix = f"{head}." if head else ""
    near = nearest(name, known)
    hint = f"did you mean {prefix}{near}?" if near else f"known here: {', '.join(sorted(known))}."
    return f"Unknown key {key}: {hint}"
