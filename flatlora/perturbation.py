"""Flat-LoRA's weight perturbation (paper section 3): train on W + ε, keep W.

    ε_ij = c_i z_ij,   c_i = σ_t/√n · ‖W'_i‖,   W' = W + Σ s·B·A     (row i = output filter i, n = input dimension)

One ε lasts from `begin(step)` to `end()`, for all micro-batches of an optimizer step. Three ways to let the layers
read W + ε give the same bits in loss and gradients:

- copy:       W + ε is written once into a second buffer that the layers' forwards read. W's bytes are never touched.
- recompute:  W + ε is made in one scratch buffer in each layer's forward and again in its backward. No extra memory.
- inplace:    the published way: W += ε, later W −= ε. Rounding makes a BF16 backbone drift; kept for comparison.

In the first two the parameter itself is W at all times: whatever hashes, saves or merges weights in mid-step sees W.

Only a seed and the m row norms of each layer describe ε; `noise.py` makes it again wherever it is needed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import psutil
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from flatlora import noise
from flatlora.schedule import RAMPS, sigma_at

logger = logging.getLogger(__name__)

Mode = Literal["auto", "copy", "recompute", "inplace"]
_HOLDER = "_weight_perturbation"  # attribute of a module: the perturbation that has it now
_CHUNK_ELEMENTS = 1 << 18  # 1 MiB of FP32: noise and weight of a chunk stay in the L2 cache


class AdapterTerm(NamedTuple):
    """One active low-rank term of a layer: W' gets `scaling` · B (m × r) · A (r × n)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass
class PerturbedLayer:
    """A linear layer whose weight is to be perturbed.

    `module` owns the weight and is called by the model (nn.Linear: m × n; GPT-2's Conv1D: stored n × m);
    `adapters` returns the low-rank terms that act on it at the time of the call; while `enabled` says no, the layer
    reads W (in copy and recompute), as a reference model made by PEFT's `disable_adapter()` should.
    """

    name: str
    module: nn.Module
    adapters: Callable[[], Sequence[AdapterTerm]] = tuple
    enabled: Callable[[], bool] = lambda: True
    weight: nn.Parameter = field(init=False)
    squared_norms: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Linear | Conv1D):
            raise TypeError(
                f"Invalid layer {self.name}={type(self.module).__name__}: a perturbed layer must be nn.Linear or "
                "Conv1D; take it out of the targets."
            )
        self.weight = self.module.weight
        if not self.weight.is_floating_point():
            raise TypeError(
                f"Invalid dtype={self.weight.dtype} of {self.name}: a perturbed weight must be floating point; "
                "load the backbone unquantised."
            )

    def as_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """A stored weight as m × n, one output filter a row (a view)."""
        return stored.t() if isinstance(self.module, Conv1D) else stored


@dataclass(frozen=True)
class Draw:
    """All that makes one layer's ε again: Philox key, counter words, and c (m, FP32)."""

    key: tuple[int, int]
    step: int
    stream: int
    c: torch.Tensor


def find_lora_layers(model: nn.Module) -> list[PerturbedLayer]:
    """Every linear layer that PEFT wrapped with a LoRA adapter, named as in the model without PEFT or DDP wrappers."""
    from peft.tuners.lora import LoraLayer

    layers = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear | Conv1D):
            layers.append(
                PerturbedLayer(
                    plain_name(name),
                    module.get_base_layer(),
                    adapters=_adapter_terms(module),
                    enabled=lambda module=module: not module.disable_adapters,
                )
            )
    return layers


