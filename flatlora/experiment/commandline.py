"""Converts command-line overrides to a plain configuration: published spellings, composition with Hydra, sweeps.

Hydra does not accept `++rho=0.05` if `rho` is a group, nor `+peft=all` if `peft` is in the defaults list. `rewrite`
converts such published spellings to the canonical ones with Hydra's own parser, before Hydra gets them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep, Sweep
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from flatlora.config.families import OLD_FAMILIES
from flatlora.config.settings import NoSection
from flatlora.experiment.old_names import OLD_EXPERIMENTS, current_overrides
from flatlora.utils.errors import ConfigError, nearest, reason_of
from flatlora.utils.files import write_atomic
from flatlora.utils.masking import masked, masked_word
from flatlora.utils.names import MOST_BYTES, is_text, size

# Hydra's parser takes about 1 s for lists of this length; nesting about ten times as deep overflows Python's stack.
_LONGEST_WORD, _LONGEST_LINE, _DEEPEST_BRACKETS, _LONGEST_NUMBER = 16_000, 32_000, 20, 300
_MOST_REFERENCES = 24
MOST_JOBS = 256
"""Maximum number of jobs of a sweep; all are composed and checked before the first one starts."""

# Top-level keys used only inside option files, such as rho.sigma per option of rho and the tasks of a protocol.
_OF_OPTIONS = ("strengths", "tasks", "task", "full_ft_lr", "adapter", "answers")
GROUPS = ("model", "dataset", "peft", "rho", "trainer", "eval", "protocol", "experiment")
_RENAMED_GROUPS = {"dataset_name": "dataset"}


def rewrite(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns canonical overrides, and a note "old → new" for each published spelling that was rewritten.

    `+peft=all` → `peft=all` · `++dataset_name=X` → `dataset=X` · `++rho=0.05` → `rho=flat rho.sigma=0.05` ·
    `++rho=0` → `rho=off` · `++rho=0,0.05` → `rho=flat rho.sigma=0,0.05` (σ = 0 is off, bit for bit) ·
    `+peft.k=v` → `++peft.k=v` · `experiment=table2/dora_r8` → `experiment=table2 peft=dora peft.lora_r=8`, without
    keys that are also set on the command line · `model.family=sdxl` → `model.family=text_to_image`.

    Raises:
        ConfigError: Hydra's parser cannot read an override, or a sweep contains old names of experiments.
    """
    canonical, notes = [], []
    errors: list[str] = []
    overrides = _parse_all(words)
    given = {override.key_or_group for override in overrides if override is not None}
    for word, override in zip(words, overrides, strict=True):
        if override is None:
            canonical.append(word)
            continue
        try:
            new = _rewrite_override(override, given)
        except ConfigError as error:
            errors += error.errors
            continue
        canonical += new
        # ++key=value has the same meaning as key=value, so no note is needed.
        if new not in ([word], [word.lstrip("+")], [f"++{word}"]) or (new != [word] and word.startswith("+")):
            notes.append(f"{masked_word(word)} → {' '.join(map(masked_word, new))}")
    if errors:
        raise ConfigError(errors)
    return canonical, notes


def _rewrite_override(override: Override, given: Iterable[str]) -> list[str]:
    key, value = override.key_or_group, override.input_line.partition("=")[2]
    if override.is_delete() or key.startswith("hydra"):
        return [override.input_line]
    if key == "rho" and _is_number(override):
        return ["rho=off"] if override.value() == 0 else ["rho=flat", f"rho.sigma={value}"]
    if key == "experiment" and (names := _old_experiments(override)):
        return current_overrides(names[0], given)
    if key == "model.family" and value in OLD_FAMILIES:  # in a sweep the configuration renames it
        prefix = "++" if override.is_add() or override.is_force_add() else ""
        return [f"{prefix}{key}={OLD_FAMILIES[value]}"]
    key = _RENAMED_GROUPS.get(key, key)
    if key in GROUPS:
        return [f"{key}={value}"]
    return [f"++{key}={value}"] if override.is_add() or override.is_force_add() else [override.input_line]


