"""LoRA-Pro (2024): updates A and B so that the change of W is as close as possible to that of full fine-tuning.

W = W₀ + s·B·A with A (r×n) and B (m×r). LoRA's gradients are g_A = s Bᵀ G and g_B = s G Aᵀ for the full gradient
G (m×n), which is never formed. Among all changes s·B·gA + s·gB·A that updates gA and gB can make, the nearest to G has

    gA = s⁻² (BᵀB)⁻¹ g_A + X A,     gB = s⁻² (I − B(BᵀB)⁻¹Bᵀ) g_B (AAᵀ)⁻¹ − B X

for any X; the X that keeps gA and gB nearest to g_A and g_B solves BᵀB·X + X·AAᵀ = −s⁻² (BᵀB)⁻¹ g_A Aᵀ.

mode="sgd" steps along (gA, gB). mode="adamw", the published full adjustment, keeps Adam's two moments of the equivalent
gradient g̃ = s·B·gA + s·gB·A (m×n), and projects Adam's direction D back to A and B by the same closed form, with s Bᵀ D
and s D Aᵀ in place of the gradients. Inverses are damped by 1e-8, as published, and are pseudo-inverses: eigenvalues
of BᵀB or AAᵀ up to r·eps·λ_max (eps of the factors' dtype) are rounding errors and are treated as zero. So the first
step, at B = 0, is exact, and a step is still the nearest one if B or A has a rank below r.

Deviations: moments may be BF16, rounded stochastically (half the memory); with several processes each pair's moments
are kept on one of them; weight decay is decoupled and acts on A and B.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.hira.layer import HiraLayer
from torch import nn

from flatlora.perturb.layers import named_lora_layers, normalized_or_multiplied_layers
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import warn_of_unscaled_fp16

logger = logging.getLogger(__name__)

_MOMENT_KEYS = ("exp_avg", "exp_avg_sq")
_MOMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Pair(NamedTuple):
    """The two factors of one layer, which add `scaling` · B (m × r) · A (r × n) to W; FP32 or FP64 parameters."""

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float


class Pairs(list[Pair]):
    """The pairs of a model, its other trained parameters as (name, parameter), and the dtypes of the frozen ones."""

    def __init__(
        self,
        pairs: Iterable[Pair],
        others: Iterable[tuple[str, nn.Parameter]],
        frozen_dtypes: Iterable[torch.dtype] = (),
    ) -> None:
        super().__init__(pairs)
        self.others, self.frozen_dtypes = list(others), set(frozen_dtypes)


def lora_pairs(model: nn.Module) -> Pairs:
    """The trained pairs of a PEFT model, by the names of their layers without PEFT.

    Other trained parameters, such as DoRA's magnitudes, biases and whole modules, are in the attribute `others` of the
    result, a list of (name, parameter).

    Raises:
        ConfigError: an adapter is not s·B·A on the weight of its layer: AdaLoRA, DeLoRA, HiRA, PEFT's
            `target_parameters`, and some variants of LoRA.
    """
    for name, module in normalized_or_multiplied_layers(model):
        kind = "HiRA" if isinstance(module, HiraLayer) else "DeLoRA"
        raise ConfigError(
            [f"Invalid adapter of {name}: {kind} does not add s·B·A to the weight; use plain LoRA, rsLoRA or DoRA."]
        )
    pairs = []
    for name, module in named_lora_layers(model):
        if isinstance(module, AdaLoraLayer):
            raise ConfigError(
                [
                    f"Invalid adapter of {name}: AdaLoRA's s·B·diag(E)·A has three factors instead of a pair; use "
                    "plain LoRA, rsLoRA or DoRA."
                ]
            )
        for adapter in module.active_adapters:
            if adapter in module.lora_A and module.lora_A[adapter].weight.requires_grad:
                A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                pairs.append(Pair(name, A, B, module.scaling[adapter]))
    factors = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    others = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    return Pairs(pairs, others, (p.dtype for p in model.parameters() if not p.requires_grad))


def product_pairs(model: nn.Module) -> list[Pair]:
    """The trained pairs whose loss depends on B·A alone: those of `lora_pairs`, or HiRA's, which multiply W by 1 + B·A.

    Raises:
        ConfigError: as `lora_pairs`.
    """
    multiplied = [each for each in normalized_or_multiplied_layers(model) if isinstance(each[1], HiraLayer)]
    pairs = [
        Pair(name, module.hira_A[adapter], module.hira_B[adapter], 1.0)
        for name, module in multiplied
        for adapter in module.active_adapters
        if adapter in module.hira_A and module.hira_A[adapter].requires_grad
    ]
    return pairs if multiplied else lora_pairs(model)


class LoRAPro(torch.optim.Optimizer):
    """LoRA-Pro as an optimizer for the (A, B) pairs of a PEFT model.

        optimizer = LoRAPro(peft_model, lr=1e-4)

    Args:
        params_pairs: a PEFT model, the result of `lora_pairs`, or `Pair`s or (name, A, B, scaling) tuples. Names must
            be unique, since state is kept by name.
        mode: "adamw" or "sgd".
        moments: dtype of Adam's moments of the m×n equivalent gradient: "float32" (8 bytes per weight of the backbone)
            or "bfloat16", rounded stochastically (4 bytes).
        damping: added to the eigenvalues of BᵀB and AAᵀ before they are inverted.
        seed: seed of the stochastic rounding, which is a function of (seed, step, name).
        others: other trained parameters, as (name, parameter); they are updated by AdamW with FP32 moments. None uses
            those of the model. For a plain list of pairs None means none, with a warning; others=() is the same without
            the warning.
        loss_scaled: as in `WeightPerturbation`; only used with a model or the result of `lora_pairs`.
        shard: with several processes, keep and update each pair on one of them and broadcast the result. Gradients must
            be averaged before (DDP does). Call `consolidate_state_dict()` on all of them before `state_dict()` on one.

    Raises:
        ValueError: a setting is out of range, names are equal, or shapes or dtypes do not fit.
    """

    def __init__(
        self,
        params_pairs: nn.Module | Iterable[Pair | tuple[str, nn.Parameter, nn.Parameter, float]],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: Literal["adamw", "sgd"] = "adamw",
        moments: Literal["float32", "bfloat16"] = "float32",
        damping: float = 1e-8,
        seed: int = 0,
        others: Iterable[tuple[str, nn.Parameter]] | None = None,
        loss_scaled: bool = False,
        shard: bool = False,
    ) -> None:
        if isinstance(params_pairs, nn.Module):
            params_pairs = lora_pairs(params_pairs)
        if others is None and not isinstance(params_pairs, Pairs):
            logger.warning(
                "LoRAPro was given a plain list of pairs without others=: other trained parameters (biases, "
                "magnitudes, embeddings, whole modules) will not be updated; pass the model, "
                "others=lora_pairs(model).others, or others=() if nothing else is trained."
            )
        if not loss_scaled:
            warn_of_unscaled_fp16(getattr(params_pairs, "frozen_dtypes", ()))
        if others is None:
            others = getattr(params_pairs, "others", ())
        pairs, others = [Pair(*pair) for pair in params_pairs], list(others)
        _validate_arguments(pairs, lr, betas, eps, weight_decay, mode, moments, damping)
        self.mode, self.moments, self.damping, self.seed = mode, _MOMENTS[moments], damping, seed
        groups: list[dict[str, Any]] = [
            {
                "params": [factor for pair in pairs for factor in (pair.A, pair.B)],
                "names": [pair.name for pair in pairs],
                "scalings": [float(pair.scaling) for pair in pairs],
            }
        ]
        if others:
            groups.append({"params": [p for _, p in others], "names": [name for name, _ in others]})
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        shard = shard and torch.distributed.is_initialized()
        self._rank = torch.distributed.get_rank() if shard else 0
        self._processes = torch.distributed.get_world_size() if shard else 1
        self._owners = _owners(pairs, self._processes)
        self._gathered: dict[str, dict[str, torch.Tensor]] | None = None

    @property
    def pairs(self) -> list[Pair]:
        """The pairs, in the order of the parameters."""
        group = self.param_groups[0]
        factors = zip(group["names"], group["params"][0::2], group["params"][1::2], group["scalings"], strict=True)
        return [Pair(*each) for each in factors]

    @torch.no_grad()
    def step(self, closure=None) -> torch.Tensor | None:
        """One optimizer step; pairs without gradients are skipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gathered = None
        waiting = defaultdict(list)
        for pair in self.pairs:
            if pair.A.grad is not None and pair.B.grad is not None and self._owners[pair.name] == self._rank:
                waiting[pair.A.shape, pair.B.shape, pair.A.device, pair.A.dtype].append(pair)
        for pairs in waiting.values():
            self._step_pairs(pairs, self.param_groups[0])
        if self._processes > 1:
            self._send_updates()
        for group in self.param_groups[1:]:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_other(parameter, group)
        return loss

    def _step_pairs(self, pairs: Sequence[Pair], group: dict[str, Any]) -> None:
        """Update pairs of one shape, with their r×r algebra in one batch."""
        frame = _Frame.of(pairs, self.damping)
        A_grads, B_grads = torch.stack([p.A.grad for p in pairs]), torch.stack([p.B.grad for p in pairs])
        if self.mode == "adamw":
            left, right = frame.equivalent_gradient(A_grads, B_grads)
            for k, pair in enumerate(pairs):
                direction = self._adam_direction(pair, left[k] @ right[k], group)
                torch.mm(pair.B.mT, direction, out=A_grads[k]).mul_(pair.scaling)
                torch.mm(direction, pair.A.mT, out=B_grads[k]).mul_(pair.scaling)
        A_updates, B_updates = frame.nearest(A_grads, B_grads)
        for pair, A_update, B_update in zip(pairs, A_updates, B_updates, strict=True):
            for factor, update in ((pair.A, A_update), (pair.B, B_update)):
                factor.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _adam_direction(self, pair: Pair, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Update the moments; returns Adam's direction (m × n), which overwrites the equivalent gradient."""
        state = self.state[pair.A]
        if not state:
            dtype = self.moments if self.moments != torch.float32 else gradient.dtype  # FP64 pairs have FP64 moments
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(gradient, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(gradient, dtype=dtype)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        first, second = (state[key].to(gradient.dtype) for key in ("exp_avg", "exp_avg_sq"))
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if self.moments == torch.bfloat16:
            generator = self._generator(pair, step)
            for key, value in (("exp_avg", first), ("exp_avg_sq", second)):
                round_stochastically(value, state[key], generator)
        denominator = torch.sqrt(second, out=gradient).div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        return torch.div(first, denominator, out=denominator).div_(1 - beta1**step)

    def _generator(self, pair: Pair, step: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}|{step}|{pair.name}".encode(), digest_size=8).digest()
        return torch.Generator(pair.A.device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def _step_other(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))

    def _send_updates(self) -> None:
        """Broadcast the new factors of each pair from the process that owns it."""
        owned = defaultdict(list)
        for pair in self.pairs:
            owned[self._owners[pair.name], pair.A.device, pair.A.dtype].extend([pair.A, pair.B])
        for (owner, _, _), factors in sorted(owned.items(), key=lambda item: item[0][0]):
            flat = torch.cat([factor.detach().flatten() for factor in factors])
            torch.distributed.broadcast(flat, src=owner)
            if owner != self._rank:
                for factor, part in zip(factors, flat.split([f.numel() for f in factors]), strict=True):
                    factor.copy_(part.view_as(factor))

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all pairs on process `to`, in host memory; every process must call it."""
        if self._processes == 1:
            return
        gathered: dict[str, dict[str, torch.Tensor]] = {}
        for pair in self.pairs:
            owner = self._owners[pair.name]
            dtypes: list[Any] = [
                {key: value.dtype for key, value in self.state[pair.A].items()} if owner == self._rank else None
            ]
            torch.distributed.broadcast_object_list(dtypes, src=owner)
            state = {}
            for key, dtype in dtypes[0].items():
                shape = () if key == "step" else (pair.B.shape[0], pair.A.shape[1])
                value = torch.empty(shape, dtype=dtype, device=pair.A.device)
                if owner == self._rank:
                    value.copy_(self.state[pair.A][key])
                torch.distributed.broadcast(value, src=owner)
                state[key] = value.cpu()
            if self._rank == to:
                gathered[pair.name] = state
        self._gathered = gathered if self._rank == to else None

    def state_dict(self) -> dict[str, Any]:
        """The state dict in torch's format; after `consolidate_state_dict(to)`, process `to` has that of all pairs."""
        state = super().state_dict()
        for index, pair in enumerate(self.pairs):
            if self._gathered and self._gathered.get(pair.name):
                state["state"][2 * index] = self._gathered[pair.name]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of pairs with the same names, in any order.

        Raises:
            ValueError: the names differ.
        """
        state_dict = {**state_dict, "state": dict(state_dict["state"])}
        saved, names = state_dict["param_groups"][0]["names"], self.param_groups[0]["names"]
        if sorted(saved) != sorted(names):
            odd = sorted(set(saved) ^ set(names))
            raise ValueError(f"Invalid state_dict: its pairs differ from these ({', '.join(odd[:3])}, …).")
        entries = state_dict["state"]
        moved = {2 * names.index(name): entries.pop(2 * index, None) for index, name in enumerate(saved)}
        owned = {2 * index for index, name in enumerate(names) if self._owners[name] == self._rank}
        moved = {index: dict(entry) for index, entry in moved.items() if entry is not None and index in owned}
        # torch would convert moments to their parameter's dtype, and BF16 moments would take twice their memory.
        moments = {index: [entry.pop(key, None) for key in _MOMENT_KEYS] for index, entry in moved.items()}
        entries |= moved
        group = {**state_dict["param_groups"][0], "names": names, "scalings": self.param_groups[0]["scalings"]}
        state_dict["param_groups"] = [group, *state_dict["param_groups"][1:]]
        super().load_state_dict(state_dict)
        for index, pair in enumerate(self.pairs):
            for key, value in zip(_MOMENT_KEYS, moments.get(2 * index, ()), strict=False):
                if value is not None:
                    dtype = self.moments if self.moments != torch.float32 else pair.A.dtype
                    self.state[pair.A][key] = value.to(pair.A.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle; torch's own method only keeps parameters and state."""
        own = ("mode", "moments", "damping", "seed", "_rank", "_processes", "_owners")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_gathered": None}


class _Frame(NamedTuple):
    """k pairs of one shape with the eigendecompositions of BᵀB and AAᵀ (k × r × r).

    All tensors and computations are FP64, which is cheap for these thin matrices: inverses of r × r Gram matrices
    multiply rounding errors by their condition number.
    """

    A: torch.Tensor  # k × r × n
    B: torch.Tensor  # k × m × r
    scaling: torch.Tensor  # k × 1 × 1
    B_values: torch.Tensor
    B_vectors: torch.Tensor
    A_values: torch.Tensor
    A_vectors: torch.Tensor
    damping: float

    @classmethod
    def of(cls, pairs: Sequence[Pair], damping: float) -> _Frame:
        A, B = torch.stack([pair.A.detach() for pair in pairs]), torch.stack([pair.B.detach() for pair in pairs])
        scaling = torch.tensor([pair.scaling for pair in pairs], dtype=torch.float64, device=A.device).view(-1, 1, 1)
        try:
            decompositions = *_spectrum(B), *_spectrum(A.mT)
        except torch.linalg.LinAlgError as error:
            broken = [pair.name for pair in pairs if not (pair.A.isfinite().all() and pair.B.isfinite().all())]
            if not broken:
                raise
            raise FloatingPointError(
                f"A or B of {broken[0]} contains NaN or infinity: training has diverged; lower the learning rate."
            ) from error
        return cls(A.double(), B.double(), scaling, *decompositions, damping)

    def free_parts(self, A_grads: torch.Tensor, B_grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gA and gB for X = 0, FP64."""
        A_grads, B_grads = A_grads.double(), B_grads.double()
        B_inverse = _inverse(self.B_values, self.B_vectors, self.damping)
        A_inverse = _inverse(self.A_values, self.A_vectors, self.damping)
        outside = B_grads - self.B @ (B_inverse @ (self.B.mT @ B_grads))
        return B_inverse @ A_grads / self.scaling**2, outside @ A_inverse / self.scaling**2

    def equivalent_gradient(self, A_grads: torch.Tensor, B_grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """g̃ as left (k × m × 2r) times right (k × 2r × n), in the gradients' dtype; it does not depend on X."""
        gA, gB = self.free_parts(A_grads, B_grads)
        left, right = torch.cat([self.scaling * self.B, self.scaling * gB], dim=2), torch.cat([gA, self.A], dim=1)
        return left.to(B_grads.dtype), right.to(A_grads.dtype)

    def nearest(self, A_grads: torch.Tensor, B_grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gA (k × r × n) and gB (k × m × r) with the X of the Sylvester equation, in the gradients' dtype."""
        gA, gB = self.free_parts(A_grads, B_grads)
        rotated = self.B_vectors.mT @ -(gA @ self.A.mT) @ self.A_vectors
        B_values, A_values = self.B_values[:, :, None], self.A_values[:, None, :]
        spanned = (B_values > 0) & (A_values > 0)  # elsewhere the right side is zero, and so is X
        solved = torch.where(spanned, rotated / (B_values + A_values + self.damping), 0.0)
        X = self.B_vectors @ solved @ self.A_vectors.mT
        return (gA + X @ self.A).to(A_grads.dtype), (gB - self.B @ X).to(B_grads.dtype)


def _spectrum(factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (k × r) and eigenvectors (k × r × r) of FᵀF of each factor F (k × m × r), FP64.

    Eigenvalues up to r·eps·λ_max are set to zero, because they are rounding errors at the precision of F. So are those
    up to the rounding error of FᵀF, which matters if F is FP64.
    """
    wide = factors.double()  # in FP32, rounding errors of sums over m rows would exceed the limit
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    rows, rank = factors.shape[-2:]
    limit = max(rank * torch.finfo(factors.dtype).eps, rows * torch.finfo(torch.float64).eps) * values[:, -1:]
    return torch.where(values > limit, values, 0.0), vectors


def _inverse(values: torch.Tensor, vectors: torch.Tensor, damping: float) -> torch.Tensor:
    """The damped pseudo-inverse, from eigenvalues and eigenvectors."""
    inverted = torch.where(values > 0, 1.0 / (values + damping), 0.0)
    return (vectors * inverted[:, None, :]) @ vectors.mT


def nearest_update_reference(
    A: torch.Tensor, B: torch.Tensor, scaling: float, full_gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow reference for the closed form: a least-squares solve over all (gA, gB) from the full gradient, in FP64.

    Among the minimizers it returns the one nearest to LoRA's own gradients.
    """
    A, B, G = A.double(), B.double(), full_gradient.double()
    (r, n), m = A.shape, B.shape[0]
    # vec by rows: vec(B gA) = (B ⊗ I_n) vec(gA), vec(gB A) = (I_m ⊗ Aᵀ) vec(gB)
    left = torch.kron(B, torch.eye(n, dtype=A.dtype))
    right = torch.kron(torch.eye(m, dtype=A.dtype), A.mT.clone(memory_format=torch.contiguous_format))
    own = torch.cat([(scaling * B.mT @ G).flatten(), (scaling * G @ A.mT).flatten()])
    system = scaling * torch.cat([left, right], dim=1)
    nearest = own + torch.linalg.lstsq(system, G.flatten() - system @ own, driver="gelsd").solution
    return nearest[: r * n].view(r, n), nearest[r * n :].view(m, r)


@torch.no_grad()
def round_stochastically(value: torch.Tensor, out: torch.Tensor, generator: torch.Generator) -> None:
    """Rounds an FP32 value to BF16, up or down at random, so that its expectation is the value and small updates count.

    A BF16 number is the upper half of an FP32 number: a random lower half is added before the lower half is dropped.
    """
    bits = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    bits.add_(value.float().view(torch.int32)).bitwise_and_(-(1 << 16))
    out.copy_(bits.view(torch.float32))


def _owners(pairs: Sequence[Pair], processes: int) -> dict[str, int]:
    """{name: process that keeps the pair's moments}; largest pairs first, each goes to the least loaded process."""
    loads, owners = [0] * processes, {}
    for pair in sorted(pairs, key=lambda pair: (-pair.A.shape[1] * pair.B.shape[0], pair.name)):
        owner = loads.index(min(loads))
        owners[pair.name] = owner
        loads[owner] += pair.A.shape[1] * pair.B.shape[0]
    return owners


def _validate_arguments(pairs, lr, betas, eps, weight_decay, mode, moments, damping) -> None:
    errors = []
    if not pairs:
        errors.append("Invalid params_pairs=[]: it must have at least one (A, B) pair; see lora_pairs(model).")
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        errors.append(f"Invalid params_pairs: {len(names) - len(set(names))} names occur twice; state is kept by name.")
    for pair in pairs:
        if pair.A.ndim != 2 or pair.B.ndim != 2 or pair.A.shape[0] != pair.B.shape[1]:
            errors.append(
                f"Invalid pair {pair.name}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}; must be r × n and m × r."
            )
        if pair.A.dtype != pair.B.dtype or pair.A.dtype not in (torch.float32, torch.float64):
            errors.append(
                f"Invalid pair {pair.name}: A is {pair.A.dtype} and B {pair.B.dtype}; both must be FP32 (or FP64): "
                "keep adapters in full precision."
            )
        if not pair.scaling > 0:
            errors.append(f"Invalid scaling={pair.scaling} of {pair.name}: it must be > 0.")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("damping", damping)):
        if not value >= 0:
            errors.append(f"Invalid {name}={value}: it must be ≥ 0.")
    if not all(0 <= beta < 1 for beta in betas):
        errors.append(f"Invalid betas={betas}: both must be in [0, 1).")
    for name, value, known in (("mode", mode, ("adamw", "sgd")), ("moments", moments, tuple(_MOMENTS))):
        if value not in known:
            errors.append(f"Invalid {name}={value!r}: choose one of {', '.join(known)}.")
    if errors:
        raise ValueError("\n".join(errors))
