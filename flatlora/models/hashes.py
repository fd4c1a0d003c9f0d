"""SHA-256 of weights: of a model in memory, of an adapter's and of a backbone's files; and of a backbone's settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatlora.perturb.layers import plain_name
from flatlora.utils.plain_files import file_sha256
from flatlora.utils.precision import as_stored

_WEIGHT_FILES = ("*.safetensors", "*.bin")
_PART_FILES = (*_WEIGHT_FILES, "*.json", "*.txt", "*.model")  # of a pipeline, whose parts' settings decide as much


def backbone_sha256(model: nn.Module) -> str | None:
    """SHA-256 over name, dtype, shape and bytes of every frozen parameter, in name order; None when there is none.

    Names are those of the model without PEFT, and an adapter's frozen half (LoRA-FA's A) is left out, so the hash does
    not depend on the adapter. A weight that is held in a wider tensor is hashed in the dtype it is stored in, so that
    the hash is the same on every machine.
    """
    parameters = ((plain_name(name), p) for name, p in model.named_parameters() if not p.requires_grad)
    frozen = {name: p for name, p in parameters if ".lora_" not in name and ".ranknum." not in name}
    return _tensors_sha256(frozen) if frozen else None


def trainable_sha256(model: nn.Module) -> str:
    """SHA-256 over the trained parameters, as `backbone_sha256`."""
    return _tensors_sha256({plain_name(name): p for name, p in model.named_parameters() if p.requires_grad})


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the weight files of an adapter or model folder, in name order.

    Of a pipeline of diffusers, and of one of its parts, settings and vocabularies count too: the scale of a VAE or the
    number of timesteps stands in no weight.
    """
    if (folder / "model_index.json").is_file():  # one folder a part
        patterns = ["model_index.json", *(f"*/{pattern}" for pattern in _PART_FILES)]
    else:
        patterns = _WEIGHT_FILES
    return _files_sha256(folder, patterns)


def weights_state(folder: Path) -> list[tuple[str | int, ...]]:
    """What changes whenever a file of weights or settings of a folder, or of its parts, is written or replaced."""
    paths = {path for pattern in _PART_FILES for deep in ("", "*/") for path in folder.glob(deep + pattern)}
    stats = [(str(path), path.stat()) for path in sorted(paths)]
    return [(name, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in stats]


def folder_state(folder: Path) -> str:
    """ "sha256:" and the hash of a model folder's weights; where it has a config.json, "/config:" and its settings'."""
    state, config = f"sha256:{weights_sha256(folder)}", folder / "config.json"
    return f"{state}{_SETTINGS}{settings_sha256(json.loads(config.read_bytes()))}" if config.is_file() else state


_SETTINGS = "/config:"


def differing_part(recorded: str, here: str) -> str | None:
    """In what two states of a backbone differ: "weights" or "settings"; None where both are of one model.

    Args:
        recorded, here: as `flatlora.models.loading.backbone_state` gives them; one of an earlier version has no
            settings, and is of any.
    """
    weights, _, settings = recorded.partition(_SETTINGS)
    own_weights, _, own_settings = here.partition(_SETTINGS)
    if weights != own_weights:
        return "weights"
    return "settings" if settings and own_settings and settings != own_settings else None


PUT_BACK = {"weights": "those weights", "settings": "the config.json of then"}
"""What to put back where `differing_part` names a part."""


def short_state(state: str) -> str:
    """A backbone's state for the user, its hashes cut."""
    return _HASH.sub(lambda match: f"{match[0][:12]}…", state).replace("+", " + ")


_HASH = re.compile(r"[0-9a-f]{40,}")


def settings_sha256(config: Any) -> str:
    """SHA-256 over those settings of a model's config.json that decide what its weights compute, such as rope_theta.

    A setting of null counts as one that is not there.
    """
    return hashlib.sha256(json.dumps(_of_the_function(config), sort_keys=True).encode()).hexdigest()


_NOT_OF_THE_FUNCTION = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}
_NOT_OF_THE_FUNCTION |= {"_attn_implementation_autoset", "output_attentions", "output_hidden_states", "use_cache"}


def _of_the_function(config: Any) -> Any:
    if isinstance(config, list):
        return [_of_the_function(value) for value in config]
    if not isinstance(config, dict):
        return config
    kept = {key: value for key, value in config.items() if value is not None and key not in _NOT_OF_THE_FUNCTION}
    return {key: _of_the_function(value) for key, value in kept.items()}


def part_sha256(folder: Path) -> str:
    """As `weights_sha256`, of one part of a pipeline that has a folder of its own."""
    return _files_sha256(folder, _PART_FILES)


def _files_sha256(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.relative_to(folder)}|{file_sha256(path)}|".encode())
    return digest.hexdigest()


def _tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = as_stored(tensors[name])
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for piece in _byte_pieces(tensor):
            digest.update(piece)
    return digest.hexdigest()


def _byte_pieces(tensor: torch.Tensor, elements: int = 1 << 26) -> Iterable[memoryview]:
    flat = tensor.contiguous().view(-1)
    for piece in flat.split(elements) if flat.numel() else ():
        yield memoryview(piece.cpu().view(torch.uint8).numpy())
