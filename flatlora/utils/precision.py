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
import logging
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_NATIVE = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "arm_bf16": "Arm BF16"}


class CPUFeatures(NamedTuple):
    """BF16 support as torch and oneDNN report it; None where this version of torch has no such query."""

    avx512_bf16: bool | None = None
    amx_bf16: bool | None = None
    arm_bf16: bool | None = None
    onednn_bf16: bool | None = None  # within ONEDNN_MAX_CPU_ISA, which the others do not follow


def cpu_features() -> CPUFeatures:
    """What torch reports for the CPU of this process, and what the environment leaves of it to oneDNN."""
    reported = _query(torch.cpu, "get_capabilities")
    if reported is None:  # of torch 2.13; 2.11 has single queries for x86 alone
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

    oneDNN's own query says yes from AVX512_CORE on, where it emulates BF16. Letters' case does not matter, and values
    that oneDNN does not know limit nothing.
    """
    return limit is None or limit.lower() not in _ISAS_WITHOUT_BF16


# oneDNN's "CPU Dispatcher Control" names them all; AVX2_VNNI_2 converts BF16 and has no products of it.
_ISAS_WITHOUT_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")


def _query(owner: Any, name: str) -> Any:
    """Answer of a query; None where this version or build of torch has no such query."""
    query = getattr(owner, name, None)
    return query() if query else None


def bf16_support(features: CPUFeatures) -> tuple[bool, str]:
    """Whether BF16 products are fast on a CPU with these features, and why."""
    native = [label for name, label in _NATIVE.items() if getattr(features, name)]
    if native and features.onednn_bf16:
        return True, f"this CPU has {' and '.join(native)}"
    if native and features.onednn_bf16 is None:
        return False, f"torch {torch.__version__} does not report whether oneDNN uses {' and '.join(native)}"
    if native:
        return False, f"oneDNN does not use this CPU's {' and '.join(native)} (ONEDNN_MAX_CPU_ISA, or its build)"
    if any(getattr(features, name) is None for name in _NATIVE):
        return False, f"torch {torch.__version__} does not report this CPU's BF16 instructions"
    return False, f"this CPU has no BF16 instructions ({', '.join(_NATIVE.values())})"


class Precision(NamedTuple):
    """How a model computes: the dtype of its stored weights, of its matrix products, and of autocast if it is on."""

    stored: torch.dtype
    products: torch.dtype
    autocast: torch.dtype | None
    reason: str
    slow: bool = False  # BF16 products were asked for on a CPU that is slow in them

    @property
    def held(self) -> torch.dtype:
        """Dtype of the weights in memory: autocast converts them for each product, otherwise products read them."""
        return self.stored if self.autocast else self.products

    @property
    def label(self) -> str:
        """What tells answers apart that were computed in different ways, for their record."""
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
    """The precision that `trainer.autocast` and `model.dtype` mean on a device.

    Args:
        setting: auto, bfloat16 or none. auto is BF16 autocast for a BF16 backbone on a device that is fast in BF16.
            Whatever it is, only bfloat16 makes a CPU without BF16 instructions compute in BF16.
        stored: dtype of the backbone: float32, bfloat16 or float16.
        features: of the CPU; asked of torch when None.
    """
    dtype = getattr(torch, stored)
    if torch.device(device).type != "cpu":
        autocast = torch.bfloat16 if setting == "bfloat16" or (setting == "auto" and stored == "bfloat16") else None
        return Precision(dtype, autocast or dtype, autocast, "a GPU computes in the dtype that it is asked for")
    fast, reason = bf16_support(cpu_features() if features is None else features)
    if setting == "bfloat16":
        return Precision(dtype, torch.bfloat16, torch.bfloat16, f"asked for, and {reason}", slow=not fast)
    if dtype == torch.float32:
        return Precision(dtype, dtype, None, "the weights are float32")
    if dtype == torch.float16:
        return Precision(dtype, torch.float32, None, "no CPU is faster in float16 than in float32")
    if not fast:
        return Precision(dtype, torch.float32, None, reason)
    return Precision(dtype, dtype, dtype if setting == "auto" else None, reason)


def autocast(
    device: torch.device, precision: Precision | None, cache_enabled: bool | None = None
) -> contextlib.AbstractContextManager:
    """torch.autocast where the precision has it, else a context that changes nothing."""
    if precision is None or precision.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision.autocast, cache_enabled=cache_enabled)


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype to load a backbone in for your own training loop: BF16 where its products are fast, else FP32.

    The weights are then those of this dtype: on a CPU that is fast in BF16 an FP32 checkpoint is rounded to BF16, and
    on one that is slow in it W + ε is not rounded to BF16. Runs of the command line leave an FP32 backbone as it is,
    and round W + ε of a BF16 one on every machine.
    """
    return choose_precision("auto", "bfloat16", device).products


