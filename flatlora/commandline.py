"""From command-line words to plain configuration: published spellings, composition with Hydra, sweeps.

Hydra cannot have a group `rho` and accept `++rho=0.05`, nor `peft` among its defaults and `+peft=all`. `rewrite` turns
such published spellings into the canonical ones, with Hydra's own parser, before Hydra sees them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flatlora.config import ConfigError, nearest

GROUPS = ("model", "dataset", "peft", "rho", "trainer", "eval", "experiment")
_RENAMED_GROUPS = {"dataset_name": "dataset"}


def rewrite(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Canonical words, and a note "old → new" for each published spelling that was rewritten.

    `+peft=all` → `peft=all` · `++dataset_name=X` → `dataset=X` · `++rho=0.05` → `rho=flat rho.sigma=0.05` ·
    `++rho=0` → `rho=off` · `++rho=0,0.05` → `rho=flat rho.sigma=0,0.05` (σ = 0 is off, bit for bit) ·
    `+peft.k=v` → `++peft.k=v`.

    Raises:
        ConfigError: a word that Hydra's parser cannot read.
    """
    canonical, notes = [], []
    for word in words:
        if word.startswith("-"):  # an option of Hydra, such as -m
            canonical.append(word)
            continue
        new = _rewrite_override(_parse(word))
        canonical += new
        # A key set with ++ means what the plain key means, so only real changes of spelling are worth a line.
        if new not in ([word], [word.lstrip("+")], [f"++{word}"]) or (new != [word] and word.startswith("+")):
            notes.append(f"{word} → {' '.join(new)}")
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
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return all(isinstance(item, int | float) and not isinstance(item, bool) for item in values)


def _parse(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ConfigError(
            [f"Cannot read {word!r}: a setting is written key=value, such as seed=42 or rho.sigma=0.05."]
        ) from error


def compose_config(conf_dir: Path, words: Sequence[str]) -> dict[str, Any]:
    """Plain nested data of one job, unknown keys included: `flatlora.config.parse` names those.

    Raises:
        ConfigError: an option that no file of its group describes, or words that do not compose.
    """
    overrides = [_parse(word) for word in words]
    faults = [fault for override in overrides if (fault := _option_fault(conf_dir, override))]
    if faults:
        raise ConfigError(faults)
    # `++` lets an unknown key through to the typed config, which knows the nearest name.
    lenient = [_lenient(override) for override in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"):
            config = compose("config", overrides=lenient)
            return OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([f"The configuration does not compose: {str(error).strip().splitlines()[0]}"]) from error


def _lenient(override: Override) -> str:
    line = override.input_line
    plain_value = not (override.is_delete() or override.is_add() or override.is_force_add())
    is_group = override.key_or_group in GROUPS or override.key_or_group.startswith("hydra")
    return f"++{line}" if plain_value and not is_group else line


def _option_fault(conf_dir: Path, override: Override) -> str | None:
    group = override.key_or_group
    if group not in GROUPS or override.is_delete():
        return None
    value = override.value()
    options = sorted(
        str(path.relative_to(conf_dir / group).with_suffix("")) for path in (conf_dir / group).rglob("*.yaml")
    )
    for name in value if isinstance(value, list) else [value]:
        if name is not None and str(name) not in options:
            near = nearest(str(name), options)
            hint = f"did you mean {group}={near}? " if near else ""
            return f"Unknown option {group}={name}: {hint}Known options: {', '.join(options)}."
    return None


def expand_sweep(words: Sequence[str]) -> list[list[str]]:
    """The jobs of a `-m` command line, as Hydra's basic sweeper makes them: all combinations, last key fastest."""
    choices = []
    for word in words:
        override = _parse(word)
        if override.is_sweep_override() and override.is_hydra_override() is False:
            key = word.partition("=")[0]
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([word])
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
