"""Folders of models for tests: their configs, and copies with other tensors or settings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flatlora.config import ModelConfig

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def model_config(folder: Path | str, **changes: Any) -> ModelConfig:
    settings = {"name": "tiny", "hub_id": str(folder), "family": "causal_lm", "dtype": "float32"}
    return ModelConfig(**settings | changes)


def rewritten(folder: Path, target: Path, change: Callable[[Tensors], Tensors], **described: Any) -> Path:
    """A copy of a model's folder whose tensors are `change(tensors)`, and whose config.json says otherwise in part."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (path,) = target.glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    if described:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | described))
    return target


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}
