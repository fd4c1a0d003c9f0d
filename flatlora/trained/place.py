"""Resolves the PATH of a command line to weights and the settings of their run, and identifies the weights."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from flatlora.config.sections import DiffusionModelConfig, ModelConfig, TrainerConfig, model_section
from flatlora.config.settings import Section
from flatlora.models.clip import Classes
from flatlora.models.diffusion import INDEX
from flatlora.models.family import FAMILIES
from flatlora.models.hashes import PUT_BACK, differing_part, short_state, weights_state
from flatlora.models.loading import model_of, weights_identity
from flatlora.models.saved_adapters import adapter_config
from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.train import checkpoint
from flatlora.utils import records
from flatlora.utils.errors import ConfigError

logger = logging.getLogger(__name__)

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # a 13th month is a ValueError
OTHER_VERSION = "score the run with the version of the suite that made it, or fix the file"
_RUN_SECTIONS = ("model", "dataset", "peft", "rho", "optim", "trainer")


@dataclass(frozen=True)
class ResolvedModel:
    """The weights that PATH names, and the settings of the run that they belong to."""

    weights: str  # a folder or a hub id
    run: Path | None = None
    model: ModelConfig | None = None
    autocast: str = "auto"
    scored_with: dict[str, Any] = field(default_factory=dict)  # the run's own settings of the benchmark
    dataset: Mapping[str, Any] = field(default_factory=dict)  # the section of the run's config.yaml
    data_root: str | None = None
    # The backbone's state in the run's record, see `flatlora.models.loading.backbone_state`.
    base: str | None = None
    base_named: bool = False  # whether base=... names the backbone


class _BaseModel(ModelConfig):
    hub_setting: ClassVar[str] = "base"


class _BasePipeline(DiffusionModelConfig):
    hub_setting: ClassVar[str] = "base"


_BASES: Mapping[type[ModelConfig], type[ModelConfig]] = {ModelConfig: _BaseModel, DiffusionModelConfig: _BasePipeline}


def resolve_model(
    name: str,
    *,
    benchmark: tuple[str, type[Section]] | None = None,
    served: bool = False,
    base: str | None = None,
    setting: str | None = None,
) -> ResolvedModel:
    """Resolves a path, hub id or served name to weights, and to the settings of their run if they belong to one.

    Args:
        benchmark: name and settings of the benchmark that scores the model, if one does.
        served: `name` is the name of a model at an endpoint, even if it looks like a path.
        base: path or hub id of an adapter's base model; None: as its run or its own config says. `base_errors` reports
            a missing one.
        setting: the setting whose value `name` is, for messages; None for an argument of a command.

    Raises:
        ConfigError: there is no such folder, it holds no weights, or files of its run are damaged or invalid.
    """
    path, given = Path(name), f"path {name}" if setting is None else f"{setting}={name}"
    if served:
        return ResolvedModel(name)
    if not path.is_dir():
        if path.exists() or name.startswith((".", "/")) or name.count("/") > 1:
            raise ConfigError([f"Invalid {given}: no such folder; name a run, checkpoint, adapter or model folder."])
        return ResolvedModel(name)  # a hub id
    for folder in (path, *path.resolve().parents[:2]):
        if saved := _saved_config(folder):
            weights = path if folder != path else path / "adapter"
            break
    else:
        folder, saved, weights = None, None, path
    if not any((weights / file).is_file() for file in ("adapter_config.json", "config.json", INDEX)):
        if saved and (errors := run_errors(folder, weights)):
            raise ConfigError(errors)
        if weights != path:
            problem = "this run has no adapter/ yet; finish it, or name one of its checkpoints"
        else:
            problem = "it holds neither weights nor a run; name a run, checkpoint, adapter or model folder"
        raise ConfigError([f"Invalid {given}: {problem}."])
    if saved is None:
        return _with_base(ResolvedModel(str(weights)), base)
    resolved, errors = _resolve_in_run(str(weights), folder, saved, benchmark), run_errors(folder, weights)
    if errors:
        raise ConfigError(errors)
    return _with_base(resolved, base)


def run_errors(run: Path, weights: Path) -> list[str]:
    """Returns errors for changed files of a run's folder, of those that are read to score these weights.

    Raises:
        ConfigError: its run.json is broken.
    """
    record = _record(run)
    in_adapter = weights.resolve() == (run / "adapter").resolve()
    if record is None:
        damage = []
    else:
        damage = record.file_damage(
            run, lambda name: name != "metrics.jsonl" and (in_adapter or not name.startswith("adapter/"))
        )
        damage += record.settings_damage(run)
    errors = []
    if damage:
        errors.append(
            f"Invalid run {run}: {'; '.join(damage)}. Repeat the run's command with resume=true, which continues from "
            "the newest checkpoint, or with overwrite=true, which starts over."
        )
    if (
        not in_adapter
        and (weights / checkpoint.MANIFEST).is_file()
        and (message := checkpoint.inference_error(weights))
    ):
        errors.append(f"Invalid checkpoint {weights}: {message}; name another checkpoint, or the run.")
    return errors


def _record(run: Path) -> RunRecord | None:
    return RunRecord.read(run, _REMEDY)


_REMEDY = "delete that file, then repeat the run's command with resume=true"


def _with_base(resolved: ResolvedModel, base: str | None) -> ResolvedModel:
    """Returns the model with the base model `base`, or with its own, which may be relative to the adapter's folder."""
    recorded, own = _recorded_name(resolved), resolved.model
    if recorded is None:
        return resolved
    located = os.path.expanduser(base) if base is not None else _relative_to_adapter(recorded, resolved)
    if own is None and (located == recorded or _folder_problem(located)):
        return resolved  # PEFT finds it by the adapter's own config, or it is missing
    if own is None:
        fields = model_of(located).model_dump()
    else:
        moved = {"hub_id": located, "revision": None, "embedded": None} if located != own.hub_id else {}
        fields = own.model_dump() | moved
    return replace(resolved, model=_BASES[model_section(fields)](**fields), base_named=base is not None)


