"""Memory of a training step on a GPU, computed without one: the step runs on tensors that have no data.

Weights and activations are torch's fake tensors, and every operation tells which storages begin and cease to exist. So
the peak is that of the code that a run executes, whatever its architecture. Kernels that only run on a GPU (Liger's
norms, gated activations and rotary embeddings, the head's cross entropy) are replaced by functions that keep and
allocate the same tensors.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.activations import QuickGELUActivation

from flatlora.fused import cross_entropy
from flatlora.fused.acceleration import GraphedMicroStep, leave_out_mask
from flatlora.fused.lora_linear import fuse, recompute_norm
from flatlora.fused.packing import attends_to_all_before
from flatlora.perturb.layers import find_lora_layers


class StepMemory(NamedTuple):
    """Bytes on a GPU at the peak of a step, by kind, and the floating-point operations of a micro-step.

    Attributes:
        backbone: frozen weights.
        trained: trained parameters in FP32, their gradients and the optimizer's moments.
        activations: all else that a micro-step allocates.
        copy, recompute: what these modes of Flat-LoRA add.
        flops: of a micro-step.
        start: bytes before the first step, if weights leave the GPU then; else 0.
    """

    backbone: int
    trained: int
    activations: int
    copy: int
    recompute: int
    flops: int
    start: int = 0

    def shared(self, processes: int, gathered: int, *, offload: bool = False) -> StepMemory:
        """The memory of each of several processes that share the frozen weights.

        Args:
            gathered: bytes of the whole weights that each holds at the peak.
            offload: whether the shares are moved to the host after they were loaded onto the GPU.
        """
        share, copy = (-(-size // processes) for size in (self.backbone, self.copy))
        kept = gathered if offload else share + gathered
        return self._replace(backbone=kept, copy=copy, start=share if offload else 0)

    def peak(self, mode: str | None = None) -> int:
        """Bytes in a mode of Flat-LoRA; None or "inplace": without a second set of weights."""
        more = {"copy": self.copy, "recompute": self.recompute}.get(mode, 0)
        return self.backbone + self.trained + self.activations + more


def step_memory(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    kernels: bool,
    checkpointing: bool = False,
    moment_bytes: int = 4,
) -> StepMemory:
    """Returns the memory of a step with one micro-batch; changes the model, which is of no use afterwards.

    Args:
        model: a model with its adapter, on the meta device; parameters that require gradients are trained.
        inputs: keyword arguments of its forward; only shapes and dtypes matter.
        dtype: of the frozen weights.
        autocast: dtype of the products; None: that of the weights.
        kernels: whether the fast paths of `flatlora.fused` take part.
        checkpointing: whether activations are recomputed layer by layer.
        moment_bytes: size of an element of the optimizer's two moments.
    """
    copy, recompute = _of_perturbation(model, dtype)
    live = _LiveStorages()
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        _give_storages(model, dtype)
        inputs = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in inputs.items()}
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if kernels:
            stack.enter_context(_like_kernels(base))
            fuse(model)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in model.parameters():
            live.add(parameter)
        kept = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        if kernels:
            GraphedMicroStep(lambda batch: model(**batch).loss, model).restart()
        for parameter in trained:
            if not kernels:
                parameter.grad = torch.empty_like(parameter)
            live.add(parameter.grad)
        with live, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**inputs).loss
        with live:
            loss.backward()
    count = sum(p.numel() for p in trained)
    static = kept + 8 * count
    moments = 2 * moment_bytes * count
    activations = live.peak - static
    return StepMemory(kept, 8 * count + moments, activations, copy, recompute, live.flops)


def _of_perturbation(model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the modes copy and recompute add: a second set of the weights, or one layer's; and FP32 row norms."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return 0, 0
    layers = find_lora_layers(model)
    weights = [layer.weight.numel() * dtype.itemsize for layer in layers]
    rows = sum(12 * layer.stored_shape[0] for layer in layers)  # squared norms of W, of W', and c
    return sum(weights) + rows, max(weights) + rows


# The fused layers' products add to their result.
_PRODUCTS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that exist, and the operations of products.

    Attributes:
        now, peak: bytes at this time, and at most.
        flops: floating-point operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (flops_of := _PRODUCTS.get(func._overloadpacket)) is not None:
            self.flops += flops_of(*args, **kwargs, out_val=result)
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.add(each)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)


def _give_storages(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces parameters and buffers by fake ones on the CPU; trained parameters are FP32."""
    replaced: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                kind = torch.float32 if parameter.requires_grad else dtype
                fresh = torch.empty(parameter.shape, dtype=kind if parameter.is_floating_point() else parameter.dtype)
                replaced[id(parameter)] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


# --- stand-ins for kernels of a GPU

# Model types of which Liger replaces norms, gated activations and rotary embeddings.
_OF_LIGER = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "smollm3",
    "olmo2",
)


@contextlib.contextmanager
def _like_kernels(base: nn.Module) -> Iterator[None]:
    """Lets a model allocate what it does with the kernels of `acceleration.accelerate`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(cross_entropy, "_on_cpu", _head_on_gpu))
        modeling = sys.modules[type(base).__module__]
        for module in base.modules():
            if isinstance(module, QuickGELUActivation):
                module.forward = functools.partial(_elementwise, in_place=False)
        if getattr(getattr(base, "config", None), "model_type", None) in _OF_LIGER:
            for name, module in base.named_modules():
                kind = type(module).__name__
                if kind.endswith("RMSNorm"):
                    module.forward = functools.partial(_elementwise, in_place=True)
                elif kind.endswith("MLP") and hasattr(module, "gate_proj"):
                    module.forward = functools.partial(_gated, module)
                if name.endswith(".post_attention_layernorm"):
                    recompute_norm(module)
            if hasattr(modeling, "apply_rotary_pos_emb"):
                stack.enter_context(_replaced(modeling, "apply_rotary_pos_emb", _rotated_in_place))
        leave_out_mask(base)
        if _has_plain_head(base):
            base.forward = cross_entropy.forward_without_logits(base)
        yield


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _has_plain_head(base: nn.Module) -> bool:
    """As `cross_entropy.has_frozen_linear_head`, without a trial, which needs weights."""
    head = getattr(base, "lm_head", None)
    plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    return plain and attends_to_all_before(base) and getattr(base.config, "final_logit_softcapping", None) is None


def _elementwise(x: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    return _Elementwise.apply(x, in_place)


class _Elementwise(torch.autograd.Function):
    """Keeps x, as Liger's norms and `quick_gelu` do; the gradient of a norm overwrites that of y."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, in_place: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.in_place = in_place
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad if ctx.in_place else torch.empty_like(grad), None


def _gated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x)))


class _Gate(torch.autograd.Function):
    """Keeps both inputs; their gradients overwrite them."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


def _rotated_in_place(query: torch.Tensor, key: torch.Tensor, *others: Any, **more: Any) -> tuple[torch.Tensor, ...]:
    return query, key


def _head_on_gpu(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The products of `cross_entropy._on_gpu`; its kernel overwrites the logits."""
    grad_hidden = torch.empty_like(hidden, dtype=weight.dtype)
    for start in range(0, labels.shape[0], cross_entropy._GPU_ROWS):
        rows = slice(start, start + cross_entropy._GPU_ROWS)
        logits = hidden[rows].to(weight.dtype) @ weight.t()
        torch.mm(logits, weight, out=grad_hidden[rows])
    return torch.zeros(()), grad_hidden