def _old_experiments(override: Override) -> list[str]:
    """Returns the name of the experiment in a list if it is an old one; else an empty list.

    Raises:
        ConfigError: a sweep with old names; their rows differ in several keys, which a sweep cannot vary together.
    """
    value = override.value()
    if not isinstance(value, ChoiceSweep):
        return [value] if isinstance(value, str) and value in OLD_EXPERIMENTS else []
    if names := [name for name in map(str, value.list) if name in OLD_EXPERIMENTS]:
        instead = "; ".join(f"{name} is {' '.join(OLD_EXPERIMENTS[name])}" for name in names)
        raise ConfigError(
            [f"Invalid {override.input_line}: rows of a table are overrides now; give a command for each: {instead}."]
        )
    return []


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
    """Parses overrides; returns None in place of options of Hydra, such as -m.

    Raises:
        ConfigError: overrides that are too long, unreadable or not allowed.
    """
    words, parsed = list(words), []
    errors = [message for word in words if not word.startswith("-") and (message := _size_error(word))]
    if not errors and (length := sum(map(len, words))) > _LONGEST_LINE:
        raise ConfigError(
            [
                f"Cannot read settings of {length} characters: together they take {_LONGEST_LINE}; put them into a "
                "file of conf/experiment, and name that."
            ]
        )
    for word in words:
        if word.startswith("-"):
            parsed.append(None)
        elif _size_error(word) is None:
            try:
                override = _parse(word)
                errors += _place_errors(override) or _hydra_errors(override)
                parsed.append(override)
            except HydraException:
                errors.append(_unreadable(word))
    if errors:
        raise ConfigError(errors)
    return parsed


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Lets Hydra parse each override once in the block: it would parse those of every job of a sweep several times."""
    before = OverridesParser.parse_rule
    OverridesParser.parse_rule = lambda _, text, rule: copy.copy(_parsed(text, rule))
    try:
        yield
    finally:
        OverridesParser.parse_rule = before


_parse_rule = OverridesParser.parse_rule


@functools.lru_cache(maxsize=1024)
def _parsed(text: str, rule: str) -> Any:
    return _parse_rule(OverridesParser.create(), text, rule)


@functools.lru_cache(maxsize=1024)  # jobs of a sweep are parsed several times and share most overrides
def _parse(word: str) -> Override:
    if word.lstrip("+~").startswith("="):
        raise HydraException("no key")
    override = OverridesParser.create().parse_override(word)
    if _loses_blanks(override):
        raise HydraException("blanks around a text")
    return override


@functools.lru_cache(maxsize=1024)
def _size_error(word: str) -> str | None:
    """Returns an error for an override that would take the parser minutes or overflow the stack; else None."""
    begin = word if len(word) <= 60 else f"{word[:60]}…"
    if not is_text(word):
        return f"Cannot read {word!r}: its bytes are no UTF-8; rename the folder, or mend the word."
    if len(word) > _LONGEST_WORD:
        return (
            f"Cannot read {begin!r}: it has {len(word)} characters, and a setting takes {_LONGEST_WORD}; put it into a "
            "file of conf/experiment, and name that."
        )
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "", word)
    if _deepest_brackets(plain) > _DEEPEST_BRACKETS:
        return f"Cannot read {begin!r}: at most {_DEEPEST_BRACKETS} brackets stand within each other; close some."
    if re.search(rf"[0-9_]{{{_LONGEST_NUMBER}}}", plain):
        return (
            f"Cannot read {begin!r}: a number has fewer than {_LONGEST_NUMBER} digits; a text of digits stands in two "
            "kinds of quotes."
        )
    return None


def _deepest_brackets(text: str) -> int:
    depth = deepest = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _place_errors(override: Override) -> list[str]:
    """Returns errors for overrides that would put a value where nothing reads it."""
    line, key = override.input_line, override.key_or_group
    if override.package is not None:
        return [
            f"Invalid {line}: @ would put {key} at another place, where nothing reads it; write "
            f"{key}={line.partition('=')[2]}."
        ]
    if key in ("hydra", "hydra.launcher", "hydra.sweeper"):
        return [f"Invalid {line}: Hydra's settings are given one by one, such as hydra.launcher.n_jobs=4."]
    if key in ("hydra.run", "hydra.run.dir", "hydra.output_subdir"):
        return [f"Invalid {line}: a run has its folder below results_root and no other; set results_root=DIR."]
    return []


_HYDRA_KEYS = (
    "hydra/launcher",
    "hydra.launcher",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job.name",
    "hydra.job.chdir",
    "hydra.job.env_set",
    "hydra.job.env_copy",
    "hydra.mode",
    "hydra.searchpath",
    "hydra.verbose",
)
_PROCESSES = {  # {key: minimum}
    "hydra.launcher.n_jobs": -MOST_JOBS,
    "hydra.launcher.tasks_per_node": 1,
    "hydra.launcher.ray.init.num_cpus": 1,  # Ray starts this many workers before the first job
}


def _hydra_errors(override: Override) -> list[str]:
    """Returns errors for Hydra settings that would write outside results_root or start too many processes."""
    line, key, value = override.input_line, override.key_or_group, override.value()
    if not re.match(r"hydra[./]", key):
        return []
    if not any(key == known or key.startswith(f"{known}.") for known in _HYDRA_KEYS):
        return [f"Invalid {line}: of Hydra's settings these are taken: {', '.join(_HYDRA_KEYS)}; leave it out."]
    if override.is_delete():
        return []
    text = "" if override.is_sweep_override() else value.text if isinstance(value, QuotedString) else str(value)
    if key in _PROCESSES and not (_is_whole(text) and _PROCESSES[key] <= int(text) <= MOST_JOBS and int(text) != 0):
        least = "or -1 for all CPUs" if _PROCESSES[key] < 0 else "each of them a process"
        return [f"Invalid {line}: a whole number from 1 to {MOST_JOBS} is needed, {least}; write {key}=4."]
    if key == "hydra.job.chdir" and text != "False":
        return [f"Invalid {line}: a job stays in the folder where it was started; leave it out, and set results_root."]
    if key == "hydra.job.name" and not _is_file_name(text):
        return [f"Invalid {line}: it becomes the name of a file, in at most {MOST_BYTES - 40} bytes; write {key}=NAME."]
    if key == "hydra.sweep.subdir" and not all(map(_is_file_name, _numbered(text).split("/"))) and text != ".":
        return [
            f"Invalid {line}: a job's folder lies within hydra.sweep.dir, neither absolute nor with ..; write "
            f"{key}=NAME, with ${{hydra.job.num}} or ${{hydra.job.id}} if need be."
        ]
    return []


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,9}", text) is not None


def _is_file_name(text: str) -> bool:
    """Whether a text is a valid file name without references to other keys, short enough for Hydra's suffixes."""
    return (
        text not in ("", ".", "..", "None") and not re.search(r"[/\x00]|\$\{", text) and size(text) <= MOST_BYTES - 40
    )


