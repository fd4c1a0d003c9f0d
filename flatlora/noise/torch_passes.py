"""The noise pass and the row-norm pass as plain torch operations on any device, used without Triton.

They draw the same stream of normals as philox.py and triton_kernels.py, and the kernels are tested against them. The
validation of arguments here serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from flatlora.noise import philox
from flatlora.noise.philox import COLUMNS_PER_BLOCK, PHILOX_ROUNDS, UINT32, validate_counter

_CHUNK_ELEMENTS = 1 << 20  # bounds the INT64 and FP64 temporaries


def philox_torch(counter, key: tuple[int, int], rounds: int = PHILOX_ROUNDS) -> tuple[torch.Tensor, ...]:
    """Philox-4x32 of four broadcastable INT64 tensors or integers (the first a tensor), each word in 0 … 2³² − 1.

    INT64 products wrap modulo 2⁶⁴, which keeps both 32-bit halves correct.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device=counter[0].device) for word in counter)
    k0, k1 = key
    m0, m1, w0, w1 = philox.PHILOX_M0, philox.PHILOX_M1, philox.PHILOX_W0, philox.PHILOX_W1
    for _ in range(rounds):
        product0, product1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32 & UINT32) ^ c1 ^ k0,
            product1 & UINT32,
            (product0 >> 32 & UINT32) ^ c3 ^ k1,
            product0 & UINT32,
        )
        k0, k1 = (k0 + w0) & UINT32, (k1 + w1) & UINT32
    return c0, c1, c2, c3


@torch.no_grad()
def fill_normal_torch(
    out: torch.Tensor, key: tuple[int, int], step: int, stream: int, *, row: int = 0, column: int = 0
) -> torch.Tensor:
    """Fill `out` (m × n, floating, any device and strides) with the slice of z that starts at (row, column)."""
    validate_counter(step=step, stream=stream)
    validate_address(out.shape, key, row, column)
    for start, stop in row_chunks(*out.shape):
        out[start:stop] = _normal(out[start:stop], key, step, stream, row + start, column)
    return out


@torch.no_grad()
def add_normal_torch(
    weight: torch.Tensor,
    c: torch.Tensor,
    out: torch.Tensor,
    key: tuple[int, int],
    step: int,
    stream: int,
    *,
    row: int = 0,
    column: int = 0,
    sign: float = 1.0,
) -> torch.Tensor:
    """Writes out_ij = round(weight_ij + sign · c_i z_ij); see `NoisePass` for shapes and errors."""
    one_device([weight, c, out])
    validate_outs([weight], [out])
    validate_coefficients(c, weight.shape[0])
    validate_counter(step=step, stream=stream)
    validate_address(weight.shape, key, row, column)
    return add_normal_unchecked(weight, c, out, key, step, stream, row, column, sign)


def add_normal_unchecked(weight, c, out, key, step, stream, row, column, sign):
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for start, stop in row_chunks(*weight.shape):
        z = _normal(weight[start:stop], key, step, stream, row + start, column).to(wide)
        out[start:stop] = weight[start:stop].to(wide) + (sign * c[start:stop, None]).to(wide) * z
    return out


