"""SHA-256 hashes of weights (in memory, and in files of adapters and backbones) and of a backbone's settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flatlora.perturb.layers import is_adapters, plain_name
from flatlora.utils.plain_files import file_sha256
from flatlora.utils.precision import as_stored
from flatlora.utils.shards import is_sharded

_WEIGHT_FILES = ("*.safetensors", "*.bin")
_PART_FILES = (*_WEIGHT_FILES, "*.json", "*.txt", "*.model")  # of a pipeline: settings count too


TENSOR_HASH = "tensors"
"""Name of the definition of `backbone_sha256` and `trainable_sha256`, for run.json.

"tensors": SHA-256 over name, dtype, shape and SHA-256 of the bytes of each tensor, in name order. "stream", of earlier
versions: SHA-256 over name, dtype, shape and bytes, which cannot be computed on several cores.
"""


def backbone_sha256(model: nn.Module, definition: str = TENSOR_HASH) -> str | None:
    """Returns the hash of all frozen parameters by a definition of `TENSOR_HASH`; None without any.

    Names are those without PEFT, and frozen parameters of the adapter (A in LoRA-FA) are left out, so that the hash
    does not depend on the adapter. A weight held in a wider dtype is hashed in its stored dtype, so that the hash is
    the same on every machine. If weights are sharded, all processes must call this together; each gets the hash of the
    whole ones.
    """
    parameters = ((plain_name(name), p) for name, p in model.named_parameters() if not p.requires_grad)
    frozen = {name: p for name, p in parameters if not is_adapters(name)}
    return _DEFINITIONS[definition](frozen) if frozen else None


def trainable_sha256(model: nn.Module, definition: str = TENSOR_HASH) -> str:
    """Returns the hash of the trained parameters, computed as in `backbone_sha256`."""
    return _DEFINITIONS[definition]({plain_name(name): p for name, p in model.named_parameters() if p.requires_grad})


def weights_sha256(folder: Path) -> str:
    """Returns SHA-256 over the weight files of an adapter or model folder, in name order.

    For a pipeline of diffusers, settings and vocabularies are hashed too: the scale of a VAE and the number of
    timesteps are not in the weights.
    """
    if (folder / "model_index.json").is_file():  # one folder per part
        patterns = ["model_index.json", *(f"*/{pattern}" for pattern in _PART_FILES)]
    else:
        patterns = _WEIGHT_FILES
    return _files_sha256(folder, patterns)


def weights_state(folder: Path) -> list[tuple[str | int, ...]]:
    """Returns file stats that change when a weight or settings file of a folder or its parts is written or replaced."""
    paths = {path for pattern in _PART_FILES for deep in ("", "*/") for path in folder.glob(deep + pattern)}
    stats = [(str(path), path.stat()) for path in sorted(paths)]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]


def folder_state(folder: Path) -> str:
    """Returns "sha256:HASH" of a model folder's weights, followed by "/config:HASH" if it has a config.json."""
    state, config = f"sha256:{weights_sha256(folder)}", folder / "config.json"
    return f"{state}{_SETTINGS}{settings_sha256(json.loads(config.read_bytes()))}" if config.is_file() else state


_SETTINGS = "/config:"


def differing_part(recorded: str, here: str) -> str | None:
    """Returns which part of two backbone states differs, "weights" or "settings"; None if they are equal.

    Args:
        recorded, here: from `flatlora.models.loading.backbone_state`. Earlier versions recorded no settings; these are
            not compared then.
    """
    weights, _, settings = recorded.partition(_SETTINGS)
    own_weights, _, own_settings = here.partition(_SETTINGS)
    if weights != own_weights:
        return "weights"
    return "settings" if settings and own_settings and settings != own_settings else None


PUT_BACK = {"weights": "those weights", "settings": "the config.json of then"}
"""What to restore, by the result of `differing_part`."""


def short_state(state: str) -> str:
    """Returns a backbone state with shortened hashes, for messages."""
    return _HASH.sub(lambda match: f"{match[0][:12]}…", state).replace("+", " + ")


_HASH = re.compile(r"[0-9a-f]{40,}")


def settings_sha256(config: Any) -> str:
    """Returns SHA-256 over the settings in a config.json that change what the weights compute, such as rope_theta.

    A setting of null is treated as missing.
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
    """Same as `weights_sha256`, for the folder of one part of a pipeline."""
    return _files_sha256(folder, _PART_FILES)


def _files_sha256(folder: Path, patterns: Iterable[str]) -> str:
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_threads()) as pool:
        for path, sha256 in zip(paths, pool.map(file_sha256, paths), strict=True):
            digest.update(f"{path.relative_to(folder)}|{sha256}|".encode())
    return digest.hexdigest()


def _stream_sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = as_stored(tensors[name])
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for piece in _byte_pieces(tensor):
            digest.update(piece)
    return digest.hexdigest()


def _tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # the threads below copy on the default stream
    sharded = {name for name, tensor in tensors.items() if is_sharded(tensor)}
    processes, own = (dist.get_world_size(), dist.get_rank()) if sharded else (1, 0)
    # Copies that `as_stored` makes, narrow or gathered, are few at a time.
    ahead = min(2 * _threads(), 8) if sharded else 2 * _threads()
    lines: dict[str, Future[str]] = {}
    waiting: deque[Future[str]] = deque()
    with ThreadPoolExecutor(_threads()) as pool:
        for number, name in enumerate(sorted(tensors)):
            tensor = as_stored(tensors[name])  # which all processes gather, and one hashes
            if name in sharded and number % processes != own:
                continue
            if len(waiting) == ahead:
                waiting.popleft().result()
            lines[name] = pool.submit(_line_of, tensor)
            waiting.append(lines[name])
    found = {name: line.result() for name, line in lines.items()}
    if processes > 1:
        others: list[dict[str, str]] = [{}] * processes
        dist.all_gather_object(others, found)
        for other in others:
            found = other | found  # what every process hashes itself stays its own
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}|{found[name]}".encode())
    return digest.hexdigest()


_DEFINITIONS = {"tensors": _tensors_sha256, "stream": _stream_sha256}


def _line_of(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for piece in _byte_pieces(tensor):
        digest.update(piece)
    return f"{tensor.dtype}|{tuple(tensor.shape)}|{digest.hexdigest()}|"


_PIECE = 1 << 24  # bytes that are copied from a GPU at a time
_thread = threading.local()  # `pinned`: the thread's buffer for a copy


def _byte_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes; those on a GPU in one buffer, so that they must be read before the next are taken."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    for piece in flat.split(_PIECE) if flat.numel() else ():
        if flat.is_cuda:
            with torch.cuda.device_of(flat):
                if not hasattr(_thread, "pinned"):
                    _thread.pinned = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
            piece = _thread.pinned[: len(piece)].copy_(piece)
        yield memoryview(piece.cpu().numpy())


def _threads() -> int:
    """Returns this process's share of the cores, at most 16: more do not hash faster than a GPU's memory is copied."""
    return min(16, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