def _numbered(text: str) -> str:
    return re.sub(r"\$\{hydra[.:]job\.(num|id)\}", "0", text)


def _loses_blanks(override: Override) -> bool:
    """Whether Hydra would strip leading or trailing blanks of a text; they may be part of a folder's name."""
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
            f"in two kinds of quotes, as {masked_word(quoted)}"
        )
    return f"Cannot read {masked_word(word)!r}: {remedy}."


def _quoted(key: str, value: str) -> str | None:
    """Returns the override in shell quotes that sets `key` to exactly this text; None if there is none."""
    if not (key and value and value.isprintable()):
        return None
    text = value if re.search(r"\$\{[^}]+\}", value) else value.replace("${", r"\${")  # not an interpolation
    inner = QuotedString(text, Quote.single if "'" not in text else Quote.double).with_quotes()
    try:
        if OverridesParser.create().parse_override(f"{key}={inner}").value() != text:
            return None
    except HydraException:
        return None
    return shlex.quote(f"{key}={inner}") if re.search(r'["$`\\!]', inner) else f'{key}="{inner}"'


# What Hydra raises: its own, and for hydra/launcher=5, hydra.job.env_copy=[NO_VARIABLE], a broken option file, and one
# that names itself in its defaults.
_COMPOSING = (HydraException, OmegaConfBaseException, ValueError, LookupError, yaml.YAMLError, RecursionError)


