"""HumanEval+ (EvalPlus, Liu et al. 2023): HumanEval's 164 functions with about 80 times as many tests.

    python -m eval.humaneval_plus PATH allow_code_execution=true [key=value ...]

Everything else is as in `eval.humaneval`: keys, prompts, sandbox and score. The problems come from the hub
(evalplus/humanevalplus), or from DIR/evalplus/humanevalplus/default/test.jsonl (or .parquet).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, ClassVar

from eval import BENCHMARKS, humaneval
from flatlora.inputs.rows import Source, read_rows

_SOURCE = Source("evalplus/humanevalplus", "default", "test")


class Config(humaneval.Config):
    name: ClassVar[str] = "humaneval_plus"


def benchmark_rows(data_root: str | None, config: Config | None = None) -> list[dict[str, Any]]:
    """Returns the problems, from data_root or the hub."""
    return read_rows(_SOURCE, columns=humaneval.ROW_COLUMNS, data_root=data_root)


HUMANEVAL_PLUS = replace(humaneval.HUMANEVAL, name="humaneval_plus", version=1, load=benchmark_rows)

if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("humaneval_plus", sys.argv[1:]))


BENCHMARKS.add("humaneval_plus", HUMANEVAL_PLUS.benchmark(Config, __doc__))
