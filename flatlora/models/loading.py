"""What the rest of the suite asks of models, whatever their family: backbones, adapters on them, and their identity."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils.hub import has_file

from flatlora.config.sections import ModelConfig
from flatlora.models.clip import Classes
from flatlora.models.families.sdxl import described_pipeline
from flatlora.models.family import FAMILIES, LoadOptions
from flatlora.models.fit import embedding_rows, vocabulary_errors
from flatlora.models.hashes import weights_sha256
from flatlora.models.language import described_language_model
from flatlora.models.processors import load_tokenizer
from flatlora.models.saved_adapters import base_name, check_adapter, with_adapter
from flatlora.models.sources import hub_errors, source_and_options
from flatlora.models.starts import start_of_checkpoint, subtract_initial_adapter
from flatlora.utils.errors import ConfigError


def skeleton(config: ModelConfig) -> nn.Module:
    """The architecture without weights (meta device), to check what does not need them."""
    return FAMILIES[config.family].skeleton(config)


def load_processor(config: ModelConfig) -> Any:
    """What turns rows into tensors: a tokenizer or an image processor; None of a diffusion model.

    Raises:
        ConfigError: it cannot be loaded; with the remedy.
    """
    return FAMILIES[config.family].processor(config)


def check_weights(config: ModelConfig, device: torch.device) -> None:
    """See that `load_backbone` will find weights and its attention kernels; nothing is loaded.

    Raises:
        ConfigError: weights or kernels are missing; with the ways out.
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
    config: ModelConfig, device: torch.device, classes: Classes | None = None, autocast: str = "auto"
) -> nn.Module:
    """Frozen backbone on `device`, its weights those of `config.dtype`.

    On a CPU that is slow in that dtype they are held in FP32; see `flatlora.utils.precision`.

    Args:
        classes: what a CLIP model tells apart.
        autocast: the setting of that name, auto, bfloat16 or none.

    Raises:
        ConfigError: the weights cannot be had; with the ways out.
    """
    return FAMILIES[config.family].load_backbone(config, LoadOptions(device, classes, autocast=autocast))


def backbone_state(config: ModelConfig) -> str:
    """What changes whenever the function of the frozen backbone does: the hashes of a folder's weight files and
    settings (`folder_state`), or the hub's commit.

    Settings of embedded weights are the suite's own, and do not count. Of a pipeline with another VAE, that one's
    stands behind a "+".

    Raises:
        ConfigError: there is no such model; with the ways out.
    """
    return FAMILIES[config.family].state(config)


def weights_identity(
    path: str, config: ModelConfig | None, classes: Classes | None = None, base: str | None = None
) -> dict[str, str]:
    """What decides a model's answers besides how it is asked, for the record of them.

    Args:
        path: as in `load_for_inference`.
        config: the backbone of the run that `path` belongs to; None for a model that no run describes.
        classes: what a CLIP model tells apart, in which words.
        base: the backbone's state where it is known, for hashing it reads all of its files.

    Raises:
        ConfigError: as `backbone_state`.
    """
    folder = Path(path)
    identity = {"weights": weights_sha256(folder) if folder.is_dir() else backbone_state(model_of(path))}
    if (folder / "adapter_config.json").is_file() or classes is not None:
        identity["base"] = base or backbone_state(config or model_of(path))
    if classes is not None:
        identity["classes"] = hashlib.sha256(json.dumps(classes).encode()).hexdigest()
    return identity


def choose_device(wanted: str) -> torch.device:
    """cuda:<local rank> or cpu.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["Invalid trainer.device=cuda: torch sees no GPU here; use trainer=cpu or trainer=auto."])
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def complete_adapter(config: ModelConfig, folder: Path) -> None:
    """Write beside a saved adapter what users of that kind of model load it by, if not by PEFT."""
    FAMILIES[config.family].complete_adapter(folder)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """{"trainable", "total"} numbers of parameters; tied ones counted once."""
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
    """Model of a folder or hub id, in evaluation mode: a PEFT adapter on its base, or a whole model.

    Args:
        path: adapter folder (with adapter_config.json), model folder, or hub id.
        model_config: the backbone of the run that `path` belongs to; None takes it from the adapter's own config.
        classes: what a CLIP model tells apart.
        dtype: of the weights, instead of the model's own.
        autocast: the setting of that name.

    Returns:
        model, its tokenizer or image processor (None of a diffusion model), and {"base", "adapter"} for the record.

    Raises:
        ConfigError: weights cannot be had; with the ways out.
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
    """Check a language model that another program loads as `load_for_inference` would; none of its weights is kept.

    Args:
        adapter: folder of a PEFT adapter on it.
        tokenizer: folder of the adapter's tokenizer; None: the model's own.

    Raises:
        ConfigError: the model's or the adapter's tensors are not all there, are left over, of another shape or not
            finite (of the adapter), or the tokenizer has tokens that the model has no embedding for.
    """
    model = FAMILIES[config.family].outline(config)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # as is meant here
            model = with_adapter(model, adapter, family=config.family, name=config.hub_id)
    processor = load_tokenizer(config.at(str(tokenizer)) if tokenizer else config)
    _check_vocabulary(processor, model, str(adapter or config.hub_id), config if adapter is not None else None)


def saved_processor(config: ModelConfig, adapter: Path) -> Path | None:
    """Where the processor was saved that an adapter was trained with: beside it, or in its training's folder."""
    family = FAMILIES[config.family]
    return next((folder for folder in (adapter, adapter.parent) if family.holds_processor(folder)), None)


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, path: str, base: ModelConfig | None
) -> None:
    """
    Args:
        base: the backbone of an adapter: tokens beyond the embeddings that its own tokenizer has too are in no text.

    Raises:
        ConfigError: the tokenizer gives tokens that the model has no embedding for.
    """
    rows = embedding_rows(model)
    added = [token for token, number in tokenizer.get_added_vocab().items() if number >= rows] if base else []
    if added:
        with contextlib.suppress(ConfigError):  # a backbone that has none
            own = load_tokenizer(base).get_vocab()
            added = [token for token in added if token not in own]
    if errors := vocabulary_errors(tokenizer, model, path, added):
        raise ConfigError(errors)


def model_of(path: str) -> ModelConfig:
    """The backbone of an adapter's folder, or the whole model of a folder or hub id, which no run describes."""
    adapter = Path(path) if (Path(path) / "adapter_config.json").is_file() else None
    config = _guess_model_config(base_name(adapter) if adapter else path)
    return FAMILIES[config.family].of_adapter(config, adapter) if adapter else config


def _guess_model_config(name: str) -> ModelConfig:
    """Config of a model that no run describes: a pipeline says so in its index, any other is a language model."""
    return described_pipeline(name) or described_language_model(name)
