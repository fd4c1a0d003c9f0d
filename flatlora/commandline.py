"""From command-line words to plain configuration: published spellings, composition with Hydra, sweeps.

Hydra cannot have a group `rho` and accept `++rho=0.05`, nor `peft` among its defaults and `+peft=all`. `rewrite` turns
such published spellings into the canonical ones, with Hydra's own parser, before Hydra sees them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from flatlora.config import ConfigError, NoSection, nearest, reason_of

GROUPS = ("model", "dataset", "peft", "rho", "trainer", "eval", "experiment")
_RENAMED_GROUPS = {"dataset_name": "dataset"}


def rewrite(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Canonical words, and a note "old → new" for each published spelling that was rewritten.

    `+peft=all` → `peft=all` · `++dataset_name=X` → `dataset=X` · `++rho=0.05` → `rho=flat rho.sigma=0.05` ·
    `++rho=0` → `rho=off` · `++rho=0,0.05` → `rho=flat rho.sigma=0,0.05` (σ = 0 is off, bit for bit) ·
    `+peft.k=v` → `++peft.k=v`.

    Raises:
        ConfigError: words that Hydra's parser cannot read.
    """
    canonical, notes = [], []
    faults: list[str] = []
    for word, override in zip(words, _parse_all(words), strict=True):
        if override is None:
            canonical.append(word)
            continue
        try:
            new = _rewrite_override(override)
        except ConfigError as error:
            faults += error.faults
            continue
        canonical += new
        # A key set with ++ means what the plain key means, so only real changes of spelling are worth a line.
        if new not in ([word], [word.lstrip("+")], [f"++{word}"]) or (new != [word] and word.startswith("+")):
            notes.append(f"{word} → {' '.join(new)}")
    if faults:
        raise ConfigError(faults)
    return canonical, notes


def _rewrite_override(override: Override) -> list[str]:
    key, value = override.key_or_group, override.input_line.partition("=")[2]
    if override.is_delete() or key.startswith("hydra"):
        return [override.input_line]
    if key == "rho" and _is_number(override):
        return ["rho=off"] if override.value() == 0 else ["rho=flat", f"rho.sigma={value}"]
    key = _RENAMED_GROUPS.get(key, key)
    if key in GROUPS:
        return [f"{key}={value}"]
    return [f"++{key}={value}"] if override.is_add() or override.is_force_add() else [override.input_line]


def _is_number(override: Override) -> bool:
    value = override.value()
    if isinstance(value, RangeSweep):
        return True
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    numbers = [isinstance(item, int | float) and not isinstance(item, bool) for item in values]
    if any(numbers) and not all(numbers):
        raise ConfigError(
            [
                f"Invalid {override.input_line}: numbers and names cannot be swept together; sweep numbers (rho=0,0.05 "
                "is off and flat) or names (rho=off,flat)."
            ]
        )
    return all(numbers)


def _parse_all(words: Iterable[str]) -> list[Override | None]:
    """Parsed settings; None for an option of Hydra, such as -m."""
    parser, parsed, faults = OverridesParser.create(), [], []
    for word in words:
        try:
            if word.lstrip("+~").startswith("="):
                raise HydraException("no key")
            parsed.append(None if word.startswith("-") else parser.parse_override(word))
        except HydraException:
            key, separator, value = word.partition("=")
            if separator and key and value.isprintable() and not value.isascii():
                remedy = f"a value with other letters than a-z stands in two kinds of quotes, as {key}=\"'{value}'\""
            else:
                remedy = "a setting is written key=value, such as seed=42 or rho.sigma=0.05"
            faults.append(f"Cannot read {word!r}: {remedy}.")
    if faults:
        raise ConfigError(faults)
    return parsed


