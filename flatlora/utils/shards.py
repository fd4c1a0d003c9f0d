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
    return (weight._local_tensor if isinstance(weight, DTensor) else weight).detach()


def first_row(weight: DTensor) -> int:
    """Index in the whole tensor of the first row of `share`."""
    mesh, rows = weight.device_mesh, weight.shape[0]
    return min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))


def device_of(weight: torch.Tensor) -> torch.device:
    """The device of passes that read a weight: FSDP2 gathers a sharded one there, also from shares on the host."""
    if not isinstance(weight, DTensor):
        return weight.device
    device, kind = weight._local_tensor.device, weight.device_mesh.device_type
    return device if device.type == kind else torch.device(kind, torch.cuda.current_device())


def gathering_device(model: nn.Module) -> torch.device | None:
    """Where FSDP2 gathers the weights of a model; None if they are not sharded."""
    return next((device_of(parameter) for parameter in model.parameters() if is_sharded(parameter)), None)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor on its `device_of`, which all processes must do together; any other tensor as it is."""
    if not isinstance(weight, DTensor):
        return weight.detach()
    rows, layout = share(weight).to(device_of(weight)), {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(rows, weight.device_mesh, weight.placements, run_check=False, **layout).full_tensor()


def move_to_host(model: nn.Module) -> None:
    """Moves the shares of sharded weights from GPUs to pinned memory of the host, and frees what they took.

    FSDP2's offloading expects them there in the first forward.
    """
    for parameter in model.parameters():
        if is_sharded(parameter) and parameter.is_cuda:
            rows = torch.empty_like(share(parameter), device="cpu", pin_memory=True).copy_(share(parameter))
            moved = DTensor(rows, parameter._spec, requires_grad=False)  # from_local would move them to the GPU again
            torch.utils.swap_tensors(parameter, nn.Parameter(moved, requires_grad=False))
    torch.cuda.empty_cache()


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
