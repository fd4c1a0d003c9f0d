"""Initial adapters whose product was subtracted from the backbone, W ← W − s·B₀·A₀; saved in `start/` of a run.

PiSSA, OLoRA, CorDA and LoRA-GA start from such an adapter, so that the initial model computes the same function as the
backbone. A resumed run and an evaluation of a checkpoint subtract it again from the same bytes and get the same W.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_json
from flatlora.utils.precision import stored_dtype
from flatlora.utils.records import read_record
from flatlora.utils.shards import whole, write_weight

MOVED = "moved.json"  # in start/: the adapter was subtracted from W; in a checkpoint: hash of its start/
ADAPTER = "adapter_model.safetensors"


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yields the names and modules of the LoRA layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def load_adapter(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Loads saved weights into an existing adapter of a PEFT model, and changes nothing else."""
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)


@torch.no_grad()
def move_weights(model: nn.Module) -> None:
    """Sets W ← round(W − s·B·A) in every LoRA layer; the difference is computed in FP32.

    If weights are sharded, all processes must call this together.
    """
    for _, layer in lora_layers(model):
        base = layer.get_base_layer()
        moved = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        moved = moved.t() if isinstance(base, Conv1D) else moved
        rounded = (whole(base.weight).float() - moved).to(stored_dtype(base.weight))
        write_weight(base, rounded.to(base.weight.dtype))


def subtract_initial_adapter(backbone: nn.Module, folder: Path) -> None:
    """Subtracts the initial adapter in `folder` from an unmodified backbone, as before the run's training."""
    adapted = PeftModel.from_pretrained(backbone, str(folder))
    move_weights(adapted)
    adapted.unload()


def mark_checkpoint(folder: Path, start: Path) -> None:
    """Records in a checkpoint which initial adapter must be subtracted; writes nothing if the run subtracted none."""
    if (start / MOVED).is_file():
        write_json(folder / MOVED, {"start_sha256": _sha256(start), "settings": _settings(start)})


def start_of_checkpoint(folder: Path) -> Path | None:
    """Returns the folder of the initial adapter to subtract for a checkpoint; None if its adapter fits W itself.

    Raises:
        ConfigError: the folder is not beside the checkpoint, or its content has changed.
    """
    if not (folder / MOVED).is_file():
        return None
    start = folder.resolve().parent / "start"
    wanted = json.loads((folder / MOVED).read_text())
    if problem := _start_problem(start, wanted):
        raise ConfigError(
            [
                f"The adapter in {folder} fits the backbone less the start of its run, and that is not in {start} "
                f"({problem}): keep checkpoints beside their run's start/, or score the run's adapter/, which fits the "
                "whole one."
            ]
        )
    return start


def _start_problem(start: Path, wanted: Mapping[str, Any]) -> str | None:
    if missing := [name for name in (MOVED, ADAPTER) if not (start / name).is_file()]:
        return f"{missing[0]} is missing"
    if _sha256(start) != wanted.get("start_sha256"):
        return f"{ADAPTER} is another"
    if wanted.get("settings", _settings(start)) != _settings(start):  # earlier versions saved none
        return "adapter_config.json is another"
    return None


def _sha256(start: Path) -> str:
    return hashlib.sha256((start / ADAPTER).read_bytes()).hexdigest()


def _settings(start: Path) -> dict[str, Any] | None:
    """Returns the settings that determine s·B·A besides the factors; None for a broken file.

    Other keys are not compared: PEFT rewrites them when training ends.
    """
    try:
        config = read_record(start / "adapter_config.json") or {}
    except ConfigError:
        return None
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    targets = config.get("target_modules")
    return {key: config.get(key) for key in keys} | {
        "targets": sorted(targets) if isinstance(targets, list) else targets
    }
