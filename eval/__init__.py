"""Benchmarks, one file each: generate() → predictions.jsonl, score() → score.json; the file lies between.

An evaluator module has `Config` (its config section), `run(backend, rows, folder, config, ...)` and a command line,
`python -m eval.NAME PATH [key=value ...]`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def evaluator(name: str) -> ModuleType:
    """The evaluator module; KeyError lists the known ones."""
    if name not in names():
        raise KeyError(f"Unknown benchmark {name}: known are {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}")


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


_SHARED = ("backends", "predictions", "command")
