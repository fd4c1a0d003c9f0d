"""The typed, frozen configuration of one experiment, and its validation rules.

`parse` turns plain nested data (a composed config, a saved config.yaml) into an `Experiment`, or raises one
`ConfigError` that lists every error: unknown keys with the nearest known name, values out of range with the rule and
the remedy, and incompatible choices. After that, nothing reads the raw configuration and nothing changes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from pydantic import SerializeAsAny

from flatlora.config.sections import (
    DatasetConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
    RhoConfig,
    TrainerConfig,
    WandbConfig,
    model_section,
    own_weights,
)
from flatlora.config.settings import NoSection, Section, checked_section, setting, unknown_key
from flatlora.config.types import FolderPath
from flatlora.utils import names
from flatlora.utils.errors import ConfigError, SettingError


class Experiment(Section):
    """One run: model × dataset × peft × rho × optim × trainer × eval."""

    model: SerializeAsAny[ModelConfig]
    dataset: SerializeAsAny[DatasetConfig]
    peft: SerializeAsAny[PeftConfig]
    rho: SerializeAsAny[RhoConfig]
    optim: OptimConfig
    trainer: TrainerConfig
    eval: dict[str, SerializeAsAny[Section]] = setting({}, identity=False)
    wandb: WandbConfig = setting(WandbConfig(), identity=False)
    tracker: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = setting(
        ["wandb"],
        identity=False,
        remedy="it is a list of wandb, tensorboard, trackio and mlflow, such as tracker=[wandb,tensorboard]",
    )
    # The paper whose settings were taken; what it sets is in the sections.
    protocol: str | None = setting(None, identity=False, remedy="null takes the settings of model and data set")
    seed: int = setting(42, ge=0, le=2**32 - 1, remedy="use a whole number from 0 to 4294967295")
    data_root: FolderPath | None = setting(None, identity=False, remedy="null reads the hub")
    results_root: FolderPath = setting("results", identity=False, remedy="name a folder")
    dry_run: bool = setting(False, identity=False)
    plan: bool = setting(False, identity=False)
    resume: bool = setting(False, identity=False)
    overwrite: bool = setting(False, identity=False)

    @property
    def flat(self) -> bool:
        """Whether weights are perturbed by Flat-LoRA's noise."""
        return self.rho.method == "flat" and self.regularized

    @property
    def regularized(self) -> bool:
        """Whether a regularizer is active; sigma = 0 is plain training, bit for bit, for every method."""
        return self.rho.method != "off" and self.rho.sigma > 0

    def identity(self) -> dict[str, Any]:
        """All settings that the trained bytes depend on."""
        return self.identity_of(self.model_dump(mode="json"))

    def identity_of(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """`identity` of the raw content of a config.yaml, with this experiment's section classes."""
        identity = {}
        for key, value in raw.items():
            section = getattr(self, key, None)
            if isinstance(section, Section) and isinstance(value, Mapping):
                value = section.identity_items(value)
            if self.decides(key, value):
                identity[key] = value
        if raw["rho"]["method"] == "off" or raw["rho"]["sigma"] == 0:
            identity["rho"] = {"method": "off"}
        return identity

    def sha256(self) -> str:
        """Hash of `identity()`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def run_name(self) -> str:
        """`wandb.name`, or a name derived from the config: readable parts, then a hash of all settings but the seed."""
        if self.wandb.name:
            return self.wandb.name
        identity = {key: value for key, value in self.identity().items() if key != "seed"}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
        rank = getattr(self.peft, "lora_r", None)
        parts = [self.model.name, self.peft.name] + ([f"r{rank}"] if rank else [])
        parts += [f"{self.rho.name}{self.rho.sigma:g}"] if self.regularized else []
        return "-".join([*parts, digest])


SectionChooser = Callable[[str, Mapping[str, Any]], type[Section] | str]
"""(section name, raw section) → the class of the section, or an error message.

It lets methods, loaders and evaluators define their own keys.
"""


class Registry(Protocol):
    """Section classes and compatibility rules of the plug-ins that an experiment can choose."""

    def section_class(self, section: str, raw: Mapping[str, Any]) -> type[Section] | str:
        """As `SectionChooser`, for "dataset", "peft", "rho" and "eval.<benchmark>"."""
        ...

    def owners(self, section: str, key: str) -> list[str]:
        """Other options of this section that have this key."""
        ...

    def combination_errors(self, experiment: Experiment) -> list[SettingError]:
        """Errors about incompatible options."""
        ...


def parse(raw: Mapping[str, Any], registry: Registry) -> Experiment:
    """Builds the typed experiment from plain data, nested dicts as YAML gives them.

    Raises:
        ConfigError: it lists every error in keys, values and combinations.
    """
    raw = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    if isinstance(raw.get("eval"), dict):
        raw["eval"].pop("allow_code_execution", None)  # not a benchmark; those that run code have it in their section
    if isinstance(raw.get("model"), dict):
        raw["model"] = own_weights(raw["model"])
    errors = _foreign_keys(raw, registry)
    classes, unknown = _section_classes(raw, registry.section_class)
    errors += unknown
    values: dict[str, Any] = {}
    invalid: set[str] = set()
    for key, value in raw.items():
        if isinstance(value, NoSection):
            errors += [SettingError((key,), message) for message in value.errors]
        elif key not in Experiment.model_fields:
            errors.append(SettingError((key,), unknown_key(key, Experiment.model_fields), "unknown"))
        elif key == "eval" and isinstance(value, Mapping):
            chosen = {name: classes[f"eval.{name}"] for name in value if f"eval.{name}" in classes}
            values[key] = _sections(
                {f"eval.{name}": (cls, value[name]) for name, cls in chosen.items()}, errors, invalid
            )
        elif key in classes:
            values |= _sections({key: (classes[key], value)}, errors, invalid)
        elif not any(key in error.keys for error in errors):
            values[key] = value
    missing = [key for key, spec in Experiment.model_fields.items() if spec.is_required() and key not in raw]
    errors += [
        SettingError(
            (key,), f"Missing {key}: every experiment needs it; set {key}.KEY=VALUE, or leave out ~{key}.", "missing"
        )
        for key in missing
    ]
    experiment, more = checked_section("", Experiment, values)
    invalid |= {key for error in errors for key in error.keys}
    errors += [error for error in more if not invalid & set(error.keys)]
    if experiment is None:
        raise ConfigError(error.message for error in errors)
    invalid |= {key for error in errors for key in error.keys}
    rules = [*_combination_errors(experiment), *registry.combination_errors(experiment)]
    errors += [rule for rule in rules if not invalid & set(rule.keys)]
    if errors:
        raise ConfigError(error.message for error in errors)
    return experiment


def _sections(
    given: Mapping[str, tuple[type[Section], Any]], errors: list[SettingError], invalid: set[str]
) -> dict[str, Section]:
    """{last part of a path: section} for the valid sections; extends `errors` and `invalid` for the others."""
    sections = {}
    for path, (cls, value) in given.items():
        section, section_errors = checked_section(path, cls, value)
        errors += section_errors
        if section is not None:
            sections[path.rpartition(".")[2]] = section
        else:
            invalid.add(path)
    return sections


def _foreign_keys(raw: dict[str, Any], registry: Registry) -> list[SettingError]:
    """Remove keys of other methods from peft and rho, with an error that names the method, unlike for a typo."""
    errors = []
    for section in ("peft", "rho"):
        options = raw.get(section)
        chosen = registry.section_class(section, options) if isinstance(options, Mapping) else ""
        if isinstance(chosen, str):
            continue
        for key in [key for key in options if key not in chosen.model_fields]:
            if others := registry.owners(section, key):
                few = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
                message = (
                    f"Invalid {section}.{key}={options[key]} with {section}={options.get('name')}: it is a key of "
                    f"{section}={few}; leave it out, or choose {others[0]}."
                )
                errors.append(SettingError((f"{section}.{key}",), message))
                del options[key]
    return errors


def _section_classes(
    raw: Mapping[str, Any], choose: SectionChooser
) -> tuple[dict[str, type[Section]], list[SettingError]]:
    classes: dict[str, Any] = {
        "model": model_section(raw["model"] if isinstance(raw.get("model"), Mapping) else {}),
        "optim": OptimConfig,
        "trainer": TrainerConfig,
        "wandb": WandbConfig,
    }
    errors = []
    wanted = {key: raw[key] for key in ("dataset", "peft", "rho") if key in raw}
    if isinstance(raw.get("eval"), Mapping):
        wanted |= {f"eval.{name}": options for name, options in raw["eval"].items()}
    for key, section in wanted.items():
        if isinstance(section, NoSection):
            continue
        chosen = choose(key, section if isinstance(section, Mapping) else {})
        if isinstance(chosen, str):
            errors.append(SettingError((key,), chosen))
        else:
            classes[key] = chosen
    return {key: cls for key, cls in classes.items() if key in raw or key.startswith("eval.")}, errors


def _combination_errors(experiment: Experiment) -> Iterable[SettingError]:
    """Errors about incompatible choices of model, data, optimizer and trainer."""
    optim, trainer = experiment.optim, experiment.trainer
    yield from _name_errors(experiment)
    yield from _unread_key_errors(experiment)
    yield from _dtype_errors(experiment)
    if optim.batch_size % trainer.micro_batch_size:
        yield SettingError(
            ("optim.batch_size", "trainer.micro_batch_size"),
            f"Invalid trainer.micro_batch_size={trainer.micro_batch_size} with optim.batch_size={optim.batch_size}: "
            "the micro-batch must divide the batch; change one of them.",
        )
    if experiment.model.traits.rows != experiment.dataset.kind:
        yield SettingError(
            ("model.family", "dataset.kind"),
            f"Invalid dataset={experiment.dataset.name} ({experiment.dataset.kind}) with model="
            f"{experiment.model.name} ({experiment.model.family}): CLIP takes image data sets, SDXL text-to-image "
            "ones, language models text; change one of them.",
        )
    if optim.group_by_length and not experiment.dataset.has_lengths:
        yield SettingError(
            ("dataset.kind", "optim.group_by_length"),
            f"Invalid optim.group_by_length=true with dataset={experiment.dataset.name}: pictures have no length; "
            "leave the key out (dataset.buckets=true puts pictures of one shape together).",
        )
    if trainer.offload and not (trainer.zero or trainer.fsdp):
        yield SettingError(
            ("trainer.offload", "trainer.zero", "trainer.fsdp"),
            f"Invalid trainer.offload=true with trainer={trainer.name}: ZeRO's optimizer and FSDP2's weights alone can "
            "be kept on the host; use trainer=zero2_offload or fsdp_offload, or leave the key out.",
        )
    if trainer.zero and optim.optimizer != "adamw":
        yield SettingError(
            ("trainer.zero", "optim.optimizer"),
            f"Invalid optim.optimizer={optim.optimizer} with trainer={trainer.name}: ZeRO keeps FP32 masters and "
            "moments, a share in each process; use optim.optimizer=adamw, or trainer=ddp.",
        )
    if trainer.fsdp:
        yield from _fsdp_errors(experiment)
    if trainer.gpus is not None and trainer.launch == "single" and trainer.gpus > 1:
        yield SettingError(
            ("trainer.gpus", "trainer.launch"),
            f"Invalid trainer.gpus={trainer.gpus} with trainer={trainer.name}: it runs one process; use trainer=ddp.",
        )
    if experiment.resume and experiment.overwrite:
        yield SettingError(
            ("resume", "overwrite"),
            "Invalid resume=true with overwrite=true: one continues the run, the other deletes it; choose one.",
        )


def _fsdp_errors(experiment: Experiment) -> Iterable[SettingError]:
    """Errors about choices that do not support a backbone whose rows are split among the processes."""
    model, trainer, head = experiment.model, experiment.trainer, f"Invalid trainer={experiment.trainer.name} with"
    if trainer.zero:
        yield SettingError(
            ("trainer.fsdp", "trainer.zero"),
            f"Invalid trainer.fsdp=true with trainer.zero={trainer.zero}: each shards in its own way; choose one.",
        )
    if model.family != "causal_lm":
        yield SettingError(
            ("trainer.fsdp", "model.family"),
            f"{head} model={model.name} ({model.family}): only decoder-only language models are sharded; use "
            "trainer=ddp.",
        )
    if trainer.offload and trainer.device == "cpu":
        yield SettingError(
            ("trainer.offload", "trainer.device"),
            f"{head} trainer.device=cpu: its weights are on the host already; use trainer=fsdp.",
        )
    if model.quantize != "none":
        yield SettingError(
            ("trainer.fsdp", "model.quantize"),
            f"{head} model.quantize={model.quantize}: packed weights have no rows that could be split; use "
            "model.quantize=none, or trainer=ddp.",
        )
    if experiment.eval:
        names = ",".join(experiment.eval)
        yield SettingError(
            ("trainer.fsdp", "eval"),
            f"{head} eval=[{names}]: one process scores, and it has only its share of the weights; set eval=[], and "
            f"score the finished run with python -m eval.{next(iter(experiment.eval))} RUN_FOLDER.",
        )


def _name_errors(experiment: Experiment) -> Iterable[SettingError]:
    """An error if the derived run name, which joins several names, is too long for a folder."""
    name = experiment.run_name()
    if (size := names.size(name)) > names.MOST_BYTES:
        yield SettingError(
            ("model.name", "peft.name", "rho.name", "wandb.name"),
            f"Invalid run name {name[:60]}…: it joins the names of model, peft and rho and has {size} bytes, but a "
            f"folder's name has at most {names.MOST_BYTES}; set wandb.name.",
        )


def _dtype_errors(experiment: Experiment) -> Iterable[SettingError]:
    """Errors about FP16 weights where they cannot be trained."""
    model, trainer = experiment.model, experiment.trainer
    if model.dtype == "float16" and not model.traits.scales_loss:
        yield SettingError(
            ("model.dtype", "model.family"),
            f"Invalid model.dtype=float16 with model={model.name} ({model.family}): its loss is "
            "not scaled, and small gradients of an adapter underflow to 0 in FP16; use model.dtype=bfloat16 or float32 "
            "(FP16 is for scoring).",
        )
    elif model.dtype == "float16" and trainer.device == "cpu":
        yield SettingError(
            ("model.dtype", "trainer.device"),
            f"Invalid model.dtype=float16 with trainer={trainer.name}: FP16 is trained on a GPU alone; use "
            "model.dtype=bfloat16 or float32.",
        )


def _unread_key_errors(experiment: Experiment) -> Iterable[SettingError]:
    """Errors about keys that were set but would have no effect."""
    rho, optim = experiment.rho, experiment.optim
    if rho.method == "off":
        for key in sorted(_changed(rho) - {"name", "method"}):
            yield SettingError(
                ("rho.method", f"rho.{key}"),
                f"Invalid rho.{key}={getattr(rho, key)} with rho=off: plain LoRA has no perturbation; use rho=flat "
                "(rho.sigma=0 with it is plain LoRA, bit for bit), or leave the key out.",
            )
    for key in ("revision", "test_revision"):
        if experiment.data_root is not None and (pinned := getattr(experiment.dataset, key, None)) is not None:
            yield SettingError(
                (f"dataset.{key}", "data_root"),
                f"Invalid dataset.{key}={pinned} with data_root={experiment.data_root}: only the hub has revisions; "
                "leave one of them out.",
            )
    if getattr(experiment.dataset, "loss_on", "answer") == "text" and experiment.model.family != "causal_lm":
        yield SettingError(
            ("dataset.loss_on", "model.family"),
            f"Invalid dataset.loss_on=text with model={experiment.model.name} ({experiment.model.family}): only a "
            "decoder-only model predicts its prompt; leave the key out.",
        )
    if getattr(experiment.dataset, "template", None) == "chat" and experiment.model.family != "causal_lm":
        yield SettingError(
            ("dataset.template", "model.family"),
            f"Invalid dataset.template=chat with model={experiment.model.name} ({experiment.model.family}): chats are "
            "continued by decoder-only models; use another template, or leave the key out.",
        )
    if getattr(experiment.dataset, "validation_rows", None) == 0:
        if experiment.dataset.evaluate == "validation":
            yield SettingError(
                ("dataset.evaluate", "dataset.validation_rows"),
                "Invalid dataset.evaluate=validation with dataset.validation_rows=0: no row of "
                f"dataset={experiment.dataset.name} is held out; set dataset.validation_rows, or leave the key out.",
            )
        for key in keys_of_validation(optim):
            yield SettingError(
                (f"optim.{key}", "dataset.validation_rows"),
                f"Invalid optim.{key}={getattr(optim, key)} with dataset.validation_rows=0: it needs a validation "
                "loss; set dataset.validation_rows, or leave the key out.",
            )


def keys_of_validation(optim: OptimConfig) -> list[str]:
    """The keys of `optim` that differ from their defaults and need a validation loss."""
    return sorted(_changed(optim) & {"eval_steps", "early_stopping_patience", "best_model"})


def _changed(section: Section) -> set[str]:
    fields = type(section).model_fields
    return {key for key, spec in fields.items() if getattr(section, key) != spec.get_default()}
