"""MBPP (Austin et al. 2021): short functions to write from a sentence and three tests; unbiased pass@k.

    python -m eval.mbpp PATH allow_code_execution=true [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: subset (sanitized: the 257 problems
whose wording was checked; full: 500), and those of `eval.humaneval` other than prompt. The prompt is the sentence and
the tests, zero-shot, in the run's template (the paper has three shots).

Scoring runs generated code, in the sandbox of `eval.humaneval`, and only if you allow it. The problems come from the
hub (google-research-datasets/mbpp), or from DIR/google-research-datasets/mbpp/<subset>/test.jsonl (or .parquet).
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from eval import BENCHMARKS, answers, humaneval, programs, sandbox
from flatlora.inputs.conversations import Chat
from flatlora.inputs.rows import Source, read_rows

SCORER_VERSION = 1
_COLUMNS = {"task_id": "int", "code": "text", "test_list": "any"}
_OF_SUBSET = {
    "sanitized": {"prompt": "text", "test_imports": "any"},
    "full": {"text": "text", "test_setup_code": "text"},
}
_VALUE = "value_of_test"  # the function that is called if tests need more of a program than calls of one function


class Config(programs.Config):
    name: ClassVar[str] = "mbpp"
    subset: Literal["sanitized", "full"] = "sanitized"


def _names(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def _sentence(row: Mapping[str, Any]) -> str:
    return row["prompt"] if "prompt" in row else row["text"]


def _setup(row: Mapping[str, Any]) -> str:
    """Returns the code that runs before the tests."""
    lines = row["test_imports"] if "test_imports" in row else [row["test_setup_code"]]
    return "".join(f"{line}\n" for line in lines).replace("\r\n", "\n")


def problem(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a problem as `CodeBenchmark` has it.

    `entry_point` has the names that the tests need of the program, one or more.

    Raises:
        ValueError: the row lacks a column, or its tests need no function of its solution.
    """
    if not ({"prompt", "test_imports"} <= row.keys() or {"text", "test_setup_code"} <= row.keys()):
        raise ValueError("it has neither prompt and test_imports (sanitized) nor text and test_setup_code (full)")
    tests, setup = [test.strip() for test in row["test_list"]], _setup(row)
    solution = ast.parse(row["code"].replace("\r\n", "\n"))
    defined = [node.name for node in solution.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    needed = [name for name in dict.fromkeys(defined) if name in _names("\n".join([setup, *tests]))]
    if not needed:
        raise ValueError("its tests need no function of its solution")
    checks, code = (tests, setup) if _is_called(needed) else _compared(tests, setup)
    return {
        "task_id": str(row["task_id"]),
        "code": code,
        "canonical_solution": row["code"],
        "test": "def check(candidate):\n" + "".join(textwrap.indent(check, "    ") + "\n" for check in checks),
        "entry_point": " ".join(needed),
    }


def _is_called(names: Sequence[str]) -> bool:
    """Whether the tests can call the program's function; "check" is the name of the tests."""
    return len(names) == 1 and names[0] != "check"


def _compared(tests: Sequence[str], setup: str) -> tuple[list[str], str]:
    """Returns tests that compare plain values, and the code that computes them beside the program.

    Objects such as the nodes of a tree cannot leave the program's process.

    Raises:
        ValueError: a test is no comparison by ==.
    """
    pairs = []
    for test in ast.parse("\n".join(tests)).body:
        match test:
            case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
                pairs.append((ast.unparse(left), ast.unparse(right)))
            case _:
                raise ValueError(f"it has several names, and a test that is no comparison by ==: {ast.unparse(test)}")
    values = ", ".join(f"lambda: {left}" for left, _ in pairs)
    checks = [f"assert candidate({number}) == {right}" for number, (_, right) in enumerate(pairs)]
    return checks, f"{setup}\ndef {_VALUE}(number):\n    return [{values}][number]()\n"


def ask(row: Mapping[str, Any], config: Config) -> tuple[str | Chat, str]:
    """Returns the prompt of a problem, and the form of its answer."""
    tests = "\n".join(test.strip() for test in row["test_list"])
    text = (
        f"{_sentence(row).strip()} Answer with Python code and nothing else. It should pass these tests:\n"
        f"```python\n{tests}\n```"
    )
    return programs.request(config, text), "instruction"


def task(row: Mapping[str, Any]) -> sandbox.Task:
    """Returns the program of an answer, and its tests."""
    names = row["entry_point"].split()
    if _is_called(names):
        return humaneval.task(row)
    text = answers.without_draft(row["completion"])
    written = dict.fromkeys(answers.function_in(text, name) or "" for name in names)
    return sandbox.Task("\n".join([*written, row["code"]]), "", row["test"], _VALUE)


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns the problems of the test split, from data_root or the hub."""
    source = Source("google-research-datasets/mbpp", config.subset, "test")
    return read_rows(source, columns=_COLUMNS | _OF_SUBSET[config.subset], data_root=data_root)


MBPP = programs.CodeBenchmark(
    name="mbpp",
    version=SCORER_VERSION,
    row_columns=_COLUMNS,
    problem=problem,
    ask=ask,
    task=task,
    load=benchmark_rows,
)

if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("mbpp", sys.argv[1:]))


BENCHMARKS.add("mbpp", MBPP.benchmark(Config, __doc__))