def compose_config(conf_dir: Path, words: Sequence[str]) -> dict[str, Any]:
    """Plain nested data of one job: `flatlora.config.parse` names its unknown keys and options (`NoSection`).

    Raises:
        ConfigError: words that do not compose.
    """
    overrides = _parse_all(words)
    faults = [
        f"Several values in {override.input_line}: a sweep needs -m"
        + (
            "; a text with a comma stands in quotes of its own, as \"KEY='a, b'\"."
            if ", " in override.input_line
            else "."
        )
        for override in overrides
        if _is_sweep(override)
    ]
    if faults:
        raise ConfigError(faults)
    unknown = {
        override.key_or_group: NoSection(tuple(faults))
        for override in overrides
        if (faults := _option_faults(conf_dir, override))
    }
    known = [override.input_line for override in overrides if override.key_or_group.split(".")[0] not in unknown]
    deleted = {"peft"} if "~peft" in known else set()  # by hand: conf/optim_of follows it, and would not compose
    kept = [word for word in known if word.removeprefix("~") not in deleted]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"):
            plain = OmegaConf.to_container(compose("config", overrides=lenient(kept)), resolve=True)
            plain = {key: value for key, value in plain.items() if key not in deleted}
            return plain | _unchosen_benchmarks(conf_dir, known) | unknown
    except (HydraException, OmegaConfBaseException) as error:
        faults = [fault for section in unknown.values() for fault in section.faults]
        reason = reason_of(error)
        if isinstance(error, InterpolationResolutionError):
            reason += (
                r"; ${KEY} takes the value of another key: name one that is there, or write \${…} for a text with it."
            )
        faults.append(f"The configuration does not compose: {reason}")
        raise ConfigError(faults) from error


ALLOW_CODE = "eval.allow_code_execution"


def _unchosen_benchmarks(conf_dir: Path, words: Sequence[str]) -> dict[str, NoSection]:
    """`eval` with a fault for each key such as eval.gsm8k.max_rows=5 whose benchmark `eval=[...]` does not name.

    Hydra would make a section of it all the same, and the benchmark would run.
    """
    keys = {word.lstrip("+").partition("=")[0]: word for word in words if word.lstrip("+").startswith("eval.")}
    keys.pop(ALLOW_CODE, None)  # of no one benchmark
    if not keys:
        return {}
    others = [word for word in words if word not in keys.values()]
    options = _options(conf_dir, "eval")
    chosen = [name for name in compose("config", overrides=lenient(others)).get("eval") or {} if name in options]
    faults = []
    for key, word in keys.items():
        name = key.split(".")[1]
        if name not in options:
            near = nearest(name, options)
            hint = f"did you mean eval.{near}?" if near else f"benchmarks here: {', '.join(options)}."
            faults.append(f"Unknown key {key}: {hint}")
        elif name not in chosen:
            faults.append(
                f"Invalid {word.lstrip('+')} with eval=[{','.join(chosen)}]: that benchmark is not chosen; use "
                f"eval=[{','.join([*chosen, name])}], or leave the key out."
            )
    return {"eval": NoSection(tuple(faults))} if faults else {}


def lenient(words: Sequence[str]) -> list[str]:
    """Settings as Hydra takes them with keys of the typed config that no option file names."""
    return [_lenient(override) for override in _parse_all(words)]


def _is_sweep(override: Override) -> bool:
    return override.is_sweep_override() and not override.is_hydra_override()


def _lenient(override: Override) -> str:
    prefixed = override.is_delete() or override.is_add() or override.is_force_add()
    is_group = override.key_or_group in GROUPS or override.key_or_group.startswith("hydra")
    return override.input_line if prefixed or is_group else f"++{override.input_line}"


def _option_faults(conf_dir: Path, override: Override) -> list[str]:
    group = override.key_or_group
    if group not in GROUPS or override.is_delete():
        return []
    value, options = override.value(), _options(conf_dir, group)
    faults = []
    for name in map(_option_name, value if isinstance(value, list) else [value]):
        if name not in options:
            near = nearest(name, options)
            hint = f"did you mean {group}={near}? " if near else ""
            known = ", ".join(options) or f"none yet, put one into {conf_dir.name}/{group}"
            faults.append(f"Unknown option {group}={name}: {hint}Known options: {known}.")
    return faults


