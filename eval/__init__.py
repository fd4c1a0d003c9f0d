"""Benchmarks, one file each: `run` writes predictions.jsonl, and `score_file` reads it and writes score.json.

A benchmark registers a `flatlora.experiment.plugins.Benchmark` and has a command line, `python -m eval.NAME PATH
[key=value ...]`.
"""

from __future__ import annotations

from flatlora.experiment.plugins import Benchmark
from flatlora.utils.registry import Registry

BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "eval")
