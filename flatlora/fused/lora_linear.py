"""A LoRA layer as one autograd function: base product, weight noise and low-rank branch together.

    y = x (W + ε)ᵀ + b + s · D(x) Aᵀ Bᵀ        D: dropout

PEFT's forward saves an FP32 copy of x for each layer and makes three extra passes over y. Here the branch is written
first, and the base product accumulates into it. x is saved once, in its own dtype, for all layers that read it (query,
key and value; gate and up), and their gradients are summed in one buffer. A and B are FP32, and their products are in
the dtype of the base product: the same arithmetic as PEFT's under autocast, with fewer roundings.

`fuse` only changes how layers are computed; parameters, names and checkpoints stay PEFT's.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import layer as peft_lora
from torch import nn

from flatlora.perturb.forward import PerturbedForward, Reading, as_own_tensor

logger = logging.getLogger(__name__)

# Names of sibling layers that read the same input, in the order in which their parent calls them.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)
_CROSS_ATTENTION = ".attn2"  # in diffusers' blocks: keys and values read the prompt


def fuse(model: nn.Module) -> int:
    """Replaces the forward of every plain LoRA layer of a PEFT model by the fused one; returns the number of layers.

    Other layers (DoRA and further variants, LoRA on embeddings and convolutions, quantized weights) keep PEFT's forward
    and are counted in the log. Calls that the fused forward does not support (disabled, merged or several adapters,
    `adapter_names`) use PEFT's forward too.
    """
    fused: dict[str, FusedForward] = {}
    others: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, peft_lora.LoraLayer):
            if reason := _reason_against(module):
                others[reason] += 1
            else:
                fused[name] = module.forward = FusedForward(module)
    for names in _families(fused):
        group = LayerGroup([fused[name] for name in names])
        for name in names:
            fused[name].group = group
    if others:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in others.items())
        logger.warning("%d LoRA layers keep PEFT's forward: %s.", others.total(), reasons)
    return len(fused)


def groups_of(model: nn.Module) -> list[LayerGroup]:
    """The distinct groups of all fused layers of a model."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return list(dict.fromkeys(forward.group for forward in forwards if isinstance(forward, FusedForward)))


def fused_throughout(model: nn.Module) -> bool:
    """Whether all trained parameters are factors of fused layers."""
    members = [member for group in groups_of(model) for member in group.members if member.covers()]
    factors = {id(factor) for member in members for factor in member.factors}
    return bool(members) and all(id(p) in factors for p in model.parameters() if p.requires_grad)


