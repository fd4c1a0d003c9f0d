"""A LoRA layer as one autograd function: base product, weight noise and low-rank branch together.

    y = x (W + ε)ᵀ + b + s · D(x) Aᵀ Bᵀ        D: dropout

PEFT's forward keeps an FP32 copy of x for each layer and walks over y three times more than the products need. Here the
branch is written first and the base product adds to it while it is written out; x is kept once, in its own dtype, for
all layers that read it (query, key and value; gate and up), whose gradients meet in one buffer. A and B are FP32, their
products are in the dtype of the base product: the same arithmetic as PEFT's under autocast, rounded fewer times.

`fuse` changes how layers are computed, never what they hold: parameters, names and checkpoints stay PEFT's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import layer as peft_lora
from torch import nn

from flatlora.perturbation import PerturbedForward, Reading

logger = logging.getLogger(__name__)

# Leaf names of layers that read one input, in the order in which their parent calls them.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"))


def fuse(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PEFT model the fused forward; the number of layers that took it.

    Others (DoRA and further variants, LoRA on embeddings and convolutions, quantised weights) keep PEFT's forward and
    are counted in the log. So do calls that the fused forward does not cover: disabled, merged or several adapters,
    `adapter_names`.
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
        shared = SharedInput([fused[name] for name in names])
        for name in names:
            fused[name].shared = shared
    if others:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in others.items())
        logger.warning("%d LoRA layers keep PEFT's forward: %s.", others.total(), reasons)
    return len(fused)


def unfuse(model: nn.Module) -> None:
    """Give all layers PEFT's own forward back."""
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


