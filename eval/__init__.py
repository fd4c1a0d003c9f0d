"""Benchmarks, one file each: generate() → predictions.jsonl, score() → score.json; the file lies between.

A benchmark registers a `flatlora.experiment.plugins.Benchmark` and has a command line, `python -m eval.NAME PATH
[key=value ...]`.
"""

from __future__ import annotations

from flatlora.experiment.plugins import Benchmark
from flatlora.utils.registry import Registry

BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "eval")
