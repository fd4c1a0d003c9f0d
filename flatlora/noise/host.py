"""Noise on the CPU: writes z, adds c·z to a weight, or computes row norms, with compiled code on several threads."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional

from flatlora.noise import torch_passes
from flatlora.noise.philox import layer_key, validate_counter

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ELEMENTS_WORTH_A_THREAD = 32768
_JOBS_WORTH_A_THREAD = 4  # with fewer jobs per thread the load is uneven
_thread = threading.local()  # `shares` is True in a thread of `share`, which must not start further threads


def normal(
    seed: int, step: int, stream: int, layer: str, shape: tuple[int, int], *, row: int = 0, column: int = 0
) -> torch.Tensor:
    """Returns z[row : row + shape[0], column : column + shape[1]] of a layer, FP32 on the CPU."""
    out = torch.empty(shape, dtype=torch.float32)
    return fill_normal(out, layer_key(seed, layer), step, stream, row=row, column=column)


def normal_like(tensor: torch.Tensor, key: tuple[int, int], step: int, stream: int) -> torch.Tensor:
    """z, FP32, of the shape and on the device of `tensor`; all dimensions but the last are rows."""
    out = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    fill = fill_normal if out.is_cpu else torch_passes.fill_normal_torch
    fill(out.view(-1, out.shape[-1]), key, step, stream)
    return out


def fill_normal(
    out: torch.Tensor, key: tuple[int, int], step: int, stream: int, *, row: int = 0, column: int = 0
) -> torch.Tensor:
    """Fill `out` (FP32, contiguous, rows × columns, CPU) with the slice of z that starts at (row, column)."""
    if out.dtype != torch.float32 or not _is_plain_matrix(out):
        raise ValueError(
            f"Invalid out={out.dtype} {tuple(out.shape)} on {out.device}: noise is written to a contiguous FP32 CPU "
            "matrix; make one with torch.empty(rows, columns) and convert the result."
        )
    if (kernels := _compiled()) is None:
        return torch_passes.fill_normal_torch(out, key, step, stream, row=row, column=column)
    _over_rows(kernels.fill_rows, out, (out.numpy(),), key, step, stream, row, column)
    return out


def add_normal(
    weight: torch.Tensor,
    c: torch.Tensor,
    out: torch.Tensor,
    key: tuple[int, int],
    step: int,
    stream: int,
    *,
    row: int = 0,
    column: int = 0,
    rounded: bool = False,
) -> torch.Tensor:
    """Writes out_ij = round(weight_ij + c_i z_ij), summed in FP32 and rounded once (to nearest even).

    Args:
        weight, out: m × n, both FP32 or both BF16, contiguous, CPU; `out` may be `weight`.
        c: shape (m,), FP32.
        rounded: round to BF16 even if weight and out are FP32 tensors (which then hold BF16 values).
    """
    if not supports(weight, out) or out.dtype != weight.dtype:
        raise ValueError(
            f"Invalid weight={weight.dtype} {tuple(weight.shape)}, out={out.dtype} {tuple(out.shape)}: both must be "
            "contiguous CPU matrices, both FP32 or both BF16; use perturb.epsilon.write_perturbed for others."
        )
    if (kernels := _compiled()) is None:
        torch_passes.add_normal_torch(weight, c, out, key, step, stream, row=row, column=column)
        return out.copy_(out.bfloat16()) if rounded else out
    if weight.dtype == torch.bfloat16:
        arrays = (weight.view(torch.uint16).numpy(), c.numpy(), out.view(torch.uint16).numpy())
        _over_rows(kernels.add_rows_bf16, weight, arrays, key, step, stream, row, column)
    else:
        arrays = (weight.numpy(), c.numpy(), out.numpy())
        kernel = kernels.add_rows_rounded if rounded else kernels.add_rows_fp32
        _over_rows(kernel, weight, arrays, key, step, stream, row, column)
    return out


def merged_row_norms(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, squared_norms: torch.Tensor
) -> torch.Tensor:
    """Returns ‖W_i + B_i A‖, shape (m,), FP32, in one pass over W; `torch_passes.squared_row_norms` is the reference.

    Args:
        weight: W, m × n, FP32 or BF16, contiguous, CPU.
        A, B: r × n and m × r, FP32.
        squared_norms: ‖W_i‖², shape (m,), FP64.
    """
    if not supports(weight):
        raise ValueError(
            f"Invalid weight={weight.dtype} {tuple(weight.shape)}: it must be a contiguous CPU matrix, FP32 or BF16; "
            "use perturb.epsilon.merged_row_norms for others."
        )
    if (kernels := _compiled()) is None:
        return torch_passes.squared_row_norms(weight, A, B, squared_norms).clamp_min(0.0).sqrt().float()
    narrow = weight.dtype == torch.bfloat16
    words = weight.view(torch.uint16).numpy() if narrow else weight.numpy().view(np.uint32)
    if missing := -len(A) % kernels.FACTORS_AT_ONCE:
        A = functional.pad(A, (0, 0, 0, missing))
    out = torch.empty(len(weight))
    arrays = A.contiguous().numpy(), B.contiguous().numpy(), squared_norms.numpy(), out.numpy()
    shift = np.uint32(16 if narrow else 0)
    _in_shares(weight, lambda start, stop: kernels.merged_row_norms(words, shift, *arrays, start, stop))
    return out


@lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    """The compiled code, None without numba; imported on first use, because the import compiles it."""
    if importlib.util.find_spec("numba") is None:
        logger.warning(
            "numba is not installed: noise on the CPU is drawn by plain torch operations, which takes several times as "
            "long; run pip install numba."
        )
        return None
    from flatlora.noise import host_compiled

    return host_compiled


def supports(*weights: torch.Tensor) -> bool:
    """Whether `add_normal` and `merged_row_norms` support these weights: contiguous CPU matrices, FP32 or BF16."""
    return _is_plain_matrix(*weights) and all(w.dtype in (torch.float32, torch.bfloat16) for w in weights)


def _is_plain_matrix(*tensors: torch.Tensor) -> bool:
    return all(t.dim() == 2 and t.is_contiguous() and t.device.type == "cpu" for t in tensors)


def _over_rows(
    kernel: Callable[..., None],
    matrix: torch.Tensor,
    arrays: tuple[np.ndarray, ...],
    key: tuple[int, int],
    step: int,
    stream: int,
    row: int,
    column: int,
) -> None:
    """Run a compiled noise kernel on all rows of a matrix."""
    validate_counter(step=step, stream=stream, row=row + matrix.shape[0])
    words = tuple(np.uint32(word) for word in (*key, step, stream, row))
    _in_shares(matrix, lambda start, stop: kernel(*arrays, *words, column, start, stop, *_tables()))


def _in_shares(matrix: torch.Tensor, work: Callable[[int, int], None]) -> None:
    """Call `work(first row, last row + 1)` on torch's number of threads, which does not change the result."""
    rows = matrix.shape[0]
    workers = min(torch.get_num_threads(), max(1, matrix.numel() // _ELEMENTS_WORTH_A_THREAD))
    if workers == 1 or getattr(_thread, "shares", False):
        work(0, rows)
        return
    bounds = np.linspace(0, rows, workers + 1).astype(int).tolist()
    submit = _thread_pool(workers - 1).submit
    jobs = [submit(work, start, stop) for start, stop in itertools.pairwise(bounds[1:])]
    work(0, bounds[1])
    for job in jobs:
        job.result()


def share(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Runs independent jobs on torch's number of threads, each job on one thread; returns their results.

    A model has hundreds of layers, and splitting a small one over threads costs more than its noise.
    """
    workers = min(torch.get_num_threads(), len(jobs) // _JOBS_WORTH_A_THREAD)
    if workers <= 1:
        return [job() for job in jobs]
    results: dict[int, T] = {}
    remaining = enumerate(jobs)  # a core that other programs use takes fewer of them

    def run() -> None:
        _thread.shares = True
        try:
            for index, job in remaining:
                results[index] = job()
        finally:
            _thread.shares = False

    others = [_thread_pool(workers - 1).submit(run) for _ in range(workers - 1)]
    run()
    for other in others:
        other.result()
    return [results[index] for index in range(len(jobs))]


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Lookup tables for Box–Muller: radius [65536] and (cos, sin) [65536, 2], FP32, correctly rounded from FP64."""
    uniform = (np.arange(65536) + 0.5) / 65536
    angle = 2.0 * np.pi * uniform
    return (
        np.sqrt(-2.0 * np.log(uniform)).astype(np.float32),
        np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32),
    )


@lru_cache(maxsize=8)
def _thread_pool(workers: int) -> ThreadPoolExecutor:
    # Plain threads, since the kernels release the GIL; a second OpenMP pool would spin on the same cores as torch's.
    return ThreadPoolExecutor(workers, thread_name_prefix="flatlora-noise")
