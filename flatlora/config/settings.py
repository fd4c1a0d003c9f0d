"""Base class of configuration sections, and error messages for their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flatlora.utils.errors import ConfigError, SettingError, nearest, shown


@dataclass(frozen=True)
class NoSection:
    """Placeholder in raw data for a section that could not be composed, with the errors."""

    errors: tuple[str, ...]


def setting(default: Any = ..., *, remedy: str = "", identity: bool | Literal["changed"] = True, **rules: Any) -> Any:
    """A config field.

    Args:
        remedy: end of its error messages.
        identity: whether the trained bytes depend on it; False for scoring, paths, logging and the like. "changed" is
            for a field that is newer than recorded runs: its default value is not part of the identity.
        rules: bounds, as pydantic's `Field` takes them.
    """
    return Field(default, json_schema_extra={"remedy": remedy, "identity": identity}, **rules)


class Section(BaseModel):
    """Base class of config sections: typed and frozen; unknown keys, conversions and infinite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def decides(cls, key: str, value: Any) -> bool:
        """Whether the trained bytes depend on a field with this value; True for fields unknown to this version."""
        field = cls.model_fields.get(key)
        identity = True if field is None else (field.json_schema_extra or {}).get("identity", True)
        return value != field.get_default() if identity == "changed" else identity

    @classmethod
    def identity_items(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the items of a raw section that the trained bytes depend on, as an experiment's identity has them."""
        return {key: value for key, value in raw.items() if cls.decides(key, value)}

    def rule_errors(self) -> list[SettingError]:
        """Errors about incompatible keys within this section; `keys` of an error are field names."""
        return []


T = TypeVar("T", bound=Section)

# Upper bounds above all sensible values; larger values would fail late, hang, or exhaust the machine.
MOST_ROWS = 10**9
MOST_TOKENS = 2**20
MOST_BATCH = 2**20
MOST_STEPS = 2**32 - 1
MOST_SECONDS = 7 * 86_400
MOST_PIXELS = 2**14  # per side


def build_section(path: str, cls: type[T], raw: Mapping[str, Any]) -> T:
    """Builds one typed section, for a command that needs no whole experiment.

    Raises:
        ConfigError: it lists every error about its keys and their combinations.
    """
    section, errors = checked_section(path, cls, raw)
    if errors:
        raise ConfigError(error.message for error in errors)
    return section


def checked_section(path: str, cls: type[T], raw: Any) -> tuple[T | None, list[SettingError]]:
    """Returns the section and all errors about its keys and their combinations.

    Combinations are checked with invalid keys at their defaults, and errors about these keys are left out. The section
    is None if a required key is invalid or missing.

    Args:
        path: path of the section in an experiment, such as "model"; "" for the experiment itself.
    """
    if not isinstance(raw, Mapping):
        message = f"Invalid {path}={raw!r}: it is a group of settings; set one of them, as in {path}.KEY=VALUE."
        return None, [SettingError((path,), message)]
    values, errors, invalid = dict(raw), [], set()
    for _ in range(2):
        try:
            section = cls.model_validate(values)
        except ValidationError as error:
            for detail in error.errors():
                name = str(detail["loc"][0])
                if name not in invalid:  # else this error only follows from one that is listed already
                    errors.append(_describe(path, cls, detail, values.get(name)))
                invalid.add(name)
                values.pop(name, None)
        else:
            rules = [rule.within(path) for rule in section.rule_errors() if not invalid & set(rule.keys)]
            return section, errors + rules
    return None, errors


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


def _describe(path: str, cls: type[Section], detail: Mapping[str, Any], value: Any) -> SettingError:
    name = str(detail["loc"][0])
    key = f"{path}.{name}" if path else name
    field = cls.model_fields.get(name)
    remedy = ((field.json_schema_extra or {}) if field else {}).get("remedy", "")
    if len(detail["loc"]) > 1 and detail["type"] in ("extra_forbidden", "missing"):  # in a section of this section
        problem = "Unknown key" if detail["type"] == "extra_forbidden" else "Missing"
        inside = ".".join(map(str, detail["loc"][1:]))
        return SettingError((key,), f"{problem} {key}.{inside}" + (f": {remedy}." if remedy else "; fix it."))
    if detail["type"] == "extra_forbidden":
        return SettingError((key,), unknown_key(key, cls.model_fields), "unknown")
    if detail["type"] == "missing":
        message = f"Missing {key}: this key has no default; set {key}=VALUE" + (f"; {remedy}." if remedy else ".")
        return SettingError((key,), message, "missing")
    if len(detail["loc"]) > 1:  # inside a list or a union
        rule = "it has none of the types that this key accepts"
    elif detail["type"] in _RULES:
        rule = _RULES[detail["type"]].format(**detail.get("ctx", {}))
    else:
        rule = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "string_type" and isinstance(value, int | float):
        remedy = f"""on the command line a number is text in two kinds of quotes: {key}="'{value}'\""""
    if detail["type"] == "string_type" and isinstance(value, list | Mapping):
        remedy = f"""on the command line text with brackets or braces stands in two kinds of quotes: {key}="'[…]'\""""
    return SettingError((key,), f"Invalid {key}={shown(value)}: {rule}" + (f"; {remedy}." if remedy else "."))


def unknown_key(key: str, known: Iterable[str]) -> str:
    head, _, name = key.rpartition(".")
    prefix = f"{head}." if head else ""
    near = nearest(name, known)
    hint = f"did you mean {prefix}{near}?" if near else f"known here: {', '.join(sorted(known))}."
    return f"Unknown key {key}: {hint}"
