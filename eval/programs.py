"""Benchmarks of programs: the model writes functions, and tests of them run in a sandbox; unbiased pass@k."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval import predictions, sandbox
from eval.backends import Generator, Sampling
from flatlora.config.sections import ChatSection
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_TOKENS, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.conversations import Chat, question
from flatlora.inputs.rows import prompt_of
from flatlora.utils.console import progress
from flatlora.utils.errors import ConfigError, SettingError
from flatlora.utils.files import write_atomic, write_json

HEADLINE = "pass@1"
FIELDS: predictions.Fields = {
    **predictions.GENERATED,
    **dict.fromkeys(("task_id", "code", "test", "entry_point", "form"), str),
    "sample": int,
    "seed": int,
}
Row = Mapping[str, Any]


class Config(ChatSection):
    name: ClassVar[str]  # of the benchmark
    allow_code_execution: bool = setting(False, remedy="true runs what the model wrote, in a sandbox")
    template: Literal["alpaca", "qa", "none", "chat"] = "alpaca"  # of the instruction; a run has its own
    samples: int = setting(5, ge=1, le=10**4, remedy="5 as published; 1 as in LoRA-Pro")
    temperature: float = setting(0.8, ge=0, le=100, remedy="0 is greedy")
    top_p: float = setting(0.95, gt=0, le=1, remedy="1 samples from all tokens")
    k: list[int] = setting([1], remedy="pass@k of each; k=[1,5]")
    seed: int = setting(42, ge=0, le=2**32 - 1, remedy="use a whole number from 0 to 4294967295")
    max_new_tokens: int = setting(512, ge=1, le=MOST_TOKENS, remedy="512 is usual")
    time_limit: float = setting(10.0, gt=0, le=86_400, remedy="seconds of CPU time for one program and its tests")
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null asks all problems")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    @property
    def section_path(self) -> str:
        return f"eval.{self.name}"

    def rule_errors(self) -> list[SettingError]:
        errors = super().rule_errors()
        if not self.allow_code_execution:
            errors.append(
                SettingError(
                    ("allow_code_execution",),
                    f"Invalid eval.{self.name} without eval.allow_code_execution=true (python -m eval.{self.name}: "
                    "allow_code_execution=true): its score comes from running programs that the model wrote, in a "
                    "sandbox without network, files and environment; say that you want that, or leave the "
                    "benchmark out.",
                )
            )
        if not self.k or any(k < 1 or k > self.samples for k in self.k):
            errors.append(
                SettingError(
                    ("k", "samples"),
                    f"Invalid eval.{self.name}.k={self.k} with samples={self.samples}: pass@k needs at least k "
                    "samples; lower k, or raise samples.",
                )
            )
        if self.temperature == 0 and self.samples > 1:
            errors.append(
                SettingError(
                    ("samples", "temperature"),
                    f"Invalid eval.{self.name}.samples={self.samples} with temperature=0: greedy answers are all the "
                    "same; use samples=1, or a temperature.",
                )
            )
        return errors


def request(config: Config, text: str) -> str | Chat:
    """Returns the prompt of an instruction. A text ends with the beginning of the answer, a code block."""
    prompt = prompt_of(question(config.template, config.system, text))
    return f"{prompt}```python\n" if isinstance(prompt, str) else prompt


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 − C(n−c, k)/C(n, k): the probability that at least one of k samples, drawn from n with c right, is right."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class CodeBenchmark:
    """A benchmark of functions that the model writes.

    Args:
        name: the benchmark's name, that of its file and option.
        version: incremented when the same answers get different scores.
        row_columns: columns of its rows, as `flatlora.inputs.rows.Columns`.
        problem: row → {"task_id", "code", "canonical_solution", "test", "entry_point"}, all text; raises ValueError
            with the reason if the row is none.
        ask: (row, config) → (prompt, form of the answer); a prompt is a text or a `Chat`.
        task: answered row, with `FIELDS` → the program and its tests.
        stops: texts that end an answer of the form "completion".
        load: (data_root, config) → the benchmark's own rows.
    """

    name: str
    version: int
    row_columns: Mapping[str, str]
    problem: Callable[[Row], dict[str, str]]
    ask: Callable[[Row, Any], tuple[str | Chat, str]]
    task: Callable[[Row], sandbox.Task]
    load: Callable[[str | None, Any], list[dict[str, Any]]]
    stops: tuple[str, ...] = ()

    def score(self, rows: Sequence[dict[str, Any]], passed: Sequence[bool], ks: Sequence[int] = (1,)) -> dict[str, Any]:
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
        return {"scorer": f"{self.name}/{self.version}", "n": len(groups), "metrics": metrics}

    def row_scores(self, rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
        """Returns {problem: fraction of its samples that pass} from outcomes.jsonl; runs no program.

        Raises:
            ConfigError: outcomes are missing.
        """
        outcomes = predictions.appended_rows(folder / "outcomes.jsonl")
        passed_of = {row["program"]: row["passed"] for row in outcomes if {"program", "passed"} <= row.keys()}
        programs = {row["index"]: _program_sha256(task) for row, task in zip(rows, map(self.task, rows), strict=True)}
        if not set(programs.values()) <= passed_of.keys():
            raise ConfigError(
                [f"{folder / 'outcomes.jsonl'} lacks outcomes: score the run first, with score_only=true."]
            )
        groups: dict[str, list[bool]] = defaultdict(list)
        for row in rows:
            groups[row["task_id"]].append(passed_of[programs[row["index"]]])
        return {task: sum(passes) / len(passes) for task, passes in groups.items()}

    def check_rows(self, rows: Sequence[Row], source: str, config: Any, **known: Any) -> None:
        """Checks that every problem can be run, and that this machine can isolate programs.

        Raises:
            ConfigError: a problem is not valid Python or lacks its function; also raises the errors of `sandbox.walls`.
        """
        for number, row in enumerate(rows, start=1):
            try:
                problem = self.problem(row)
                compile(problem["code"], "<prompt>", "exec")
                compile(problem["test"], "<test>", "exec")
                reason = None
            except SyntaxError as error:
                reason = f"it is not valid Python ({error})"
            except ValueError as error:
                reason = str(error)
            if reason:
                raise ConfigError([f"Invalid problem in {source}, row {number}: {reason}; fix it, or leave it out."])
        sandbox.walls()

    def run(
        self,
        backend: Generator,
        rows: Sequence[dict[str, Any]],
        folder: Path,
        config: Config,
        *,
        on_progress: predictions.OnProgress | None = None,
    ) -> dict[str, Any]:
        """Generates `config.samples` programs per problem and runs them; writes predictions, outcomes and the score."""
        rows = rows[: config.max_rows]
        samples = [(row, sample) for row in rows for sample in range(config.samples)]
        problems = [self.problem(row) for row, _ in samples]
        prompts, forms = zip(*(self.ask(row, config) for row, _ in samples), strict=True) if samples else ((), ())
        completes = "completion" in forms
        sampling = Sampling(
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            stop=self.stops if completes else (),  # a fence may close a block, open one, or be part of a docstring
            stop_in_body=completes,
        )
        path = predictions.generate(
            backend,
            prompts,
            [problem["canonical_solution"] for problem in problems],
            folder,
            sampling=sampling,
            known=[
                {
                    "task_id": problem["task_id"],
                    "sample": sample,
                    "code": problem["code"],
                    "test": problem["test"],
                    "entry_point": problem["entry_point"],
                    "form": form,
                }
                for problem, (_, sample), form in zip(problems, samples, forms, strict=True)
            ],
            seeds=[
                _seed(config.seed, problem["task_id"], sample)
                for problem, (_, sample) in zip(problems, samples, strict=True)
            ],
            on_progress=on_progress,
        )
        return self.score_file(path, config)

    def score_file(self, path: Path, config: Config) -> dict[str, Any]:
        """Runs every program of a finished predictions.jsonl; writes outcomes.jsonl and score.json beside it.

        Programs that were already run with the same limits are not run again.

        Raises:
            ConfigError: the file is missing or broken, code execution is not allowed, or there is no safe sandbox here.
        """
        if errors := [error.message for error in config.rule_errors()]:
            raise ConfigError(errors)
        rows = predictions.read(path, FIELDS)
        limits = sandbox.Limits(seconds=config.time_limit)
        tasks = [self.task(row) for row in rows]
        outcomes = self._outcomes(tasks, limits, path.with_name("outcomes.jsonl"))
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
        result = self.score(rows, [outcome["passed"] for outcome in outcomes], config.k)
        result["sandbox"] = sandbox.walls().describe() | {"seconds": limits.seconds, "memory": limits.memory}
        write_json(path.with_name("score.json"), result)
        return result

    def _outcomes(self, tasks: Sequence[sandbox.Task], limits: sandbox.Limits, path: Path) -> list[dict[str, Any]]:
        """Returns {"passed", "error", "key"} of each task: from `path` if it has them, else by running the program."""
        keys = [
            hashlib.sha256(json.dumps([*task, limits.seconds, limits.memory, self.version]).encode()).hexdigest()
            for task in tasks
        ]
        rows = [row for row in predictions.appended_rows(path) if {"key", "passed", "error"} <= row.keys()]
        # A busy machine may be the reason for a time-out: run those programs again.
        outcomes = {row["key"]: row for row in rows if not str(row["error"]).startswith("no verdict")}
        write_atomic(path, predictions.appendable(rows))  # drop an incomplete last line before appending
        remaining = {
            key: task for key, task in zip(keys, tasks, strict=True) if key not in outcomes
        }  # each program once
        with progress("run programs", len(remaining), least=1) as advance, open(path, "a", encoding="utf-8") as file:
            for key, outcome in zip(remaining, sandbox.run_all(list(remaining.values()), limits), strict=True):
                outcomes[key] = {"key": key, "passed": outcome.passed, "error": outcome.error}
                file.write(predictions.appendable([outcomes[key]]))
                file.flush()
                advance(1)
        return [{name: outcomes[key][name] for name in ("key", "passed", "error")} for key in keys]

    def benchmark(self, Config: type[Config], help: str) -> Benchmark:
        """Returns the plug-in to register."""
        return Benchmark(
            Config=Config,
            help=help,
            kind="text",
            scorer_version=self.version,
            headline=HEADLINE,
            row_columns=self.row_columns,
            generates=True,
            scoring=("allow_code_execution", "k", "time_limit"),
            own_rows=lambda config: True,
            fields=FIELDS,
            check_rows=self.check_rows,
            run=self.run,
            score_file=self.score_file,
            row_scores=self.row_scores,
            benchmark_rows=self.load,
        )


def _seed(seed: int, task: str, sample: int) -> int:
    """Returns the seed of one sample, which is independent of the other samples and problems."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{sample}".encode()).digest()[:6], "little")


def _program_sha256(task: sandbox.Task) -> str:
    return hashlib.sha256(json.dumps(list(task)).encode()).hexdigest()