def _families(names: Sequence[str]) -> list[list[str]]:
    """Groups of layer names that read one input."""
    by_parent: dict[str, dict[str, str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = name
    families = []
    for parent, leaves in by_parent.items():
        if "EncDec" in parent or "cross" in parent.lower():
            continue  # keys and values come from the encoder
        for family in SHARED_INPUT:
            found = [leaves[leaf] for leaf in family if leaf in leaves]
            if len(found) > 1:
                families.append(found)
    return families


@dataclass(frozen=True)
class _Branch:
    """What one layer brings to a fused call."""

    weight: torch.Tensor | None  # W; None while `reading` says what is read
    reading: Reading | None
    bias: torch.Tensor | None
    scaling: float

    def base(self) -> torch.Tensor:
        return self.weight if self.reading is None else self.reading.weight()


class FusedForward:
    """Stands for the forward of one `peft.tuners.lora.layer.Linear`."""

    def __init__(self, module: peft_lora.Linear) -> None:
        self.module, self.base = module, module.get_base_layer()
        self.plain = type(module).forward.__get__(module)
        self.shared: SharedInput | None = None

    def __call__(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args or kwargs or not self.covers():
            return self.plain(x, *args, **kwargs)
        if self.shared is not None and not self.drops():
            return self.shared.call(self, x)
        return fused_lora(x, [self])[0]

    def covers(self) -> bool:
        """Whether the layer is, at this moment, one plain adapter on a floating-point weight."""
        module, forward = self.module, self.base.__dict__.get("forward")
        return (
            not module.disable_adapters
            and not module.merged
            and len(module.active_adapters) == 1
            and module.active_adapters[0] in module.lora_A
            and (forward is None or isinstance(forward, PerturbedForward))
            and not self.base.weight.requires_grad
        )

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        name = self.module.active_adapters[0]
        return self.module.lora_A[name].weight, self.module.lora_B[name].weight

    def drops(self) -> float:
        """Rate of the dropout before A, 0 outside of training."""
        dropout = self.module.lora_dropout[self.module.active_adapters[0]]
        return dropout.p if self.module.training and isinstance(dropout, nn.Dropout) else 0.0

    def branch(self) -> _Branch:
        forward = self.base.__dict__.get("forward")
        reading = forward.reading() if forward is not None else None
        weight = self.base.weight if reading is None else None
        return _Branch(weight, reading, self.base.bias, self.module.scaling[self.module.active_adapters[0]])


class SharedInput:
    """Layers that read one input: the first call computes all of them, the others take what is ready."""

    def __init__(self, members: Sequence[FusedForward]) -> None:
        self.members = list(members)
        self._x: torch.Tensor | None = None
        self._ready: dict[FusedForward, torch.Tensor] = {}

    def call(self, member: FusedForward, x: torch.Tensor) -> torch.Tensor:
        if self._x is x and member in self._ready:
            y = self._ready.pop(member)
            if not self._ready:
                self._x = None
            return y
        self._ready, self._x = {}, None
        together = member is self.members[0] and all(other.covers() and not other.drops() for other in self.members)
        if not together:
            return fused_lora(x, [member])[0]
        y, *others = fused_lora(x, self.members)
        self._ready, self._x = dict(zip(self.members[1:], others, strict=True)), x
        return y


def fused_lora(x: torch.Tensor, layers: Sequence[FusedForward]) -> tuple[torch.Tensor, ...]:
    """y of every layer (… × m_k) for one x (… × n), in autocast's dtype where that is on, else in x's."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    factors = [factor for layer in layers for factor in layer.factors()]
    dropout = layers[0].drops() if len(layers) == 1 else 0.0
    with torch.autocast(device, enabled=False):  # every cast below is meant
        return _FusedLora.apply(x, [layer.branch() for layer in layers], dtype, dropout, *factors)


class _FusedLora(torch.autograd.Function):
    """k layers on one x. Kept for the backward: x, h = x Aᵀ (tokens × Σr), and the factors in the products' dtype."""

    @staticmethod
    def forward(ctx, x, branches, dtype, dropout, *factors):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ranks = [a.shape[0] for a in factors[0::2]]
        A = torch.cat([a.detach() for a in factors[0::2]]).to(dtype)  # Σr × n
        Bs = [b.detach().to(dtype) for b in factors[1::2]]
        dropped, mask = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        h = dropped @ A.t()
        ys = []
        for branch, B, own in zip(branches, Bs, h.split(ranks, dim=1), strict=True):
            y = (own * branch.scaling) @ B.t()
            if branch.bias is not None:
                y += branch.bias.to(dtype)
            y.addmm_(rows, branch.base().to(dtype).t())  # the base product adds to what is there as it is written
            ys.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x, A, h, mask, *Bs)
        ctx.branches, ctx.ranks, ctx.dtype, ctx.dropout = branches, ranks, dtype, dropout
        ctx.factor_dtypes = [factor.dtype for factor in factors]
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grad_ys):
        x, A, h, mask, *Bs = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        grads = [g.reshape(-1, g.shape[-1]).to(ctx.dtype) for g in grad_ys]
        grad_Bs, grad_hs = [], []
        for branch, B, own, grad in zip(ctx.branches, Bs, h.split(ctx.ranks, dim=1), grads, strict=True):
            grad_Bs.append(grad.t() @ (own * branch.scaling))
            grad_hs.append((grad @ B) * branch.scaling)
        grad_h = torch.cat(grad_hs, dim=1) if len(grad_hs) > 1 else grad_hs[0]  # tokens × Σr
        kept = rows if mask is None else rows * mask / (1 - ctx.dropout)
        grad_As = (grad_h.t() @ kept).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_h @ A
            if mask is not None:
                grad_x *= mask / (1 - ctx.dropout)
            for branch, grad in zip(ctx.branches, grads, strict=True):
                grad_x.addmm_(grad, branch.base().to(ctx.dtype))
            grad_x = grad_x.view_as(x).to(x.dtype)
        pairs = [grad for pair in zip(grad_As, grad_Bs, strict=True) for grad in pair]
        return grad_x, None, None, None, *(g.to(d) for g, d in zip(pairs, ctx.factor_dtypes, strict=True))
