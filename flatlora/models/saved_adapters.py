"""Saved PEFT adapters: reads and checks their files, and loads them onto a backbone, complete or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import pickle
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import nn

from flatlora.models.family import FAMILIES
from flatlora.models.sources import in_short, not_finite
from flatlora.perturb.layers import is_adapters
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic
from flatlora.utils.plain_files import irregular_files, read_plain
from flatlora.utils.time_limit import time_limit


def check_adapter(folder: Path) -> None:
    """Checks an adapter's folder: files, PEFT type, and sizes in adapter_config.json.

    Raises:
        ConfigError: weights are missing, a size is invalid, this version of PEFT does not know the type, or the base's
            weights were changed in a way that cannot be repeated.
    """
    errors = []
    if not any(folder.glob("adapter_model.*")):
        errors.append(f"Missing file {folder}/adapter_model.safetensors: copy the adapter's folder whole.")
    kind = adapter_config(folder).get("peft_type")
    if kind not in list(PeftType):
        errors.append(
            f"Invalid peft_type {kind} in {folder}/adapter_config.json: PEFT {importlib.metadata.version('peft')} does "
            "not know it; install the version that saved the adapter, or copy its folder whole."
        )
    if irregular := irregular_files(folder):
        errors.append(f"Invalid adapter {folder}: not all in it are files: {in_short(irregular)}; copy it again.")
    if adapter_config(folder).get("init_lora_weights") == "lora_ga":  # PEFT would load it onto the base as it is
        errors.append(
            f"Invalid init_lora_weights=lora_ga in {folder}/adapter_config.json: PEFT moved a part of the base's "
            "weights into the adapter by a gradient that it did not save, so the base that the adapter fits is "
            "unknown; save it with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER)."
        )
    if not errors:
        errors += _number_errors(folder)
    if errors:
        raise ConfigError(errors)


def sort_names(folder: Path) -> None:
    """Sorts the module names in adapter_config.json, which PEFT writes in another order in each process, some twice.

    Does nothing for a folder without an adapter.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_bytes())
    for key in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = sorted(set(config[key]))
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True))


_MOST_RANK = 1024  # larger ranks and sizes must occur in the shapes of tensors
_NO_SIZE = re.compile(r"alpha|seed|prng|step|warmup|token_id|layers_to_transform")  # integers that are no sizes


def _number_errors(folder: Path) -> list[str]:
    """Returns errors for ranks and alphas in adapter_config.json that do not fit its tensors.

    They are checked first, because PEFT allocates layers of the sizes in the file.
    """
    config = adapter_config(folder)
    if config.get("peft_type") not in _NUMBERS:
        return _size_errors(folder, config)
    of_ranks, of_alphas = _NUMBERS[config["peft_type"]]
    ranks, alphas = _numbers(config, of_ranks), _numbers(config, of_alphas)
    wrong = {name: value for name, value in ranks.items() if type(value) is not int or value < 1}
    if large := {name: value for name, value in ranks.items() if name not in wrong and value > _MOST_RANK}:
        most = max([0, *(len(tensor) for name, tensor in saved_tensors(folder).items() if _LEFT_FACTOR.search(name))])
        wrong |= {name: value for name, value in large.items() if value > most}
    wrong |= {
        name: value for name, value in alphas.items() if type(value) not in (int, float) or not math.isfinite(value)
    }
    return [
        f"Invalid {_short(name)}={_short(value)} in {folder}/adapter_config.json: ranks are whole numbers from 1 that "
        f"its tensors have, and alphas are numbers; {_COPY}."
        for name, value in wrong.items()
    ]


_LEFT_FACTOR = re.compile(r"\.(lora|hira|delora)_A")

# PEFT type → {key of a rank: PEFT's default}, and the same for scalings; of a pattern's key the values are meant.
_NUMBERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    PeftType.LORA: ({"r": 8, "rank_pattern": {}}, {"lora_alpha": 8, "alpha_pattern": {}}),
    PeftType.ADALORA: ({"init_r": 12}, {"lora_alpha": 8}),
    PeftType.HIRA: ({"r": 32, "rank_pattern": {}}, {}),
    PeftType.DELORA: ({"r": 8, "rank_pattern": {}}, {"delora_lambda": 15, "lambda_pattern": {}}),
}


