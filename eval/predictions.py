"""predictions.jsonl: one row per prompt, written batch by batch, so that an interrupted evaluation can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.backends import Generator, Sampling
from flatlora.inputs.conversations import Chat, readable
from flatlora.inputs.rows import MOST_BYTES, jsonl, prompt_of, read_jsonl
from flatlora.runs.record import RunRecord
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic, write_json
from flatlora.utils.plain_files import read_plain
from flatlora.utils.records import ROWS_HASH, read_record, rows_problem

logger = logging.getLogger(__name__)

Each = Callable[[Callable[[int], Any], Sequence[int]], Iterator[tuple[int, Any]]]
OnProgress = Callable[[int, int, list[dict[str, Any]]], None]  # (rows done, of how many, rows of the newest batch)
Fields = Mapping[str, type]

GENERATED: Fields = {
    "index": int,
    "prompt": str,
    "reference": str,
    "completion": str,
    "tokens": int,
    "finished": bool,
}


def generate(
    backend: Generator,
    prompts: Sequence[str | Chat],
    references: Sequence[str],
    folder: Path,
    *,
    sampling: Sampling,
    known: Sequence[Mapping[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Generates a completion for every prompt, in `folder`/predictions.jsonl in the prompts' order; returns that path.

    Works like `collect`, and raises its errors.

    Args:
        known: further columns of each row, for the scorer.
        seeds: one per row if completions are sampled; saved in the rows.
    """
    known, done = known or [{}] * len(prompts), 0
    if seeds is not None:
        known = [{**more, "seed": seed} for more, seed in zip(known, seeds, strict=True)]

    def count(rows: int, total: int, newest: list[dict[str, Any]]) -> None:
        nonlocal done
        done = rows
        on_progress(rows, total, newest)

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        def report_token(token: int) -> None:  # a batch can take a minute, so the progress bar also counts tokens
            on_progress(done + len(batch) * token // (sampling.max_new_tokens + 1), len(prompts), [])

        drawn = [seeds[index] for index in batch] if seeds is not None else None
        with _on_token(backend, report_token if on_progress else None):
            completions = backend.generate([prompts[index] for index in batch], sampling, drawn)
        return [
            {"completion": completion.text, "tokens": completion.tokens, "finished": completion.finished}
            | ({"refusal": completion.refusal} if completion.refusal else {})
            for completion in completions
        ]

    lengths = prompt_lengths(backend, prompts)
    if check := getattr(backend, "check_lengths", None):
        check(lengths, sampling.max_new_tokens)
    return collect(
        [{**_asked(p), "reference": r, **more} for p, r, more in zip(prompts, references, known, strict=True)],
        answer,
        folder,
        fields=GENERATED,
        lengths=lengths,
        batch_size=backend.batch_size,
        each=getattr(backend, "each", None),
        settings={**backend.describe(), **sampling.describe()},
        on_progress=count if on_progress else None,
    )


def _asked(prompt: str | Chat) -> dict[str, Any]:
    """Returns the columns of a prompt: of a chat its text for people, its turns, and its tools if it has any."""
    if not isinstance(prompt, Chat):
        return {"prompt": prompt}
    columns = {"prompt": readable(prompt.messages), "messages": prompt.messages, "tools": prompt.tools}
    return {key: value for key, value in columns.items() if value is not None}


@contextlib.contextmanager
def _on_token(backend: Generator, report: Callable[[int], None] | None) -> Iterator[None]:
    """Makes the backend call `report` for each token inside the context, if it supports that."""
    if not hasattr(backend, "on_token"):
        yield
        return
    backend.on_token = report
    try:
        yield
    finally:
        backend.on_token = None


def answer_rows(
    backend: Generator,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    sampling: Sampling,
    *,
    keep: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Calls `generate` for rows {"x", "y"} of a data set; columns in `keep` are saved with the answers."""
    return generate(
        backend,
        [prompt_of(row) for row in rows],
        [row["y"] for row in rows],
        folder,
        sampling=sampling,
        known=[{key: row[key] for key in keep} for row in rows],
        seeds=seeds,
        on_progress=on_progress,
    )


def prompt_lengths(backend: Generator, prompts: Sequence[str | Chat]) -> list[int]:
    """Returns the number of tokens of each prompt.

    Raises:
        ConfigError: a prompt has no tokens.
    """
    lengths = [backend.prompt_length(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ConfigError(
            [f"Invalid prompt in row {lengths.index(0) + 1}: the model's tokenizer finds no token in it; leave it out."]
        )
    return lengths


def collect(
    inputs: Sequence[Mapping[str, Any]],
    answer: Callable[[list[int]], list[dict[str, Any]]],
    folder: Path,
    *,
    fields: Fields,
    lengths: Sequence[int],
    batch_size: int,
    settings: Mapping[str, Any],
    each: Each | None = None,
    on_progress: OnProgress | None = None,
    is_valid: Callable[[Mapping[str, Any]], bool] = lambda row: True,
) -> Path:
    """Answers every row, in `folder`/predictions.jsonl in the rows' order; returns that path.

    generation.json records the settings that determine the answers, and the hash of the finished file. Each row of an
    unfinished file has a hash of the row and of those settings. Damaged answers, and answers that a process with
    another model wrote, are therefore never used.

    Rows are answered in batches of similar length. With greedy decoding in low precision an answer can depend on the
    rest of its batch, so a resumed call forms the same batches and repeats incomplete ones. A file that is damaged, or
    was made by another model, with other settings or for other rows, is renamed to predictions.stale.jsonl.

    Args:
        inputs: the columns of each row before it is answered; saved unchanged.
        answer: indices of a batch → the columns to add to each of its rows.
        fields: keys of a complete row, and their types.
        settings: what determines the answers besides the rows; saved in generation.json.
        is_valid: whether the files that a row names still exist; other rows are answered again.
        each: how to answer single rows concurrently, see `eval.backends.Generator`; None answers in batches.

    Raises:
        OSError: the file system is full or read-only; a later call continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "predictions.jsonl", folder / "predictions.partial.jsonl"
    prompts_sha256 = hashlib.sha256(json.dumps(list(inputs), default=str).encode()).hexdigest()
    settings = {**settings, "rows": len(inputs), "prompts_sha256": prompts_sha256}
    made_by = _digest(settings)
    done, complete = _finished_rows(folder, [path, partial], settings, inputs, fields)
    done = {index: row for index, row in done.items() if is_valid(row)}
    if complete and len(done) == len(inputs) and not partial.is_file():
        if on_progress:
            on_progress(len(done), len(inputs), [])
        return path
    if done or os.path.lexists(partial):  # drop an incomplete last line before appending
        write_atomic(partial, jsonl(_checked(row, made_by) for row in done.values()))
    write_json(folder / "generation.json", settings | {ROWS_HASH: None})
    path.unlink(missing_ok=True)  # its rows are in the partial file now
    order = sorted(range(len(inputs)), key=lambda i: (-lengths[i], i))
    if on_progress:
        on_progress(len(done), len(inputs), [])

    for batch, answers in _answers(order, done, answer, batch_size, each):
        if answers is not None:
            rows = [{"index": i, **inputs[i], **answered} for i, answered in zip(batch, answers, strict=True)]
            done.update({row["index"]: row for row in rows})
            with open(partial, "a", encoding="utf-8") as file:
                file.write(jsonl(_checked(row, made_by) for row in rows))
        if on_progress:
            on_progress(len(done), len(inputs), [done[index] for index in batch])
    write_finished(folder, (done[index] for index in range(len(inputs))), settings)
    partial.unlink(missing_ok=True)
    return path


def _answers(
    order: Sequence[int],
    done: Mapping[int, Any],
    answer: Callable[[list[int]], list[dict[str, Any]]],
    batch_size: int,
    each: Each | None,
) -> Iterator[tuple[Sequence[int], Sequence[Mapping[str, Any]] | None]]:
    """Yields batches of `order` with the columns added to their rows; None for a batch whose rows are all finished."""
    if each:
        for index, answers in each(lambda i: answer([i]), [i for i in order if i not in done]):
            yield [index], answers
        return
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield batch, None if all(index in done for index in batch) else answer(batch)


def write_finished(folder: Path, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """Writes finished answers, and generation.json with their settings and hash; returns the path of the answers."""
    content = jsonl(rows).encode()
    write_json(folder / "generation.json", {**settings, ROWS_HASH: hashlib.sha256(content).hexdigest()})
    path = folder / "predictions.jsonl"
    write_atomic(path, content)
    return path


_CHECK = "check"  # hash in the rows of an unfinished file, or of one that is appended to row by row


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _checksum(row: Mapping[str, Any], made_by: str = "appended") -> str:
    return hashlib.sha256(f"{made_by}|{json.dumps(row)}".encode()).hexdigest()[:16]


def _checked(row: Mapping[str, Any], made_by: str) -> dict[str, Any]:
    """Returns the row with a hash of its contents and of the settings that generated it."""
    return {**row, _CHECK: _checksum(row, made_by)}


def _finished_rows(
    folder: Path,
    paths: Sequence[Path],
    settings: dict[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    fields: Fields,
) -> tuple[dict[int, dict[str, Any]], bool]:
    """Returns the existing rows, and whether they are those of a finished file with a valid hash."""
    problem, manifest = _origin_problem(folder, settings)
    rows: dict[int, dict[str, Any]] = {}
    complete = False
    for path in paths:
        if not os.path.lexists(path):
            continue
        partial, message = path != paths[0], problem
        if message is None:
            valid_rows = _read_rows(path, inputs, fields, _digest(settings) if partial else None)
            broken = valid_rows is None or (
                not partial and manifest is not None and rows_problem(path, manifest) is not None
            )
            message = "is damaged" if broken else None
        if message is None:
            rows |= {row["index"]: row for row in valid_rows}
            complete = complete or (not partial and manifest is not None)
            continue
        stale = free_name(path.with_name(path.name.replace(".jsonl", ".stale.jsonl")))
        logger.warning("%s %s: kept as %s.", path, message, stale.name)
        path.replace(stale)
    return rows, complete


_LATER_KEYS = ("tokenizer", "settings")  # of generation.json, added by later versions


def _origin_problem(folder: Path, settings: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """Returns (why the existing answers have another origin, or None; generation.json if it has the rows' hash)."""
    try:
        manifest = read_record(folder / "generation.json")
    except ConfigError:
        return "has a broken generation.json, so its origin is unknown", None
    if manifest is None:
        return "has no generation.json, so its origin is unknown", None
    unknown = {key: settings[key] for key in _LATER_KEYS if key in settings}  # earlier versions did not record these
    if unknown | {key: value for key, value in manifest.items() if key != ROWS_HASH} != settings:
        return "was made by another model, settings or prompts", None
    return None, manifest if ROWS_HASH in manifest else None


def free_name(path: Path) -> Path:
    """Returns `path`, or if it exists the first free one of NAME-2, NAME-3, …, so that nothing is overwritten."""
    names = [path, *(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _read_rows(
    path: Path, inputs: Sequence[Mapping[str, Any]], fields: Fields, made_by: str | None
) -> list[dict[str, Any]] | None:
    """Returns the rows of a file whose last line may be incomplete; None if any other line does not match its prompt.

    Args:
        made_by: the digest of the settings for the rows' checks; None for a finished file, whose rows have no checks.
    """
    try:
        *lines, last = read_plain(path, MOST_BYTES).split(b"\n")  # unlike splitlines, not at U+2028 and the like
    except OSError:
        return None
    rows = [_parse_line(line) for line in lines]
    if (row := _parse_line(last)) is not None:
        rows.append(row)
    if made_by is not None:
        if not all(isinstance(row, dict) and _checksum(_unchecked(row), made_by) == row.get(_CHECK) for row in rows):
            return None
        rows = [_unchecked(row) for row in rows]
    for row in rows:
        if _row_problem(row, fields) or not row["index"] < len(inputs):
            return None
        if any(row[key] != value for key, value in inputs[row["index"]].items()):
            return None
    return rows


def _unchecked(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != _CHECK}


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def appendable(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the rows as lines of a file that is appended to row by row, each with a hash of its contents."""
    return jsonl({**row, _CHECK: _checksum(row)} for row in rows)


def appended_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of `appendable` lines, whose last line may be incomplete; [] if there is no file.

    Damaged rows are left out with a warning; rows of earlier versions have no hash and are not checked.

    Raises:
        ConfigError: it is not a file, or cannot be read.
    """
    try:
        *lines, last = read_plain(path, MOST_BYTES).split(b"\n") if os.path.lexists(path) else [b""]
    except OSError as error:
        raise ConfigError([f"Cannot read {path}: {reason_of(error)}; move it away, and it is made again."]) from error
    rows = [_parse_line(line) for line in (*filter(None, lines), *filter(_parse_line, [last]))]
    valid = [row for row in rows if isinstance(row, dict) and row.get(_CHECK) in (None, _checksum(_unchecked(row)))]
    if len(valid) < len(rows):
        logger.warning("%s: damaged lines are left out (%d).", path, len(rows) - len(valid))
    return [_unchecked(row) for row in valid]


def _row_problem(row: Any, fields: Fields) -> str | None:
    if not isinstance(row, dict):
        return "is not a JSON object"
    wrong = [key for key, kind in fields.items() if type(row.get(key)) is not kind]
    if wrong:
        return f"has no valid {', '.join(wrong)}"
    return None if row["index"] >= 0 else "has a negative index"


def _expected_rows(folder: Path) -> int | None:
    """Returns the number of rows in generation.json; None if it is missing or broken, or does not have the number."""
    try:
        return (read_record(folder / "generation.json") or {}).get("rows")
    except ConfigError:
        return None  # `read` reports it


def score_file(path: Path, fields: Fields, score: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
    """Scores a predictions file and writes score.json beside it.

    Raises:
        ConfigError: the file is missing or broken.
    """
    result = score(read(path, fields))
    write_json(path.with_name("score.json"), result)
    return result


def answer_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the metrics that every benchmark of generated answers has.

    Args:
        rows: {"finished", "tokens"} each, and "refusal" if an endpoint did not answer.

    Returns:
        {"unfinished": fraction of the answers cut at max_new_tokens, "mean_tokens"}, and "refused", the fraction of
        refused answers, if there are any.
    """
    total, refused = len(rows), sum("refusal" in row for row in rows)

    def share(count: float) -> float | None:
        return count / total if total else None

    return {
        "unfinished": share(sum(not row["finished"] and "refusal" not in row for row in rows)),
        **({"refused": share(refused)} if refused else {}),
        "mean_tokens": share(sum(row["tokens"] for row in rows)),
    }


def incomplete(metrics: Mapping[str, Any]) -> list[str]:
    """Returns one phrase for each reason for which some answers are incomplete; [] if all are complete."""
    return [f"{metrics[name]:.1%} of the answers {what}" for name, what in _INCOMPLETE.items() if metrics.get(name)]


_INCOMPLETE = {
    "unfinished": "were cut at max_new_tokens (unfinished) and are scored as they are",
    "refused": "were refused by the endpoint and count as wrong",
}


def read(path: Path, fields: Fields = GENERATED) -> list[dict[str, Any]]:
    """Returns the rows of a finished predictions file, after checking each of them.

    Raises:
        ConfigError: the file is missing or broken.
    """
    if not os.path.lexists(path):
        raise ConfigError([f"{path} is not there: generate the answers first (leave out score_only=true)."])
    try:
        rows = read_jsonl(path)
    except ConfigError as error:
        remedy = "run the same command without score_only=true for the missing answers"
        raise ConfigError([f"{message.rstrip('.')}, or {remedy}." for message in error.errors]) from error
    expected = _expected_rows(path.parent)
    if expected is not None and len(rows) != expected:
        raise ConfigError(
            [
                f"Broken file {path}: it has {len(rows)} of {expected} rows; run the same command without "
                "score_only=true for the missing answers."
            ]
        )
    for index, row in enumerate(rows):
        problem = _row_problem(row, fields) or (
            f"has index {row['index']}, not {index}" if row["index"] != index else None
        )
        if problem:
            raise ConfigError(
                [f"Broken file {path}: row {index + 1} {problem}; generate again (leave out score_only=true)."]
            )
    if problem := _mismatch(path):
        raise ConfigError([f"Broken file {path}: it {problem}; generate again (leave out score_only=true)."])
    return rows


def _mismatch(path: Path) -> str | None:
    """Returns why answers do not match their generation.json, or the adapter of the run in whose folder they are."""
    manifest = read_record(path.with_name("generation.json"), "generate again (leave out score_only=true)")
    if manifest is None:
        return None
    if problem := rows_problem(path, manifest):
        return problem
    folder, run = path.parent, path.parent.parent.parent
    if folder.parent.name != "eval" or "-checkpoint-" in folder.name or "weights" not in manifest:
        return None
    record = RunRecord.read(run, "run it again, or restore a complete copy")
    trained = record.weights_sha256 if record else None
    if trained in (None, manifest["weights"]):
        return None
    return f"has answers of other weights ({manifest['weights'][:12]}) than those of {run} ({trained[:12]})"