def unfuse(model: nn.Module) -> None:
    """Restore PEFT's forward in all layers."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.forward


def _reason_against(module: peft_lora.LoraLayer) -> str | None:
    base = module.get_base_layer()
    if type(module) is not peft_lora.Linear or type(base) is not nn.Linear:
        return f"{type(base).__name__} inside {type(module).__name__}"
    if module.lora_variant:
        return "a variant of LoRA"
    if any(getattr(module, "lora_bias", {}).values()):
        return "lora_bias"
    if "forward" in module.__dict__:
        return "a forward that another library wrapped"
    return None


def _families(fused: Mapping[str, FusedForward]) -> list[list[str]]:
    """Groups of names of layers that read the same input."""
    by_parent: dict[str, dict[str, str]] = {}
    for name in fused:
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = name
    families = []
    for parent, leaves in by_parent.items():
        if "EncDec" in parent or "cross" in parent.lower():
            continue  # keys and values come from the encoder
        for family in SHARED_INPUT:
            family = family[1:] if parent.endswith(_CROSS_ATTENTION) else family
            siblings = [leaves[leaf] for leaf in family if leaf in leaves]
            widths = {fused[name].base.in_features for name in siblings}  # RWKV's "value" reads what its "key" computes
            if len(siblings) > 1 and len(widths) == 1:
                families.append(siblings)
    return families


class FusedForward:
    """Replaces the forward of one `peft.tuners.lora.layer.Linear`."""

    def __init__(self, module: peft_lora.Linear) -> None:
        self.module, self.base = module, module.get_base_layer()
        self.plain = type(module).forward.__get__(module)
        self.group = LayerGroup([self])

    def __call__(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args or kwargs or not self.covers():
            return self.plain(x, *args, **kwargs)
        return self.group.call(self, x)

    def covers(self) -> bool:
        """Whether the layer now has exactly one plain adapter on a frozen floating-point weight.

        False if another library wrapped or hooked the base layer, which the fused forward does not call.
        """
        module, own = self.module, self.base.__dict__
        forward = own.get("forward")
        return (
            not module.disable_adapters
            and not module.merged
            and len(module.active_adapters) == 1
            and module.active_adapters[0] in module.lora_A
            and (forward is None or (isinstance(forward, PerturbedForward) and forward.replaced is None))
            and not own["_forward_hooks"]
            and not own["_forward_pre_hooks"]
            and not self.base.weight.requires_grad
            and (self.base.bias is None or not self.base.bias.requires_grad)
        )

    @property
    def adapter(self) -> str:
        return self.module.active_adapters[0]

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        adapter = self.adapter
        return self.module.lora_A[adapter].weight, self.module.lora_B[adapter].weight

    @property
    def scaling(self) -> float:
        return self.module.scaling[self.adapter]

    @property
    def dropout(self) -> float:
        """Probability of the dropout before A; 0 outside of training."""
        dropout = self.module.lora_dropout[self.adapter]
        return dropout.p if self.module.training and isinstance(dropout, nn.Dropout) else 0.0

    def reading(self) -> Reading | None:
        """The `Reading` of W + ε; None while the layer reads W."""
        forward = self.base.__dict__.get("forward")
        return forward.reading() if forward is not None else None


class LayerGroup:
    """Layers that read the same input: the call of the first computes all, and the other calls return its results.

    If `managed` is True, a training loop calls `refresh` before each optimizer step and keeps `.grad` allocated. Then
    the factors are cast to the products' dtype once per step, and the products accumulate their gradients into `.grad`
    in FP32; hooks of the parameters (DDP's, ZeRO's) do not run.
    """

    def __init__(self, members: Sequence[FusedForward]) -> None:
        self.members = list(members)
        self.managed = False
        self._x: torch.Tensor | None = None
        self._ready: dict[FusedForward, torch.Tensor] = {}
        self._casts: dict[torch.dtype, _Cast] = {}

    @torch.compiler.disable  # the result depends on earlier calls, so torch.compile must break its graph here
    def call(self, member: FusedForward, x: torch.Tensor) -> torch.Tensor:
        if self._x is x and member in self._ready:
            y = self._ready.pop(member)
            if not self._ready:
                self._x = None
            return y
        self._ready, self._x = {}, None
        if member is not self.members[0] or not all(other.covers() and not other.dropout for other in self.members):
            return self._compute(x, [member])[0]
        y, *others = self._compute(x, self.members)
        if others:
            self._ready, self._x = dict(zip(self.members[1:], others, strict=True)), x
        return y

    def casts(self) -> list[_Cast]:
        """The casts that are kept from step to step, one per dtype."""
        return list(self._casts.values())

    def _compute(self, x: torch.Tensor, members: Sequence[FusedForward]) -> tuple[torch.Tensor, ...]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        managed = self.managed and members[0].module.training
        kept = managed and len(members) == len(self.members)
        cast = self._casts.get(dtype) if kept else None
        if cast is None:
            cast = _Cast(members, dtype)
            if kept:
                self._casts[dtype] = cast
        branches = [
            _Branch(member.base, member.reading(), member.scaling, B)
            for member, B in zip(members, cast.Bs, strict=True)
        ]
        factors = [factor for member in members for factor in member.factors]
        trained = [factor for factor in factors if factor.requires_grad]
        adds = managed and bool(trained) and all(factor.grad is not None for factor in trained)
        dropout = members[0].dropout if len(members) == 1 else 0.0
        call = _Call(branches, factors, cast.A, dtype, dropout, adds)
        with torch.autocast(device, enabled=False):  # all casts below are explicit
            return _FusedLora.apply(x, call, *([_ANCHOR] if adds else factors))


# Passed to autograd in place of the factors, whose hooks would otherwise run, with or without a gradient. It is on the
# CPU, so that no stream waits for its gradient.
_ANCHOR = torch.zeros((), requires_grad=True)


class _Cast:
    """A of all layers, stacked (Σr × n), and s·B of each, in the dtype of the products; updated in place."""

    def __init__(self, members: Sequence[FusedForward], dtype: torch.dtype) -> None:
        self.members = list(members)
        factors = [member.factors for member in members]
        rank, columns = sum(A.shape[0] for A, _ in factors), factors[0][0].shape[1]
        self.A = torch.empty(rank, columns, dtype=dtype, device=factors[0][0].device)
        self.Bs = [torch.empty_like(B, dtype=dtype, requires_grad=False) for _, B in factors]
        self.parts = self.A.split([A.shape[0] for A, _ in factors])  # of each layer, (r × n)
        refresh([self])


@torch.no_grad()
def refresh(casts: Sequence[_Cast]) -> None:
    """Cast the factors of all layers again, after an optimizer step: a few kernels for all of them, not two a layer."""
    if not casts:
        return
    members = [member for cast in casts for member in cast.members]
    As, Bs = zip(*(member.factors for member in members), strict=True)
    torch._foreach_copy_([part for cast in casts for part in cast.parts], As)
    scaled = torch._foreach_mul(Bs, [member.scaling for member in members])
    torch._foreach_copy_([B for cast in casts for B in cast.Bs], scaled)


@torch.no_grad()
def refresh_reference(casts: Sequence[_Cast]) -> None:
    """`refresh`, one factor after the other."""
    for cast in casts:
        for member, A_cast, B_cast in zip(cast.members, cast.parts, cast.Bs, strict=True):
            A, B = member.factors
            A_cast.copy_(A)
            torch.mul(B, member.scaling, out=B_cast)


class _Branch(NamedTuple):
    """One layer's part of a fused call."""

    base: nn.Linear
    reading: Reading | None  # None if W itself is read
    scaling: float
    B: torch.Tensor  # s·B, in the products' dtype

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.base.weight if self.reading is None else self.reading.weight()).to(dtype)