def _numbers(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """The values of these keys of adapter_config.json, those of a pattern by pattern.layer."""
    values: dict[str, Any] = {}
    for key, default in keys.items():
        if isinstance(default, dict):
            given = config.get(key) or {}
            named = given.items() if isinstance(given, dict) else [("?", given)]
            values |= {f"{key}.{layer}": value for layer, value in named}
        else:
            values[key] = config.get(key, default)
    return values


def _size_errors(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Same as `_number_errors`, for PEFT types that `_NUMBERS` does not have, whose sizes have many names."""
    sizes = {name: value for name, value in config.items() if not _NO_SIZE.search(name)}
    for name, value in config.items():
        if isinstance(value, dict):
            sizes |= {f"{name}.{key}": entry for key, entry in value.items() if not _NO_SIZE.search(name)}
    large = {name: size for name, size in sizes.items() if type(size) in (int, float) and not size <= _MOST_RANK}
    most = max([0, *(side for tensor in saved_tensors(folder).values() for side in tensor.shape)]) if large else 0
    return [
        f"Invalid {_short(name)}={_short(size)} in {folder}/adapter_config.json: a size above {_MOST_RANK:,} is one of "
        f"its tensors' too, and their largest is {most:,}; {_COPY}."
        for name, size in large.items()
        if not size <= most
    ]


_COPY = "copy the adapter's folder whole"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def base_name(adapter: Path) -> str:
    """Returns the base model's name in a saved adapter's config.

    Raises:
        ConfigError: there is none, or the file is broken.
    """
    name = adapter_config(adapter).get("base_model_name_or_path")
    if not (isinstance(name, str) and name):
        raise ConfigError(
            [
                f"Broken file {adapter}/adapter_config.json: base_model_name_or_path is {name}, no base model's name; "
                "copy the adapter's folder whole."
            ]
        )
    return name


_MOST_BYTES = 16 << 20  # maximum size of an adapter_config.json


def adapter_config(adapter: Path) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    Raises:
        ConfigError: the file is broken.
    """
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(read_plain(path, _MOST_BYTES))
        if not isinstance(config, dict):
            raise ValueError("it holds no keys")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"Broken file {path}: {error}; copy the adapter's folder whole."]) from error
    return config


def tensor_names(folder: Path) -> list[str]:
    """Returns the names of a saved adapter's tensors.

    Raises:
        ConfigError: the file is broken.
    """
    return sorted(saved_tensors(folder))


def holds_tensors_of(folder: Path, part: str) -> bool:
    """Whether a saved adapter has tensors for layers of the module `part` of its model."""
    return any(name.startswith(f"base_model.model.{part}.") for name in saved_tensors(folder))


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a saved adapter, each once.

    Raises:
        ConfigError: the file is broken.
    """
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        return {name: tensor for name, tensor in weights.items() if not _is_repeated(name, weights)}
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ConfigError([f"Cannot load {folder}: its weights are broken ({error}); copy it whole."]) from error


def _is_repeated(name: str, names: Container[str]) -> bool:
    """Whether a tensor belongs to a layer that is there under its plain name.

    PEFT writes the parts of its wrapper too for embeddings that were resized and are in modules_to_save.
    """
    plain = re.sub(r"\.(modules_to_save|original_module)(?=\.)", "", name)
    return plain != name and plain in names


def with_adapter(backbone: nn.Module, folder: Path, *, family: str, name: str) -> nn.Module:
    """Loads a saved adapter onto a backbone, its factors in FP32; no tensor may be missing or unexpected.

    Args:
        family: `ModelConfig.family` of the backbone.
        name: name of the backbone in error messages.

    Raises:
        ConfigError: the adapter is for another task, or its tensors do not fit the backbone, its config or each other.
    """
    weights = saved_tensors(folder)
    errors = [*task_errors(folder, family), *embedding_errors(backbone, weights, folder)]
    errors += [f"Invalid adapter {folder}: it has {message}; copy it again." for message in not_finite(weights)]
    if errors:
        raise ConfigError(errors)
    _resize_embeddings(backbone, weights)
    _try_patterns(folder, [name for name, _ in backbone.named_modules()])
    try:
        # Same as PeftModel.from_pretrained, which discards the loading report.
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        adapted = get_peft_model(backbone, config)
        heads = tuple(f"base_model.model.{head}." for head in getattr(backbone, "trained_modules", None) or ())
        for key, parameter in adapted.named_parameters():
            if key.startswith(heads):
                parameter.data = parameter.data.float()  # as it was trained and saved
        mapping = getattr(backbone, "_checkpoint_conversion_mapping", None) or None
        report = adapted.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=mapping)
        # The report omits missing biases. Prompt-learning adapters are loaded by separate code without a report.
        wanted = {} if config.is_prompt_learning else get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ConfigError([_misfit(folder, name, f"{type(error).__name__}: {error}")]) from error
    biases = [key for key in wanted if key.endswith(".bias") and key not in weights]
    left_over = [key for key in report.unexpected_keys if not _is_repeated(key, weights)]
    parts = {"missing": [*report.missing_keys, *biases], "left over": left_over}
    if config.is_prompt_learning:
        parts = {}
    if wrong := [f"{in_short(names)} {what}" for what, names in parts.items() if names]:
        raise ConfigError([_misfit(folder, name, "; ".join(wrong))])
    for key, parameter in adapted.named_parameters():
        if is_adapters(key):
            parameter.data = parameter.data.float()
    return adapted


_PATTERN_SECONDS = 20.0


def _try_patterns(folder: Path, names: Sequence[str]) -> None:
    """Matches all layer names against an adapter's patterns as PEFT does, with a time limit.

    Raises:
        ConfigError: a pattern is no regular expression, or matching takes too long (exponential backtracking).
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        by_pattern = [value for key, value in vars(config).items() if key.endswith("_pattern")]  # of a rank, a scale, …
        patterns = [pattern for value in by_pattern if isinstance(value, dict) for pattern in value]
        feedforward = getattr(config, "feedforward_modules", None)
        has_targets = hasattr(config, "target_modules")
        if has_targets and config.target_modules is None:
            config.target_modules = []  # PEFT has defaults for the model; the other patterns are still used
        with time_limit(_PATTERN_SECONDS):
            for name in names:
                if has_targets:
                    check_target_module_exists(config, name)
                get_pattern_key(patterns, name)
                if isinstance(feedforward, str):
                    re.fullmatch(feedforward, name)
    except TimeoutError as error:
        reason = f"matching them with the names of its layers takes more than {_PATTERN_SECONDS:.0f} s"
        raise ConfigError([_bad_patterns(folder, reason)]) from error
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError([_bad_patterns(folder, reason_of(error))]) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            [f"Invalid {folder}/adapter_config.json: PEFT cannot read it ({reason_of(error)}); {_COPY}."]
        ) from error


