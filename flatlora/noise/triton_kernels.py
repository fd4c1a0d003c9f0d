"""The noise pass and the row-norm pass on a GPU (Triton), one launch for all layers of a dtype.

    noise pass      out_ij = round(W_ij + sign · c_i z_ij)   z: the stream of philox.py, c: paper section 3.3
    row-norm pass   ‖W'_i‖² = ‖W_i‖² + 2 B_i·(W Aᵀ)_i + B_i (A Aᵀ) B_iᵀ,   W' = W + B·A, the scaling s inside B

Both are memory-bound: each reads W once, which takes longer than Philox, Box–Muller and the rank-r products. A pass is
built once for a list of weights. A table on the device has one row of addresses and sizes per weight, and a second
array holds the table row of each program of the grid. Step and stream are read from device memory, so a captured CUDA
graph can be replayed with new ones.

Without Triton the passes run as plain torch operations (torch_passes.py), which also are their reference in tests.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch

from flatlora.noise import philox
from flatlora.noise.philox import COLUMNS_PER_BLOCK, PHILOX_ROUNDS, validate_counter
from flatlora.noise.torch_passes import (
    add_normal_unchecked,
    one_device,
    squared_row_norms,
    validate_address,
    validate_coefficients,
    validate_equal_lengths,
    validate_factors,
    validate_matrix,
    validate_outs,
)

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Python on CPU tensors, for tests
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NOISE_TILE = {"ROWS": 4, "BLOCKS": 32, "num_warps": 1}  # 4 rows × 256 columns, 8 columns of each row per thread
NOISE_TILE_TRANSPOSED = {"ROWS": 128, "BLOCKS": 4, "num_warps": 4}  # neighboring threads on neighboring rows
ROW_NORM_TILE = {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3}
ROW_NORM_TILE_WIDE = {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2}  # for FP32, FP16 and r > 32
ROW_NORM_TILE_NARROW = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3}  # for r > 16, factors in registers


def available(device: torch.device | str) -> bool:
    """Whether the Triton kernels support this device: NVIDIA, compute capability 8.0 (BF16 arithmetic) or later."""
    device = torch.device(device)
    if INTERPRETED:
        return HAS_TRITON and device.type == "cpu"
    return (
        HAS_TRITON
        and device.type == "cuda"
        and torch.version.cuda is not None  # the inline assembly is PTX
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class NoisePass:
    """Writes out_ij = round(weight_ij + sign · c_i z_ij) for many weights, summed in FP32 (FP64 for FP64 weights).

    A pass is built once and called each step. It keeps the tensors' addresses, so build a new one when a storage is
    replaced.

    Args:
        weights, outs: m_k × n_k matrices on one device, any strides; an out has the shape and floating dtype of its
            weight, and is that weight or overlaps with no other tensor. The pass is fastest if they are row-major and
            16-byte aligned, and n_k and the column offset are multiples of 8.
        coefficients: c of all weights, concatenated: shape (Σ m_k,), FP32, contiguous. Write into it, never replace it.
        keys: two 32-bit Philox words for each weight; see `noise.philox.layer_key`.
        rows, columns: offset of each weight in its whole layer, for slices of a sharded weight; default 0.
        counter: step and stream, shape (2,), INT64 on the device; passes that share it are set together.

    Raises:
        ValueError: tensors do not fit together, or an element is outside Philox's 32-bit counter.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        coefficients: torch.Tensor,
        keys: Sequence[tuple[int, int]],
        *,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        counter: torch.Tensor | None = None,
    ) -> None:
        rows = [0] * len(weights) if rows is None else rows
        columns = [0] * len(weights) if columns is None else columns
        validate_equal_lengths(weights=weights, outs=outs, keys=keys, rows=rows, columns=columns)
        self.device = one_device([*weights, *outs, coefficients])
        self.counter = torch.zeros(2, dtype=torch.int64, device=self.device) if counter is None else counter
        validate_outs(weights, outs)
        validate_coefficients(coefficients, sum(weight.shape[0] for weight in weights))
        for weight, key, row, column in zip(weights, keys, rows, columns, strict=True):
            validate_address(weight.shape, key, row, column)
        if self.counter.dtype != torch.int64 or self.counter.shape != (2,) or self.counter.device != self.device:
            raise ValueError(
                f"Invalid counter={self.counter.dtype} {tuple(self.counter.shape)} on {self.counter.device}: it must "
                f"hold step and stream as two INT64 on {self.device}; use the counter of another pass."
            )
        c = coefficients.split([weight.shape[0] for weight in weights])
        jobs = [job for job in zip(weights, c, outs, keys, rows, columns, strict=True) if job[0].numel()]
        fast, self._slow = _divide(jobs, self.device)
        self._groups: list[tuple[dict, _Grid]] = []
        self._build_groups(fast)
        self._alive = jobs  # the tables hold addresses of these tensors, which must not be freed

    def _build_groups(self, fast: Sequence[tuple]) -> None:
        groups: defaultdict[tuple[torch.dtype, str], list[tuple]] = defaultdict(list)
        for job in fast:
            groups[_noise_group(*job)].append(job)
        for (dtype, layout), jobs in groups.items():
            tile = _noise_tile(layout)
            grid = _Grid(self.device)
            for weight, c, out, key, row, column in jobs:
                skipped = column % COLUMNS_PER_BLOCK  # the slice may start inside a Philox block
                across = -(-(weight.shape[1] + skipped) // (tile["BLOCKS"] * COLUMNS_PER_BLOCK))
                grid.add(
                    (weight.data_ptr(), out.data_ptr(), c.data_ptr(), *weight.shape, *weight.stride(), *out.stride()),
                    (*key, row, column),
                    height=-(-weight.shape[0] // tile["ROWS"]),
                    width=across,
                )
            grid.close()
            self._groups.append((_noise_constants(dtype, layout, grid.lone), grid))

    def __call__(self, step: int, stream: int, sign: float = 1.0) -> None:
        """Write all outs for this step and stream; sign is +1 or −1."""
        self.set_counter(step, stream)
        self.launch(sign)

    def set_counter(self, step: int, stream: int) -> None:
        """Set step and stream of the next launch, or of the next replay of a captured launch."""
        validate_counter(step=step, stream=stream)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"Cannot set step={step} while a CUDA graph is captured: every replay would draw the same noise; "
                "capture launch() alone and call set_counter() before each replay."
            )
        self.counter[0].fill_(step)
        self.counter[1].fill_(stream)

    @torch.no_grad()
    def launch(self, sign: float = 1.0) -> None:
        """Run the pass with step and stream from the counter; it can be captured in a CUDA graph."""
        for constants, grid in self._groups:
            grid.launch(_noise_kernel, self.counter, float(sign), **constants)
        for weight, c, out, key, row, column in self._slow:
            step, stream = self.counter.unbind()
            add_normal_unchecked(weight, c, out, key, step, stream, row, column, sign)


class RowNormPass:
    """Computes ‖W_i + s B_i A‖² of each row of many frozen weights without forming B·A (paper section 3.3).

    ‖W_i‖² is computed at construction and kept, so build a new pass if a weight changes. The result is deterministic.
    For a slice of a sharded weight pass A[:, columns] and B[rows]; the squares of column slices add up to those of the
    whole row. Rounding may make a square near zero negative: clamp it before taking the root.

    Args:
        weights: m_k × n_k, floating, any strides, one device.
        A, B: r × n_k and m_k × r, FP32, unit column stride, r ≥ 0; several adapters are stacked: [A₁; …], [s₁B₁ …].
            The pass keeps their addresses and reads their values at each call.
        scalings: s of each weight; default 1.
        squared_norms: ‖W_i‖² of all weights, shape (Σ m_k,), if known.
        out: output buffer, shape (Σ m_k,), FP32; the caller may change its values between calls. None allocates one.

    Raises:
        ValueError: tensors do not fit together.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        A: Sequence[torch.Tensor],
        B: Sequence[torch.Tensor],
        scalings: Sequence[float] | None = None,
        *,
        squared_norms: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> None:
        scalings = [1.0] * len(weights) if scalings is None else scalings
        validate_equal_lengths(weights=weights, A=A, B=B, scalings=scalings)
        self.device = one_device([*weights, *A, *B])
        for weight, a, b in zip(weights, A, B, strict=True):
            validate_matrix(weight)
            validate_factors(weight, a, b)
        heights = [weight.shape[0] for weight in weights]
        if squared_norms is None:
            squared_norms = torch.cat([squared_row_norms(weight.detach()) for weight in weights])
        if squared_norms.shape != (sum(heights),):
            raise ValueError(
                f"Invalid squared_norms={tuple(squared_norms.shape)}: it must have one number per row, {sum(heights)}."
            )
        self.squared_norms = squared_norms.to(self.device, torch.float32).contiguous()
        self.result = torch.empty_like(self.squared_norms) if out is None else out
        validate_coefficients(self.result, sum(heights))
        factors = torch.tensor(scalings, dtype=torch.float32, device=self.device).split(1)
        squares = self.squared_norms.split(heights), self.result.split(heights)
        every = zip(weights, A, B, factors, *squares, strict=True)
        jobs = [job for job in every if job[0].numel() and job[1].shape[0]]
        fast, self._slow = _divide(jobs, self.device)
        self._groups: list[tuple[dict, dict, torch.Tensor, _Grid]] = []
        self._build_groups(fast)
        self._alive = jobs  # the tables hold addresses of these tensors, also of the scalings, which must not be freed

    def _build_groups(self, fast: Sequence[tuple]) -> None:
        groups: defaultdict[tuple[torch.dtype, int, bool], list[tuple]] = defaultdict(list)
        for job in fast:
            groups[_row_norm_group(job[0], job[1])].append(job)
        for (dtype, rank, aligned), jobs in groups.items():
            capability = _capability(self.device)
            tile = _row_norm_tile(dtype, rank, capability)
            grams = torch.empty(len(jobs), rank, rank, device=self.device)
            grid = _Grid(self.device)
            for (weight, a, b, scaling, square, result), gram in zip(jobs, grams, strict=True):
                pointers = (t.data_ptr() for t in (weight, a, b, scaling, square, result, gram))
                sizes = (*weight.shape, a.shape[0], *weight.stride(), a.stride(0), b.stride(0))
                grid.add(pointers, sizes, height=-(-weight.shape[0] // tile["BM"]))
            grid.close()
            constants = _row_norm_constants(dtype, rank, aligned, grid.lone, capability)
            self._groups.append((constants, _gram_constants(rank, capability), grams, grid))

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """The squares, shape (Σ m_k,), FP32, in a buffer that the next call overwrites; can be captured."""
        self.result.copy_(self.squared_norms)  # the kernels skip rows without an adapter
        for constants, gram_constants, grams, grid in self._groups:
            across = gram_constants["RANK"] // gram_constants["TILE"]
            with on_device(self.device):
                _gram_kernel[len(grams), across, across](grid.table, **gram_constants)
            grid.launch(_row_norm_kernel, **constants)
        for weight, a, b, scaling, square, result in self._slow:
            result.copy_(squared_row_norms(weight, a, scaling * b, square))
        return self.result


def _divide(jobs: Sequence[tuple], device: torch.device) -> tuple[list[tuple], list[tuple]]:
    """Split jobs (tuples that start with a weight) into those for the kernels and those for torch."""
    served = available(device)
    fast = [job for job in jobs if served and job[0].dtype in _KERNEL_DTYPES]
    return fast, [job for job in jobs if not (served and job[0].dtype in _KERNEL_DTYPES)]


class _Grid:
    """The launch grid over many tensors: a device table with one INT64 row per tensor, and each program's row.

    A single tensor does not need the latter: recompute mode has a grid per layer, and 4 bytes per program would add up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows: list[tuple[int, ...]] = []
        self._sizes: list[int] = []

    def add(self, *fields: Iterable[int], height: int, width: int = 1) -> None:
        """Add a tensor cut into height × width tiles; its table row ends with its first program and its width."""
        values = [value for group in fields for value in group]
        values = [value - (1 << 64) if value >= 1 << 63 else value for value in values]
        self._rows.append((*values, sum(self._sizes), width))
        self._sizes.append(height * width)

    def close(self) -> None:
        self.table = torch.tensor(self._rows, dtype=torch.int64, device=self.device)
        self.lone = len(self._sizes) == 1
        numbers = torch.arange(0 if self.lone else len(self._sizes), dtype=torch.int32, device=self.device)
        sizes = torch.tensor([] if self.lone else self._sizes, dtype=torch.int64, device=self.device)
        self.owners = torch.repeat_interleave(numbers, sizes)
        self.programs = sum(self._sizes)

    def launch(self, kernel, *arguments, **constants) -> None:
        with on_device(self.device):
            kernel[(self.programs,)](self.table, self.owners, *arguments, **constants)


# --- Triton kernels. Every index that is multiplied by a stride is INT64, because m · n may exceed 2³¹.

jit = triton.jit if HAS_TRITON else lambda function: function
_constant = tl.constexpr if HAS_TRITON else lambda value: value
_M0, _M1 = _constant(philox.PHILOX_M0), _constant(philox.PHILOX_M1)
_W0, _W1 = _constant(philox.PHILOX_W0), _constant(philox.PHILOX_W1)
_ROUNDS, _COLUMNS = _constant(PHILOX_ROUNDS), _constant(COLUMNS_PER_BLOCK)
_TWO_PI, _MINUS_TWO_LN2 = _constant(6.283185307179586), _constant(-1.3862943611198906)

# One word → two normals in 14 instructions, 4 of them on the special-function unit. The 16-bit halves become floats by
# setting mantissa bits, which saves two conversions on that unit: 2²³ + lo, then exactly u = (lo + ½) / 2¹⁶; and
# 1 + (hi + ½) / 2¹⁶, then exactly minus 1½. So the angle is in (−π, π), where sin and cos .approx have errors below
# 2⁻²⁰, and it is off by half a turn, which the negated radius corrects.
_BOX_MULLER_PTX = _constant("""{
    .reg .b32 bits; .reg .f32 v, radius, angle, c, s;
    lop3.b32 bits, $2, 0xFFFF, 0x4B000000, 0xEA;
    mov.b32 v, bits;
    fma.rn.f32 v, v, 0f37800000, 0fC2FFFFFF;
    lg2.approx.ftz.f32 v, v;
    mul.f32 v, v, 0fBFB17218;
    sqrt.approx.ftz.f32 radius, v;
    shr.u32 bits, $2, 9;
    lop3.b32 bits, bits, 0x7FFF80, 0x3F800040, 0xEA;
    mov.b32 v, bits;
    add.f32 v, v, 0fBFC00000;
    mul.f32 angle, v, 0f40C90FDB;
    cos.approx.ftz.f32 c, angle;
    sin.approx.ftz.f32 s, angle;
    neg.f32 radius, radius;
    mul.f32 $0, radius, c;
    mul.f32 $1, radius, s;
}""")


@jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-7; scalar counter words are broadcast as late as possible."""
    for _ in tl.static_range(_ROUNDS):
        product0 = c0.to(tl.uint64) * _M0  # one wide multiplication gives both halves
        product1 = c2.to(tl.uint64) * _M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3


@jit
def _box_muller(word, FAST_MATH: tl.constexpr):
    """Two normals (cos, sin) from each 32-bit word; the interpreter has no assembly and needs FAST_MATH=False."""
    if FAST_MATH:
        return tl.inline_asm_elementwise(
            _BOX_MULLER_PTX, "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    uniform = ((word & 0xFFFF).to(tl.float32) + 0.5) / 65536
    angle = (((word >> 16).to(tl.float32) + 0.5) / 65536) * _TWO_PI  # the interpreter needs the tensor first
    radius = tl.sqrt(tl.log2(uniform) * _MINUS_TWO_LN2)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def _eight_normals(block, row, step, stream, k0, k1, FAST_MATH: tl.constexpr):
    """z of every Philox block, [blocks, 8]; the joins keep a block's eight values in one thread."""
    w0, w1, w2, w3 = _philox(block, row, step, stream, k0, k1)
    x0, y0 = _box_muller(w0, FAST_MATH)
    x1, y1 = _box_muller(w1, FAST_MATH)
    x2, y2 = _box_muller(w2, FAST_MATH)
    x3, y3 = _box_muller(w3, FAST_MATH)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # x of word 2a + b at [..., a, b]
    y = tl.join(tl.join(y0, y2), tl.join(y1, y3))
    return tl.join(x, y).reshape(w0.shape[0], _COLUMNS)


@jit
def _tile_of(table, owners, FIELDS: tl.constexpr, LONE: tl.constexpr):
    """This program's row of the table, and the (row, column) of its tile in that tensor."""
    program = tl.program_id(0)
    entry = table if LONE else table + tl.load(owners + program).to(tl.int64) * FIELDS
    tile = program - tl.load(entry + FIELDS - 2).to(tl.int32)
    width = tl.load(entry + FIELDS - 1).to(tl.int32)
    return entry, tile // width, tile % width


@jit
def _noise_kernel(
    table,
    owners,
    counter,
    sign,
    FIELDS: tl.constexpr,
    LONE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FAST_MATH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One tile of ROWS × (8 · BLOCKS). ALIGNED: blocks start at 16-byte addresses, so one access moves 16 bytes."""
    entry, tile_row, tile_column = _tile_of(table, owners, FIELDS, LONE)
    weight = tl.load(entry + 0).to(tl.pointer_type(DTYPE))
    out = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    c = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    m, n = tl.load(entry + 3), tl.load(entry + 4)
    weight_row, weight_column = tl.load(entry + 5), tl.load(entry + 6)
    out_row, out_column = tl.load(entry + 7), tl.load(entry + 8)
    k0, k1 = tl.load(entry + 9).to(tl.uint32), tl.load(entry + 10).to(tl.uint32)
    first_row, first_column = tl.load(entry + 11), tl.load(entry + 12)
    step, stream = tl.load(counter).to(tl.uint32), tl.load(counter + 1).to(tl.uint32)

    # One axis of ROWS · BLOCKS Philox blocks, so that tile and noise have the same layout: eight columns per thread.
    lane = tl.arange(0, ROWS * BLOCKS)
    i = tile_row.to(tl.int64) * ROWS + (lane % ROWS if TRANSPOSED else lane // BLOCKS)
    block = tile_column.to(tl.int64) * BLOCKS + (lane // ROWS if TRANSPOSED else lane % BLOCKS)
    block += first_column // _COLUMNS
    start = block * _COLUMNS - first_column  # negative if the slice starts inside a block
    j = start[:, None] + tl.arange(0, _COLUMNS)[None, :]
    if ALIGNED:
        weight_column, out_column = 1, 1
        inside = ((i < m) & (start < n))[:, None]
    else:
        inside = (i < m)[:, None] & (j >= 0) & (j < n)
    if TRANSPOSED:
        weight_row, out_row = 1, 1
    sources = weight + (i * weight_row)[:, None] + j * weight_column
    targets = out + (i * out_row)[:, None] + j * out_column
    if ALIGNED:  # a hint: the compiler cannot know the addresses in the table
        sources = tl.max_contiguous(tl.multiple_of(sources, (16, 16)), (1, 8))
        targets = tl.max_contiguous(tl.multiple_of(targets, (16, 16)), (1, 8))

    w = tl.load(sources, mask=inside, other=0.0)
    scale = sign * tl.load(c + i, mask=i < m, other=0.0)
    z = _eight_normals(block.to(tl.uint32), (first_row + i).to(tl.uint32), step, stream, k0, k1, FAST_MATH)
    # An explicit FMA, because the compiler might round aligned and unaligned variants differently.
    total = tl.fma(tl.broadcast_to(scale[:, None], z.shape), z, w.to(tl.float32))
    tl.store(targets, total.to(DTYPE), mask=inside)


@jit
def _gram_kernel(table, FIELDS: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr):
    """One TILE × TILE part of A Aᵀ (RANK × RANK, FP32, zeros beyond r) for each weight."""
    entry = table + tl.program_id(0).to(tl.int64) * FIELDS
    a = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    gram = tl.load(entry + 6).to(tl.pointer_type(tl.float32))
    n, r, a_row = tl.load(entry + 8), tl.load(entry + 9), tl.load(entry + 12)
    left = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    right = tl.program_id(2).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, n, BN):
        j = start + tl.arange(0, BN)
        x = tl.load(a + left[:, None] * a_row + j[None, :], mask=(left < r)[:, None] & (j < n)[None, :], other=0.0)
        y = tl.load(a + right[:, None] * a_row + j[None, :], mask=(right < r)[:, None] & (j < n)[None, :], other=0.0)
        total = tl.dot(x, y.T, total, input_precision="tf32x3")
    tl.store(gram + left[:, None] * RANK + right[None, :], total)


@jit
def _row_norm_kernel(
    table,
    owners,
    FIELDS: tl.constexpr,
    LONE: tl.constexpr,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """‖W_i‖² + Σ_k sB_ik (2 (W Aᵀ)_ik + (sB A Aᵀ)_ik) of BM rows; W is read once per RANK_TILE ranks."""
    entry, tile, _ = _tile_of(table, owners, FIELDS, LONE)
    weight = tl.load(entry + 0).to(tl.pointer_type(DTYPE))
    a, b = tl.load(entry + 1).to(tl.pointer_type(tl.float32)), tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    scaling = tl.load(tl.load(entry + 3).to(tl.pointer_type(tl.float32)))
    square = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    result = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    gram = tl.load(entry + 6).to(tl.pointer_type(tl.float32))
    m, n, r = tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9)
    weight_row, weight_column = tl.load(entry + 10), tl.load(entry + 11)
    a_row, b_row = tl.load(entry + 12), tl.load(entry + 13)
    if ALIGNED:
        weight, a = tl.multiple_of(weight, 16), tl.multiple_of(a, 16)
        weight_row, a_row, n = tl.multiple_of(weight_row, 8), tl.multiple_of(a_row, 8), tl.multiple_of(n, 8)
        weight_column = 1

    i = tile.to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.load(square + i, mask=i < m, other=0.0)
    for first in range(0, RANK, RANK_TILE):
        k = first + tl.arange(0, RANK_TILE)
        projected = tl.zeros((BM, RANK_TILE), tl.float32)
        for start in range(0, n, BN):
            j = start + tl.arange(0, BN)
            w_at = weight + (i * weight_row)[:, None] + (j * weight_column)[None, :]
            w = tl.load(w_at, mask=(i < m)[:, None] & (j < n)[None, :], other=0.0)
            x = tl.load(a + (k * a_row)[:, None] + j[None, :], mask=(k < r)[:, None] & (j < n)[None, :], other=0.0)
            if SPLIT:  # W is exact and A = high + low up to 2⁻¹⁷: nearly FP32 precision at the speed of BF16
                high = x.to(tl.bfloat16)
                low = (x - high.to(tl.float32)).to(tl.bfloat16)
                projected = tl.dot(w, high.T, projected)
                projected = tl.dot(w, low.T, projected)
            else:
                projected = tl.dot(w.to(tl.float32), x.T, projected, input_precision="tf32x3")
        factor = 2.0 * projected
        for inner in range(0, RANK, RANK_TILE):
            h = inner + tl.arange(0, RANK_TILE)
            b_h = tl.load(b + (i * b_row)[:, None] + h[None, :], mask=(i < m)[:, None] & (h < r)[None, :], other=0.0)
            factor = tl.dot(
                scaling * b_h, tl.load(gram + h[:, None] * RANK + k[None, :]), factor, input_precision="tf32x3"
            )
        b_k = tl.load(b + (i * b_row)[:, None] + k[None, :], mask=(i < m)[:, None] & (k < r)[None, :], other=0.0)
        total += tl.sum(scaling * b_k * factor, 1)
    tl.store(result + i, total, mask=i < m)


# --- What the kernels are launched with.

ARGUMENT_TYPES = {"table": "*i64", "owners": "*i32", "counter": "*i64", "sign": "fp32"}  # all others are constants
_NOISE_FIELDS, _ROW_NORM_FIELDS = 15, 16  # columns of the passes' tables


def every_launch(capability: tuple[int, int]) -> Iterator[tuple[Callable[..., Any], dict[str, Any], dict[str, str]]]:
    """Each kernel, each set of constants for a GPU of this compute capability, and the types of the other arguments.

    Two kinds of sets are left out: those of a table with a single row, which differ by a load, and ranks above 128,
    which differ by the number of iterations.
    """
    for dtype, layout in product(_KERNEL_DTYPES, ("aligned", "transposed", "strided")):
        yield _noise_kernel, _noise_constants(dtype, layout, False), ARGUMENT_TYPES
    for rank in (16, 32, 64, 128):
        yield _gram_kernel, _gram_constants(rank, capability), ARGUMENT_TYPES
        for dtype, aligned in product(_KERNEL_DTYPES, (True, False)):
            constants = _row_norm_constants(dtype, rank, aligned, False, capability)
            yield _row_norm_kernel, constants, ARGUMENT_TYPES


def _noise_constants(dtype: torch.dtype, layout: str, lone: bool) -> dict[str, Any]:
    return {
        "FIELDS": _NOISE_FIELDS,
        "LONE": lone,
        "DTYPE": _triton_dtype(dtype),
        "ALIGNED": layout == "aligned",
        "TRANSPOSED": layout == "transposed",
        "FAST_MATH": not INTERPRETED,
        **_noise_tile(layout),
    }


def _row_norm_constants(
    dtype: torch.dtype, rank: int, aligned: bool, lone: bool, capability: tuple[int, int]
) -> dict[str, Any]:
    return {
        "FIELDS": _ROW_NORM_FIELDS,
        "LONE": lone,
        "DTYPE": _triton_dtype(dtype),
        "RANK": rank,
        "RANK_TILE": _rank_tile(rank, capability),
        "ALIGNED": aligned,
        "SPLIT": dtype == torch.bfloat16 and not INTERPRETED,  # the interpreter cannot multiply BF16 matrices
        **_row_norm_tile(dtype, rank, capability),
    }


def _gram_constants(rank: int, capability: tuple[int, int]) -> dict[str, Any]:
    tile = _rank_tile(rank, capability)
    columns = 64 if _factors_in_shared_memory(capability) else 32
    return {"FIELDS": _ROW_NORM_FIELDS, "RANK": rank, "TILE": tile, "BN": columns, "num_warps": 4}


def _noise_tile(layout: str) -> dict[str, int]:
    return NOISE_TILE_TRANSPOSED if layout == "transposed" else NOISE_TILE


def _row_norm_tile(dtype: torch.dtype, rank: int, capability: tuple[int, int]) -> dict[str, int]:
    if rank > 16 and not _factors_in_shared_memory(capability):
        return ROW_NORM_TILE_NARROW
    return ROW_NORM_TILE if dtype == torch.bfloat16 and rank <= 32 else ROW_NORM_TILE_WIDE


def _rank_tile(rank: int, capability: tuple[int, int]) -> int:
    return min(rank, 64 if _factors_in_shared_memory(capability) else 32)


def _factors_in_shared_memory(capability: tuple[int, int]) -> bool:
    """Whether tensor cores read factors from shared memory (wgmma, tcgen05); others hold both in registers.

    There each warp holds a whole A tile, for TF32 twice (its value and the rest), so that larger tiles would spill.
    """
    return capability[0] in (9, 10)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)  # a CPU: the interpreter


def _triton_dtype(dtype: torch.dtype):
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _noise_group(weight, c, out, key, row, column) -> tuple[torch.dtype, str]:
    """Key of the weights that share a launch: dtype and memory layout."""
    if column % COLUMNS_PER_BLOCK == 0 and _is_aligned(weight) and _is_aligned(out):
        return weight.dtype, "aligned"
    transposed = all(t.stride(0) == 1 and t.stride(1) != 1 for t in (weight, out))
    return weight.dtype, "transposed" if transposed else "strided"


def _row_norm_group(weight: torch.Tensor, a: torch.Tensor) -> tuple[torch.dtype, int, bool]:
    """Key of the weights that share a launch: dtype, rank rounded up to a power of two (at least 16), alignment."""
    rank = max(16, triton.next_power_of_2(a.shape[0]))
    return weight.dtype, rank, _is_aligned(weight) and _is_aligned(a)


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether rows consist of whole groups of eight columns, each at a 16-byte address."""
    return (
        matrix.stride(1) == 1
        and matrix.shape[1] % COLUMNS_PER_BLOCK == 0
        and matrix.stride(0) % COLUMNS_PER_BLOCK == 0
        and matrix.data_ptr() % 16 == 0
    )


def on_device(device: torch.device):
    # Triton launches on the current device, not on that of the tensors.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
