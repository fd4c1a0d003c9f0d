"""predictions.jsonl: one row a prompt, written batch by batch, so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.backends import Backend
from flatlora.config import ConfigError
from flatlora.results import write_atomic, write_json
from flatlora.rows import jsonl, read_jsonl

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, list[dict[str, Any]]], None]  # (rows done, rows of the newest batch)


def generate(
    backend: Backend,
    prompts: Sequence[str],
    references: Sequence[str],
    folder: Path,
    *,
    max_new_tokens: int,
    on_progress: OnProgress | None = None,
) -> Path:
    """Answer every prompt greedily into `folder`/predictions.jsonl, in the prompts' order; returns that path.

    Prompts are answered in batches of like length. Greedy decoding in low precision can depend on a batch's company,
    so a resumed call forms the same batches and redoes a batch that is not whole. A file that is damaged, or made by
    another model, with other settings or for other prompts or references, is put aside as predictions.stale.jsonl.

    Raises:
        ConfigError: a prompt without a token.
        OSError: as the file system says (full, read-only); a later call goes on.
    """
    lengths = [backend.prompt_length(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ConfigError(
            [f"Invalid prompt in row {lengths.index(0) + 1}: the model's tokenizer finds no token in it; leave it out."]
        )
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "predictions.jsonl", folder / "predictions.partial.jsonl"
    asked = hashlib.sha256(json.dumps([*prompts, *references]).encode()).hexdigest()
    settings = {**backend.describe(), "max_new_tokens": max_new_tokens, "prompts_sha256": asked}
    done = _finished_rows(folder, [path, partial], settings, list(zip(prompts, references, strict=True)))
    if partial.is_file():
        write_atomic(partial, jsonl(done.values()))  # without a torn last line, which an append would run into
    write_json(folder / "generation.json", settings)
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    batches = [order[i : i + backend.batch_size] for i in range(0, len(order), backend.batch_size)]
    for batch in batches:
        if any(index not in done for index in batch):
            completions = backend.generate([prompts[index] for index in batch], max_new_tokens)
            rows = [
                {
                    "index": index,
                    "prompt": prompts[index],
                    "reference": references[index],
                    "completion": completion.text,
                    "tokens": completion.tokens,
                    "finished": completion.finished,
                }
                for index, completion in zip(batch, completions, strict=True)
            ]
            done |= {row["index"]: row for row in rows}
            with open(partial, "a", encoding="utf-8") as file:
                file.write(jsonl(rows))
        if on_progress:
            on_progress(sum(index in done for index in order), [done[index] for index in batch])
    write_atomic(path, jsonl(done[index] for index in range(len(prompts))))
    partial.unlink(missing_ok=True)
    return path


def _finished_rows(
    folder: Path, paths: Sequence[Path], settings: dict[str, Any], asked: Sequence[tuple[str, str]]
) -> dict[int, dict[str, Any]]:
    recorded, rows = folder / "generation.json", {}
    try:
        same, problem = json.loads(recorded.read_bytes()) == settings, "was made by another model, settings or prompts"
    except FileNotFoundError:
        same, problem = False, "has no generation.json that says what made it"
    except (ValueError, RecursionError):
        same, problem = False, "has a broken generation.json, which says not what made it"
    for path in paths:
        if not path.is_file():
            continue
        found = _whole_lines(path, asked) if same else None
        if found is not None:
            rows |= {row["index"]: row for row in found}
            continue
        stale = path.with_name(path.name.replace(".jsonl", ".stale.jsonl"))
        logger.warning("%s %s: kept as %s.", path, "is damaged" if same else problem, stale.name)
        path.replace(stale)
    return rows


def _whole_lines(path: Path, asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]] | None:
    """Rows of a file whose last line may be torn; None when any other is not one that answers what is asked."""
    *lines, last = path.read_bytes().split(b"\n")  # U+2028 and the like end no line
    rows = [_parse_line(line) for line in lines]
    if (row := _parse_line(last)) is not None:
        rows.append(row)
    for row in rows:
        if (
            _row_problem(row)
            or not row["index"] < len(asked)
            or asked[row["index"]] != (row["prompt"], row["reference"])
        ):
            return None
    return rows


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


_FIELDS = {"index": int, "prompt": str, "reference": str, "completion": str, "tokens": int, "finished": bool}


def _row_problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "is no row"
    wrong = [key for key, kind in _FIELDS.items() if type(row.get(key)) is not kind]
    if wrong:
        return f"has no good {', '.join(wrong)}"
    return None if row["index"] >= 0 else "has a negative index"


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a finished predictions file, each of them whole and in its place.

    Raises:
        ConfigError: the file is not there, or broken.
    """
    if not path.is_file():
        raise ConfigError([f"{path} is not there: generate the answers first (leave out score_only=true)."])
    rows = read_jsonl(path)
    for place, row in enumerate(rows):
        problem = _row_problem(row) or (f"has index {row['index']}, not {place}" if row["index"] != place else None)
        if problem:
            raise ConfigError(
                [f"Broken file {path}: row {place + 1} {problem}; generate anew (leave out score_only=true)."]
            )
    return rows
