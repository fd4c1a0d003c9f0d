"""What the user named on the command line: weights, and what the run that they belong to says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

import eval as benchmarks
from flatlora.config import ConfigError, ModelConfig, Section, TrainerConfig, model_section
from flatlora.diffusion import INDEX

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # a 13th month is a ValueError
OTHER_VERSION = "score the run with the version of the suite that made it, or mend the file"
_RUN_SECTIONS = ("model", "dataset", "peft", "rho", "optim", "trainer")


@dataclass(frozen=True)
class Place:
    """What the user named: weights, and what the run that they belong to says of them."""

    weights: str  # a folder or a hub id
    run: Path | None = None
    model: ModelConfig | None = None
    autocast: str = "auto"
    scored_with: dict[str, Any] = field(default_factory=dict)  # the run's own settings of the benchmark
    dataset: Mapping[str, Any] = field(default_factory=dict)  # the run's, as its config.yaml has it
    data_root: str | None = None
    base: str | None = None  # the backbone's state that the run's record has, see `flatlora.models.backbone_state`


def locate_place(name: str, benchmark: str, served: bool = False) -> Place:
    """`served`: the name is one that an endpoint knows, whatever it looks like."""
    path = Path(name)
    if served:
        return Place(name)
    if not path.is_dir():
        if path.exists() or name.startswith((".", "/")) or name.count("/") > 1:
            raise ConfigError(
                [f"Invalid path {name}: no such folder; name a run, checkpoint, adapter or model folder."]
            )
        return Place(name)  # a hub id
    for folder in (path, *path.resolve().parents[:2]):
        if saved := _saved_config(folder):
            weights = path if folder != path else path / "adapter"
            break
    else:
        folder, saved, weights = None, None, path
    if not any((weights / file).is_file() for file in ("adapter_config.json", "config.json", INDEX)):
        if weights != path:
            problem = "this run has no adapter/ yet; finish it, or name one of its checkpoints"
        else:
            problem = "neither weights nor a run are in it; name a run, checkpoint, adapter or model folder"
        raise ConfigError([f"Invalid path {name}: {problem}."])
    return _place_in_run(str(weights), folder, saved, benchmark) if saved else Place(str(weights))


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """config.yaml of a run's folder; None for a folder that is no run's, whatever config.yaml it may have.

    Raises:
        ConfigError: the folder is a run's, and its config.yaml is broken or lacks a section.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        saved = yaml.safe_load(path.read_bytes())
    except YAML_ERRORS:
        saved = None
    sections = [name for name in _RUN_SECTIONS if name in saved] if isinstance(saved, dict) else []
    if len(sections) == len(_RUN_SECTIONS):
        return saved
    ran = any((folder / file).is_file() for file in ("run.json", "metrics.jsonl"))
    if not ran or (saved and isinstance(saved, dict) and not sections):
        return None  # another program's
    if sections:
        missing = ", ".join(name for name in _RUN_SECTIONS if name not in sections)
        raise ConfigError([f"Invalid {path}: the run's {missing} is missing; {OTHER_VERSION}."])
    raise ConfigError(
        [f"Broken file {path}: it holds no settings; put those back that run.json keeps under experiment."]
    )


def _place_in_run(weights: str, run: Path, saved: Mapping[str, Any], benchmark: str) -> Place:
    path, faults = run / "config.yaml", []

    def section(key: str, cls: type[Section], value: Any) -> Any:
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            for detail in error.errors():
                name = ".".join([key, *map(str, detail["loc"])])
                faults.append(f"Invalid {name} in {path}: {detail['msg'].lower()}; {OTHER_VERSION}.")

    model = section("model", model_section(saved["model"]), saved["model"])
    trainer = section("trainer", TrainerConfig, saved["trainer"])
    scored = saved.get("eval") or {}
    if not isinstance(scored, Mapping):
        faults.append(f"Invalid eval in {path}: a group of benchmarks is needed; {OTHER_VERSION}.")
    elif benchmark in scored:
        own = section(f"eval.{benchmark}", benchmarks.evaluator(benchmark).Config, scored[benchmark])
    if faults:
        raise ConfigError(faults)
    if benchmark in scored:
        settings = own.model_dump()
    else:  # what the run's data set says of any benchmark: the task, and the template that its rows have
        fields = benchmarks.evaluator(benchmark).Config.model_fields
        settings = {
            key: saved["dataset"][key]
            for key in ("task", "template")
            if key in fields and saved["dataset"].get(key) in get_args(fields[key].annotation)  # not squad's own prompt
        }
    return Place(
        weights, run, model, trainer.autocast, settings, saved["dataset"], saved.get("data_root"), _recorded_base(run)
    )


def _recorded_base(run: Path) -> str | None:
    """None before a run has ended, and of one whose record says nothing of it."""
    try:
        return json.loads((run / "run.json").read_bytes()).get("base")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
