"""LoRA-Pro (2024): move A and B so that W moves as close as can be to where full fine-tuning moves it.

W = W₀ + s·B·A, A r×n, B m×r; LoRA's gradients are g_A = s Bᵀ G and g_B = s G Aᵀ of the full gradient G (m×n), which is
never formed. Among all changes of W that A and B can make, s·B·gA + s·gB·A, the nearest to G has

    gA = s⁻² (BᵀB)⁻¹ g_A + X A,     gB = s⁻² (I − B(BᵀB)⁻¹Bᵀ) g_B (AAᵀ)⁻¹ − B X

for any X; the X that keeps gA and gB nearest to g_A and g_B solves BᵀB·X + X·AAᵀ = −s⁻² (BᵀB)⁻¹ g_A Aᵀ.

mode="sgd" steps along (gA, gB). mode="adamw", the published full adjustment, keeps Adam's two moments of the equivalent
gradient g̃ = s·B·gA + s·gB·A (m×n), and brings Adam's direction D back to A and B by the same closed form, with s Bᵀ D
and s D Aᵀ in the place of the gradients. Inverses are damped by 1e-8, as published, and are pseudo-inverses: an
eigenvalue of BᵀB or AAᵀ up to r·eps·λ_max, eps of the factors' dtype, is rounding, and its direction takes no part. So
the first step is exact at B = 0, and a step stays the nearest one where B or A has a rank below r.

Deviations: moments may be BF16, rounded stochastically (half the memory); under several processes each pair's moments
live on one of them; weight decay is decoupled and acts on A and B.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.adalora import AdaLoraLayer
from torch import nn

from flatlora.perturb.layers import named_lora_layers
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import warn_of_unscaled_fp16

logger = logging.getLogger(__name__)

_MOMENT_KEYS = ("exp_avg", "exp_avg_sq")
_MOMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Pair(NamedTuple):
    """The two factors of one layer: W gets `scaling` · B (m × r) · A (r × n); both FP32 or FP64 parameters."""

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float


class Pairs(list[Pair]):
    """The pairs of a model, in `others` what is trained besides, as (name, parameter), and the dtypes of the rest."""

    def __init__(
        self,
        pairs: Iterable[Pair],
        others: Iterable[tuple[str, nn.Parameter]],
        frozen_dtypes: Iterable[torch.dtype] = (),
    ) -> None:
        super().__init__(pairs)
        self.others, self.frozen_dtypes = list(others), set(frozen_dtypes)


def lora_pairs(model: nn.Module) -> Pairs:
    """The trained pairs of a PEFT model, by the names that the layers have without PEFT.

    Adapters of embeddings, DoRA's magnitudes, biases, and whole modules that are trained besides are no pairs: they are
    among the others.

    Raises:
        ConfigError: an adapter is no s·B·A on the weight of its layer: AdaLoRA's, PEFT's `target_parameters`, and some
            variants of LoRA.
    """
    pairs = []
    for name, module in named_lora_layers(model):
        if isinstance(module, AdaLoraLayer):
            raise ConfigError(
                [
                    f"Invalid adapter of {name}: AdaLoRA's is s·B·diag(E)·A, three factors and no pair; use plain "
                    "LoRA, rsLoRA or DoRA."
                ]
            )
        for adapter in module.active_adapters:
            if adapter in module.lora_A and module.lora_A[adapter].weight.requires_grad:
                A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                pairs.append(Pair(name, A, B, module.scaling[adapter]))
    factors = {id(factor) for pair in pairs for factor in (pair.A, pair.B)}
    others = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    return Pairs(pairs, others, (p.dtype for p in model.parameters() if not p.requires_grad))


class LoRAPro(torch.optim.Optimizer):
    """LoRA-Pro as an optimizer of a PEFT model's (A, B) pairs.

        optimizer = LoRAPro(peft_model, lr=1e-4)

    Args:
        params_pairs: a PEFT model, `lora_pairs` of one, or `Pair`s or (name, A, B, scaling) tuples; names must differ,
            since state is kept by name.
        mode: "adamw" or "sgd".
        moments: dtype of Adam's moments of the m×n equivalent gradient: "float32" (8 bytes a weight of the backbone) or
            "bfloat16", rounded stochastically (4 bytes).
        damping: added to the eigenvalues of BᵀB and AAᵀ that are inverted.
        seed: of the stochastic rounding, which is a function of (seed, step, name).
        others: trained parameters that are no pairs, as (name, parameter); they get AdamW with FP32 moments. None takes
            those that `lora_pairs` found in its model; of a plain list of pairs there are none, with a warning, as
            that list cannot tell what else is trained: others=() says that nothing is.
        loss_scaled: as in `WeightPerturbation`; known of a model's pairs alone.
        shard: with several processes, keep and update each pair on one of them and send the result to all. Gradients
            must be averaged already (DDP does). Call `consolidate_state_dict()` on all before `state_dict()` on one.

    Raises:
        ValueError: a setting out of range, equal names, shapes or dtypes that make no pair.
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
                "LoRAPro was given a plain list of pairs without others=: what is trained besides them (biases, "
                "magnitudes, embeddings, whole modules) would stay where it is; give it the model, "
                "others=lora_pairs(model).others, or others=() where nothing else is trained."
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
        """One step; a pair without gradients stays where it is."""
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
        """Pairs of one shape, their r×r algebra in one batch."""
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
        """Adam's direction (m × n) for the equivalent gradient, whose storage it takes over; moves the moments on."""
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
        """Every process gets the new factors of the pairs that others keep."""
        mine = defaultdict(list)
        for pair in self.pairs:
            mine[self._owners[pair.name], pair.A.device, pair.A.dtype].extend([pair.A, pair.B])
        for (owner, _, _), factors in sorted(mine.items(), key=lambda item: item[0][0]):
            flat = torch.cat([factor.detach().flatten() for factor in factors])
            torch.distributed.broadcast(flat, src=owner)
            if owner != self._rank:
                for factor, part in zip(factors, flat.split([f.numel() for f in factors]), strict=True):
                    factor.copy_(part.view_as(factor))

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all pairs on process `to`, on its host; every process must call it."""
        if self._processes == 1:
            return
        gathered: dict[str, dict[str, torch.Tensor]] = {}
        for pair in self.pairs:
            owner = self._owners[pair.name]
            about: list[Any] = [
                {key: value.dtype for key, value in self.state[pair.A].items()} if owner == self._rank else None
            ]
            torch.distributed.broadcast_object_list(about, src=owner)
            state = {}
            for key, dtype in about[0].items():
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
        """As torch's; of the process that `consolidate_state_dict` named, with the state of all pairs."""
        state = super().state_dict()
        for place, pair in enumerate(self.pairs):
            if self._gathered and self._gathered.get(pair.name):
                state["state"][2 * place] = self._gathered[pair.name]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of pairs with the same names, in any order.

        Raises:
            ValueError: the names differ.
        """
        state_dict = {**state_dict, "state": dict(state_dict["state"])}
        saved, names = state_dict["param_groups"][0]["names"], self.param_groups[0]["names"]
        if sorted(saved) != sorted(names):
            odd = sorted(set(saved) ^ set(names))
            raise ValueError(f"Invalid state_dict: it is of other pairs than these ({', '.join(odd[:3])}, …).")
        entries = state_dict["state"]
        moved = {2 * names.index(name): entries.pop(2 * place, None) for place, name in enumerate(saved)}
        owned = {2 * place for place, name in enumerate(names) if self._owners[name] == self._rank}
        moved = {place: dict(entry) for place, entry in moved.items() if entry is not None and place in owned}
        # Not left to torch, which gives every state its parameter's dtype: BF16 moments would take twice their room.
        moments = {place: [entry.pop(key, None) for key in _MOMENT_KEYS] for place, entry in moved.items()}
        entries |= moved
        group = {**state_dict["param_groups"][0], "names": names, "scalings": self.param_groups[0]["scalings"]}
        state_dict["param_groups"] = [group, *state_dict["param_groups"][1:]]
        super().load_state_dict(state_dict)
        for place, pair in enumerate(self.pairs):
            for key, value in zip(_MOMENT_KEYS, moments.get(2 * place, ()), strict=False):
                if value is not None:
                    dtype = self.moments if self.moments != torch.float32 else pair.A.dtype
                    self.state[pair.A][key] = value.to(pair.A.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: torch's own keeps parameters and state alone."""
        own = ("mode", "moments", "damping", "seed", "_rank", "_processes", "_owners")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_gathered": None}


