"""The typed, frozen description of one experiment, and the rules that it must meet.

`parse` turns plain nested data (a composed config, a saved config.yaml) into an `Experiment` or raises one
`ConfigError` that lists every fault: unknown keys with the nearest known name, values out of range with the rule and
the remedy, and choices that do not go together. Nothing reads raw configuration after that and nothing changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from pydantic import SerializeAsAny

from flatlora.config.sections import (
    KINDS,
    DatasetConfig,
    FlatConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
    RhoConfig,
    TrainerConfig,
    WandbConfig,
    model_section,
    own_weights,
)
from flatlora.config.settings import NoSection, Section, _build_section, _unknown_key, setting
from flatlora.config.types import FolderPath
from flatlora.utils import names
from flatlora.utils.errors import ConfigError


class Experiment(Section):
    """One run: model × dataset × peft × rho × optim × trainer × eval."""

    model: SerializeAsAny[ModelConfig]
    dataset: SerializeAsAny[DatasetConfig]
    peft: SerializeAsAny[PeftConfig]
    rho: SerializeAsAny[RhoConfig]
    optim: OptimConfig
    trainer: TrainerConfig
    eval: dict[str, SerializeAsAny[Section]] = setting({})
    wandb: WandbConfig = WandbConfig()
    seed: int = setting(42, ge=0, le=2**32 - 1, remedy="use a whole number from 0 to 4294967295")
    data_root: FolderPath | None = setting(None, remedy="null reads the hub")
    results_root: FolderPath = setting("results", remedy="name a folder")
    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False

    @property
    def flat(self) -> bool:
        """Whether weights are perturbed by Flat-LoRA's noise."""
        return self.rho.method == "flat" and self.regularised

    @property
    def regularised(self) -> bool:
        """Whether something acts on top of the loss; sigma = 0 is plain training, bit for bit, whatever the method."""
        return self.rho.method != "off" and self.rho.sigma > 0

    def identity(self) -> dict[str, Any]:
        """All that decides the trained bytes: the config less record keeping, scoring, paths and logging."""
        return identity_of(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """Hash of `identity()`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def run_name(self) -> str:
        """`wandb.name`, or one derived from the config: readable head, then a hash over all but the seed."""
        if self.wandb.name:
            return self.wandb.name
        identity = {key: value for key, value in self.identity().items() if key != "seed"}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
        rank = getattr(self.peft, "lora_r", None)
        parts = [self.model.name, self.peft.name] + ([f"r{rank}"] if rank else [])
        parts += [f"{self.rho.name}{self.rho.sigma:g}"] if self.regularised else []
        return "-".join([*parts, digest])


def identity_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`Experiment.identity` of a config as config.yaml keeps it."""
    unread = ("wandb", "results_root", "data_root", "dry_run", "resume", "overwrite", "eval")
    identity = {key: value for key, value in raw.items() if key not in unread}
    scoring = ("generated_test_rows", "test_rows", "answer_tokens", "scorer", "captioner", "drawn")
    for section in ("model", "dataset"):
        identity[section] = {key: value for key, value in raw[section].items() if key not in scoring}
    unread = ("save_steps", "save_total_limit", "logging_steps", "num_workers", "name", "launch", "gpus", "zero")
    unread += ("offload", "timeout_s")
    identity["trainer"] = {key: value for key, value in raw["trainer"].items() if key not in unread}
    if raw["rho"]["method"] == "off" or raw["rho"]["sigma"] == 0:
        identity["rho"] = {"method": "off"}
    return identity


SectionChooser = Callable[[str, Mapping[str, Any]], type[Section] | str]
"""(section, raw section) → the class that types it, or a fault; lets methods, loaders and evaluators own their keys."""


class Registry(Protocol):
    """What the options of an experiment bring along, and how they go together."""

    def section_class(self, section: str, raw: Mapping[str, Any]) -> type[Section] | str:
        """As `SectionChooser`, for "dataset", "peft", "rho" and "eval.<benchmark>"."""
        ...

    def owners(self, section: str, key: str) -> list[str]:
        """Other options of this section that have such a key."""
        ...

    def refusals(self, experiment: Experiment) -> list[tuple[tuple[str, ...], str]]:
        """(keys that a rule reads, fault) of every two options that do not go together."""
        ...


def parse(raw: Mapping[str, Any], registry: Registry) -> Experiment:
    """Typed experiment of plain data, nested dicts as YAML gives them.

    Raises:
        ConfigError: with every fault found in keys, values and combinations.
    """
    raw = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    faults: list[str] = []
    faulty: set[str] = set()
    if isinstance(raw.get("eval"), dict):
        raw["eval"].pop("allow_code_execution", None)  # no benchmark: those that run code have it in their own section
    if isinstance(raw.get("model"), dict):
        raw["model"] = own_weights(raw["model"])
    _refuse_foreign_knobs(raw, registry, faults, faulty)
    classes = _section_classes(raw, registry.section_class, faults, faulty)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, NoSection):
            faults += value.faults
            faulty.add(key)
        elif key not in Experiment.model_fields:
            faults.append(_unknown_key(key, Experiment.model_fields))
        elif key in classes:
            values[key] = _build_section(key, classes[key], value, faults, faulty)
        elif key == "eval" and isinstance(value, Mapping):
            sections = {
                name: _build_section(f"eval.{name}", classes[f"eval.{name}"], options, faults, faulty)
                for name, options in value.items()
                if f"eval.{name}" in classes
            }
            values[key] = {name: section for name, section in sections.items() if section is not None}
        elif key not in faulty:
            values[key] = value
    missing = [key for key, spec in Experiment.model_fields.items() if spec.is_required() and key not in raw]
    faults += [
        f"Missing {key}: every experiment has one; set {key}.KEY=VALUE, and leave out ~{key}." for key in missing
    ]
    faulty |= set(missing)
    values = {key: value for key, value in values.items() if value is not None or key not in classes}
    experiment = _build_section("", Experiment, values, faults, faulty)
    if experiment is None:
        raise ConfigError(faults)
    sections = [getattr(experiment, key) for key in classes if not key.startswith("eval.")] + [
        *experiment.eval.values()
    ]
    rule_faults = [fault for section in sections for fault in section.rule_faults()]
    faults += [fault for fault in rule_faults if not any(f"{key}=" in fault for key in faulty)]
    combined = [*_combination_faults(experiment), *registry.refusals(experiment)]
    faults += [fault for keys, fault in combined if not faulty & set(keys)]
    if faults:
        raise ConfigError(faults)
    return experiment