class _Call(NamedTuple):
    branches: list[_Branch]
    factors: list[torch.Tensor]  # A, B of each branch
    A: torch.Tensor  # of all branches, stacked, in the products' dtype
    dtype: torch.dtype
    dropout: float
    adds: bool  # whether the factors' gradients are added to their `.grad`


def recompute_norm(norm: nn.Module) -> None:
    """Let the fused layers after a norm save its input, which the norm saves too, and recompute its output in backward.

    This costs a second forward of the norm and saves one activation of the size of the residual stream.
    """
    original = norm.forward

    @functools.wraps(original)
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = original(x)
        if norm.training and torch.is_grad_enabled():
            y._made_by, y._made_from = original, x
        return y

    norm.forward = forward


class _FusedLora(torch.autograd.Function):
    """k layers on one x. Saved for backward: x (or the tensor that it is recomputed from) and h = x Aᵀ (tokens × Σr).

    Only the gradient of A needs x, so x is not saved if every A is frozen (LoRA-FA).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, call: _Call, *tracked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).to(call.dtype)
        dropped, mask = torch.native_dropout(rows, call.dropout, True) if call.dropout else (rows, None)
        h, ys = dropped @ call.A.t(), []
        for branch, own in zip(call.branches, h.split(_ranks(call.factors), dim=1), strict=True):
            bias = branch.base.bias
            y = own @ branch.B.t() if bias is None else torch.addmm(bias.to(call.dtype), own, branch.B.t())
            y.addmm_(rows, branch.weight(call.dtype).t())  # the base product accumulates into the branch
            ys.append(as_own_tensor(y, (*x.shape[:-1], -1)))
        ctx.make, kept = getattr(x, "_made_by", None), getattr(x, "_made_from", x)
        if not any(A.requires_grad for A in call.factors[0::2]):
            ctx.make = kept = None
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        ctx.save_for_backward(kept, h, mask, call.A, *(branch.B for branch in call.branches))
        ctx.call = call
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grad_ys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, mask, A, *Bs = ctx.saved_tensors
        call, ranks = ctx.call, _ranks(ctx.call.factors)
        if ctx.make is not None:
            x = ctx.make(x.detach())
        grads = [grad.reshape(-1, grad.shape[-1]).to(call.dtype) for grad in grad_ys]
        grad_h = torch.empty_like(h)  # tokens × Σr, including s
        if x is not None:
            kept = x.reshape(-1, x.shape[-1]).to(call.dtype)
            kept = kept if mask is None else kept * mask / (1 - call.dropout)
        As, grad_factors = call.factors[0::2], []
        stacked = _stacked([A.grad for A in As]) if call.adds and all(A.requires_grad for A in As) else None
        columns = zip(h.split(ranks, dim=1), grad_h.split(ranks, dim=1), strict=True)
        for k, (grad, B, (own, grad_own)) in enumerate(zip(grads, Bs, columns, strict=True)):
            A_k, B_k = call.factors[2 * k : 2 * k + 2]
            torch.mm(grad, B, out=grad_own)
            A_grad = B_grad = None
            if A_k.requires_grad and stacked is None:
                A_grad = _product(grad_own.t(), kept, 1.0, A_k, call.adds)
            if B_k.requires_grad:
                B_grad = _product(grad.t(), own, call.branches[k].scaling, B_k, call.adds)
            grad_factors += [A_grad, B_grad]
        if stacked is not None:
            _add_product(grad_h.t(), kept, 1.0, stacked)  # which reads x once for all layers
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_h @ A
            if mask is not None:
                grad_x *= mask / (1 - call.dropout)
            for branch, grad in zip(call.branches, grads, strict=True):
                grad_x.addmm_(grad, branch.weight(call.dtype))
            grad_x = grad_x.view(ctx.input_shape).to(ctx.input_dtype)
        return grad_x, None, *([None] if call.adds else grad_factors)


def _ranks(factors: Sequence[torch.Tensor]) -> list[int]:
    """r of each layer, from the list A, B, A, B, ..."""
    return [A.shape[0] for A in factors[0::2]]


def _product(
    left: torch.Tensor, right: torch.Tensor, scaling: float, factor: torch.Tensor, adds: bool
) -> torch.Tensor | None:
    """scaling · left · right, the gradient of a factor; None if it has been added to `factor.grad`."""
    if adds:
        _add_product(left, right, scaling, factor.grad)
        return None
    product = left @ right
    return (product if scaling == 1.0 else product * scaling).to(factor.dtype)


def _add_product(left: torch.Tensor, right: torch.Tensor, scaling: float, total: torch.Tensor) -> None:
    if not left.is_cuda:
        total.add_(left @ right, alpha=scaling)
    elif left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scaling)
    else:  # accumulated in FP32 by the product itself
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scaling, out=total)


def _stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One matrix of the rows of all, as a view; None unless each follows the one before in the same storage."""
    first, place = matrices[0], matrices[0].storage_offset()
    for matrix in matrices:
        same = matrix.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not (same and matrix.is_contiguous() and matrix.storage_offset() == place):
            return None
        place += matrix.numel()
    return first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())
