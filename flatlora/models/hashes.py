"""SHA-256 of weights: of a model in memory, of an adapter's and of a backbone's files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

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