def use_physical_cores() -> None:
    """Let torch use no more threads than there are physical cores for this process, unless OMP_NUM_THREADS is set.

    A second thread on a core waits for the same arithmetic units, and slows down the first.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import joblib  # of the commands alone: whoever uses the library sets threads as they like

    cores = joblib.cpu_count(only_physical_cores=True)  # of those that affinity and cgroups allow
    if cores < torch.get_num_threads():
        torch.set_num_threads(cores)


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the BF16 and FP16 weights of a model in tensors of `dtype`, in place; every value stays what it was.

    A parameter's `stored_dtype` says what it holds the values of. Weights packed by bitsandbytes stay packed: they are
    unpacked to `dtype`, and their products are made in it.
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
    """The model with FP32 weights that count as FP32 from now on, in place: W + ε is not rounded to a narrower dtype.

    `model.float()` alone leaves the `stored_dtype` of a held weight, and so do PEFT's merges.
    """
    model.float()
    for parameter in model.parameters():
        parameter.__dict__.pop("stored_dtype", None)
    return model


def hold_as_computed(model: nn.Module, precision: Precision) -> None:
    """`hold` a model in the dtype of its products where that is wider than the stored one, else leave it."""
    if precision.held != precision.stored:
        hold(model, precision.held)


def stored_dtype(weight: torch.Tensor) -> torch.dtype:
    """Dtype whose values a weight holds: its own, unless `hold` has put them into wider tensors."""
    return getattr(weight, "stored_dtype", weight.dtype)


def as_stored(weight: torch.Tensor) -> torch.Tensor:
    """A frozen weight in its stored dtype; unchanged where some value is not representable in that dtype."""
    if weight.requires_grad or stored_dtype(weight) == weight.dtype:
        return weight.detach()
    narrow = weight.detach().to(stored_dtype(weight))
    return narrow if torch.equal(narrow.to(weight.dtype), weight) else weight.detach()


def slow_bf16_warning(model: nn.Module, setting: str, remedy: str) -> str:
    """A warning that `setting` makes a CPU compute in BF16 which is slow in it, with the measured ratio."""
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
        f"for {reason}; {remedy}."
    )


def warn_of_unscaled_fp16(dtypes: Iterable[torch.dtype]) -> None:
    """Warn of a training whose loss is not scaled, where a weight of its backbone is FP16."""
    if torch.float16 in set(dtypes):
        logger.warning(
            "The backbone is float16 and the loss is not scaled: small gradients of the adapter underflow to 0; load "
            "the backbone with dtype=torch.bfloat16, or set fp16=True in TrainingArguments (in a loop of your own: "
            "torch.amp.GradScaler, and loss_scaled=True here)."
        )


def measured_ratio(m: int, n: int, rows: int = 32, rounds: int = 3) -> float:
    """Time of an x Wᵀ in BF16 over that in FP32, W m × n and x rows × n; medians of a few rounds."""
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