def _recorded_name(resolved: ResolvedModel) -> str | None:
    """Returns the base model's name in the config of a run or an adapter; None if there is none."""
    if resolved.model is not None:
        return resolved.model.hub_id
    try:
        name = adapter_config(Path(resolved.weights)).get("base_model_name_or_path")
    except ConfigError:  # no adapter, or a broken one, which loading reports
        return None
    return name if isinstance(name, str) and name else None


def _relative_to_adapter(name: str, resolved: ResolvedModel) -> str:
    """Resolves a relative path against the working directory, as PEFT does, or the folder of the adapter or its run."""
    if os.path.isabs(name) or (resolved.model is not None and resolved.model.embedded):
        return name
    folders = [os.path.join(folder, name) for folder in (resolved.weights, resolved.run) if folder]
    beside = next(filter(os.path.isdir, folders), None)
    if beside is None or not os.path.isdir(name):
        return beside or name
    if not os.path.samefile(name, beside):
        logger.warning(
            "There are two folders %s: the one in the working directory is used; base=%s is the other.", name, beside
        )
    return name


def base_errors(resolved: ResolvedModel, base: str | None) -> list[str]:
    """Returns errors if there is no base model at `base`, or at the path that the run or the adapter names."""
    adapter = (Path(resolved.weights) / "adapter_config.json").is_file()
    if not (adapter or (resolved.model is not None and FAMILIES[resolved.model.family].whole_needs_base)):
        return [f"Invalid base={base}: {resolved.weights} is no adapter and needs no base; drop it."] if base else []
    name = base or _recorded_name(resolved)
    if name is None or (base is None and resolved.model is not None and resolved.model.embedded):
        return []
    problem = _folder_problem(os.path.expanduser(name))
    if problem is None:
        return []
    if base is not None:
        return [f"Invalid base={base}: {problem}; name the folder of a complete model, or a hub id."]
    return [f"Invalid base model {name} of {resolved.weights}: {problem}; name its new place with base=PATH."]


def _folder_problem(name: str) -> str | None:
    """Returns why a path holds no model; None if it holds one or may be a hub id."""
    if os.path.isdir(name):
        has_model = any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", INDEX))
        return None if has_model else "the folder holds no model"
    if os.path.exists(name):
        return "it is a file, not a folder"
    return "there is no such folder" if name.startswith((".", "/", "~")) or name.count("/") > 1 else None


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """Returns config.yaml of a run's folder; None if the folder does not belong to a run.

    Raises:
        ConfigError: the folder is a run's, and its config.yaml is broken or lacks a section.
    """
    path = folder / "config.yaml"
    if not os.path.lexists(path):
        if records.SIGNATURE in (records.read_record(folder / RECORD_FILE, _REMEDY) or {}):  # else another program's
            raise ConfigError([f'Missing file {path}: write it from "experiment" in run.json, as YAML.'])
        return None
    try:
        saved = records.read_settings(path, "")
    except ConfigError:
        saved = None
    sections = [name for name in _RUN_SECTIONS if name in saved] if isinstance(saved, dict) else []
    if len(sections) == len(_RUN_SECTIONS):
        return saved
    ran = any(os.path.isfile(folder / file) for file in (RECORD_FILE, "metrics.jsonl"))
    if not ran or (saved and isinstance(saved, dict) and not sections):
        return None  # another program's
    if sections:
        missing = ", ".join(name for name in _RUN_SECTIONS if name not in sections)
        raise ConfigError([f"Invalid {path}: the run's {missing} is missing; {OTHER_VERSION}."])
    raise ConfigError([f'Broken file {path}: it holds no settings; restore them from "experiment" in run.json.'])


