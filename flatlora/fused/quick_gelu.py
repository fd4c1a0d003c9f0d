"""QuickGELU, x · σ(1.702 x), CLIP's activation, as one Triton kernel forward and one backward.

transformers computes it in three operations, whose backward are five more; each reads and writes the widest activation
of a block. Here sums are in FP32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import QuickGELUActivation

from flatlora.noise import triton_kernels
from flatlora.noise.triton_kernels import jit, on_device

if triton_kernels.HAS_TRITON:
    import triton
    import triton.language as tl

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LAUNCH = {"BLOCK": 1024, "num_warps": 4}


def fuse_quick_gelu(model: nn.Module) -> int:
    """Replaces the forward of every QuickGELU of a model; returns their number."""
    activations = [module for module in model.modules() if isinstance(module, QuickGELUActivation)]
    for activation in activations:
        activation.forward = quick_gelu
    return len(activations)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x · σ(1.702 x), in x's dtype; by transformers' operations where the kernel does not run."""
    if x.dtype not in _DTYPES or not triton_kernels.available(x.device):
        return quick_gelu_reference(x)
    return _QuickGELU.apply(x)


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """`quick_gelu` in torch's operations."""
    return x * torch.sigmoid(1.702 * x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _launch(_quick_gelu_kernel, x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return _launch(_quick_gelu_backward_kernel, x, grad.contiguous())


def _launch(kernel, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    with on_device(x.device):
        kernel[(triton.cdiv(x.numel(), _LAUNCH["BLOCK"]),)](x, *others, out, x.numel(), **_LAUNCH)
    return out


@jit
def _quick_gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count).to(tl.float32)
    tl.store(out + i, value * tl.sigmoid(1.702 * value), mask=i < count)


@jit
def _quick_gelu_backward_kernel(x, grad, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count).to(tl.float32)
    slope = tl.sigmoid(1.702 * value) * (1 + 1.702 * value * tl.sigmoid(-1.702 * value))  # 1 − σ would cancel
    tl.store(out + i, tl.load(grad + i, mask=i < count).to(tl.float32) * slope, mask=i < count)


def every_launch(capability: tuple[int, int]) -> Iterator[tuple[Callable[..., Any], dict[str, Any], dict[str, str]]]:
    """Each kernel, the constants that it is launched with, and the types of its other arguments."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("x", "grad", "out"), f"*{dtype}") | {"count": "i32"}
        yield _quick_gelu_kernel, _LAUNCH, types
        yield _quick_gelu_backward_kernel, _LAUNCH, types
