"""The environment in a run's record: packages, hardware, commit of the code, peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "numba",
    "numpy",
    "safetensors",
    "tokenizers",
    "pillow",
    "diffusers",
    "datasets",
    "bitsandbytes",
)


def environment() -> dict[str, Any]:
    """Returns package versions and hardware of this process, for the record."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # optional packages
            versions[name] = importlib.metadata.version(name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        },
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_sha() -> str | None:
    """Returns the commit of this code, with "-dirty" if the tree has changes; None outside a git checkout.

    $FLATLORA_GIT_SHA overrides it, for copies of the tree without its history, as on clusters.
    """
    if sha := os.environ.get("FLATLORA_GIT_SHA"):
        return sha
    project = Path(__file__).parent
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_gib() -> dict[str, float | None]:
    """Returns peak memory of this process in GiB: allocated and reserved by torch on the GPU (None without), and RSS.

    All are measured since `reset_peak_memory` if the system supports that, else since the process started.
    """
    on_gpu = torch.cuda.is_available()
    gpu = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    reserved = round(torch.cuda.max_memory_reserved() / 2**30, 3) if on_gpu else None
    status = Path("/proc/self/status")
    if status.exists():
        kib = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    peak = {"peak_gpu_gib": gpu and round(gpu, 3), "peak_rss_gib": round(kib / 2**20, 3)}
    return peak | {"peak_reserved_gib": reserved}


def reset_peak_memory() -> None:
    """Resets peak memory, so that each run of a sweep in one process has its own; ignored if the kernel refuses."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
