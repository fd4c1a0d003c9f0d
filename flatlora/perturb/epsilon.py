"""Computes ε: the row norms that scale it, and the passes that write W + ε, on the host and on a GPU.

    c_i = σ_t/√n · ‖W'_i‖ (paper section 3.3; the ablations leave out 1/√n or the row),   out = round(W + c_i z_ij)

`HostEpsilon` works layer by layer with noise/host.py; `DeviceEpsilon` uses noise/triton_kernels.py, with one launch for
all layers of a model. Both draw the same stream of normals. `ShardedEpsilon` uses either for weights that FSDP2 shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from flatlora.noise import host, torch_passes, triton_kernels
from flatlora.perturb.layers import AdapterTerm, PerturbedLayer
from flatlora.utils.deferred import HostCopy

_CHUNK_ELEMENTS = 1 << 18  # 1 MiB of FP32: noise and weight of a chunk stay in the L2 cache


@dataclass(frozen=True)
class Draw:
    """Everything that determines one layer's ε: Philox key, counter words, and c, shape (m,), FP32."""

    key: tuple[int, int]
    step: int
    stream: int
    c: torch.Tensor


class Epsilon(Protocol):
    """ε of a list of layers. The lists of tensors below have one entry per layer."""

    def coefficients(self, sigma: float, *, scale: str, fan_in: bool) -> list[torch.Tensor]:
        """Returns c of every layer, the standard deviation of ε in each row, shape (m,), FP32 (paper section 3.3).

        Raises:
            FloatingPointError: a weight or an adapter contains NaN or infinity; on a GPU `check` raises it later.
        """
        ...

    def restore(self, coefficients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Moves the c of a saved draw to the layers' device and uses them."""
        ...

    def write(self, draws: Sequence[Draw], outs: Sequence[torch.Tensor], sign: float = 1.0) -> None:
        """outs = round(W + sign · c z), in the stored layout; an out may be its W."""
        ...

    def set_counter(self, draws: Sequence[Draw]) -> None:
        """Set step and stream for the `materialize` calls that a CUDA graph replays without running host code."""
        ...

    def materialize(self, index: int, draw: Draw) -> torch.Tensor:
        """W + ε of one layer in the stored layout, in a buffer that the next call overwrites."""
        ...

    def check(self) -> None:
        """Raise FloatingPointError if row norms were not finite in any step before the last call (CPU: so far).

        So a call on a GPU does not wait for the steps that are still running.
        """
        ...


def epsilon_of(
    layers: Sequence[PerturbedLayer], keys: Sequence[tuple[int, int]], shares: Sequence[torch.Tensor] | None = None
) -> Epsilon:
    """The implementation for the device of the layers, which must be on one device.

    Args:
        shares: this process's rows of each W, if the layers are sharded.
    """
    if shares is not None:
        return ShardedEpsilon(layers, keys, shares)
    return HostEpsilon(layers) if layers[0].device.type == "cpu" else DeviceEpsilon(layers, keys)


class ShardedEpsilon:
    """ε of layers whose rows FSDP2 has split among the processes, with the bits that one process would draw.

    Each process computes c of its own rows, and the processes tell each other. `write` is for the process's own rows,
    `materialize` for a whole weight that FSDP2 has gathered.

    Args:
        shares: W of the process's rows of each layer, as matrices.
    """

    def __init__(
        self,
        layers: Sequence[PerturbedLayer],
        keys: Sequence[tuple[int, int]],
        shares: Sequence[torch.Tensor],
    ) -> None:
        self._own = [layer.own_rows(rows) for layer, rows in zip(layers, shares, strict=True)]
        self._held = [i for i, rows in enumerate(shares) if len(rows)]  # a small layer may have rows for few processes
        self._of_own = epsilon_of([self._own[i] for i in self._held], [keys[i] for i in self._held])
        self._of_whole = epsilon_of(layers, keys)
        self._group = layers[0].weight.device_mesh.get_group()
        self._rows = [layer.shape[0] for layer in layers]
        self._device = layers[0].device

    def coefficients(self, sigma: float, *, scale: str, fan_in: bool) -> list[torch.Tensor]:
        c = torch.zeros(sum(self._rows), device=self._device)
        own = self._of_own.coefficients(sigma, scale=scale, fan_in=fan_in)
        for mine, each in zip(self._own_parts(c.split(self._rows)), own, strict=True):
            mine.copy_(each)
        torch.distributed.all_reduce(c, group=self._group)  # exact: all but one of the terms are 0
        return self.restore(c.split(self._rows))

    def restore(self, coefficients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._of_own.restore(self._own_parts(coefficients))
        return self._of_whole.restore(coefficients)

    def write(self, draws: Sequence[Draw], outs: Sequence[torch.Tensor], sign: float = 1.0) -> None:
        parts = self._own_parts([draw.c for draw in draws])
        own = [replace(draws[i], c=c) for i, c in zip(self._held, parts, strict=True)]
        self._of_own.write(own, [outs[i] for i in self._held], sign)

    def set_counter(self, draws: Sequence[Draw]) -> None:
        self._of_whole.set_counter(draws)

    def materialize(self, index: int, draw: Draw) -> torch.Tensor:
        return self._of_whole.materialize(index, draw)

    def check(self) -> None:
        self._of_own.check()

    def _own_parts(self, coefficients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of the elements that belong to this process's rows, of the layers that it holds rows of."""
        firsts = [(coefficients[i], self._own[i].first_row, self._own[i].shape[0]) for i in self._held]
        return [c[first : first + count] for c, first, count in firsts]


class HostEpsilon:
    """ε on the CPU, layer by layer."""

    def __init__(self, layers: Sequence[PerturbedLayer]) -> None:
        self.layers, self._scratch = layers, _Scratch()

    def coefficients(self, sigma: float, *, scale: str, fan_in: bool) -> list[torch.Tensor]:
        norms = host.share([_row_norms_of(layer) for layer in self.layers])
        if not torch.cat(norms).isfinite().all():
            names = [layer.name for layer, each in zip(self.layers, norms, strict=True) if not each.isfinite().all()]
            raise FloatingPointError(_not_finite(names[0]))
        return [
            _coefficients(each, layer.shape[1], sigma, scale=scale, fan_in=fan_in)
            for layer, each in zip(self.layers, norms, strict=True)
        ]

    def restore(self, coefficients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(coefficients)

    def write(self, draws: Sequence[Draw], outs: Sequence[torch.Tensor], sign: float = 1.0) -> None:
        def write(layer: PerturbedLayer, draw: Draw, out: torch.Tensor) -> None:
            weight, stored = layer.as_rows(layer.dense()), layer.stored_dtype
            write_perturbed(weight, draw, layer.as_rows(out), sign=sign, stored=stored, first_row=layer.first_row)

        host.share([functools.partial(write, *each) for each in zip(self.layers, draws, outs, strict=True)])

    def set_counter(self, draws: Sequence[Draw]) -> None:
        """Does nothing: each call gets its draw as an argument."""

    def materialize(self, index: int, draw: Draw) -> torch.Tensor:
        layer = self.layers[index]
        stored = self._scratch.get("weight", layer.stored_shape, layer.dtype, layer.device)
        weight = layer.dense(stored)  # a packed weight is unpacked into the buffer, where ε is then added
        rows, dtype = layer.as_rows(weight), layer.stored_dtype
        write_perturbed(rows, draw, layer.as_rows(stored), self._scratch, stored=dtype)
        return stored

    def check(self) -> None:
        """Does nothing: `coefficients` has checked already."""


class DeviceEpsilon:
    """ε on one GPU: one launch for all row norms, one for the noise of all layers, without synchronization.

    The coefficients of all layers are in one vector whose address never changes, and step and stream are on the device.
    So passes, and CUDA graphs that captured them, stay valid from step to step.
    """

    def __init__(self, layers: Sequence[PerturbedLayer], keys: Sequence[tuple[int, int]]) -> None:
        self.layers, self.keys = layers, list(keys)
        self.device = layers[0].device
        self._rows, self._columns = ([layer.shape[axis] for layer in layers] for axis in (0, 1))
        self._largest = max(math.prod(layer.shape) for layer in layers)
        self._c = torch.zeros(sum(self._rows), device=self.device)
        self._views = list(self._c.split(self._rows))
        fan_in = torch.tensor(self._columns, device=self.device).double().rsqrt()
        heights = torch.tensor(self._rows, device=self.device)
        self._fan_in = torch.repeat_interleave(fan_in, heights, output_size=self._c.numel())  # 1/√n of each row
        self._counter = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._counted: tuple[int, int] | None = None  # what the counter holds
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._checked = HostCopy(self._finite)  # at the last call of `check`
        self._squared: torch.Tensor | None = None  # ‖W_i‖² of all layers
        self._norms: tuple[object, list[tuple[range, triton_kernels.RowNormPass]]] | None = None
        self._passes: dict[object, triton_kernels.NoisePass] = {}
        self._scratch = _Scratch()

    def coefficients(self, sigma: float, *, scale: str, fan_in: bool) -> list[torch.Tensor]:
        squares = self._merged_squares()
        self._finite &= squares.isfinite().all()
        if scale == "iid":
            squares = torch.cat([part.mean().expand_as(part) for part in squares.split(self._rows)])
        factors = (sigma * self._fan_in if fan_in else torch.full_like(self._fan_in, sigma)).float()
        torch.mul(squares.clamp(min=0.0).sqrt_(), factors, out=self._c)
        return self._views

    def restore(self, coefficients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._c.copy_(torch.cat([c.to(self.device) for c in coefficients]))
        return self._views

    def write(self, draws: Sequence[Draw], outs: Sequence[torch.Tensor], sign: float = 1.0) -> None:
        self._count(draws[0])
        weights = [layer.dense() if _is_buffered(layer) else layer.weight for layer in self.layers]
        self._pass(range(len(self.layers)), weights, outs).launch(sign)

    def set_counter(self, draws: Sequence[Draw]) -> None:
        self._count(draws[0])

    def materialize(self, index: int, draw: Draw) -> torch.Tensor:
        layer = self.layers[index]
        stored = self._buffer(layer)
        self._count(draw)
        self._pass([index], [layer.dense(stored)], [stored]).launch()
        return stored

    def check(self) -> None:
        finite, self._checked = self._checked, HostCopy(self._finite)
        if not finite.tolist():
            parts = zip(self.layers, self._c.split(self._rows), strict=True)
            names = [layer.name for layer, c in parts if not c.isfinite().all()]
            raise FloatingPointError(_not_finite(names[0] if names else "a layer, in an earlier step,"))

    def _count(self, draw: Draw) -> None:
        if self._counted != (draw.step, draw.stream):
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"Cannot set step={draw.step}, stream={draw.stream} while a CUDA graph is captured: every "
                    "replay would draw the same noise; run the backward of a micro-batch before the next one begins."
                )
            self._counter.copy_(torch.tensor([draw.step, draw.stream]), non_blocking=True)
            self._counted = (draw.step, draw.stream)

    def _pass(
        self, indices: Sequence[int], weights: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]
    ) -> triton_kernels.NoisePass:
        """The pass over these layers into these buffers; built once, because filling its tables takes a while."""
        address = tuple(indices), *(tuple(each.data_ptr() for each in tensors) for tensors in (outs, weights))
        if address not in self._passes:
            layers, c = [self.layers[i] for i in indices], self._c.split(self._rows)
            self._passes[address] = triton_kernels.NoisePass(
                [layer.as_rows(weight.detach()) for layer, weight in zip(layers, weights, strict=True)],
                [layer.as_rows(out) for layer, out in zip(layers, outs, strict=True)],
                self._c if len(layers) == len(self.layers) else c[indices[0]],
                [self.keys[i] for i in indices],
                rows=[layer.first_row for layer in layers],
                counter=self._counter,
            )
        return self._passes[address]

    def _frozen_squares(self) -> torch.Tensor:
        """‖W_i‖² of the rows of all layers, shape (Σ m,), FP32; computed once, because W is frozen."""
        if self._squared is None:
            weights = (layer.as_rows(layer.dense()) for layer in self.layers)  # unpacked one at a time
            self._squared = torch.cat([torch_passes.squared_row_norms(weight) for weight in weights]).float()
        return self._squared

    @torch.no_grad()
    def _merged_squares(self) -> torch.Tensor:
        """‖W'_i‖² of the rows of all layers, shape (Σ m,), FP32."""
        # Passes are rebuilt if a factor has moved in memory, or the scaling or the adapter has changed.
        state = [layer.state() for layer in self.layers]
        if self._norms is None or self._norms[0] != state:
            terms = [list(layer.adapters()) for layer in self.layers]
            plain = [len(each) == 1 and all(t.dtype == torch.float32 for t in each[0][:2]) for each in terms]
            if not all(plain) or any(layer.multiplies for layer in self.layers):
                return self._merged_squares_of(terms)
            self._norms = state, self._norm_passes([each[0] for each in terms])
        for indices, norm_pass in self._norms[1]:
            for index in indices:
                self._readable(index)
            norm_pass()
        return self._c

    def _norm_passes(self, pairs: Sequence[AdapterTerm]) -> list[tuple[range, triton_kernels.RowNormPass]]:
        """One pass for all layers, or one per layer if their weights are read from a buffer. Output is `_c`."""
        everyone = range(len(self.layers))
        groups = [range(i, i + 1) for i in everyone] if any(map(_is_buffered, self.layers)) else [everyone]
        whole = self._frozen_squares()
        squared, c = whole.split(self._rows), self._c.split(self._rows)
        return [
            (
                group,
                triton_kernels.RowNormPass(
                    [self.layers[i].as_rows(self._readable(i)) for i in group],
                    [pairs[i].A.detach() for i in group],
                    [pairs[i].B.detach() for i in group],
                    [pairs[i].scaling for i in group],
                    squared_norms=whole if group == everyone else squared[group[0]],
                    out=self._c if group == everyone else c[group[0]],
                ),
            )
            for group in groups
        ]

    def _readable(self, index: int) -> torch.Tensor:
        """W of one layer in the stored layout: the weight, or a buffer with it that `materialize` uses too."""
        layer = self.layers[index]
        return layer.dense(self._buffer(layer) if _is_buffered(layer) else None)

    def _buffer(self, layer: PerturbedLayer) -> torch.Tensor:
        return self._scratch.get("weight", layer.stored_shape, layer.dtype, self.device, self._largest)

    def _merged_squares_of(self, terms: Sequence[Sequence[AdapterTerm]]) -> torch.Tensor:
        """`_merged_squares` for layers with several adapters or none, or HiRA's, one layer after the other."""
        squares = []
        for layer, each, squared in zip(self.layers, terms, self._frozen_squares().split(self._rows), strict=True):
            norms = merged_row_norms(layer.as_rows(layer.dense()), each, squared.double(), multiplied=layer.multiplies)
            squares.append(norms.square())
        return torch.cat(squares)


def _is_buffered(layer: PerturbedLayer) -> bool:
    """Whether a GPU reads the weight from a buffer: it is packed, or on the host."""
    return layer.quantized or layer.offloaded


class _Scratch:
    """Reusable flat buffers by (purpose, dtype, device), which grow on demand.

    At least `reserve` elements are allocated, so that a buffer can keep the address that passes were built for.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(
        self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, reserve: int = 0
    ) -> torch.Tensor:
        key, elements = (purpose, dtype, device), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < elements:
            self._buffers[key] = torch.empty(max(elements, reserve), dtype=dtype, device=device)
        return self._buffers[key][:elements].view(shape)


@torch.no_grad()
def write_perturbed(
    weight: torch.Tensor,
    draw: Draw,
    out: torch.Tensor,
    scratch: _Scratch | None = None,
    *,
    sign: float = 1.0,
    stored: torch.dtype | None = None,
    first_row: int = 0,
) -> None:
    """Writes out = round(W + sign · c_i z_ij); W and out are m × n with the same floating dtype, and out may be W.

    W may be a slice of a layer's rows, from `first_row` on. The sum is computed in FP32 (FP64 for an FP64 weight) and
    rounded once, to `stored` (the weight's dtype if None).
    """
    rows, columns = weight.shape
    rounded = stored == torch.bfloat16 and weight.dtype == torch.float32
    if host.supports(weight, out) and (rounded or stored in (None, weight.dtype)):
        host.add_normal(weight, sign * draw.c, out, draw.key, draw.step, draw.stream, row=first_row, rounded=rounded)
        return
    scratch = scratch or _Scratch()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    c = (sign * draw.c).to(wide)
    for start, stop in torch_passes.row_chunks(rows, columns, _CHUNK_ELEMENTS):
        z = scratch.get("noise", (stop - start, columns), torch.float32, torch.device("cpu"))
        host.fill_normal(z, draw.key, draw.step, draw.stream, row=first_row + start)
        total = scratch.get("sum", (stop - start, columns), wide, weight.device)
        total.copy_(weight[start:stop])
        total.addcmul_(z.to(weight.device, wide), c[start:stop, None])
        out[start:stop].copy_(total if stored is None else total.to(stored))


def _coefficients(norms: torch.Tensor, columns: int, sigma: float, *, scale: str, fan_in: bool) -> torch.Tensor:
    """c from the row norms of one layer."""
    if scale == "iid":
        norms = norms.square().mean().sqrt().expand_as(norms)
    return norms * (sigma / math.sqrt(columns) if fan_in else sigma)


def _not_finite(name: str) -> str:
    return (
        f"The row norms of {name} are not finite: its weight or adapter contains NaN or infinity; lower optim.lr or "
        "rho.sigma, or check the checkpoint."
    )


@torch.no_grad()
def merged_row_norms(
    weight: torch.Tensor,
    terms: Sequence[AdapterTerm],
    squared_norms: torch.Tensor | None = None,
    *,
    multiplied: bool = False,
) -> torch.Tensor:
    """Returns ‖W_i + Σ s B_i A‖ of each row, shape (m,), FP32, without forming B·A.

    With the terms stacked as B = [s₁B₁ …] and A = [A₁; …], the square is ‖W_i‖² + 2 B_i·(W Aᵀ)_i + B_i (A Aᵀ) B_iᵀ.
    `squared_norms` is ‖W_i‖², shape (m,), FP64, if it is known. With `multiplied`, the result is
    ‖W_i ⊙ (1 + Σ s B_i A)‖, for which parts of B·A are formed.
    """
    return _row_norms(weight, terms, squared_norms, multiplied=multiplied)()


@torch.no_grad()
def _row_norms_of(layer: PerturbedLayer) -> Callable[[], torch.Tensor]:
    weight = layer.as_rows(layer.dense())
    if layer.squared_norms is None:  # computed once, because W is frozen
        layer.squared_norms = torch_passes.squared_row_norms(weight)
    return _row_norms(weight, layer.adapters(), layer.squared_norms, multiplied=layer.multiplies)


def _row_norms(
    weight: torch.Tensor, terms: Sequence[AdapterTerm], squared: torch.Tensor | None, *, multiplied: bool
) -> Callable[[], torch.Tensor]:
    """What is left to do for the row norms: a call of compiled code, which threads can share.

    Everything else is done at once: interpreted code of several threads waits for the GIL, and torch's operations have
    threads of their own.
    """
    if terms and multiplied:
        norms = _multiplied_row_norms(weight, terms)
        return lambda: norms
    if squared is None:
        squared = torch_passes.squared_row_norms(weight)
    if terms:
        A, B = _stacked(terms)
        if host.supports(weight):
            return functools.partial(host.merged_row_norms, weight, A, B, squared)
        squared = torch_passes.squared_row_norms(weight, A, B, squared)
    return lambda: squared.clamp_min(0.0).sqrt().float()


def _stacked(terms: Sequence[AdapterTerm]) -> tuple[torch.Tensor, torch.Tensor]:
    """A = [A₁; …] and B = [s₁B₁ …], FP32."""
    if len(terms) == 1:  # without copies: a step does this for hundreds of small layers
        (term,) = terms
        return term.A.detach().float(), (term.scaling * term.B.detach()).float()
    A = torch.cat([term.A.detach() for term in terms])
    return A.float(), torch.cat([term.scaling * term.B.detach() for term in terms], dim=1).float()


def _multiplied_row_norms(weight: torch.Tensor, terms: Sequence[AdapterTerm]) -> torch.Tensor:
    A, B = _stacked(terms)
    rows, columns = weight.shape
    elements = _CHUNK_ELEMENTS if weight.is_cpu else 64 * _CHUNK_ELEMENTS  # few launches on a GPU
    norms = [
        torch.linalg.vector_norm(weight[i:j].float() * (1.0 + B[i:j] @ A), dim=1, dtype=torch.float64)
        for i, j in torch_passes.row_chunks(rows, columns, elements)
    ]
    return torch.cat(norms).float()


@torch.no_grad()
def merged_row_norms_reference(
    weight: torch.Tensor, terms: Sequence[AdapterTerm], *, multiplied: bool = False
) -> torch.Tensor:
    """Slow reference for `merged_row_norms`: forms W' in FP64 (m × n) and takes its row norms."""
    change = torch.zeros_like(weight, dtype=torch.float64)
    for term in terms:
        change = change + term.scaling * (term.B.double() @ term.A.double())
    merged = weight.double() * (1.0 + change) if multiplied else weight.double() + change
    return merged.norm(dim=1)
