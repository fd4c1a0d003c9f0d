"""The dtype of matrix products: BF16 where the device computes fast in it, FP32 elsewhere.

A CPU without BF16 instructions (AVX512_BF16, AMX or Arm's BF16) takes many times as long for a BF16 product as for an
FP32 one (`measured_ratio`). There the values of a BF16 backbone are kept in FP32 tensors, converted once when the model
is loaded:

- each value stays one that BF16 can represent, so `backbone_sha256` is the same on every machine;
- W + ε is rounded to BF16 as well, so a step of Flat-LoRA reads the same weights on every machine.

The choice depends on what torch and oneDNN report, never on a timing, so it is the same in every run on a machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from flatlora.utils.shards import whole

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_NATIVE = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "arm_bf16": "Arm BF16"}


class CPUFeatures(NamedTuple):
    """BF16 support as torch and oneDNN report it; None if this version of torch cannot report it."""

    avx512_bf16: bool | None = None
    amx_bf16: bool | None = None
    arm_bf16: bool | None = None
    onednn_bf16: bool | None = None  # respects ONEDNN_MAX_CPU_ISA, unlike the others


def cpu_features() -> CPUFeatures:
    """What torch reports for this CPU, and whether the environment lets oneDNN use it."""
    reported = _query(torch.cpu, "get_capabilities")
    if reported is None:  # torch before 2.13 only has queries for x86
        reported = {
            "avx512_bf16": _query(torch.cpu, "_is_avx512_bf16_supported"),
            "amx_bf16": _query(torch.cpu, "_is_amx_tile_supported"),
        }
    on_arm = platform.machine().lower() in ("aarch64", "arm64")
    onednn = _query(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    return CPUFeatures(
        avx512_bf16=False if on_arm else reported.get("avx512_bf16"),
        amx_bf16=False if on_arm else reported.get("amx_bf16"),
        arm_bf16=reported.get("bf16") if on_arm else False,
        onednn_bf16=onednn and (on_arm or isa_limit_allows_bf16(limit)),
    )


def isa_limit_allows_bf16(limit: str | None) -> bool:
    """Whether oneDNN may use BF16 instructions of an x86 CPU under this value of ONEDNN_MAX_CPU_ISA, None for no limit.

    oneDNN's own query returns True from AVX512_CORE on, where it emulates BF16. As in oneDNN, case is ignored and
    unknown values set no limit.
    """
    return limit is None or limit.lower() not in _ISAS_WITHOUT_BF16


# From oneDNN's "CPU Dispatcher Control". AVX2_VNNI_2 converts BF16 but has no BF16 products.
_ISAS_WITHOUT_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")


def _query(owner: Any, name: str) -> Any:
    """Calls `owner.name()`; None if this version or build of torch does not have it."""
    query = getattr(owner, name, None)
    return query() if query else None


def is_reported(features: CPUFeatures) -> bool:
    """Whether this version of torch reports what the choice depends on."""
    instructions = [getattr(features, name) for name in _NATIVE]
    return features.onednn_bf16 is not None if any(instructions) else None not in instructions


def bf16_support(features: CPUFeatures) -> tuple[bool, str]:
    """Whether BF16 products are fast on a CPU with these features, and why."""
    native = [label for name, label in _NATIVE.items() if getattr(features, name)]
    if native and features.onednn_bf16:
        return True, f"this CPU has {' and '.join(native)}"
    if native and not is_reported(features):
        return False, f"torch {torch.__version__} does not report whether oneDNN uses {' and '.join(native)}"
    if native:
        return False, f"oneDNN does not use this CPU's {' and '.join(native)} (ONEDNN_MAX_CPU_ISA, or its build)"
    if not is_reported(features):
        return False, f"torch {torch.__version__} does not report this CPU's BF16 instructions"
    return False, f"this CPU has no BF16 instructions ({', '.join(_NATIVE.values())})"


class Precision(NamedTuple):
    """How a model computes: the dtype of its stored weights, of its matrix products, and of autocast if it is on."""

    stored: torch.dtype
    products: torch.dtype
    autocast: torch.dtype | None
    reason: str
    slow: bool = False  # BF16 products were requested on a CPU that computes them slowly

    @property
    def held(self) -> torch.dtype:
        """Dtype of the weights in memory: autocast converts them for each product, otherwise products read them."""
        return self.stored if self.autocast else self.products

    @property
    def label(self) -> str:
        """Name of the dtype that products are computed in, for the record of answers."""
        converted = self.autocast is None and self.products != self.stored
        return str(self.products if converted else self.autocast)

    def __str__(self) -> str:
        how = " by autocast" if self.autocast else ""
        return f"{_name(self.stored)} weights, products in {_name(self.products)}{how}: {self.reason}"

    def record(self) -> dict[str, Any]:
        """For run.json."""
        dtypes = {"stored": self.stored, "products": self.products, "autocast": self.autocast}
        return {key: value and _name(value) for key, value in dtypes.items()} | {"reason": self.reason}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose_precision(
    setting: str, stored: str, device: torch.device | str, features: CPUFeatures | None = None
) -> Precision:
    """The precision that `trainer.autocast` and `model.dtype` select on a device.

    Args:
        setting: auto, bfloat16 or none. auto is BF16 autocast for a BF16 backbone on a device that is fast in BF16.
            A CPU without BF16 instructions computes in BF16 only with bfloat16.
        stored: dtype of the backbone: float32, bfloat16 or float16.
        features: of the CPU; queried from torch if None.
    """
    dtype = getattr(torch, stored)
    if torch.device(device).type != "cpu":
        autocast = torch.bfloat16 if setting == "bfloat16" or (setting == "auto" and stored == "bfloat16") else None
        return Precision(dtype, autocast or dtype, autocast, "a GPU computes in any of these dtypes")
    fast, reason = bf16_support(cpu_features() if features is None else features)
    if setting == "bfloat16":
        return Precision(dtype, torch.bfloat16, torch.bfloat16, f"requested, and {reason}", slow=not fast)
    if dtype == torch.float32:
        return Precision(dtype, dtype, None, "the weights are float32")
    if dtype == torch.float16:
        return Precision(dtype, torch.float32, None, "few CPUs are fast in float16")
    if not fast:
        return Precision(dtype, torch.float32, None, reason)
    return Precision(dtype, dtype, dtype if setting == "auto" else None, reason)


def autocast(
    device: torch.device, precision: Precision | None, cache_enabled: bool | None = None
) -> contextlib.AbstractContextManager:
    """`torch.autocast` if the precision uses it, else a null context."""
    if precision is None or precision.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision.autocast, cache_enabled=cache_enabled)


@contextlib.contextmanager
def float32_matmul_precision(value: str) -> Iterator[None]:
    """Sets `torch.set_float32_matmul_precision` within a context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype to load a backbone in for your own training loop: BF16 where its products are fast, else FP32.

    A backbone loaded in this dtype depends on the machine: a CPU that is fast in BF16 rounds an FP32 checkpoint and
    W + ε to BF16, and one that is slow does not. In contrast, runs of the command line leave an FP32 backbone
    as it is, and round W + ε of a BF16 backbone to BF16 on every machine.
    """
    features = cpu_features()
    precision = choose_precision("auto", "bfloat16", device, features)
    if torch.device(device).type == "cpu" and not is_reported(features):
        _warn_once(f"fast_dtype() returns {_name(precision.products)}, the safe choice: {precision.reason}.")
    return precision.products


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def physical_cores() -> int:
    """Number of physical cores available to this process, within affinity and cgroup limits."""
    import joblib  # part of the suite; the library alone does not set threads

    return joblib.cpu_count(only_physical_cores=True)


def use_physical_cores() -> None:
    """Limit torch's threads to the physical cores available to this process, unless OMP_NUM_THREADS is set.

    A second thread on a core competes for the same arithmetic units and slows down the first.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = physical_cores()
    if cores < torch.get_num_threads():
        torch.set_num_threads(cores)


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the BF16 and FP16 weights of a model to tensors of `dtype`, in place; their values do not change.

    A parameter's `stored_dtype` is then the dtype that its values came from. Weights packed by bitsandbytes stay so;
    they are unpacked to `dtype` for their products.
    """
    for parameter in model.parameters():
        if parameter.dtype in _HALF:
            parameter.stored_dtype = parameter.dtype
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in _HALF:
                module._buffers[name] = buffer.to(dtype)
        packed = getattr(getattr(module, "weight", None), "quant_state", None)
        if packed is not None:
            packed.dtype = module.compute_dtype = dtype


def widen(model: nn.Module) -> nn.Module:
    """Convert a model to FP32 and drop its `stored_dtype`, in place: W + ε is no longer rounded to a narrower dtype.

    `model.float()` and PEFT's merges keep the `stored_dtype` of a held weight.
    """
    model.float()
    for parameter in model.parameters():
        parameter.__dict__.pop("stored_dtype", None)
    return model


def hold_as_computed(model: nn.Module, precision: Precision) -> None:
    """`hold` a model in the dtype of its products if that is wider than the stored one."""
    if precision.held != precision.stored:
        hold(model, precision.held)


def stored_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype that a weight was stored in: its own, unless `hold` has converted it to a wider one."""
    return getattr(weight, "stored_dtype", weight.dtype)


