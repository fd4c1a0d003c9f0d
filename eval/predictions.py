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
    so a resumed call forms the same batches and redoes a batch that is not whole. A file made by another model, with
    other settings or for other prompts or references is put aside as predictions.stale.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "predictions.jsonl", folder / "predictions.partial.jsonl"
    asked = hashlib.sha256(json.dumps([*prompts, *references]).encode()).hexdigest()
    settings = {**backend.describe(), "max_new_tokens": max_new_tokens, "prompts_sha256": asked}
    done = _finished_rows(folder, [path, partial], settings)
    if partial.is_file():
        write_atomic(partial, jsonl(done.values()))  # without a torn last line, which an append would run into
    write_json(folder / "generation.json", settings)
    order = sorted(range(len(prompts)), key=lambda i: (-backend.prompt_length(prompts[i]), i))
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


def _finished_rows(folder: Path, paths: Sequence[Path], settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    recorded = folder / "generation.json"
    same = recorded.is_file() and json.loads(recorded.read_text()) == settings
    rows: dict[int, dict[str, Any]] = {}
    for path in paths:
        if not path.is_file():
            continue
        if same:
            rows |= {row["index"]: row for row in _whole_lines(path)}
            continue
        stale = path.with_name(path.name.replace(".jsonl", ".stale.jsonl"))
        logger.warning("%s was made by another model, settings or prompts: kept as %s.", path, stale.name)
        path.replace(stale)
    return rows


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file whose last line may be torn."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # U+2028 and the like end no line
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a finished predictions file.

    Raises:
        ConfigError: the file is not there, or broken.
    """
    if not path.is_file():
        raise ConfigError([f"{path} is not there: generate the answers first (leave out score_only=true)."])
    return read_jsonl(path)