def compose_config(conf_dir: Path, words: Sequence[str]) -> dict[str, Any]:
    """Returns the plain nested configuration of one job; `parse` reports the errors in its `NoSection` values.

    Raises:
        ConfigError: the overrides do not compose.
    """
    overrides = _parse_all(words)
    errors = [_sweep_error(override) for override in overrides if _is_sweep(override)]
    if sum(word.count("${") for word in words) > _MOST_REFERENCES:  # nested references can grow exponentially
        errors.append(f"Too many references to other keys: ${{KEY}} may stand {_MOST_REFERENCES} times in a command.")
    if errors:
        raise ConfigError(errors)
    folders = [conf_dir, *_own_folders(overrides)]
    unknown = {
        override.key_or_group: NoSection(tuple(errors))
        for override in overrides
        if (errors := _option_errors(folders, override))
    }
    known = [override.input_line for override in overrides if override.key_or_group.split(".")[0] not in unknown]
    deleted = {"peft"} if "~peft" in known else set()  # deleted after composing, as conf/optim_of depends on it
    kept = [word for word in known if word.removeprefix("~") not in deleted]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"), parsed_once(), composed_once():
            composed = _composed(folders, force_add(kept))
            _validate_protocol(conf_dir, composed)
            plain = OmegaConf.to_container(composed, resolve=True)
            plain = {key: value for key, value in plain.items() if key not in (*deleted, *_OF_OPTIONS)}
            return plain | _unchosen_benchmarks(folders, known) | unknown
    except ConfigError:
        raise
    except _COMPOSING as error:
        errors = [message for section in unknown.values() for message in section.errors]
        reason = reason_of(error)
        if isinstance(error, InterpolationResolutionError):
            reason += (
                r"; ${KEY} takes the value of another key: name one that is there, or write \${…} for a text with it."
            )
        errors.append(f"The configuration does not compose: {reason}")
        raise ConfigError(errors) from error


# Configurations without the values of a command line, by the folders of option files and what chooses among these.
_bases: dict[tuple[tuple[Path, ...], tuple[str, ...]], DictConfig] | None = None


@contextlib.contextmanager
def composed_once() -> Iterator[None]:
    """Composes each choice of options once in the block; the option files must not change meanwhile."""
    global _bases
    before = _bases
    _bases = {} if before is None else before
    try:
        yield
    finally:
        _bases = before