def _resolve_in_run(
    weights: str, run: Path, saved: Mapping[str, Any], benchmark: tuple[str, type[Section]] | None
) -> ResolvedModel:
    path, errors = run / "config.yaml", []

    def section(key: str, cls: type[Section], value: Any) -> Any:
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            for detail in error.errors():
                name = ".".join([key, *map(str, detail["loc"])])
                errors.append(f"Invalid {name} in {path}: {detail['msg'].lower()}; {OTHER_VERSION}.")

    model = section("model", model_section(saved["model"]), saved["model"])
    trainer = section("trainer", TrainerConfig, saved["trainer"])
    scored_with = {}
    if benchmark is not None:
        scored_with = _scored_with(*benchmark, saved, path, section, errors)
    if errors:
        raise ConfigError(errors)
    data_root, base = saved.get("data_root"), _recorded_base(run)
    return ResolvedModel(weights, run, model, trainer.autocast, scored_with, saved["dataset"], data_root, base)


def _scored_with(
    name: str,
    cls: type[Section],
    saved: Mapping[str, Any],
    path: Path,
    section: Callable[[str, type[Section], Any], Any],
    errors: list[str],
) -> dict[str, Any]:
    """Returns a run's settings of a benchmark; extends `errors`, as `section` does."""
    eval_settings = saved.get("eval") or {}
    if not isinstance(eval_settings, Mapping):
        errors.append(f"Invalid eval in {path}: a group of benchmarks is needed; {OTHER_VERSION}.")
    elif name in eval_settings:
        own = section(f"eval.{name}", cls, eval_settings[name])
        return {} if own is None else own.model_dump()
    # The data set's settings that apply to any benchmark: its task, and the template of its rows, if it is known there.
    known = {
        key: saved["dataset"].get(key)
        for key in ("task", "template")
        if key in cls.model_fields and saved["dataset"].get(key) in _values(cls.model_fields[key].annotation)
    }
    system = saved["dataset"].get("system") if known.get("template") == "chat" else None
    return known if system is None else {**known, "system": system}


def _values(annotation: Any) -> list[Any]:
    """Returns the values of a Literal, or of those in a union."""
    parts = get_args(annotation)
    return [value for part in parts for value in (_values(part) if get_origin(part) is Literal else [part])]


def _recorded_base(run: Path) -> str | None:
    """Returns the recorded base; None if the run has not ended or its record has no base."""
    record = _record(run)
    return record.base if record else None


def identify(resolved: ResolvedModel, classes: Classes | None = None) -> dict[str, str]:
    """Returns the hashes that identify the weights, for generation.json.

    Raises:
        ConfigError: the backbone differs from the one that the adapter was trained on.
    """
    identity = weights_identity(resolved.weights, resolved.model, classes)
    state = identity.get("base", resolved.base)
    part = differing_part(resolved.base, state) if resolved.base else "weights"
    if resolved.base_named and part and not (resolved.base and is_hash(resolved.base) == is_hash(state)):
        recorded = short_state(resolved.base) if resolved.base else "nothing"
        logger.warning(
            "Cannot check that base=%s is the backbone that %s was trained on: its record has %s, and this is %s.",
            *(resolved.model.hub_id, resolved.weights, recorded, short_state(state)),
        )
    elif resolved.base and part:
        raise ConfigError(
            [
                f"Invalid backbone of {resolved.weights}: {resolved.model.hub_id} is now "
                f"{short_state(identity['base'])}, and the run was trained on {short_state(resolved.base)} (base in "
                f"its run.json), which differ in {part}; put {PUT_BACK[part]} back, name them with base=PATH, or pin "
                "them with model.revision."
            ]
        )
    elif resolved.base and "base" in identity:
        identity["base"] = resolved.base  # may be in an earlier version's format; the model is the same
    return identity


@contextlib.contextmanager
def validated_unchanged(folder: Path) -> Iterator[None]:
    """Checks that the weights do not change between hashing and loading: the record would name the wrong weights."""
    before = weights_state(folder)
    yield
    if weights_state(folder) != before:
        raise ConfigError([f"{folder} changed while it was read: wait until nothing writes there, then try again."])


def is_hash(state: str) -> bool:
    """Whether a backbone's state is the hash of a folder, not a commit of the hub."""
    return state.startswith("sha256:")
