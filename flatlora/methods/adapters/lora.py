"""LoRA (ICLR 2022): y = W x + s·B·A x, s = α/r, A Kaiming-uniform, B zero; W frozen.

Built with PEFT, so that checkpoints are plain PEFT. Deviation: A and B are FP32 for every dtype of the backbone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft import PeftConfig as AdapterConfig
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flatlora.config.experiment import Experiment
from flatlora.config.sections import PeftConfig
from flatlora.config.settings import setting
from flatlora.config.types import FolderPath
from flatlora.methods.base import ADAPTERS, AdapterMethod, Start
from flatlora.models.fit import is_text_classifier
from flatlora.models.initial_adapters import add_whole_layers, load_initial_adapter
from flatlora.utils.errors import ConfigError, SettingError, nearest
from flatlora.utils.shards import device_of, gathering_device

_EXCLUDED = ("lm_head", "embed_tokens", "classifier", "score")  # as in the published find_all_linear_modules
# Names of attention's projections in different models.
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")  # with the key
_QUERY_VALUE = ("q_proj", "v_proj", "q", "v", "query", "value", "query_proj", "value_proj", *_FUSED)
_ATTENTION = (
    *(*_QUERY_VALUE, "k_proj", "k", "key", "key_proj", "o_proj", "out_proj", "o"),
    *("to_q", "to_k", "to_v", "to_out.0"),
)


class LowRankConfig(PeftConfig):
    """Keys of every method that trains two factors of rank r in each layer."""

    lora_r: int | None = setting(8, ge=1, le=2**16, remedy="8 and 16 are the paper's ranks")
    lora_relative_r: float | None = setting(None, gt=0, le=1, remedy="it is a share of the hidden size")
    lora_dropout: float = setting(0.0, ge=0, lt=1, remedy="it is a share, 0 is none")
    # all: linear layers; all_conv: convolutions too; a list may name both kinds.
    target_modules: Literal["all", "all_conv", "attention", "qv"] | list[str] = setting(
        "all", remedy="all, all_conv, attention, qv or a list of module names"
    )
    # Run, checkpoint, PEFT adapter or hub id whose tensors are the initial ones.
    init_from: FolderPath | None = setting(None, identity="changed", remedy="null starts from the method's own factors")

    def rule_errors(self) -> list[SettingError]:
        errors = []
        if (self.lora_r is None) == (self.lora_relative_r is None):
            remedy = "set one of them" if self.lora_r is None else "set the other to null"
            errors.append(
                SettingError(
                    ("lora_r", "lora_relative_r"),
                    f"Invalid peft.lora_r={self.lora_r} with peft.lora_relative_r={self.lora_relative_r}: exactly one "
                    f"of them sets the rank; {remedy}.",
                )
            )
        if not self.target_modules:
            errors.append(
                SettingError(
                    ("target_modules",),
                    "Invalid peft.target_modules=[]: nothing would be trained; name modules, or use all or qv.",
                )
            )
        return errors


class LoraMethodConfig(LowRankConfig):
    lora_alpha: float = setting(16.0, gt=0, le=1e6, remedy="16 is the paper's")


class LowRank(AdapterMethod):
    """Base class of methods that train two factors of rank r in each layer, with an adapter of PEFT."""

    Config = LowRankConfig
    takes_convolutions: ClassVar[bool] = True  # False if PEFT's code or the method only supports matrices
    own_start: ClassVar[str | None] = None  # why it cannot start from a saved adapter

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        yield from super().errors(experiment)
        peft = experiment.peft
        if peft.init_from is None:
            return
        if experiment.model.head == "linear":
            yield SettingError(
                ("peft.init_from", "model.head"),
                f"Invalid peft.init_from={peft.init_from} with model.head=linear: a trained head belongs to the "
                "classes of its own run; use model.head=text, or leave the key out.",
            )
        if experiment.model.traits.classifies:
            yield SettingError(
                ("peft.init_from", "model.family"),
                f"Invalid peft.init_from={peft.init_from} with model={experiment.model.name} "
                f"({experiment.model.family}): a trained head belongs to the classes of its own run; leave the key "
                "out.",
            )
        if self.own_start:
            yield SettingError(
                ("peft", "peft.method", "peft.init_from"),
                f"Invalid peft.init_from={peft.init_from} with peft={peft.name}: {self.own_start}; use peft=lora, "
                "which goes on with a saved adapter's factors, or leave the key out.",
            )

    def check(self, skeleton: nn.Module, config: LowRankConfig) -> None:
        targets = find_targets(skeleton, config.target_modules)
        convolutions = [name for name in targets if isinstance(skeleton.get_submodule(name), nn.Conv2d)]
        if convolutions and not self.takes_convolutions:
            raise ConfigError(
                [
                    f"Invalid peft.target_modules={config.target_modules} with peft={config.name}: {convolutions[0]} "
                    f"and {len(convolutions) - 1} more are convolutions, but this method only supports linear layers; "
                    "name linear layers, or use peft=lora, rslora, lora_plus or dora."
                ]
            )
        for part in getattr(skeleton, "parts", ()):
            if not any(name.startswith(f"{part}.") for name in targets):
                raise ConfigError(
                    [
                        f"Invalid peft.target_modules={config.target_modules}: no layer of the {part} is among them, "
                        "but model.train_text_encoders=true trains both encoders; use "
                        "peft.target_modules=attention or all, or name layers of each."
                    ]
                )
        if self.needs_dense:
            validate_not_quantized(skeleton, targets, config.name)
        check_rank(skeleton, targets, *self.needed_rank(rank_of(skeleton, config), config))

    def needed_rank(self, rank: int, config: LowRankConfig) -> tuple[int, str]:
        """The number of directions of a layer that the method needs, and the reason for messages."""
        return rank, f"{rank_setting(config)}: it needs {rank} directions of a layer"

    def apply(self, model: nn.Module, config: LowRankConfig, start: Start) -> nn.Module:
        if start.init_from is not None:
            add_whole_layers(model, start.init_from)
        self.check(model, config)
        with seeded(start.seed, model):  # A depends only on the seed, not on earlier draws
            adapted = get_peft_model(model, self.peft_config(model, config))
        device = gathering_device(model)  # PEFT has placed the factors beside weights, whose shares may be on the host
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device, torch.float32)
        if start.init_from is not None:
            load_initial_adapter(adapted, start.init_from)
        return adapted

    def peft_config(self, model: nn.Module, config: LowRankConfig) -> AdapterConfig:
        """PEFT's config of the adapter."""
        raise NotImplementedError

    def settings(self, model: nn.Module, config: LowRankConfig) -> dict[str, Any]:
        """Keyword arguments that PEFT's config of every method has."""
        return {
            "task_type": _task_of(model),
            "modules_to_save": getattr(model, "trained_modules", None),  # such as a trained head
            "r": rank_of(model, config),
            "target_modules": _shortest_suffixes(model, find_targets(model, config.target_modules)),
        }


