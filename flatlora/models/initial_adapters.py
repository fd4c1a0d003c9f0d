"""Saved adapters that a run starts from, `peft.init_from`: loaded whole, or refused with the settings that differ."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from torch import nn

from flatlora.models.saved_adapters import (
    adapter_config,
    base_name,
    embedding_errors,
    load_embeddings,
    saved_embeddings,
    saved_tensors,
)
from flatlora.models.sources import in_short, not_finite, shape_text
from flatlora.models.starts import MOVED, load_adapter
from flatlora.utils.errors import ConfigError

_NEUTRAL_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # initializations that leave W as it is


def add_whole_layers(model: nn.Module, folder: Path) -> None:
    """Gives a backbone what a saved adapter has besides factors: its embeddings, and `trained_modules`.

    The embeddings of an adapter are those of added tokens, which stay frozen unless `modules_to_save` has them.

    Raises:
        ConfigError: some of its layers are missing in its file.
    """
    weights, trained = saved_tensors(folder), adapter_config(folder).get("modules_to_save") or []
    errors = embedding_errors(model, weights, folder)
    if not (isinstance(trained, list) and all(isinstance(name, str) for name in trained)):
        errors.append(
            f"Broken file {folder}/adapter_config.json: modules_to_save is no list of names; copy the adapter's folder "
            "whole."
        )
    if errors:
        raise ConfigError(errors)
    load_embeddings(model, weights, trained)
    if trained:
        model.trained_modules = sorted(trained)


def load_initial_adapter(adapted: PeftModel, folder: Path) -> None:
    """Sets the adapter `default` of a PEFT model to a saved one's tensors; embeddings in its file are saved again.

    Raises:
        ConfigError: the saved adapter is another than the one that the model has; see `fit_errors`.
    """
    if errors := fit_errors(adapted, folder, str(folder)):
        raise ConfigError(errors)
    load_adapter(adapted, folder)
    # By itself PEFT compares with the base's config.json, which it may not reach.
    embeddings = bool(_frozen_embeddings(adapted, saved_tensors(folder)))
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=embeddings)


def _frozen_embeddings(adapted: PeftModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Returns {name in the file: shape in the model} of embeddings and output head that are no `modules_to_save`."""
    base, trained = adapted.get_base_model(), adapted.peft_config["default"].modules_to_save or []
    names = [name for name in saved_embeddings(base, weights) if name.rpartition(".")[2] not in trained]
    return {f"base_model.model.{name}.weight": base.get_submodule(name).weight.shape for name in names}


def fit_errors(adapted: PeftModel, folder: Path, source: str) -> list[str]:
    """Returns errors if a saved adapter would not compute the same as the adapter `default` with its tensors.

    Args:
        adapted: the model with the run's adapter; its weights may be on the meta device.
        source: value of peft.init_from, for messages.
    """
    saved, weights = adapter_config(folder), saved_tensors(folder)
    own = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    } | _frozen_embeddings(adapted, weights)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    given = f"Invalid peft.init_from={source}"
    errors = [
        *_start_errors(folder, saved, given),
        *_setting_errors(adapted.peft_config["default"], saved, given, source),
    ]
    errors += _tensor_errors(adapted, own, shapes, given, base_name(folder))
    if not errors and (others := shapes.keys() ^ own.keys()):
        errors.append(f"{given}: {in_short(others)} are missing or left over; copy the adapter's folder whole.")
    elif not errors and (wrong := [name for name, shape in own.items() if shapes[name] != shape]):
        errors.append(f"{given}: {in_short(wrong)} have ranks of their own; name an adapter of one rank.")
    return errors + [f"{given}: it has {message}; copy it again." for message in not_finite(weights)]


def _start_errors(folder: Path, saved: Mapping[str, Any], given: str) -> Iterator[str]:
    """Errors for adapters that fit another W than the backbone's."""
    if (folder / MOVED).is_file():
        yield (
            f"{given}: this checkpoint fits the backbone less the initial adapter of its run; name the finished run, "
            "whose adapter/ fits the whole one."
        )
    elif (start := saved.get("init_lora_weights")) not in _NEUTRAL_STARTS:
        yield (
            f"{given}: init_lora_weights={start} in its adapter_config.json moved a part of the base's weights into "
            "it; save it with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER)."
        )