def _options(conf_dir: Path, group: str) -> list[str]:
    folder = conf_dir / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _option_name(value: Any) -> str:
    return "null" if value is None else str(value)


def name_jobs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A sweep's settings with the swept keys in `wandb.name`, so that each job has its own folder; and notes of it.

    `wandb.name=N rho.sigma=0,0.05` → `wandb.name=N-${rho.sigma}`. The seed has a folder level of its own; benchmarks
    and experiment files have no name: jobs that differ in nothing else are refused for their one folder.

    Raises:
        ConfigError: swept values that make no folder name.
    """
    overrides = _parse_all(words)
    swept = [override for override in overrides if _is_sweep(override) and override.key_or_group not in _UNNAMED]
    named, notes, faults = [], [], []
    for override in overrides:
        line = override.input_line
        if override.key_or_group == "wandb.name" and swept and not _is_sweep(override) and "${" not in line:
            labels = [_job_label(one) for one in swept]
            faults += [_label_fault(line, one) for one, label in zip(swept, labels, strict=True) if label is None]
            line = "-".join([line, *filter(None, labels)])
            notes.append(f"{override.input_line} → {line} (each job has its own folder)")
        named.append(line)
    if faults:
        raise ConfigError(faults)
    return named, notes


_UNNAMED = ("seed", "eval", "experiment")


def _job_label(override: Override) -> str | None:
    """Interpolation that tells the swept values apart in a folder's name; None when they make none.

    Lists of one length are taken apart, `${key.0}+${key.1}`: as a whole they would have brackets and quotes.
    """
    key, sweep = override.key_or_group, override.value()
    if key in GROUPS:
        return f"${{{key}.name}}"
    values = sweep.list if isinstance(sweep, ChoiceSweep) else []
    lists = [value for value in values if isinstance(value, list)]
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    if not all(_is_nameable(item) for item in items):
        return None
    if not lists:
        return f"${{{key}}}"
    length = len(lists[0])
    if len(lists) < len(values) or length == 0 or any(len(value) != length for value in lists):
        return None
    return "+".join(f"${{{key}.{place}}}" for place in range(length))


def _is_nameable(value: Any) -> bool:
    if not isinstance(value, str | int | float | QuotedString | None):
        return False
    text = value.text if isinstance(value, QuotedString) else str(value)
    return "${" in text or re.fullmatch(r"[\w.+=@-]+", text) is not None


def _label_fault(name: str, override: Override) -> str:
    return (
        f"Invalid {name} with {override.input_line}: these values make no folder names; leave out wandb.name, and each "
        f"job gets a name of its own, or tell the jobs apart by hand with ${{...}}, such as {name}-${{peft.lora_r}}."
    )


def expand_sweep(words: Sequence[str]) -> list[list[str]]:
    """The jobs of a `-m` command line, as Hydra's basic sweeper makes them: all combinations, last key fastest.

    Raises:
        ConfigError: sweeps whose values cannot be listed.
    """
    choices, faults = [], []
    for word, override in zip(words, _parse_all(words), strict=True):
        if not _is_sweep(override):
            choices.append([word])
            continue
        key = word.partition("=")[0]
        try:
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        except HydraException:  # glob, interval
            faults.append(f"Cannot sweep over {word!r}: list the values, such as {key}=A,B, or use range(START,STOP).")
    if faults:
        raise ConfigError(faults)
    return [list(job) for job in itertools.product(*choices)]


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(Hydra's own options such as -m or --cfg job, settings)."""
    flags: list[str] = []
    settings: list[str] = []
    iterator: Iterator[str] = iter(words)
    for word in iterator:
        if not word.startswith("-"):
            settings.append(word)
            continue
        flags.append(word)
        if word in _FLAGS_WITH_VALUE:
            flags.append(next(iterator, ""))
    return flags, settings


_FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
)
