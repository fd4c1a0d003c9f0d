"""Loads and identifies backbones and adapters of any family; the interface of this package to the rest of the suite."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils.hub import has_file

from flatlora.config.sections import ModelConfig
from flatlora.models.clip import Classes
from flatlora.models.families.text_to_image import described_pipeline
from flatlora.models.family import FAMILIES, LoadOptions
from flatlora.models.fit import embedding_rows, vocabulary_errors
from flatlora.models.hashes import settings_sha256, weights_sha256
from flatlora.models.language import described_language_model
from flatlora.models.processors import load_tokenizer
from flatlora.models.saved_adapters import base_name, check_adapter, sort_names, with_adapter
from flatlora.models.sources import hub_errors, source_and_options
from flatlora.models.starts import start_of_checkpoint, subtract_initial_adapter
from flatlora.utils.errors import ConfigError


def skeleton(config: ModelConfig) -> nn.Module:
    """Returns the architecture without weights (meta device), for checks before loading."""
    return FAMILIES[config.family].skeleton(config)


def load_processor(config: ModelConfig) -> Any:
    """Loads the tokenizer or image processor; None for a diffusion model.

    Raises:
        ConfigError: the processor cannot be loaded; with a suggested fix.
    """
    return FAMILIES[config.family].processor(config)


def check_weights(config: ModelConfig, device: torch.device) -> None:
    """Checks that weights, attention kernels and packages that `load_backbone` needs exist; nothing is loaded.

    Raises:
        ConfigError: something is missing; with a suggested fix.
    """
    errors = []
    if config.attn == "flash_attention_2" and not (device.type == "cuda" and is_flash_attn_2_available()):
        errors.append(
            f"Invalid model.attn=flash_attention_2 on {device.type}: the package flash-attn is not usable here; use "
            "model.attn=auto, which takes torch's own kernels."
        )
    if config.traits.scales_loss and config.dtype == "float16" and device.type == "cpu":
        errors.append(
            "Invalid model.dtype=float16 on cpu: a diffusion model is trained in FP16 on a GPU alone, where its loss "
            "is scaled; use model.dtype=bfloat16 or float32."
        )
    if config.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        errors.append(
            f"Invalid model.quantize={config.quantize}: the package bitsandbytes is not installed; run pip install "
            "bitsandbytes, or use model.quantize=none."
        )
    source, options = source_and_options(config)
    files = FAMILIES[config.family].weight_files(config)
    with hub_errors(config):
        if not any(has_file(source, name, **options) for name in files):
            errors.append(
                f"Invalid {config.hub_setting}={config.hub_id}: it holds no weights, or they cannot be reached "
                f"({', '.join(files)}); connect to the network, or name a whole model, made by save_pretrained "
                "or `hf download`."
            )
    if errors:
        raise ConfigError(errors)


def load_backbone(
    config: ModelConfig,
    device: torch.device,
    classes: Classes | None = None,
    autocast: str = "auto",
    head_seed: int | None = None,
    shards: int = 1,
    offload: bool = False,
) -> nn.Module:
    """Loads the frozen backbone onto `device` in `config.dtype`.

    On a CPU that is slow in this dtype, the rounded weights are held in float32; see `flatlora.utils.precision`.

    Args:
        classes: the classes of a classifier.
        autocast: value of the setting trainer.autocast: auto, bfloat16 or none.
        head_seed: see `LoadOptions`.
        shards, offload: see `LoadOptions`.

    Raises:
        ConfigError: the weights cannot be loaded; with a suggested fix.
    """
    options = LoadOptions(device, classes, autocast=autocast, head_seed=head_seed, shards=shards, offload=offload)
    return FAMILIES[config.family].load_backbone(config, options)


def backbone_state(config: ModelConfig) -> str:
    """Returns the identity of the frozen backbone: hashes of a folder's weights and settings (`folder_state`), or
    "REPOSITORY@COMMIT" on the hub.

    Settings of embedded weights are written by the suite and are not hashed. For a pipeline with model.vae_id, the
    identity of that VAE is appended after a "+".

    Raises:
        ConfigError: the model does not exist; with a suggested fix.
    """
    return FAMILIES[config.family].state(config)


def weights_identity(
    path: str, config: ModelConfig | None, classes: Classes | None = None, base: str | None = None
) -> dict[str, str]:
    """Returns the hashes and commits that identify a model, to be saved with its answers.

    Args:
        path: see `load_for_inference`.
        config: the backbone of the run that `path` belongs to; None for a model without a run.
        classes: classes and prompts of a classifier.
        base: the backbone's state if it is known; None computes it, which reads all weight files.

    Returns:
        {"weights", "base", "settings", "classes"}: "base" for an adapter or a CLIP, "settings" (of config.json, see
        `flatlora.models.hashes.settings_sha256`) for a folder with a whole model, "classes" for a classifier.

    Raises:
        ConfigError: see `backbone_state`.
    """
    folder = Path(path)
    identity = {"weights": weights_sha256(folder) if folder.is_dir() else backbone_state(model_of(path))}
    needs_base = classes is not None and FAMILIES[(config or model_of(path)).family].whole_needs_base
    if (folder / "adapter_config.json").is_file() or needs_base:
        identity["base"] = base or backbone_state(config or model_of(path))
    elif (folder / "config.json").is_file():  # the same weights compute something else with another rope_theta
        identity["settings"] = settings_sha256(json.loads((folder / "config.json").read_bytes()))
    if classes is not None:
        identity["classes"] = hashlib.sha256(json.dumps(classes).encode()).hexdigest()
    return identity


def choose_device(wanted: str) -> torch.device:
    """Returns the device cuda:<local rank> or cpu for trainer.device.

    Raises:
        ConfigError: a GPU is requested and none is available.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["Invalid trainer.device=cuda: torch sees no GPU here; use trainer=cpu or trainer=auto."])
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def check_matmul_precision(value: str, device: torch.device) -> None:
    """Checks that a device has TF32 products if trainer.matmul_precision asks for them.

    Raises:
        ConfigError: it has none, and torch would compute in FP32 without a word.
    """
    if value == "highest" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    raise ConfigError(
        [
            f"Invalid trainer.matmul_precision={value} on {name}: only NVIDIA GPUs of compute capability 8.0 or later "
            "compute in TF32; use trainer.matmul_precision=highest."
        ]
    )