_SETTINGS = {"r": "peft.lora_r", "lora_alpha": "peft.lora_alpha", "delora_lambda": "peft.delora_lambda"}
# Keys of adapter_config.json that the tensors show, or that do not change what a given adapter computes.
_NOT_COMPARED = {"peft_type", "use_dora", "use_rslora", *_SETTINGS}
_NOT_COMPARED |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"}
_NOT_COMPARED |= {"modules_to_save", "task_type", "auto_mapping", "base_model_name_or_path", "revision"}
_NOT_COMPARED |= {"inference_mode", "peft_version", "lora_dropout", "hira_dropout", "module_dropout"}
_NOT_COMPARED |= {"init_lora_weights", "init_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}
_NOT_COMPARED |= {"runtime_config", "megatron_core"}


def _setting_errors(config: PeftConfig, saved: Mapping[str, Any], given: str, source: str) -> Iterator[str]:
    """Errors for settings in adapter_config.json, with both values."""
    own, saved = config.to_dict(), type(config)().to_dict() | saved
    kind, saved_kind = _kind(own), _kind(saved)
    if kind != saved_kind:
        known = saved_kind in ("lora", "rslora", "dora", "hira", "delora")
        remedy = f"set peft={saved_kind}" if known else "name an adapter of a method that can start from one"
        yield f"{given}: it is an adapter of {saved_kind}, and this run trains one of {kind}; {remedy}."
        return
    for key, setting in _SETTINGS.items():
        if key in own and saved.get(key) != own[key]:
            yield (
                f"Invalid {setting}={own[key]:g} with peft.init_from={source}: that adapter has {key}="
                f"{saved.get(key)}; set {setting}={saved.get(key)}, or name another adapter."
            )
    for key in sorted((own.keys() | saved.keys()) - _NOT_COMPARED):
        if (own.get(key) or None) != (saved.get(key) or None):
            yield (
                f"{given}: {key}={saved.get(key)} in its adapter_config.json changes what it computes, and this run's "
                f"adapter has {key}={own.get(key)}; name an adapter without it."
            )


def _kind(config: Mapping[str, Any]) -> str:
    """The option of `peft` that trains such an adapter, else PEFT's name of its type."""
    variants = [name for name in ("dora", "rslora") if config.get(f"use_{name}")]
    return " and ".join(variants) or PeftType(config["peft_type"]).value.lower()


_FACTOR = re.compile(r"^base_model\.model\.(.+)\.((?:lora|hira|delora)_\w+)(?:\.weight|\.bias)?$")


def _tensor_errors(
    adapted: PeftModel, own: Mapping[str, torch.Size], saved: Mapping[str, torch.Size], given: str, base: str
) -> Iterator[str]:
    """Errors for tensors of other layers, or of another shape apart from the rank."""
    left_over, modules = saved.keys() - own.keys(), dict(adapted.get_base_model().named_modules())
    if whole := [name for name in left_over if not _FACTOR.match(name)]:
        yield (
            f"{given}: it holds whole trained layers, such as resized embeddings or modules_to_save: "
            f"{in_short(whole)}, which this run does not train; merge it into its base with python -m flatlora.export "
            "and --merge DIR, and start from model.hub_id=DIR."
        )
    layers, own_layers = _layers(saved), _layers(own)
    if foreign := [name for name in layers if name not in modules]:
        yield f"{given}: {in_short(foreign)} are no layers of this model; {_name_base(base)}."
    elif layers != own_layers:
        yield (
            f"{given}: that adapter is on {len(layers)} layers ({_kinds(layers)}), and peft.target_modules selects "
            f"{len(own_layers)} ({_kinds(own_layers)}); set peft.target_modules=[{_targets(layers, modules)}]."
        )
    other = [
        f"{name} ({shape_text(shape)} for {shape_text(own[name])})"
        for name, shape in saved.items()
        if name in own and _without_rank(name, shape) != _without_rank(name, own[name])
    ]
    if other:
        yield f"{given}: tensors of another shape than this model's: {in_short(other, shown=2)}; {_name_base(base)}."


def _name_base(base: str) -> str:
    return f"it was trained on {base}: use that model, with the model.* settings of then"


def _layers(names: Mapping[str, torch.Size]) -> set[str]:
    return {match[1] for match in map(_FACTOR.match, names) if match}


def _kinds(layers: set[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers}))


def _targets(layers: set[str], modules: Mapping[str, Any]) -> str:
    """Names for peft.target_modules: last parts that no other layer has, else whole names."""
    kinds = {name.rpartition(".")[2] for name in layers}
    alike = {name for name in modules if name.rpartition(".")[2] in kinds}
    return ",".join(sorted(kinds if alike == layers else layers))


def _without_rank(name: str, shape: torch.Size) -> tuple[int, ...]:
    if re.search(r"(lora|hira|delora)_A", name):
        return tuple(shape[1:])
    return (shape[0], *shape[2:]) if re.search(r"(lora|hira|delora)_B", name) else tuple(shape)
