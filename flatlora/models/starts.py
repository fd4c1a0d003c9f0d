"""Initial adapters that took part of W with them: W ← W − s·B₀·A₀, kept in `start/` of a run.

PiSSA, OLoRA, CorDA and LoRA-GA begin from such an adapter, so that the model computes what it did. Subtracted again
from the same bytes, it gives a resumed run, or an evaluation of a checkpoint, the backbone that was trained on.
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

MOVED = "moved.json"  # in a start folder: W has lost what the initial adapter holds; in a checkpoint: which start
ADAPTER = "adapter_model.safetensors"


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Names and modules of the LoRA layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def load_adapter(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Give an adapter that a PEFT model has the values of a saved one, and change nothing else."""
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=name)


@torch.no_grad()
def move_weights(model: nn.Module) -> None:
    """W ← round(W − s·B·A) in every LoRA layer, the difference made in FP32."""
    for _, layer in lora_layers(model):
        base = layer.get_base_layer()
        moved = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        moved = moved.t() if isinstance(base, Conv1D) else moved
        rounded = (base.weight.float() - moved).to(stored_dtype(base.weight))
        base.weight.data = rounded.to(base.weight.dtype)


def subtract_initial_adapter(backbone: nn.Module, folder: Path) -> None:
    """Subtract a run's start from an untouched backbone: what that run's checkpoints were trained on."""
    adapted = PeftModel.from_pretrained(backbone, str(folder))
    move_weights(adapted)
    adapted.unload()


def mark_checkpoint(folder: Path, start: Path) -> None:
    """Note in a checkpoint that its adapter fits the backbone less the run's start; nothing where it fits as it is."""
    if (start / MOVED).is_file():
        write_json(folder / MOVED, {"start_sha256": _sha256(start), "settings": _settings(start)})


def start_of_checkpoint(folder: Path) -> Path | None:
    """The start folder that a checkpoint's adapter needs subtracted, None where it fits the untouched backbone.

    Raises:
        ConfigError: the start is not beside the checkpoint, or is another one.
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
    if wanted.get("settings", _settings(start)) != _settings(start):  # of before they were kept: any
        return "adapter_config.json is another"
    return None


def _sha256(start: Path) -> str:
    return hashlib.sha256((start / ADAPTER).read_bytes()).hexdigest()


def _settings(start: Path) -> dict[str, Any] | None:
    """What decides s·B·A besides the factors; None for a broken file. PEFT writes its other keys anew at the end."""
    try:
        found = read_record(start / "adapter_config.json") or {}
    except ConfigError:
        return None
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    targets = found.get("target_modules")
    return {key: found.get(key) for key in keys} | {
        "targets": sorted(targets) if isinstance(targets, list) else targets
    }