def _bad_patterns(folder: Path, reason: str) -> str:
    return (
        f"Invalid patterns in {folder}/adapter_config.json (target_modules, exclude_modules, rank_pattern, "
        f"alpha_pattern and the like): {reason}; write names of modules instead."
    )


def _misfit(folder: Path, name: str, reason: str) -> str:
    return (
        f"Invalid adapter {folder}: its tensors do not make the whole adapter that its adapter_config.json describes "
        f"on {name}: {reason}. What is missing would be random or left out; copy the adapter's folder whole, "
        "or name the model that it was trained on."
    )


def task_errors(folder: Path, family: str) -> list[str]:
    task = adapter_config(folder).get("task_type")
    known = FAMILIES[family].peft_task or "FEATURE_EXTRACTION"
    if task in (None, known, "FEATURE_EXTRACTION"):  # the last is for a model without a head, and fits every family
        return []
    return [
        f"Invalid task_type {task} in {folder}/adapter_config.json: the model is loaded as {family}, whose head is "
        f"another; name an adapter that was trained for it ({known})."
    ]


def _embedding_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns {name: token embeddings or output head}."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    names = {module: name for name, module in model.named_modules()}
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return {names[layer]: layer for layer in layers if layer is not None}


def saved_embeddings(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns {name: its tensor in the adapter's file} of the token embeddings and output head that are in it."""
    found = {}
    for name in _embedding_layers(model):
        keys = (f"base_model.model.{name}.weight", f"base_model.model.{name}.base_layer.weight")
        if key := next((key for key in keys if key in weights), None):
            found[name] = weights[key]
    return found


def _embedding_rows(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int | None]]:
    """Returns {name: (rows, rows of its tensor in the adapter's file or None)} of token embeddings and output head.

    A head that is tied to the embeddings has no entry of its own.
    """
    saved, rows, inner = saved_embeddings(model, weights), {}, None
    for name, layer in _embedding_layers(model).items():
        if inner is None or layer.weight is not inner.weight:
            rows[name] = len(layer.weight), len(saved[name]) if name in saved else None
        inner = inner or layer
    return rows


def embedding_errors(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> list[str]:
    """Returns errors for embeddings that were resized in training and not all saved with the adapter."""
    rows = _embedding_rows(model, weights)
    wanted = sorted({saved for own, saved in rows.values() if saved not in (None, own)})
    lacking = [name for name, (own, saved) in rows.items() if wanted and saved != wanted[0] and own != wanted[0]]
    if len(wanted) < 2 and not lacking:
        return []
    return [
        f"Invalid adapter {folder}: it was trained with embeddings of {wanted[0]} tokens, and holds no such tensor for "
        f"{', '.join(lacking) or 'all layers'}, whose new rows would be random; save it with "
        "save_pretrained(..., save_embedding_layers=True), or with both layers in modules_to_save."
    ]


def load_embeddings(model: nn.Module, weights: Mapping[str, torch.Tensor], trained: Sequence[str]) -> None:
    """Gives a backbone the embeddings and the output head in an adapter's file, with its number of rows.

    Args:
        trained: `modules_to_save` of the adapter, which has copies of them; the backbone only gets their added rows.
    """
    rows = {name: len(layer.weight) for name, layer in _embedding_layers(model).items()}
    _resize_embeddings(model, weights)
    for name, tensor in saved_embeddings(model, weights).items():
        first = rows[name] if name.rpartition(".")[2] in {other.rpartition(".")[2] for other in trained} else 0
        model.get_submodule(name).weight.data[first:] = tensor[first:]


def _resize_embeddings(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Resizes a backbone's embeddings to the number of rows in an adapter's file."""
    for own, saved in _embedding_rows(model, weights).values():
        if saved not in (None, own):
            model.resize_token_embeddings(saved, mean_resizing=False)  # every row is read from the file afterwards
            model.requires_grad_(False)
            return
