"""Initial adapters that took part of W with them: W ← W − s·B₀·A₀, kept in `start/` of a run.

PiSSA, OLoRA, CorDA and LoRA-GA begin from such an adapter, so that the model computes what it did. Subtracted again
from the same bytes, it gives a resumed run, or an evaluation of a checkpoint, the backbone that was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

MOVED = "moved.json"  # in a start folder: W has lost what the initial adapter holds


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Names and modules of the LoRA layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def load_start(model: PeftModel, folder: Path) -> None:
    """Give a PEFT model's adapter the values of a start folder."""
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


@torch.no_grad()
def move_weights(model: nn.Module) -> None:
    """W ← round(W − s·B·A) in every LoRA layer, the difference made in FP32."""
    for _, layer in lora_layers(model):
        base = layer.get_base_layer()
        moved = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        moved = moved.t() if isinstance(base, Conv1D) else moved
        base.weight.data = (base.weight.float() - moved).to(base.weight.dtype)


def move_as_started(backbone: nn.Module, folder: Path) -> None:
    """Subtract a run's start from an untouched backbone: what that run's checkpoints were trained on."""
    adapted = PeftModel.from_pretrained(backbone, str(folder))
    move_weights(adapted)
    adapted.unload()


def start_of_checkpoint(folder: Path) -> Path | None:
    """The start folder that a checkpoint's adapter needs subtracted, None where it fits the untouched backbone."""
    start = folder.parent / "start"
    return start if folder.name.startswith("checkpoint-") and (start / MOVED).is_file() else None
