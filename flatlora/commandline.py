"""From command-line words to plain configuration: published spellings, composition with Hydra, sweeps.

Hydra cannot have a group `rho` and accept `++rho=0.05`, nor `peft` among its defaults and `+peft=all`. `rewrite` turns
such published spellings into the canonical ones, with Hydra's own parser, before Hydra sees them.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep
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
            if not word.startswith("-") and _loses_blanks(parsed[-1]):
                raise HydraException("blanks around a text")
        except HydraException:
            faults.append(_unreadable(word))
    if faults:
        raise ConfigError(faults)
    return parsed


def _loses_blanks(override: Override) -> bool:
    """Whether Hydra drops blanks at the ends of a text, where they may belong to a folder's name."""
    value = override.input_line.partition("=")[2]
    return value != value.strip() and value.strip()[:1] not in ("'", '"') and isinstance(override.value(), str)


def _unreadable(word: str) -> str:
    key, _, value = word.partition("=")
    quoted = _quoted(key, value)
    if quoted is None:
        remedy = "a setting is written key=value, such as seed=42 or rho.sigma=0.05"
    elif value == "~" or value.startswith("~/"):
        remedy = f"a shell knows ~ at the start of a word alone; write {key}=$HOME{value[1:]}, or the whole path"
    else:
        remedy = (
            "a value with other signs than a-z, A-Z, 0-9 and _ - + . / \\ : $ % * @ ? |, or blanks at its ends, stands "
            f"in two kinds of quotes, as {quoted}"
        )
    return f"Cannot read {word!r}: {remedy}."


def _quoted(key: str, value: str) -> str | None:
    """A word for the shell by which a key takes this very text; None where there is none, as of no key."""
    if not (key and value and value.isprintable()):
        return None
    text = value if re.search(r"\$\{[^}]+\}", value) else value.replace("${", r"\${")  # the start of no interpolation
    inner = QuotedString(text, Quote.single if "'" not in text else Quote.double).with_quotes()
    try:
        if OverridesParser.create().parse_override(f"{key}={inner}").value() != text:
            return None
    except HydraException:
        return None
    return shlex.quote(f"{key}={inner}") if re.search(r'["$`\\!]', inner) else f'{key}="{inner}"'


def compose_config(conf_dir: Path, words: Sequence[str]) -> dict[str, Any]:
    """Plain nested data of one job: `flatlora.config.parse` names its unknown keys and options (`NoSection`).

    Raises:
        ConfigError: words that do not compose.
    """
    overrides = _parse_all(words)
    faults = [_sweep_fault(override) for override in overrides if _is_sweep(override)]
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


def _sweep_fault(override: Override) -> str:
    sweep, fault = override.value(), f"Several values in {override.input_line}: a sweep needs -m"
    texts = isinstance(sweep, ChoiceSweep) and any(isinstance(value, str | QuotedString) for value in sweep.list)
    quoted = _quoted(override.key_or_group, override.input_line.partition("=")[2])
    if not texts or quoted is None or override.key_or_group in GROUPS:
        return f"{fault}."
    return f"{fault}; a text with a comma stands in quotes of its own, as {quoted}."


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
            line = _appended(line, [label for label in labels if label])
            notes.append(f"{override.input_line} → {line} (each job has its own folder)")
        named.append(line)
    if faults:
        raise ConfigError(faults)
    return named, notes


def _appended(line: str, labels: Sequence[str]) -> str:
    """A setting whose text goes on with labels, within its quotes where it has some."""
    line = line.rstrip()
    quote = line[-1] if line.partition("=")[2].lstrip()[:1] in ("'", '"') else ""
    return "-".join([line.removesuffix(quote), *labels]) + quote


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
