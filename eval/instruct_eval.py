"""InstructEval (Chia et al. 2023): MMLU 5-shot, DROP 3-shot and BBH 3-shot by lm-eval, HumanEval zero-shot.

    python -m eval.instruct_eval PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: tasks (of mmlu, drop, bbh,
humaneval, or single lm-eval tasks such as mmlu_anatomy), allow_code_execution (for humaneval), max_rows (of each
lm-eval task), batch_size, data_root=DIR, device, out=DIR, score_only=true.

The tasks' data are the hub's, or DIR/<owner>/<name>/<config>/<split>.jsonl as everywhere: cais/mmlu, EleutherAI/drop,
SaylorTwift/bbh. Each lm-eval task is kept once it is answered, and not asked again. Needs the extra `instruct`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from eval import humaneval, predictions
from eval.backends import Backend
from flatlora.config import ConfigError, Section, setting
from flatlora.files import write_atomic, write_json
from flatlora.rows import jsonl, read_jsonl

KIND = "text"
GENERATES = False
OWN_ROWS = True
SCORING = ("allow_code_execution",)
SCORER_VERSION = 1
HEADLINE = "average"
ROW_COLUMNS = {"task": "text"}
FIELDS: predictions.Fields = {"index": int, "task": str, "doc": int, "score": float}
# (lm-eval's name, shots, the metric of a row)
_GROUPS = {"mmlu": ("mmlu", 5, "acc"), "drop": ("drop", 3, "f1"), "bbh": ("bbh_fewshot", 3, "exact_match")}


class Config(Section):
    tasks: list[str] = setting(
        ["mmlu", "drop", "bbh"], remedy="name mmlu, drop, bbh, humaneval, or lm-eval's own tasks"
    )
    allow_code_execution: bool = setting(False, remedy="true runs what the model wrote for humaneval, in a sandbox")
    template: Literal["alpaca", "qa", "none"] = "alpaca"  # of humaneval
    max_rows: int | None = setting(None, ge=1, remedy="null asks every row of every task")
    batch_size: int = setting(8, ge=1, remedy="lower it when memory runs out")

    def rule_faults(self) -> list[str]:
        faults = []
        if importlib.util.find_spec("lm_eval") is None:
            faults.append(
                "Invalid eval.instruct_eval: the package lm_eval is not installed; run pip install lm_eval, or leave "
                "the benchmark out."
            )
        unknown = [name for name in self.tasks if name != "humaneval" and _group(name) is None]
        if unknown or not self.tasks:
            faults.append(
                f"Invalid eval.instruct_eval.tasks={self.tasks}: {', '.join(unknown) or 'an empty list'} is none of "
                "mmlu, drop, bbh, humaneval, nor a part of them such as mmlu_anatomy; name some."
            )
        if "humaneval" in self.tasks:
            faults += self.humaneval().rule_faults()
        return faults

    def humaneval(self) -> humaneval.Config:
        """Zero-shot and greedy, as InstructEval has it."""
        return humaneval.Config(
            allow_code_execution=self.allow_code_execution,
            template=self.template,
            samples=1,
            temperature=0.0,
            max_rows=self.max_rows,
            batch_size=self.batch_size,
        )


def _group(task: str) -> str | None:
    """mmlu, drop or bbh: what an lm-eval task is part of."""
    return next((name for name in _GROUPS if task == name or task.startswith(f"{name}_")), None)


def score(rows: Sequence[dict[str, Any]], passes: float | None = None) -> dict[str, Any]:
    """The mean over the rows of each group, and the average over groups.

    Args:
        rows: {"task", "score"} each; a score is 1 or 0, or DROP's F1.
        passes: HumanEval's pass@1, where it was asked.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(_group(row["task"]) or row["task"], []).append(row["score"])
    shares = {name: sum(values) / len(values) for name, values in found.items()}
    shares |= {} if passes is None else {"humaneval": passes}
    average = sum(shares.values()) / len(shares) if shares else None
    metrics = {"n": len(rows), HEADLINE: average, **shares}
    return {"scorer": f"instruct_eval/{SCORER_VERSION}", "n": len(rows), "metrics": metrics}


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """{row: score} of the lm-eval tasks."""
    return {(row["task"], row["doc"]): row["score"] for row in rows}


def check_rows(rows: Sequence[dict[str, Any]], source: str, config: Config, **known: Any) -> None:
    """See to it that HumanEval, if asked, can be tried on this machine.

    Raises:
        ConfigError: as `humaneval.check_rows`.
    """
    if "humaneval" in config.tasks:
        humaneval.check_rows(humaneval.benchmark_rows(_root(rows)), "humaneval's own rows", config.humaneval())


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """One row a task; lm-eval reads the tasks' own rows when it comes to them."""
    return [{"task": task, "data_root": data_root} for task in config.tasks]


def _root(rows: Sequence[dict[str, Any]]) -> str | None:
    return rows[0].get("data_root") if rows else None