@ADAPTERS.register("lora")
class Lora(LowRank):
    Config = LoraMethodConfig
    not_sharded = None

    def peft_config(self, model: nn.Module, config: LoraMethodConfig) -> LoraConfig:
        """PEFT's config; variants of LoRA override `settings` or this method."""
        return LoraConfig(**self.settings(model, config))

    def settings(self, model: nn.Module, config: LoraMethodConfig) -> dict[str, Any]:
        """Keyword arguments of PEFT's config."""
        return super().settings(model, config) | {
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "fan_in_fan_out": is_transposed(model, config),
        }


def validate_not_quantized(model: nn.Module, targets: list[str], name: str) -> None:
    """Check that all weights are floating point; of a model without weights, that its config.json says nothing else.

    Raises:
        ConfigError: with the reason, such as the first layer whose weight is quantized.
    """
    quantized = [target for target in targets if not model.get_submodule(target).weight.is_floating_point()]
    if quantized:
        reason = f"{quantized[0]} is {model.get_submodule(quantized[0]).weight.dtype}"
    elif getattr(getattr(model, "config", None), "quantization_config", None):
        reason = "its config.json has a quantization_config"
    else:
        return
    raise ConfigError(
        [
            f"Invalid peft={name} on a quantized backbone ({reason}): this method computes with W, or moves a part of "
            "it into the adapter, and the rest must be stored exactly; load the backbone unquantized, or use peft=lora."
        ]
    )


def is_transposed(model: nn.Module, config: LowRankConfig) -> bool:
    """Whether all adapted layers store their weights transposed, as GPT-2's Conv1D does."""
    targets = find_targets(model, config.target_modules)
    return {isinstance(model.get_submodule(name), Conv1D) for name in targets} == {True}


def validate_not_transposed(model: nn.Module, config: LowRankConfig, method: str, remedy: str) -> None:
    """Check that no adapted layer stores its weight transposed, as GPT-2's Conv1D does.

    Raises:
        ConfigError: with the first layer that does; `method` and `remedy` are for the message.
    """
    targets = find_targets(model, config.target_modules)
    transposed = [name for name in targets if isinstance(model.get_submodule(name), Conv1D)]
    if transposed:
        raise ConfigError(
            [
                f"Invalid peft={config.name} with {transposed[0]}: {method} does not support weights that are stored "
                f"transposed (Conv1D); {remedy}."
            ]
        )


def _task_of(model: nn.Module) -> str | None:
    """PEFT's task type of a model of texts; None for other models, for which PEFT has none."""
    if not isinstance(model, PreTrainedModel) or reads_images(model):
        return None
    if is_text_classifier(model):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def reads_images(model: nn.Module) -> bool:
    """Whether a model's inputs are images."""
    return getattr(model, "main_input_name", None) == "pixel_values"


@contextlib.contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Seed the global generators of the host and of the model's devices, and restore them afterwards."""
    devices = {device_of(parameter) for parameter in model.parameters()}
    with torch.random.fork_rng(devices=sorted((each for each in devices if each.type == "cuda"), key=str)):
        torch.manual_seed(seed)
        yield


