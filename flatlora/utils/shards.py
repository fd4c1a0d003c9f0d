"""Weights that PyTorch's FSDP2 has split among the processes by rows, and modules that it gathers them for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether FSDP2 holds equal shares of a tensor's rows in the processes (the last ones may have fewer or none)."""
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        return False
    return set(weight.device_mesh.mesh_dim_names or ()) <= {"fsdp"}  # transformers' name; fully_shard itself gives none


def share(weight: torch.Tensor) -> torch.Tensor:
    """This process's rows of a sharded tensor, which they share memory with; any other tensor as it is."""
    return weight.detach()._local_tensor if isinstance(weight, DTensor) else weight.detach()


def first_row(weight: DTensor) -> int:
    """Index in the whole tensor of the first row of `share`."""
    mesh, rows = weight.device_mesh, weight.shape[0]
    return min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor, which all processes must do together; any other tensor as it is."""
    return weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach()


@contextlib.contextmanager
def holding(module: nn.Module, weight: torch.Tensor | None) -> Iterator[None]:
    """Replaces a module's weight within the block; None keeps its own."""
    parameters, own = module._parameters, module._parameters["weight"]
    if weight is not None:
        parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        parameters["weight"] = own


def write_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Makes `weight` the values of a module's own weight: of a sharded one, this process writes its rows."""
    own = module.weight
    if isinstance(own, DTensor):
        rows = share(own)
        rows.copy_(weight[first_row(own) : first_row(own) + len(rows)])
    else:
        own.data = weight


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without the one that FSDP2 has put in front of it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def call_as_forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `forward` in place of the module's own, with the module's hooks: those of FSDP2 gather its weights.

    Other hooks of the module get the output of `forward` too. Not for several threads.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(*args, **kwargs)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def reshard(model: nn.Module) -> None:
    """Frees the gathered weights that a forward without a backward left: FSDP2 keeps some for the backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