def plain_name(name: str) -> str:
    """A module or parameter name as the untouched backbone has it."""
    for wrapper in ("module.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name.replace(".base_layer.", ".").removesuffix(".base_layer")


def _adapter_terms(module: nn.Module) -> Callable[[], list[AdapterTerm]]:
    def terms() -> list[AdapterTerm]:
        if module.disable_adapters or module.merged:
            return []  # merged: W already holds s·B·A
        return [
            AdapterTerm(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
            for name in module.active_adapters
            if name in module.lora_A
        ]

    return terms


class WeightPerturbation:
    """ε on a set of layers, between `begin(step)` and `end()`.

    Args:
        layers: what to perturb; see `find_lora_layers`.
        sigma: σ ≥ 0, the `rho` of the published command line. 0 perturbs nothing.
        total_steps: T of the ramp, in optimizer steps.
        seed: the run's seed; ranks must agree on it.
        ramp: cosine | linear | constant.
        mode: auto | copy | recompute | inplace. auto is copy where the buffer takes at most half of the free memory.
        every: draw a new ε only every so many optimizer steps (the paper's T), σ_t and row norms included.
        resample: "step" keeps one ε for all micro-batches of a step, "micro_batch" draws one for each.
        per_rank: let every rank draw its own ε, so that the averaged gradient averages over them.
        scale: "filter" scales row i by ‖W'_i‖; "iid" gives every entry of a layer the same std, with the same total.
        fan_in: divide the variance by n (the paper's 1/n); off only for the ablation.
        training_only: layers in evaluation mode read W even inside a step (not in inplace), so that an interrupted
            step or a generation within one does not evaluate W + ε. Needs a loop that calls `model.train()`.

    Layers that another perturbation still holds, left behind by an interrupted loop, are taken over from it.

    Raises:
        ValueError: no layer, or a setting out of range; the message lists every fault.
    """

    def __init__(
        self,
        layers: Sequence[PerturbedLayer],
        *,
        sigma: float,
        total_steps: int,
        seed: int,
        ramp: str = "cosine",
        mode: Mode = "auto",
        every: int = 1,
        resample: Literal["step", "micro_batch"] = "step",
        per_rank: bool = False,
        scale: Literal["filter", "iid"] = "filter",
        fan_in: bool = True,
        training_only: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _refuse_faults(layers, sigma, total_steps, ramp, mode, every, resample, scale)
        self.layers = list(layers)
        for layer in self.layers:
            if _HOLDER in layer.module.__dict__:
                layer.module.__dict__[_HOLDER].close()
        self.sigma, self.total_steps, self.ramp, self.every = sigma, total_steps, ramp, every
        self.resample, self.per_rank, self.scale, self.fan_in = resample, per_rank, scale, fan_in
        self.training_only, self.rank, self.world_size = training_only, rank, world_size
        self.mode = choose_mode(self.layers) if mode == "auto" else mode
        self.active = False
        self.seconds = 0.0  # wall-clock time spent in begin, next_micro_batch and end
        self._keys = [noise.layer_key(seed, layer.name) for layer in self.layers]
        self._coefficients: list[torch.Tensor] = []  # c of every layer, from the step that drew them
        self._drawn_step: int | None = None
        self._sigma_drawn = 0.0
        self._draws: list[Draw] | None = None  # what the layers read now; None while they read W
        self._written: tuple[int, int] | None = None  # (drawn step, stream) that the copies hold
        self._copies: list[torch.Tensor] = []
        self._originals: list[torch.Tensor] = []
        self._scratch = _Scratch()
        if self.mode == "inplace" and sigma > 0:
            self._keep_originals()
        for index, layer in enumerate(self.layers):
            layer.module.__dict__[_HOLDER] = self
            if self.mode != "inplace":
                PerturbedForward.attach(self, index)

    def begin(self, step: int, micro_batch: int = 0) -> None:
        """Perturb the layers for optimizer step `step` (counted from 0), first micro-batch."""
        if self.active:
            raise RuntimeError(f"begin(step={step}) inside a perturbed step: call end() first.")
        started = time.perf_counter()
        self._draw_coefficients(step)
        if self._sigma_drawn > 0:
            self._apply(micro_batch)
        self.active = True
        self.seconds += time.perf_counter() - started

    def next_micro_batch(self, micro_batch: int) -> None:
        """Draw the ε of another micro-batch of the same step; does nothing when the step shares one ε."""
        if not self.active or self.resample == "step" or self._sigma_drawn == 0:
            return
        started = time.perf_counter()
        self._take_away()
        self._apply(micro_batch)
        self.seconds += time.perf_counter() - started

    def end(self) -> None:
        """Let the layers read W again; harmless when no step is perturbed."""
        if not self.active:
            return
        started = time.perf_counter()
        self._take_away()
        self.active = False
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Undo everything: end(), forwards unwrapped, buffers freed."""
        self.end()
        for layer in self.layers:
            if layer.module.__dict__.get(_HOLDER) is self:
                del layer.module.__dict__[_HOLDER]
                PerturbedForward.detach(layer.module)
        self._copies, self._scratch = [], _Scratch()
        self._written = None

    def sigma_at(self, step: int) -> float:
        """σ_t that `begin(step)` uses."""
        return sigma_at(step - step % self.every, self.total_steps, self.sigma, self.ramp)

    def drift(self) -> dict[str, float] | None:
        """What the in-place way did to W: ‖ΔW‖/‖W‖ and the share of changed entries; None in the other modes."""
        if not self._originals:
            return None
        changed = total = 0
        delta = norm = 0.0
        for layer, original in zip(self.layers, self._originals, strict=True):
            weight = layer.weight.detach().to(original.device)
            changed += int((weight != original).sum())
            total += original.numel()
            delta += float((weight.double() - original.double()).square().sum())
            norm += float(original.double().square().sum())
        return {"relative_norm": math.sqrt(delta / norm) if norm else 0.0, "changed_share": changed / total}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The c vectors of the current draw: needed to resume inside an `every` window, empty otherwise."""
        if self.every == 1 or self._drawn_step is None:
            return {}
        state = {layer.name: c.cpu() for layer, c in zip(self.layers, self._coefficients, strict=True)}
        return {**state, "step": torch.tensor(self._drawn_step)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue the draw that `state_dict` described."""
        self._drawn_step, self._written = int(state["step"]), None
        self._sigma_drawn = self.sigma_at(self._drawn_step)
        self._coefficients = [state[layer.name].to(layer.weight.device) for layer in self.layers]

    def draw(self, index: int, micro_batch: int = 0) -> Draw:
        """The ε of layer number `index` in the current step, as its recipe."""
        stream = noise.noise_stream(
            self.rank,
            micro_batch,
            self.world_size,
            per_rank=self.per_rank,
            per_micro_batch=self.resample == "micro_batch",
        )
        return Draw(self._keys[index], self._drawn_step, stream, self._coefficients[index])

    def _draw_coefficients(self, step: int) -> None:
        """c of every layer for this step, kept over an `every` window."""
        window = step - step % self.every
        if self._drawn_step == window and self.every > 1:
            return
        if step != window:
            raise RuntimeError(
                f"Cannot begin at step {step}: with every={self.every} its ε was drawn at step {window}, whose row "
                "norms are gone; load_state_dict() what the checkpoint saved, or start at a multiple of `every`."
            )
        self._drawn_step, self._sigma_drawn = step, self.sigma_at(step)
        self._written = None  # the adapter may have moved since the copies were written, even for the same step
        if self._sigma_drawn > 0:
            self._coefficients = [
                noise_coefficients(layer, self._sigma_drawn, scale=self.scale, fan_in=self.fan_in)
                for layer in self.layers
            ]
        else:
            self._coefficients = [
                layer.weight.new_zeros(layer.as_rows(layer.weight).shape[0], dtype=torch.float32)
                for layer in self.layers
            ]

    def _apply(self, micro_batch: int) -> None:
        draws = [self.draw(index, micro_batch) for index in range(len(self.layers))]
        if self.mode == "copy":
            self._write_copies(draws)
        elif self.mode == "inplace":
            self._add_in_place(draws, sign=1.0)
        self._draws = draws

    def _take_away(self) -> None:
        if self.mode == "inplace" and self._draws is not None:
            self._add_in_place(self._draws, sign=-1.0)
        self._draws = None

    def _write_copies(self, draws: list[Draw]) -> None:
        if not self._copies:
            self._copies = [torch.empty_like(layer.weight, requires_grad=False) for layer in self.layers]
        wanted = (draws[0].step, draws[0].stream)
        if self._written == wanted:
            return
        self._written = None  # an interrupt in mid-write must not leave half of them taken for whole
        for layer, draw, copy in zip(self.layers, draws, self._copies, strict=True):
            write_perturbed(layer.as_rows(layer.weight.detach()), draw, layer.as_rows(copy), self._scratch)
        self._written = wanted

    def _add_in_place(self, draws: list[Draw], sign: float) -> None:
        for layer, draw in zip(self.layers, draws, strict=True):
            rows = layer.as_rows(layer.weight.data)
            write_perturbed(rows, draw, rows, self._scratch, sign=sign)

    def _keep_originals(self) -> None:
        self._originals = [layer.weight.detach().to("cpu", copy=True) for layer in self.layers]
        if any(layer.weight.dtype in (torch.bfloat16, torch.float16) for layer in self.layers):
            logger.warning(
                "rho.mode=inplace on a %s backbone: (W + ε) − ε does not round back to W, so the frozen weights drift "
                "and the adapter is trained for a backbone that no longer exists; use rho.mode=copy or recompute.",
                str(self.layers[0].weight.dtype).removeprefix("torch."),
            )

    def perturbed_weight(self, index: int) -> torch.Tensor | None:
        """W + ε that layer number `index` reads now, in the stored layout; None while it reads W.

        The copy itself in copy mode; in recompute mode the shared scratch buffer, valid until the next call.
        """
        layer = self.layers[index]
        if self._draws is None or not layer.enabled() or (self.training_only and not layer.module.training):
            return None
        return self._copies[index] if self.mode == "copy" else _materialise(layer, self._draws[index], self._scratch)


class PerturbedForward:
    """The forward of a layer in copy and recompute mode: reads W + ε where `perturbed_weight` gives it, else W.

    Wrapping the call rather than swapping the parameter leaves W to everything else that reads it: tied weights,
    hashes, checkpoints, merges, and an evaluation after an interrupted step.
    """

    def __init__(self, perturbation: WeightPerturbation, index: int) -> None:
        self.perturbation, self.index = perturbation, index
        self.layer = perturbation.layers[index]
        module = self.layer.module
        self.replaced = module.__dict__.get("forward")  # accelerate's hooks sit there too
        self.plain = self.replaced or type(module).forward.__get__(module)

    @classmethod
    def attach(cls, perturbation: WeightPerturbation, index: int) -> None:
        perturbation.layers[index].module.forward = cls(perturbation, index)

    @staticmethod
    def detach(module: nn.Module) -> None:
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, PerturbedForward):
            del module.forward
            if wrapper.replaced is not None:
                module.forward = wrapper.replaced

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.perturbation.perturbed_weight(self.index)
        if weight is None:
            return self.plain(x)
        if self.perturbation.mode == "copy":
            return _apply_linear(self.layer.module, x, weight)
        draw = self.perturbation._draws[self.index]
        return _RecomputedLinear.apply(x, self.layer, weight, draw, self.perturbation._scratch)


def _apply_linear(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The module's own forward with another weight."""
    if isinstance(module, Conv1D):
        rows = torch.addmm(module.bias, x.reshape(-1, x.shape[-1]), weight)
        return rows.view(*x.shape[:-1], module.nf)
    return functional.linear(x, weight, module.bias)


class _RecomputedLinear(torch.autograd.Function):
    """y = x (W + ε)ᵀ + b with W + ε made in the shared scratch buffer, once forward and once backward.

    W is frozen, so neither x nor W + ε is kept; the recipe of ε is. Casts follow autocast as `F.linear`'s do.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, layer: PerturbedLayer, perturbed: torch.Tensor, draw: Draw, scratch: _Scratch
    ) -> torch.Tensor:
        ctx.layer, ctx.draw, ctx.scratch, ctx.input_dtype = layer, draw, scratch, x.dtype
        return _apply_linear(layer.module, x, perturbed)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        perturbed = _materialise(ctx.layer, ctx.draw, ctx.scratch).to(grad_y.dtype)
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1]) @ ctx.layer.as_rows(perturbed)
        return grad_rows.view(*grad_y.shape[:-1], -1).to(ctx.input_dtype), None, None, None, None


class _Scratch:
    """Reusable flat buffers by (purpose, dtype, device); a request for more elements grows its buffer."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, purpose: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key, elements = (purpose, dtype, device), shape[0] * shape[1]
        if key not in self._buffers or self._buffers[key].numel() < elements:
            self._buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        return self._buffers[key][:elements].view(shape)


def _materialise(layer: PerturbedLayer, draw: Draw, scratch: _Scratch) -> torch.Tensor:
    """W + ε in the stored layout, in the scratch buffer that all layers share."""
    stored = scratch.get("weight", tuple(layer.weight.shape), layer.weight.dtype, layer.weight.device)
    write_perturbed(layer.as_rows(layer.weight.detach()), draw, layer.as_rows(stored), scratch)
    return stored


@torch.no_grad()
def write_perturbed(
    weight: torch.Tensor, draw: Draw, out: torch.Tensor, scratch: _Scratch | None = None, *, sign: float = 1.0
) -> None:
    """out = round(W + sign · c_i z_ij), W and out m × n of one floating dtype; out may be W.

    The sum is made in FP32 (FP64 for an FP64 weight) and rounded once to the weight's dtype.
    """
    rows, columns = weight.shape
    if weight.dtype in noise.FUSED_DTYPES and weight.is_contiguous() and out.is_contiguous() and weight.is_cpu:
        noise.add_normal(weight, sign * draw.c, out, draw.key, draw.step, draw.stream)
        return
    scratch = scratch or _Scratch()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    c = (sign * draw.c).to(wide)
    for start, stop in _row_chunks(rows, columns):
        z = scratch.get("noise", (stop - start, columns), torch.float32, torch.device("cpu"))
        noise.fill_normal(z, draw.key, draw.step, draw.stream, row=start)
        total = scratch.get("sum", (stop - start, columns), wide, weight.device)
        total.copy_(weight[start:stop])
        total.addcmul_(z.to(weight.device, wide), c[start:stop, None])
        out[start:stop].copy_(total)


@torch.no_grad()
def noise_coefficients(
    layer: PerturbedLayer, sigma: float, *, scale: str = "filter", fan_in: bool = True
) -> torch.Tensor:
    """c (m, FP32): the std of ε in each row of a layer (paper section 3.3).

    Raises:
        FloatingPointError: the weight or an adapter holds NaN or infinity.
    """
    weight = layer.as_rows(layer.weight.detach())
    if layer.squared_norms is None:
        layer.squared_norms = _squared_row_norms(weight)
    norms = merged_row_norms(weight, layer.adapters(), layer.squared_norms)
    if not torch.isfinite(norms).all():
        raise FloatingPointError(
            f"The row norms of {layer.name} are not finite: its weight or adapter holds NaN or infinity; "
            "lower optim.lr or rho.sigma, or check the checkpoint."
        )
    if scale == "iid":
        norms = torch.full_like(norms, norms.square().mean().sqrt())
    return norms * (sigma / math.sqrt(weight.shape[1]) if fan_in else sigma)


@torch.no_grad()
def merged_row_norms(
    weight: torch.Tensor, terms: Sequence[AdapterTerm], squared_norms: torch.Tensor | None = None
) -> torch.Tensor:
    """‖W_i + Σ s B_i A‖ of each row (m, FP32) without forming any B·A.

    Stacking the terms as one pair B = [s₁B₁ …], A = [A₁; …], the square is ‖W_i‖² + 2 B_i·(W Aᵀ)_i + B_i (A Aᵀ) B_iᵀ.
    `squared_norms` (m, FP64) may hold ‖W_i‖², which a frozen W never changes.
    """
    squared = _squared_row_norms(weight) if squared_norms is None else squared_norms
    if terms:
        A = torch.cat([term.A.detach() for term in terms]).float()
        B = torch.cat([term.scaling * term.B.detach() for term in terms], dim=1).double()
        projected = torch.cat([weight[i:j].float() @ A.t() for i, j in _row_chunks(*weight.shape)])
        gram = A.double() @ A.double().t()
        squared = squared + (2.0 * projected.double() * B + (B @ gram) * B).sum(dim=1)
    return squared.clamp_min(0.0).sqrt().float()


@torch.no_grad()
def merged_row_norms_reference(weight: torch.Tensor, terms: Sequence[AdapterTerm]) -> torch.Tensor:
    """Slow twin of `merged_row_norms`: forms W' in FP64 (m × n) and takes its row norms."""
    merged = weight.double()
    for term in terms:
        merged = merged + term.scaling * (term.B.double() @ term.A.double())
    return merged.norm(dim=1)


def _squared_row_norms(weight: torch.Tensor) -> torch.Tensor:
    chunks = [weight[i:j].double().square().sum(dim=1) for i, j in _row_chunks(*weight.shape)]
    return torch.cat(chunks) if chunks else weight.new_zeros(0, dtype=torch.float64)


def _row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    height = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return ((start, min(start + height, rows)) for start in range(0, rows, height))


def choose_mode(layers: Sequence[PerturbedLayer]) -> Literal["copy", "recompute"]:
    """copy where a second set of weights takes at most half of the device's free memory, else recompute."""
    needed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    device = layers[0].weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return "copy" if needed <= free / 2 else "recompute"


def _refuse_faults(layers, sigma, total_steps, ramp, mode, every, resample, scale) -> None:
    faults = []
    if not layers:
        faults.append("Invalid layers=[]: at least one LoRA layer is needed; wrap the model with PEFT's LoRA first.")
    if not (sigma >= 0 and math.isfinite(sigma)):
        faults.append(f"Invalid sigma={sigma}: it must be finite and ≥ 0; use sigma=0 for plain LoRA.")
    for name, value in (("total_steps", total_steps), ("every", every)):
        if value < 1:
            faults.append(f"Invalid {name}={value}: it counts optimizer steps and must be ≥ 1.")
    choices = {
        "ramp": (ramp, tuple(RAMPS)),
        "mode": (mode, ("auto", "copy", "recompute", "inplace")),
        "resample": (resample, ("step", "micro_batch")),
        "scale": (scale, ("filter", "iid")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            faults.append(f"Invalid {name}={value!r}: choose one of {', '.join(known)}.")
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        faults.append(f"Invalid layers: {len(names) - len(set(names))} names occur twice; noise is keyed by name.")
    if faults:
        raise ValueError("\n".join(faults))