def complete_adapter(config: ModelConfig, folder: Path) -> None:
    """Completes a saved adapter's folder: sorted names, and the files that other libraries need besides PEFT's."""
    sort_names(folder)
    FAMILIES[config.family].complete_adapter(folder)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Returns the numbers of parameters as {"trainable", "total"}; tied parameters are counted once."""
    parameters = list(model.parameters())
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "total": sum(p.numel() for p in parameters),
    }


def load_for_inference(
    path: str,
    model_config: ModelConfig | None,
    device: torch.device,
    classes: Classes | None = None,
    dtype: str | None = None,
    autocast: str = "auto",
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Loads a model for evaluation from a folder or hub id: a PEFT adapter on its backbone, or a full model.

    Args:
        path: adapter folder (with adapter_config.json), model folder, or hub id.
        model_config: the backbone of the run that `path` belongs to; None reads it from the adapter's config.
        classes: the classes of a classifier.
        dtype: dtype of the weights; None keeps the model's own.
        autocast: value of the setting trainer.autocast.

    Returns:
        The model in evaluation mode, its tokenizer or image processor (None for a diffusion model), and
        {"base", "adapter"} for the record.

    Raises:
        ConfigError: the weights cannot be loaded; with a suggested fix.
    """
    adapter = Path(path) if (Path(path) / "adapter_config.json").is_file() else None
    if adapter is not None:
        check_adapter(adapter)
    config = model_config or model_of(path)
    family, options = FAMILIES[config.family], LoadOptions(device, classes, dtype, autocast)
    if model_config is not None and adapter is None:
        model, processor = family.load_trained(path, config, options)
    else:
        config = config.model_copy(update={"dtype": dtype}) if dtype else config
        saved = saved_processor(config, adapter) if adapter else None
        processor = family.processor(config.at(str(saved)) if saved else config)
        if adapter is not None:
            options = replace(options, head_seed=0)  # a head is drawn, and then read from the adapter
        model = family.load_backbone(config, options)
    if adapter is not None:
        if start := start_of_checkpoint(adapter):
            subtract_initial_adapter(model, start)
        model = with_adapter(model, adapter, family=config.family, name=config.hub_id)
    if isinstance(processor, PreTrainedTokenizerBase):
        _check_vocabulary(processor, model, path, config if adapter is not None else None)
    whole = path if model_config is not None and adapter is None else config.hub_id
    return model.eval(), processor, {"base": whole, "adapter": str(adapter) if adapter else None}


def check_served(config: ModelConfig, adapter: Path | None = None, tokenizer: Path | None = None) -> None:
    """Checks a language model that is served by another program, as `load_for_inference` would; keeps no weights.

    Args:
        adapter: folder of a PEFT adapter on the model.
        tokenizer: folder of the adapter's tokenizer; None checks the model's own.

    Raises:
        ConfigError: tensors of the model or the adapter are missing, unexpected or of another shape, those of the
            adapter are not finite, or the tokenizer has tokens without an embedding.
    """
    model = FAMILIES[config.family].outline(config)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # intended here
            model = with_adapter(model, adapter, family=config.family, name=config.hub_id)
    processor = load_tokenizer(config.at(str(tokenizer)) if tokenizer else config)
    _check_vocabulary(processor, model, str(adapter or config.hub_id), config if adapter is not None else None)


def saved_processor(config: ModelConfig, adapter: Path) -> Path | None:
    """Returns the folder with the processor of an adapter: the adapter's own or its parent; None if neither has one."""
    family = FAMILIES[config.family]
    return next((folder for folder in (adapter, adapter.parent) if family.holds_processor(folder)), None)


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, path: str, base: ModelConfig | None
) -> None:
    """Checks that every token of the tokenizer has an embedding.

    Args:
        base: the backbone of an adapter. Tokens without an embedding that its tokenizer also has are accepted: they do
            not occur in texts.

    Raises:
        ConfigError: the tokenizer has tokens without an embedding.
    """
    rows = embedding_rows(model)
    added = [token for token, index in tokenizer.get_added_vocab().items() if index >= rows] if base else []
    if added:
        with contextlib.suppress(ConfigError):  # the backbone has no tokenizer
            own = load_tokenizer(base).get_vocab()
            added = [token for token in added if token not in own]
    if errors := vocabulary_errors(tokenizer, model, path, added):
        raise ConfigError(errors)


def model_of(path: str) -> ModelConfig:
    """Returns the config of an adapter's backbone, or of a full model in a folder or on the hub, without a run."""
    adapter = Path(path) if (Path(path) / "adapter_config.json").is_file() else None
    config = _guess_model_config(base_name(adapter) if adapter else path)
    return FAMILIES[config.family].of_adapter(config, adapter) if adapter else config


def _guess_model_config(name: str) -> ModelConfig:
    """Returns the config of a model without a run: a diffusers pipeline if it has an index, else a language model."""
    return described_pipeline(name) or described_language_model(name)