def find_targets(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """Full names of the layers that `wanted` selects in a model.

    Args:
        wanted: "all" (linear layers), "all_conv" (linear layers and convolutions), "attention", "qv", or suffixes of
            module names, of either kind.

    Raises:
        ConfigError: an entry of `wanted` matches no layer; the message has the nearest module name.
    """
    trained = tuple(f"{name}." for name in getattr(model, "trained_modules", None) or ())  # whole, without an adapter
    linear = [
        name
        for name, module in model.named_modules()
        if _is_adaptable(module, convolutions=wanted != "all")
        and name.rpartition(".")[2] not in _EXCLUDED
        and not name.startswith(trained)
    ]
    if wanted in ("all", "all_conv"):
        _validate_not_fused(model, wanted)
        suffixes: tuple[str, ...] = tuple({name.rpartition(".")[2] for name in linear})
    else:
        suffixes = (
            {"qv": _QUERY_VALUE, "attention": _ATTENTION}.get(wanted) if isinstance(wanted, str) else tuple(wanted)
        )
    matches = {suffix: [n for n in linear if n == suffix or n.endswith(f".{suffix}")] for suffix in suffixes}
    unmatched = [suffix for suffix in suffixes if not matches[suffix]] if isinstance(wanted, list) else []
    targets = sorted({name for names in matches.values() for name in names}, key=linear.index)
    if unmatched or not targets:
        known = sorted({name.rpartition(".")[2] for name in linear})
        missing = ", ".join(unmatched) or wanted
        near = nearest(unmatched[0], known) if unmatched else None
        hint = f"did you mean {near}? " if near else ""
        message = (
            f"Invalid peft.target_modules={wanted}: {missing} matches no layer of {type(model).__name__} that supports "
            f"an adapter; {hint}Such layers here: {', '.join(known)}."
        )
        raise ConfigError([message])
    return targets


def _validate_not_fused(model: nn.Module, wanted: str) -> None:
    """Check that no layer has the weights of several matrices in one tensor, as experts have: no adapter is put there.

    Raises:
        ConfigError: with the first of them, and the choices that leave them out by name.
    """
    fused = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd)
    ]
    if fused:
        raise ConfigError(
            [
                f"Invalid peft.target_modules={wanted} with {type(model).__name__}: {fused[0]} and {len(fused) - 1} "
                "more hold the weights of all experts in one tensor each, for which there is no adapter, so they would "
                "be left out; choose layers by name, such as peft.target_modules=attention or [q_proj,v_proj]."
            ]
        )


def _is_adaptable(module: nn.Module, *, convolutions: bool) -> bool:
    """Whether an adapter supports the module: linear layers, and convolutions without groups and dilation."""
    if isinstance(module, nn.Conv2d):
        return convolutions and module.groups == 1 and module.dilation == (1, 1)
    return isinstance(module, nn.Linear | Conv1D)


def _shortest_suffixes(model: nn.Module, targets: list[str]) -> list[str]:
    """Targets for PEFT: only the last part of a name if it matches nothing else, which keeps the config short."""
    wanted, result = set(targets), []
    for suffix in sorted({name.rpartition(".")[2] for name in targets}):
        same_name = {name for name, _ in model.named_modules() if name == suffix or name.endswith(f".{suffix}")}
        result += [suffix] if same_name <= wanted else sorted(same_name & wanted)
    return result


def rank_of(model: nn.Module, config: LowRankConfig) -> int:
    """r: `lora_r`, or `lora_relative_r` as a share of the model's hidden size."""
    if config.lora_r is not None:
        return config.lora_r
    hidden_size = _hidden_size(model)
    if hidden_size is None:
        raise ConfigError(
            [
                f"Invalid {rank_setting(config)} with {type(model).__name__}: it has no hidden size, since its layers "
                "have different widths; set peft.lora_r and peft.lora_relative_r=null."
            ]
        )
    return max(1, int(config.lora_relative_r * hidden_size))


def _hidden_size(model: nn.Module) -> int | None:
    described = getattr(model, "config", None)
    return getattr(described, "hidden_size", None) or getattr(described, "d_model", None)


def rank_setting(config: LowRankConfig) -> str:
    """The setting that determines the rank, as an override."""
    if config.lora_r is not None:
        return f"peft.lora_r={config.lora_r}"
    return f"peft.lora_relative_r={config.lora_relative_r}"


def _smaller_side(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)  # not from the weight, whose shape may be packed
    rows, *columns = layer.weight.shape
    return min(rows, math.prod(columns))


def check_rank(model: nn.Module, targets: list[str], needed: int, reason: str) -> None:
    """Check that no layer's smaller side is below the needed rank.

    Raises:
        ConfigError: with the layer's name and size.
    """
    sizes = {name: _smaller_side(model.get_submodule(name)) for name in targets}
    smallest = min(sizes, key=sizes.get)
    if needed > sizes[smallest]:
        raise ConfigError(
            [
                f"Invalid {reason}, but {smallest} has {sizes[smallest]}; lower it, or leave that layer out of "
                "peft.target_modules."
            ]
        )