class _Frame(NamedTuple):
    """k pairs of one shape with the eigendecompositions of BᵀB and AAᵀ (k × r × r).

    All of it is FP64, as is what is computed with it before it is returned: these matrices are thin, and inverses of
    r × r Gram matrices multiply rounding errors by their condition number.
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
                f"A or B of {broken[0]} holds NaN or infinity: training has diverged; lower the learning rate."
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
        """g̃ as left (k × m × 2r) times right (k × 2r × n), of the gradients' dtype; X takes no part in it."""
        gA, gB = self.free_parts(A_grads, B_grads)
        left, right = torch.cat([self.scaling * self.B, self.scaling * gB], dim=2), torch.cat([gA, self.A], dim=1)
        return left.to(B_grads.dtype), right.to(A_grads.dtype)

    def nearest(self, A_grads: torch.Tensor, B_grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gA (k × r × n) and gB (k × m × r) with the X of the Sylvester equation, of the gradients' dtype."""
        gA, gB = self.free_parts(A_grads, B_grads)
        rotated = self.B_vectors.mT @ -(gA @ self.A.mT) @ self.A_vectors
        B_values, A_values = self.B_values[:, :, None], self.A_values[:, None, :]
        spanned = (B_values > 0) & (A_values > 0)  # elsewhere the right side is zero, and so is X
        solved = torch.where(spanned, rotated / (B_values + A_values + self.damping), 0.0)
        X = self.B_vectors @ solved @ self.A_vectors.mT
        return (gA + X @ self.A).to(A_grads.dtype), (gB - self.B @ X).to(B_grads.dtype)


def _spectrum(factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (k × r) and eigenvectors (k × r × r) of FᵀF of each factor F (k × m × r), FP64.

    Eigenvalues up to r·eps·λ_max are set to zero: at the precision of F they are rounding. So are those up to the
    rounding of FᵀF itself, which counts where F is FP64.
    """
    wide = factors.double()  # sums over m rows in FP32 would be rounded to more than the limit
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    rows, rank = factors.shape[-2:]
    limit = max(rank * torch.finfo(factors.dtype).eps, rows * torch.finfo(torch.float64).eps) * values[:, -1:]
    return torch.where(values > limit, values, 0.0), vectors


def _inverse(values: torch.Tensor, vectors: torch.Tensor, damping: float) -> torch.Tensor:
    """The damped pseudo-inverse."""
    inverted = torch.where(values > 0, 1.0 / (values + damping), 0.0)
    return (vectors * inverted[:, None, :]) @ vectors.mT


def nearest_update_reference(
    A: torch.Tensor, B: torch.Tensor, scaling: float, full_gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow twin of the closed form, from the full gradient: a least-squares solve over all (gA, gB), in FP64.

    Among the minimizers it takes the one nearest to LoRA's own gradients.
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
    """Write an FP32 value as BF16, up or down at random so that the mean is the value: small moves are not lost.

    A BF16 is the upper half of an FP32: a random lower half is added before the lower half is dropped.
    """
    bits = torch.randint(0, 1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    bits.add_(value.float().view(torch.int32)).bitwise_and_(-(1 << 16))
    out.copy_(bits.view(torch.float32))


def _owners(pairs: Sequence[Pair], processes: int) -> dict[str, int]:
    """Which process keeps a pair's moments: the largest first, each to whoever has least."""
    loads, owners = [0] * processes, {}
    for pair in sorted(pairs, key=lambda pair: (-pair.A.shape[1] * pair.B.shape[0], pair.name)):
        owner = loads.index(min(loads))
        owners[pair.name] = owner
        loads[owner] += pair.A.shape[1] * pair.B.shape[0]
    return owners


def _validate_arguments(pairs, lr, betas, eps, weight_decay, mode, moments, damping) -> None:
    errors = []
    if not pairs:
        errors.append("Invalid params_pairs=[]: at least one (A, B) pair is needed; see lora_pairs(model).")
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        errors.append(f"Invalid params_pairs: {len(names) - len(set(names))} names occur twice; state is kept by name.")
    for pair in pairs:
        if pair.A.ndim != 2 or pair.B.ndim != 2 or pair.A.shape[0] != pair.B.shape[1]:
            errors.append(
                f"Invalid pair {pair.name}: A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}; not r × n, m × r."
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