def as_stored(weight: torch.Tensor) -> torch.Tensor:
    """A frozen weight in its stored dtype; unchanged if some value is not representable in that dtype.

    A sharded weight is gathered, so all processes must call this together.
    """
    stored, held = stored_dtype(weight), whole(weight)
    if weight.requires_grad or stored == held.dtype:
        return held
    narrow = held.to(stored)
    return narrow if torch.equal(narrow.to(held.dtype), held) else held


def slow_bf16_warning(model: nn.Module, setting: str, remedy: str) -> str:
    """A warning that `setting` makes a CPU without fast BF16 compute in BF16, with the measured ratio."""
    shapes = Counter(
        tuple(module.weight.shape)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and ".lora_" not in name  # an adapter's factors are much smaller than its layer
    )
    m, n = (min(side, 1024) for side in (shapes.most_common(1)[0][0] if shapes else (512, 512)))
    ratio = measured_ratio(m, n)
    _, reason = bf16_support(cpu_features())
    return (
        f"{setting}: a BF16 product takes {ratio:.1f} times as long as an FP32 one on this CPU (measured, {m} × {n}), "
        f"because {reason}; {remedy}."
    )


def warn_of_unscaled_fp16(dtypes: Iterable[torch.dtype]) -> None:
    """Warn that the loss is not scaled, if one of the backbone's dtypes is FP16."""
    if torch.float16 in set(dtypes):
        logger.warning(
            "The backbone is float16 and the loss is not scaled: small gradients of the adapter underflow to 0; load "
            "the backbone with dtype=flatlora.fast_dtype(device), or set fp16=True in TrainingArguments (in a loop of "
            "your own: torch.amp.GradScaler, and loss_scaled=True here)."
        )


def measured_ratio(m: int, n: int, rows: int = 32, rounds: int = 3) -> float:
    """Time of x Wᵀ in BF16 divided by its time in FP32, for W (m × n) and x (rows × n); medians over `rounds`."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(rows, n, dtype=dtype), torch.ones(m, n, dtype=dtype)
        x @ weight.t()
        seconds[dtype] = statistics.median(_timed(x, weight) for _ in range(rounds))
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _timed(x: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    x @ weight.t()
    return time.perf_counter() - started