def run(
    backend: Backend,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Ask every task; tasks/NAME.jsonl each, predictions.jsonl of all, score.json."""
    settings = {
        **backend.describe(),
        "max_rows": config.max_rows,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    kept = folder / "tasks"
    kept.mkdir(parents=True, exist_ok=True)
    if _settings(folder) != settings and any(kept.iterdir()):  # answers of another model, or of other settings
        kept.rename(predictions.free_name(folder / "tasks.stale"))
        kept.mkdir()
    write_json(folder / "generation.json", settings)
    names = [row["task"] for row in rows if row["task"] != "humaneval"]
    found: list[dict[str, Any]] = []
    for done, task in enumerate(names):
        if on_progress:
            on_progress(done, len(names), [])
        path = kept / f"{task}.jsonl"
        if not _is_answered(path, _root(rows)):
            answers, read = _ask(backend, task, config, _root(rows))
            write_atomic(path, jsonl(answers))
            write_json(path.with_suffix(".read.json"), read)
        found += read_jsonl(path)
    if on_progress:
        on_progress(len(names), len(names), [])
    path = folder / "predictions.jsonl"
    write_atomic(path, jsonl({"index": index, **row} for index, row in enumerate(found)))
    if "humaneval" in config.tasks:
        asked = humaneval.benchmark_rows(_root(rows))
        humaneval.run(backend, asked, folder / "humaneval", config.humaneval(), on_progress=on_progress)
    return score_file(path, config)


def _is_answered(path: Path, data_root: str | None) -> bool:
    """Whether a task's answers are there, and its data are those that it was asked."""
    try:
        read = json.loads(path.with_suffix(".read.json").read_bytes())
    except (OSError, ValueError):
        return False
    alike = bool(read) == (data_root is not None)
    return path.is_file() and alike and all(read[name] == _sha256(Path(data_root) / name) for name in read)


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settings(folder: Path) -> Any:
    try:
        return json.loads((folder / "generation.json").read_bytes())
    except (OSError, ValueError):
        return None


def _ask(
    backend: Any, task: str, config: Config, data_root: str | None
) -> tuple[list[dict[str, Any]], dict[str, str | None]]:
    """Rows {"task", "doc", "prompt", "answer", "target", "score"} of one lm-eval task or group, as lm-eval scores them;
    and the files below `data_root` that they are from, with their hashes.

    Raises:
        ConfigError: the task's data, or a task of that name, are not to be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    group, shots, metric = _GROUPS[_group(task)]
    name = group if task in _GROUPS else f"{group}{task[len(_group(task)) :]}"
    model = HFLM(
        pretrained=backend.model,
        tokenizer=backend.tokenizer,
        batch_size=config.batch_size,
        mixed_precision_dtype=backend.autocast_dtype,
        backend="seq2seq" if backend.model.config.is_encoder_decoder else "causal",
    )
    with _data_of(data_root) as files:
        try:
            results = lm_eval.simple_evaluate(
                model=model, tasks=[name], num_fewshot=shots, limit=config.max_rows, bootstrap_iters=0
            )
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError([f"Cannot ask {name} of lm-eval: {str(error).partition(chr(10))[0]}."]) from error
    rows = [
        {
            "task": part.replace("bbh_fewshot", "bbh"),
            "doc": sample["doc_id"],
            "prompt": str(sample["arguments"][0][0]),  # of its first request; the others differ in the choice alone
            "answer": json.dumps(sample["filtered_resps"], default=str, ensure_ascii=False),
            "target": str(sample["target"]),
            "score": float(sample[metric]),
        }
        for part, samples in sorted(results["samples"].items())
        for sample in sorted(samples, key=lambda one: one["doc_id"])
    ]
    return rows, {str(path.relative_to(data_root)): _sha256(path) for path in files}


@contextlib.contextmanager
def _data_of(data_root: str | None) -> Iterator[set[Path]]:
    """Let lm-eval read data_root/<owner>/<name>/<config>/<split>.jsonl instead of the hub; gives the files it read."""
    read: set[Path] = set()
    if data_root is None:
        yield read
        return
    import datasets

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        folder = Path(data_root) / path / (name or "default")
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise ConfigError(
                [
                    f"Invalid data_root={data_root}: {folder}/SPLIT.jsonl is not there; put the splits of {path} in "
                    "such files with the hub's columns, or leave data_root out to read the hub."
                ]
            )
        read.update(files)
        return datasets.DatasetDict({file.stem: datasets.Dataset.from_list(read_jsonl(file)) for file in files})

    usual, datasets.load_dataset = datasets.load_dataset, load
    try:
        yield read
    finally:
        datasets.load_dataset = usual


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Score a finished predictions.jsonl, and HumanEval's beside it; writes score.json.

    Raises:
        ConfigError: a file is not there, or broken.
    """
    passes = None
    if "humaneval" in config.tasks:
        found = humaneval.score_file(path.parent / "humaneval" / "predictions.jsonl", config.humaneval())
        passes = found["metrics"][humaneval.HEADLINE]
    result = score(predictions.read(path, FIELDS), passes)
    write_json(path.with_name("score.json"), result)
    return result


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("instruct_eval", sys.argv[1:]))