def _composed(folders: Sequence[Path], words: Sequence[str]) -> DictConfig:
    """Returns Hydra's configuration for words of `force_add`, in a block of `composed_once`.

    Hydra sets values after it has composed the options, so the latter can be composed once for all jobs of a sweep.
    `folders` are those of option files, the suite's first.
    """
    overrides = _parse_all(words)
    values = [override for override in overrides if _sets_value(folders, override)]
    options = [override for override in overrides if override not in values]
    if not all(override.is_hydra_override() or _chooses_option(override) for override in options):
        return compose("config", overrides=list(words))
    chosen = tuple(override.input_line for override in options)
    key = (tuple(folder.resolve() for folder in folders), chosen)
    if key not in _bases:
        _bases[key] = compose("config", overrides=list(chosen))
    composed = copy.deepcopy(_bases[key])
    for value in values:
        try:
            OmegaConf.update(composed, value.key_or_group, value.value(), merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigCompositionException(f"Error merging override {value.input_line}") from error
    return composed


def _sets_value(folders: Sequence[Path], override: Override) -> bool:
    key = override.key_or_group
    return (
        override.is_force_add()
        and not key.startswith("hydra")
        and not any(os.path.isdir(folder / key) for folder in folders)  # ++GROUP=NAME
    )


def _chooses_option(override: Override) -> bool:
    """Whether it is GROUP=NAME; GROUP={KEY: VALUE} sets values, in the order of the command line."""
    return override.key_or_group in GROUPS and not isinstance(override.value(), dict)


def _validate_protocol(conf_dir: Path, composed: DictConfig) -> None:
    """Checks that the chosen protocol defines the experiment.

    Raises:
        ConfigError: its paper does not train this model on this dataset; the message lists its experiments.
    """
    protocol = composed.get("protocol")
    model, dataset = (OmegaConf.select(composed, f"{group}.name") for group in ("model", "dataset"))
    if protocol is None or dataset in composed.get("tasks", ()):
        return
    files = sorted((conf_dir / "protocol_of" / str(protocol)).glob("*.yaml"))
    known = "; ".join(f"model={path.stem}: {', '.join(OmegaConf.load(path).tasks)}" for path in files)
    raise ConfigError(
        [
            f"Invalid protocol={protocol} with model={model} dataset={dataset}: its paper has no such experiment, but "
            f"{known}; choose one of these, or leave protocol out."
        ]
    )


def _sweep_error(override: Override) -> str:
    sweep, message = override.value(), f"Several values in {override.input_line}: a sweep needs -m"
    texts = isinstance(sweep, ChoiceSweep) and any(isinstance(value, str | QuotedString) for value in sweep.list)
    quoted = _quoted(override.key_or_group, override.input_line.partition("=")[2])
    if not texts or quoted is None or override.key_or_group in GROUPS:
        return f"{message}."
    return f"{message}; a text with a comma stands in quotes of its own, as {quoted}."


ALLOW_CODE = "eval.allow_code_execution"


def _unchosen_benchmarks(folders: Sequence[Path], words: Sequence[str]) -> dict[str, NoSection]:
    """Returns {"eval": errors} for keys such as eval.gsm8k.max_rows=5 whose benchmark is not in `eval=[...]`; else {}.

    Without this check Hydra would add a section for the key, and the benchmark would run.
    """
    keys = {word.lstrip("+").partition("=")[0]: word for word in words if word.lstrip("+").startswith("eval.")}
    keys.pop(ALLOW_CODE, None)  # applies to all benchmarks
    if not keys:
        return {}
    others = [word for word in words if word not in keys.values()]
    options = _options(folders, "eval")
    chosen = [name for name in _composed(folders, force_add(others)).get("eval") or {} if name in options]
    errors = []
    for key, word in keys.items():
        name = key.split(".")[1]
        if name not in options:
            near = nearest(name, options)
            hint = f"did you mean eval.{near}?" if near else f"benchmarks here: {', '.join(options)}."
            errors.append(f"Unknown key {key}: {hint}")
        elif name not in chosen:
            errors.append(
                f"Invalid {word.lstrip('+')} with eval=[{','.join(chosen)}]: that benchmark is not chosen; use "
                f"eval=[{','.join([*chosen, name])}], or leave the key out."
            )
    return {"eval": NoSection(tuple(errors))} if errors else {}


def force_add(words: Sequence[str]) -> list[str]:
    """Returns overrides with ++ where Hydra needs it for keys that are in no option file."""
    return [_force_add(override) for override in _parse_all(words)]


def _is_sweep(override: Override) -> bool:
    return override.is_sweep_override() and not override.is_hydra_override()


def _force_add(override: Override) -> str:
    prefixed = override.is_delete() or override.is_add() or override.is_force_add()
    is_group = override.key_or_group in GROUPS or override.key_or_group.startswith("hydra")
    return override.input_line if prefixed or is_group else f"++{override.input_line}"


def _option_errors(folders: Sequence[Path], override: Override) -> list[str]:
    group = override.key_or_group
    if group not in GROUPS or override.is_delete():
        return []
    value, options = override.value(), _options(folders, group)
    errors = []
    for name in map(_option_name, value if isinstance(value, list) else [value]):
        if name not in options:
            near = nearest(name, options)
            hint = f"did you mean {group}={near}? " if near else ""
            known = ", ".join(options) or f"none yet, put one into {folders[0].name}/{group}"
            errors.append(f"Unknown option {group}={name}: {hint}Known options: {known}.")
    return errors


def _options(folders: Sequence[Path], group: str) -> list[str]:
    places = [folder / group for folder in folders]
    return sorted({str(path.relative_to(place).with_suffix("")) for place in places for path in place.rglob("*.yaml")})


_OWN_FOLDERS = "hydra.searchpath"


def _own_folders(overrides: Iterable[Override]) -> list[Path]:
    """Returns the user's own folders of option files."""
    values = [override.value() for override in overrides if override.key_or_group == _OWN_FOLDERS]
    named = [text for value in values if isinstance(value, list) for text in map(str, value)]
    return [Path(text.removeprefix("file://")) for text in named if "://" not in text or text.startswith("file://")]


def _option_name(value: Any) -> str:
    return "null" if value is None else str(value)


def name_jobs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Appends the swept keys to `wandb.name`, so that each job has its own folder; returns overrides and notes.

    `wandb.name=N rho.sigma=0,0.05` → `wandb.name=N-${rho.sigma}`. The seed is not appended: it is a folder level of
    its own. Nor are benchmarks and experiment files: jobs that differ only in those are rejected for their one folder.

    Raises:
        ConfigError: swept values that are not usable in a folder name.
    """
    overrides = _parse_all(words)
    swept = [override for override in overrides if _is_sweep(override) and override.key_or_group not in _UNNAMED]
    named, notes, errors = [], [], []
    for override in overrides:
        line = override.input_line
        if override.key_or_group == "wandb.name" and swept and not _is_sweep(override) and "${" not in line:
            labels = [_job_label(sweep) for sweep in swept]
            errors += [_label_error(line, sweep) for sweep, label in zip(swept, labels, strict=True) if label is None]
            line = _appended(line, [label for label in labels if label])
            notes.append(f"{masked_word(override.input_line)} → {masked_word(line)} (each job has its own folder)")
        named.append(line)
    if errors:
        raise ConfigError(errors)
    return named, notes


def _appended(line: str, labels: Sequence[str]) -> str:
    """Appends labels to the value of an override, inside its quotes if it has any."""
    line = line.rstrip()
    quote = line[-1] if line.partition("=")[2].lstrip()[:1] in ("'", '"') else ""
    return "-".join([line.removesuffix(quote), *labels]) + quote


_UNNAMED = ("seed", "eval", "experiment")


def _job_label(override: Override) -> str | None:
    """Returns an interpolation that distinguishes the swept values in a folder name; None if that is impossible.

    Lists of equal length are joined by items, `${key.0}+${key.1}`, to avoid brackets and quotes.
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


def _label_error(name: str, override: Override) -> str:
    return (
        f"Invalid {name} with {override.input_line}: these values make no folder names; leave out wandb.name, and each "
        f"job gets a name of its own, or tell the jobs apart by hand with ${{...}}, such as {name}-${{peft.lora_r}}."
    )


def expand_sweep(words: Sequence[str]) -> list[list[str]]:
    """Returns the overrides of each job of a `-m` command line in the order of Hydra's basic sweeper.

    The jobs are all combinations of swept values; the last key varies fastest.

    Raises:
        ConfigError: values that cannot be listed, or too many jobs.
    """
    overrides = _parse_all(words)
    counts, errors = [], []
    for word, override in zip(words, overrides, strict=True):
        if not _is_sweep(override):
            continue
        key, count = word.partition("=")[0], _count_values(override.value())
        if count is None:  # glob, interval, infinite range
            errors.append(f"Cannot sweep over {word!r}: list the values, such as {key}=A,B, or use range(START,STOP).")
        elif count == 0:
            errors.append(f"Cannot sweep over {word!r}: there is no value in it; a range counts up from START to STOP.")
        else:
            counts.append(count)
    if (jobs := math.prod(counts)) > MOST_JOBS:
        errors.append(f"Cannot sweep over {jobs:,} jobs: {MOST_JOBS} are one sweep; give several commands.")
    if errors:
        raise ConfigError(errors)
    choices = [
        [f"{word.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]
        if _is_sweep(override)
        else [word]
        for word, override in zip(words, overrides, strict=True)
    ]
    return [list(job) for job in itertools.product(*choices)]


def split_sweep(words: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Returns the overrides with one value, and those with several."""
    overrides = _parse_all(words)
    single = [override.input_line for override in overrides if not _is_sweep(override)]
    return single, [override for override in overrides if _is_sweep(override)]


def _count_values(sweep: Any) -> int | None:
    """Returns the number of values of a sweep without generating them; None if they cannot be counted."""
    if isinstance(sweep, ChoiceSweep):
        return None if any(isinstance(value, Sweep) for value in sweep.list) else len(sweep.list)
    if not isinstance(sweep, RangeSweep):
        return None
    bounds = (sweep.start, sweep.stop, sweep.step)
    if not all(map(math.isfinite, bounds)) or sweep.step == 0:
        return None
    count = (sweep.stop - sweep.start) / sweep.step
    return max(0, math.ceil(count)) if math.isfinite(count) else None


def mask_record(sweep_folder: Path) -> None:
    """Masks passwords in the configuration that Hydra saves for a sweep."""
    path = sweep_folder / "multirun.yaml"
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text(encoding="utf-8")
        if masked(text) != text:
            write_atomic(path, masked(text))


@contextlib.contextmanager
def hydra_errors() -> Iterator[None]:
    """Converts Hydra's errors in the block to `ConfigError`; by default Hydra prints them and exits."""
    variable = "HYDRA_FULL_ERROR"  # if set, Hydra raises its errors
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([f"Hydra refuses the command: {reason_of(error)}."]) from error
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into Hydra's options, such as -m or --cfg job, and overrides."""
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


FLAGS_HELP = """\
Options besides settings (key=value):
  -m, --multirun             every combination of the values of settings such as seed=1,2
  -c, --cfg job|hydra|all    show the configuration and run nothing
      --resolve              with --cfg: references to other keys as their values
  -p, --package NAME         with --cfg: a part of it, such as optim
  -i, --info[=WHAT]          how it is composed: all, config, defaults, defaults-tree, plugins, searchpath
  -cd, --config-dir DIR      option files of your own, DIR/GROUP/NAME.yaml
  -cn, --config-name NAME    another file than config.yaml
  -cp, --config-path DIR     another folder than conf
  -r, --run                  one run, as without it
  -h, --help                 options of the groups, and the configuration
      --version              Hydra's
Sweeps: hydra/launcher=NAME (basic, and those of the extras sweep and ray), its keys, and hydra.sweep.dir; --cfg=hydra
shows them. What Hydra offers besides: https://hydra.cc
"""
_FLAGS = {  # {name: (short form, allowed values; () for no value, None for any text)}
    "--multirun": ("-m", ()),
    "--help": ("-h", ()),
    "--hydra-help": (None, ()),
    "--version": (None, ()),
    "--cfg": ("-c", ("job", "hydra", "all")),
    "--resolve": (None, ()),
    "--package": ("-p", None),
    "--info": ("-i", ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    "--run": ("-r", ()),
    "--config-dir": ("-cd", None),
    "--config-path": ("-cp", None),
    "--config-name": ("-cn", None),
}
_SHORT = {short: name for name, (short, _) in _FLAGS.items() if short}
_FLAGS_WITH_VALUE = tuple(
    form
    for name in ("--cfg", "--package", "--config-dir", "--config-path", "--config-name")
    for form in (name, _FLAGS[name][0])
)
_NOT_OFFERED = {
    "--shell-completion": "each word would wait ten seconds for the imports of torch",
    "-sc": "each word would wait ten seconds for the imports of torch",
    "--experimental-rerun": "it would read a pickle, which may run anything",
}


def read_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Checks Hydra's options from `split_flags`; returns those to pass on, and overrides that replace the others.

    `--config-dir DIR` → `hydra.searchpath=[file://DIR]`, which our own composition reads, too.

    Raises:
        ConfigError: unknown options, invalid values, or options that cannot be combined.
    """
    kept: dict[str, str | None] = {}
    settings, errors = [], []
    iterator = iter(flags)
    for flag in iterator:
        given, separator, value = flag.partition("=")
        name = _SHORT.get(given, given)
        if message := _flag_error(given, name):
            errors.append(message)
            continue
        if given in _FLAGS_WITH_VALUE and not separator:
            value = next(iterator, "")
        choices = _FLAGS[name][1]
        if choices == () and separator:
            errors.append(f"Invalid {flag}: nothing follows {name}; write {name} alone.")
        elif choices and value not in choices and not (name == "--info" and not separator):
            errors.append(f"Invalid {given} {value}: it is one of {', '.join(choices)}; write {name}={choices[0]}.")
        elif choices is None and not value:
            errors.append(f"Missing value of {given}: write {name}=VALUE.")
        elif name == "--config-dir":
            folder = Path(value).absolute()
            if os.path.isdir(folder):  # False for too long names, for which Path.is_dir raises
                settings.append(f"{_OWN_FOLDERS}=[{QuotedString(f'file://{folder}', Quote.single).with_quotes()}]")
            else:
                errors.append(f"Invalid {given} {value}: there is no such folder; name one with option files.")
        else:
            kept[name] = value or ("all" if name == "--info" else None)  # alone, it would take the next word
    errors += _flag_pair_errors(kept)
    if errors:
        raise ConfigError(errors)
    return [name if value is None else f"{name}={value}" for name, value in kept.items()], settings


def _flag_error(given: str, name: str) -> str | None:
    if given in _NOT_OFFERED:
        return f"Invalid {given}: it is not offered here, for {_NOT_OFFERED[given]}; leave it out."
    if name in _FLAGS:
        return None
    near = nearest(given, [*_FLAGS, *_SHORT])
    return f"Unknown option {given[:60]}: " + (f"did you mean {near}?" if near else f"known: {', '.join(_FLAGS)}.")


def _flag_pair_errors(flags: Iterable[str]) -> list[str]:
    commands = [name for name in ("--multirun", "--run", "--cfg", "--info") if name in flags]
    errors = [f"Invalid {' with '.join(commands)}: each of them is a command; choose one."] if len(commands) > 1 else []
    return errors + [
        f"Invalid {name} without --cfg: it says how --cfg shows the configuration; add --cfg=job, or leave it out."
        for name in ("--resolve", "--package")
        if name in flags and "--cfg" not in flags
    ]
