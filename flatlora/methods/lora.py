"""LoRA (ICLR 2022): y = W x + s·B·A x, s = α/r, A Kaiming-uniform, B zero; W frozen.

Built with PEFT, so that checkpoints are plain PEFT. Deviation: A and B are FP32 whatever the backbone's dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora.config import ConfigError, PeftConfig, nearest, setting
from flatlora.methods.base import AdapterMethod, Start, register

_EXCLUDED = ("lm_head", "embed_tokens", "classifier", "score")  # as the published find_all_linear_modules leaves out
_QUERY_VALUE = ("q_proj", "v_proj", "q", "v", "query", "value", "c_attn")


class LoraMethodConfig(PeftConfig):
    lora_r: int | None = setting(8, ge=1, remedy="8 and 16 are the paper's ranks")
    lora_relative_r: float | None = setting(None, gt=0, le=1, remedy="it is a share of the hidden size")
    lora_alpha: float = setting(16.0, gt=0)
    lora_dropout: float = setting(0.0, ge=0, lt=1)
    target_modules: Literal["all", "qv"] | list[str] = setting("all", remedy="all, qv or a list of module names")

    def rule_faults(self) -> list[str]:
        faults = []
        if (self.lora_r is None) == (self.lora_relative_r is None):
            remedy = "set one of them" if self.lora_r is None else "set the other to null"
            faults.append(
                f"Invalid peft.lora_r={self.lora_r} with peft.lora_relative_r={self.lora_relative_r}: exactly one of "
                f"them sets the rank; {remedy}."
            )
        if not self.target_modules:
            faults.append("Invalid peft.target_modules=[]: nothing would be trained; name modules, or use all or qv.")
        return faults


@register("lora")
class Lora(AdapterMethod):
    Config = LoraMethodConfig

    def check(self, skeleton: nn.Module, config: LoraMethodConfig) -> None:
        targets = find_targets(skeleton, config.target_modules)
        check_rank(skeleton, targets, *self.needed_rank(rank_of(skeleton, config), config))

    def needed_rank(self, rank: int, config: LoraMethodConfig) -> tuple[int, str]:
        """How many directions of a layer the method needs, its start included; and which setting asks for them."""
        return rank, f"{rank_setting(config)}: it takes {rank} directions of a layer"

    def apply(self, model: nn.Module, config: LoraMethodConfig, start: Start) -> nn.Module:
        self.check(model, config)
        with seeded(start.seed, model):  # A's values depend on the seed alone, not on what ran before
            adapted = get_peft_model(model, self.peft_config(model, config))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted

    def peft_config(self, model: nn.Module, config: LoraMethodConfig) -> LoraConfig:
        """PEFT's own config; variants of LoRA override `settings`, or this."""
        return LoraConfig(**self.settings(model, config))

    def settings(self, model: nn.Module, config: LoraMethodConfig) -> dict[str, Any]:
        """Keywords of PEFT's config."""
        targets = find_targets(model, config.target_modules)
        language = "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
        return {
            "task_type": None if reads_images(model) else language,
            "modules_to_save": getattr(model, "trained_modules", None),  # a head that is trained besides
            "r": rank_of(model, config),
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "target_modules": _shortest_suffixes(model, targets),
            "fan_in_fan_out": {isinstance(model.get_submodule(name), Conv1D) for name in targets} == {True},
        }


def reads_images(model: nn.Module) -> bool:
    """Whether a model's input are pictures."""
    return getattr(model, "main_input_name", None) == "pixel_values"


@contextlib.contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Global generators of the host and of the model's device seeded, and afterwards as they were."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(seed)
        yield


def find_targets(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """Full names of the linear layers that `wanted` (all, qv or module-name suffixes) means in this model.

    Raises:
        ConfigError: an entry of `wanted` matches no linear layer; the nearest module name is given.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in _EXCLUDED
    ]
    if wanted == "all":
        suffixes: tuple[str, ...] = tuple({name.rpartition(".")[2] for name in linear})
    else:
        suffixes = _QUERY_VALUE if wanted == "qv" else tuple(wanted)
    matches = {suffix: [n for n in linear if n == suffix or n.endswith(f".{suffix}")] for suffix in suffixes}
    unmatched = [suffix for suffix in suffixes if not matches[suffix]] if isinstance(wanted, list) else []
    found = sorted({name for names in matches.values() for name in names}, key=linear.index)
    if unmatched or not found:
        known = sorted({name.rpartition(".")[2] for name in linear})
        asked = ", ".join(unmatched) or wanted
        near = nearest(unmatched[0], known) if unmatched else None
        hint = f"did you mean {near}? " if near else ""
        fault = (
            f"Invalid peft.target_modules={wanted}: {asked} matches no linear layer of {type(model).__name__}; "
            f"{hint}Linear layers here: {', '.join(known)}."
        )
        raise ConfigError([fault])
    return found


def _shortest_suffixes(model: nn.Module, targets: list[str]) -> list[str]:
    """Targets as PEFT reads them: bare names where these match nothing else, so that the adapter's config is short."""
    wanted, result = set(targets), []
    for suffix in sorted({name.rpartition(".")[2] for name in targets}):
        same_name = {name for name, _ in model.named_modules() if name == suffix or name.endswith(f".{suffix}")}
        result += [suffix] if same_name <= wanted else sorted(same_name & wanted)
    return result


def rank_of(model: nn.Module, config: LoraMethodConfig) -> int:
    """r: `lora_r`, or `lora_relative_r` as a share of the model's hidden size."""
    if config.lora_r is not None:
        return config.lora_r
    hidden_size = getattr(model.config, "hidden_size", None) or model.config.d_model
    return max(1, int(config.lora_relative_r * hidden_size))


def rank_setting(config: LoraMethodConfig) -> str:
    """The setting that gave the rank, as the user typed it."""
    if config.lora_r is not None:
        return f"peft.lora_r={config.lora_r}"
    return f"peft.lora_relative_r={config.lora_relative_r}"


def _smaller_side(layer: nn.Module) -> int:
    sides = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape
    return min(sides)  # a packed weight has another shape


def check_rank(model: nn.Module, targets: list[str], needed: int, reason: str) -> None:
    """Refuse a rank above the smaller side of a layer.

    Raises:
        ConfigError: with the layer's name and size.
    """
    sizes = {name: _smaller_side(model.get_submodule(name)) for name in targets}
    smallest = min(sizes, key=sizes.get)
    if needed > sizes[smallest]:
        raise ConfigError(
            [
                f"Invalid {reason}, and {smallest} has {sizes[smallest]}; lower it, or leave that layer out of "
                "peft.target_modules."
            ]
        )