def _refuse_foreign_knobs(raw: dict[str, Any], registry: Registry, faults: list[str], faulty: set[str]) -> None:
    """Take out of peft and rho what is another method's key: a typo has a near name, this one has an owner."""
    for section in ("peft", "rho"):
        options = raw.get(section)
        chosen = registry.section_class(section, options) if isinstance(options, Mapping) else ""
        if isinstance(chosen, str):
            continue
        for key in [key for key in options if key not in chosen.model_fields]:
            if others := registry.owners(section, key):
                few = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
                faults.append(
                    f"Invalid {section}.{key}={options[key]} with {section}={options.get('name')}: it is a key of "
                    f"{section}={few}; leave it out, or choose {others[0]}."
                )
                faulty.add(f"{section}.{key}")
                del options[key]


def _section_classes(
    raw: Mapping[str, Any], choose: SectionChooser, faults: list[str], faulty: set[str]
) -> dict[str, type[Section]]:
    classes: dict[str, Any] = {
        "model": model_section(raw["model"] if isinstance(raw.get("model"), Mapping) else {}),
        "optim": OptimConfig,
        "trainer": TrainerConfig,
        "wandb": WandbConfig,
    }
    wanted = {key: raw[key] for key in ("dataset", "peft", "rho") if key in raw}
    if isinstance(raw.get("eval"), Mapping):
        wanted |= {f"eval.{name}": options for name, options in raw["eval"].items()}
    for key, section in wanted.items():
        if isinstance(section, NoSection):
            continue
        chosen = choose(key, section if isinstance(section, Mapping) else {})
        if isinstance(chosen, str):
            faults.append(chosen)
            faulty.add(key)
        else:
            classes[key] = chosen
    return {key: cls for key, cls in classes.items() if key in raw or key.startswith("eval.")}


def _combination_faults(experiment: Experiment) -> Iterable[tuple[tuple[str, ...], str]]:
    """(keys that a rule reads, fault) of every choice that does not go with another."""
    rho, optim, trainer = experiment.rho, experiment.optim, experiment.trainer
    yield from _name_faults(experiment)
    yield from _unread_keys(experiment)
    yield from _dtype_faults(experiment)
    if isinstance(rho, FlatConfig) and rho.every > 1 and rho.resample == "micro_batch":
        yield (
            ("rho.every", "rho.resample"),
            f"Invalid rho.every={rho.every} with rho.resample=micro_batch: one keeps ε over steps, the other draws "
            "several a step; drop one of them.",
        )
    if optim.batch_size % trainer.micro_batch_size:
        yield (
            ("optim.batch_size", "trainer.micro_batch_size"),
            f"Invalid trainer.micro_batch_size={trainer.micro_batch_size} with optim.batch_size={optim.batch_size}: "
            "the micro-batch must divide the batch; change one of them.",
        )
    if KINDS[experiment.model.family] != experiment.dataset.kind:
        yield (
            ("model.family", "dataset.kind"),
            f"Invalid dataset={experiment.dataset.name} ({experiment.dataset.kind}) with model="
            f"{experiment.model.name} ({experiment.model.family}): CLIP takes image data sets, SDXL captioned ones, "
            "language models text; change one of them.",
        )
    if experiment.dataset.kind == "captioned" and optim.group_by_length:
        yield (
            ("dataset.kind", "optim.group_by_length"),
            f"Invalid optim.group_by_length=true with dataset={experiment.dataset.name}: pictures have no length; "
            "leave the key out (dataset.buckets=true puts pictures of one shape together).",
        )
    if experiment.resume and experiment.flat and rho.mode == "inplace":
        yield (
            ("resume", "rho.mode"),
            "Invalid resume=true with rho.mode=inplace: the drifted backbone is in no checkpoint, so the run cannot be "
            "continued; use rho.mode=copy or recompute, or overwrite=true.",
        )
    if trainer.offload and not trainer.zero:
        yield (
            ("trainer.offload", "trainer.zero"),
            "Invalid trainer.offload=true with trainer.zero=0: it is ZeRO's optimizer that is moved to the host; use "
            "trainer=zero2_offload, or leave the key out.",
        )
    if trainer.zero and optim.optimizer != "adamw":
        yield (
            ("trainer.zero", "optim.optimizer"),
            f"Invalid optim.optimizer={optim.optimizer} with trainer={trainer.name}: ZeRO keeps FP32 masters and "
            "moments, a share in each process; use optim.optimizer=adamw, or trainer=ddp.",
        )
    if trainer.gpus is not None and trainer.launch == "single" and trainer.gpus > 1:
        yield (
            ("trainer.gpus", "trainer.launch"),
            f"Invalid trainer.gpus={trainer.gpus} with trainer={trainer.name}: it is one process; use trainer=ddp.",
        )
    if experiment.resume and experiment.overwrite:
        yield (
            ("resume", "overwrite"),
            "Invalid resume=true with overwrite=true: one continues the run, the other deletes it; choose one.",
        )