def _normal(like: torch.Tensor, key, step, stream, row: int, column: int) -> torch.Tensor:
    """z, FP32, with the shape and device of `like`; step and stream may be 0-d INT64 tensors."""
    (rows, columns), first = like.shape, column // COLUMNS_PER_BLOCK
    block = torch.arange(first, -(-(column + columns) // COLUMNS_PER_BLOCK), device=like.device)
    words = torch.stack(
        philox_torch((block, torch.arange(row, row + rows, device=like.device)[:, None], step, stream), key), dim=-1
    )
    radius = (-2.0 * torch.log(((words & 0xFFFF).double() + 0.5) / 65536)).sqrt().float()
    angle = 2.0 * torch.pi * ((words >> 16).double() + 0.5) / 65536
    z = torch.stack([radius * angle.cos().float(), radius * angle.sin().float()], dim=-1).flatten(1)
    return z.narrow(1, column - first * COLUMNS_PER_BLOCK, columns)


@torch.no_grad()
def squared_row_norms(
    weight: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    squared: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ‖W_i + B_i A‖², shape (m,), FP64 or the dtype of `squared`; computed in FP64.

    Args:
        weight: W, m × n.
        a, b: A, r × n, and B, m × r; None for no adapter.
        squared: ‖W_i‖², shape (m,), if known.
    """
    chunks = list(row_chunks(*weight.shape))
    if squared is None:
        parts = [weight[start:stop].double().square().sum(dim=1) for start, stop in chunks]
        squared = torch.cat(parts) if parts else torch.zeros(weight.shape[0], device=weight.device)
    if a is None or b is None or not chunks:
        return squared
    a, b = a.double(), b.double()
    projected = torch.cat([weight[start:stop].double() @ a.t() for start, stop in chunks])
    return (squared + (b * (2.0 * projected + b @ (a @ a.t()))).sum(dim=1)).to(squared.dtype)


def row_chunks(rows: int, columns: int, elements: int = _CHUNK_ELEMENTS) -> Iterable[tuple[int, int]]:
    """(start, stop) of consecutive rows that have at most `elements` elements together, or of single rows."""
    height = max(1, elements // max(1, columns))
    return ((start, min(start + height, rows)) for start in range(0, rows, height)) if columns else ()


# --- Validation of arguments.


def validate_equal_lengths(**lists: Sequence) -> None:
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"Invalid lists ({counts}): they must have one entry per weight; pass equal lengths.")


def one_device(tensors: Sequence[torch.Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        names = sorted(map(str, devices))
        raise ValueError(f"Invalid devices={names}: a pass works on one device; build one pass per device.")
    return devices.pop()


def validate_matrix(weight: torch.Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"Invalid weight={weight.dtype} {tuple(weight.shape)}: it must be a floating-point matrix; load the "
            "backbone unquantized and view the weight as rows × columns."
        )


def validate_outs(weights: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """Check that each out fits its weight, is that weight or does not overlap with it, and occurs once."""
    for weight, out in zip(weights, outs, strict=True):
        validate_matrix(weight)
        if out.shape != weight.shape or out.dtype != weight.dtype:
            raise ValueError(
                f"Invalid out={out.dtype} {tuple(out.shape)} for weight={weight.dtype} {tuple(weight.shape)}: both "
                "must be equal; make it with torch.empty_like(weight)."
            )
        if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
            raise ValueError(
                f"Invalid out strides={out.stride()}: elements of an expanded view share memory; clone it."
            )
        in_place = out.data_ptr() == weight.data_ptr() and out.stride() == weight.stride()
        if not in_place and _overlap(weight, out):
            raise ValueError(
                "Invalid out: it shares part of its memory with its weight; pass the weight itself to work in place, "
                "or a buffer of its own."
            )
    starts = [out.data_ptr() for out in outs if out.numel()]
    if len(set(starts)) < len(starts):
        raise ValueError(
            f"Invalid outs: {len(starts) - len(set(starts))} of them occur twice and would be written in no order; "
            "list a tied weight once."
        )


def _overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    def end(matrix: torch.Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
        return matrix.data_ptr() + (last + 1) * matrix.element_size()

    return left.numel() > 0 and left.data_ptr() < end(right) and right.data_ptr() < end(left)


def validate_coefficients(c: torch.Tensor, rows: int) -> None:
    if c.dtype != torch.float32 or c.shape != (rows,) or not c.is_contiguous():
        raise ValueError(
            f"Invalid coefficients={c.dtype} {tuple(c.shape)}: they must be a contiguous FP32 vector with one number "
            f"per row, {rows} in all; use torch.cat of the layers' c."
        )


def validate_address(shape: Sequence[int], key: tuple[int, int], row: int, column: int) -> None:
    last_column = UINT32 * COLUMNS_PER_BLOCK
    bounds = {
        "row": (row, UINT32 - shape[0]),
        "column": (column, last_column - shape[1]),
        "key[0]": (key[0], UINT32),
        "key[1]": (key[1], UINT32),
    }
    for name, (value, largest) in bounds.items():
        if not 0 <= value <= largest:
            raise ValueError(
                f"Invalid {name}={value} of a {tuple(shape)} slice: Philox counters and keys have 32 bits; "
                f"use a value from 0 to {largest}."
            )


def validate_factors(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    fits = a.dim() == b.dim() == 2 and a.shape[1] == weight.shape[1] and b.shape == (weight.shape[0], a.shape[0])
    plain = all(t.dtype == torch.float32 and (t.shape[-1] <= 1 or t.stride(-1) == 1) for t in (a, b))
    if not (fits and plain):
        raise ValueError(
            f"Invalid A={a.dtype} {tuple(a.shape)}, B={b.dtype} {tuple(b.shape)} for weight {tuple(weight.shape)}: "
            "A is r × n and B m × r, both FP32 with contiguous rows; convert them with .float().contiguous()."
        )