def _name_faults(experiment: Experiment) -> Iterable[tuple[tuple[str, ...], str]]:
    """A derived name has several names in it, each of which may be as long as a name may be."""
    name = experiment.run_name()
    if (size := names.size(name)) > names.MOST_BYTES:
        yield (
            ("model.name", "peft.name", "rho.name", "wandb.name"),
            f"Invalid run name {name[:60]}…: it is made of the names of model, peft and rho, has {size} bytes, and a "
            f"folder's name takes {names.MOST_BYTES}; give wandb.name.",
        )


def _dtype_faults(experiment: Experiment) -> Iterable[tuple[tuple[str, ...], str]]:
    """Weights that are stored as neither the noise nor the loss of the experiment can have them."""
    model, rho, trainer = experiment.model, experiment.rho, experiment.trainer
    if model.quantize != "none" and experiment.flat and rho.mode in ("copy", "inplace"):
        yield (
            ("model.quantize", "rho.mode"),
            f"Invalid rho.mode={rho.mode} with model.quantize={model.quantize}: a copy would undo what the "
            "weights are packed for, and noise cannot be added to 4 bits; use rho.mode=recompute (or auto).",
        )
    if model.family == "sdxl" and model.dtype == "float16" and trainer.device == "cpu":
        yield (
            ("model.dtype", "trainer.device"),
            f"Invalid model.dtype=float16 with trainer={trainer.name}: FP16 is trained on a GPU alone; use "
            "model.dtype=bfloat16 or float32.",
        )
    if model.family != "sdxl" and model.dtype == "float16":
        yield (
            ("model.dtype", "model.family"),
            f"Invalid model.dtype=float16 with model={model.name} ({model.family}): its loss is "
            "not scaled, and small gradients of an adapter underflow to 0 in FP16; use model.dtype=bfloat16 or float32 "
            "(FP16 is for scoring).",
        )


def _unread_keys(experiment: Experiment) -> Iterable[tuple[tuple[str, ...], str]]:
    """Keys that were set and that nothing would read: the user believes that they act."""
    rho, optim = experiment.rho, experiment.optim
    if rho.method == "off":
        for key in sorted(_changed(rho) - {"name", "method"}):
            yield (
                ("rho.method", f"rho.{key}"),
                f"Invalid rho.{key}={getattr(rho, key)} with rho=off: plain LoRA has no perturbation; use rho=flat "
                "(rho.sigma=0 with it is plain LoRA, bit for bit), or leave the key out.",
            )
    for key in ("revision", "test_revision"):
        if experiment.data_root is not None and (pinned := getattr(experiment.dataset, key, None)) is not None:
            yield (
                (f"dataset.{key}", "data_root"),
                f"Invalid dataset.{key}={pinned} with data_root={experiment.data_root}: a folder has one state, and "
                "revisions are the hub's; leave one of them out.",
            )
    if getattr(experiment.dataset, "validation_rows", None) == 0:
        for key in keys_of_validation(optim):
            yield (
                (f"optim.{key}", "dataset.validation_rows"),
                f"Invalid optim.{key}={getattr(optim, key)} with dataset.validation_rows=0: it needs a validation "
                "loss; set dataset.validation_rows, or leave the key out.",
            )


def keys_of_validation(optim: OptimConfig) -> list[str]:
    """Those of the given settings that need a validation loss."""
    return sorted(_changed(optim) & {"eval_steps", "early_stopping_patience", "best_model"})


def _changed(section: Section) -> set[str]:
    fields = type(section).model_fields
    return {key for key, spec in fields.items() if getattr(section, key) != spec.get_default()}
