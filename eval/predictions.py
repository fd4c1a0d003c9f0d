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
from flatlora.inputs.rows import MOST_BYTES, jsonl, prompt_text, read_jsonl
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
    prompts: Sequence[str],
    references: Sequence[str],
    folder: Path,
    *,
    sampling: Sampling,
    known: Sequence[Mapping[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Answer every prompt into `folder`/predictions.jsonl, in the prompts' order; returns that path.

    As `collect`; raises its errors.

    Args:
        known: further columns of each row, for the scorer.
        seeds: one a row where something is drawn; kept in the rows.
    """
    known, done = known or [{}] * len(prompts), 0
    if seeds is not None:
        known = [{**more, "seed": seed} for more, seed in zip(known, seeds, strict=True)]

    def count(rows: int, total: int, newest: list[dict[str, Any]]) -> None:
        nonlocal done
        done = rows
        on_progress(rows, total, newest)

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        def tell(token: int) -> None:  # a batch can take a minute, so the bar also counts tokens
            on_progress(done + len(batch) * token // (sampling.max_new_tokens + 1), len(prompts), [])

        drawn = [seeds[index] for index in batch] if seeds is not None else None
        with _on_token(backend, tell if on_progress else None):
            completions = backend.generate([prompts[index] for index in batch], sampling, drawn)
        return [
            {"completion": one.text, "tokens": one.tokens, "finished": one.finished}
            | ({"refusal": one.refusal} if one.refusal else {})
            for one in completions
        ]

    lengths = prompt_lengths(backend, prompts)
    if check := getattr(backend, "check_lengths", None):
        check(lengths, sampling.max_new_tokens)
    return collect(
        [{"prompt": p, "reference": r, **more} for p, r, more in zip(prompts, references, known, strict=True)],
        answer,
        folder,
        fields=GENERATED,
        lengths=lengths,
        batch_size=backend.batch_size,
        each=getattr(backend, "each", None),
        settings={**backend.describe(), **sampling.describe()},
        on_progress=count if on_progress else None,
    )


@contextlib.contextmanager
def _on_token(backend: Generator, report: Callable[[int], None] | None) -> Iterator[None]:
    """Makes the backend report its tokens meanwhile, if it supports that."""
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
    """`generate` for rows {"x", "y"} of a data set; columns in `keep` stay with the answers."""
    return generate(
        backend,
        [prompt_text(row["x"]) for row in rows],
        [row["y"] for row in rows],
        folder,
        sampling=sampling,
        known=[{key: row[key] for key in keep} for row in rows],
        seeds=seeds,
        on_progress=on_progress,
    )


def prompt_lengths(backend: Generator, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt.

    Raises:
        ConfigError: a prompt without a token.
    """
    lengths = [backend.prompt_length(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ConfigError(
            [f"Invalid prompt in row {lengths.index(0) + 1}: the model's tokenizer finds no token in it; leave it out."]
        )
    return lengths


def collect(
    asked: Sequence[Mapping[str, Any]],
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
    """Answer every row into `folder`/predictions.jsonl, in the rows' order; returns that path.

    generation.json says what made the answers, with the hash of the finished file; each row of an unfinished one has a
    hash of itself and of those settings. So neither a damaged answer nor one that a process with another model writes
    there passes for an answer of this one.

    Rows are answered in batches of like length. Greedy decoding in low precision can depend on a batch's company,
    so a resumed call forms the same batches and redoes a batch that is not whole. A file that is damaged, or made by
    another model, with other settings or for other rows, is put aside as predictions.stale.jsonl.

    Args:
        asked: what is known of a row before it is answered; stands in the file as it is.
        answer: indices of a batch → what is added to each of its rows.
        fields: keys of a whole row, and their types.
        settings: what decides the answers besides the rows; kept in generation.json.
        is_valid: whether what a row names is still there; others are answered anew.
        each: how to ask row by row, several at a time, as `eval.backends.Generator` has it; None asks in batches.

    Raises:
        OSError: as the file system says (full, read-only); a later call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / "predictions.jsonl", folder / "predictions.partial.jsonl"
    hashed = hashlib.sha256(json.dumps(list(asked), default=str).encode()).hexdigest()
    settings = {**settings, "rows": len(asked), "prompts_sha256": hashed}
    made_by = _digest(settings)
    done, complete = _finished_rows(folder, [path, partial], settings, asked, fields)
    done = {index: row for index, row in done.items() if is_valid(row)}
    if complete and len(done) == len(asked) and not partial.is_file():
        if on_progress:
            on_progress(len(done), len(asked), [])
        return path
    if done or os.path.lexists(partial):  # drops an incomplete last line before appending
        write_atomic(partial, jsonl(_checked(row, made_by) for row in done.values()))
    write_json(folder / "generation.json", settings | {ROWS_HASH: None})
    path.unlink(missing_ok=True)  # its rows are in the partial file now
    order = sorted(range(len(asked)), key=lambda i: (-lengths[i], i))
    if on_progress:
        on_progress(len(done), len(asked), [])

    for batch, answers in _answers(order, done, answer, batch_size, each):
        if answers is not None:
            rows = [{"index": i, **asked[i], **answered} for i, answered in zip(batch, answers, strict=True)]
            done.update({row["index"]: row for row in rows})
            with open(partial, "a", encoding="utf-8") as file:
                file.write(jsonl(_checked(row, made_by) for row in rows))
        if on_progress:
            on_progress(len(done), len(asked), [done[index] for index in batch])
    write_sealed(folder, (done[index] for index in range(len(asked))), settings)
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


def write_sealed(folder: Path, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """Writes finished answers, and generation.json with their settings and hash; returns the path of the answers."""
    content = jsonl(rows).encode()
    write_json(folder / "generation.json", {**settings, ROWS_HASH: hashlib.sha256(content).hexdigest()})
    path = folder / "predictions.jsonl"
    write_atomic(path, content)
    return path


_CHECK = "check"  # of a row of an unfinished file, or of one that is written row by row


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
    asked: Sequence[Mapping[str, Any]],
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
            found = _whole_lines(path, asked, fields, _digest(settings) if partial else None)
            broken = found is None or (
                not partial and manifest is not None and rows_problem(path, manifest) is not None
            )
            message = "is damaged" if broken else None
        if message is None:
            rows |= {row["index"]: row for row in found}
            complete = complete or (not partial and manifest is not None)
            continue
        stale = free_name(path.with_name(path.name.replace(".jsonl", ".stale.jsonl")))
        logger.warning("%s %s: kept as %s.", path, message, stale.name)
        path.replace(stale)
    return rows, complete


_LATER_KEYS = ("tokenizer", "settings")


def _origin_problem(folder: Path, settings: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """Why what lies there was made otherwise, None where it was not; and the record with the hash, where it has one."""
    try:
        made = read_record(folder / "generation.json")
    except ConfigError:
        return "has a broken generation.json, which says not what made it", None
    if made is None:
        return "has no generation.json that says what made it", None
    unknown = {key: settings[key] for key in _LATER_KEYS if key in settings}  # what earlier versions did not record
    if unknown | {key: value for key, value in made.items() if key != ROWS_HASH} != settings:
        return "was made by another model, settings or prompts", None
    return None, made if ROWS_HASH in made else None


def free_name(path: Path) -> Path:
    """`path`, or where it is taken the first of NAME-2, NAME-3, …: what was put aside before is not written over."""
    names = [path, *(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _whole_lines(
    path: Path, asked: Sequence[Mapping[str, Any]], fields: Fields, made_by: str | None
) -> list[dict[str, Any]] | None:
    """Returns the rows of a file whose last line may be incomplete; None if any other line does not match its prompt.

    Args:
        made_by: what the rows' checks must say; None: of a finished file, whose rows have none.
    """
    try:
        *lines, last = read_plain(path, MOST_BYTES).split(b"\n")  # U+2028 and the like end no line
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
        if _row_problem(row, fields) or not row["index"] < len(asked):
            return None
        if any(row[key] != value for key, value in asked[row["index"]].items()):
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
    """Returns the lines of a file that is written row by row, each with a hash of its contents."""
    return jsonl({**row, _CHECK: _checksum(row)} for row in rows)


def appended_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of such a file, its last line torn perhaps; none where there is no file.

    A damaged row is left out with a warning; one of an earlier version has no hash, and is taken as it is.

    Raises:
        ConfigError: it is no file, or cannot be read.
    """
    try:
        *lines, last = read_plain(path, MOST_BYTES).split(b"\n") if os.path.lexists(path) else [b""]
    except OSError as error:
        raise ConfigError([f"Cannot read {path}: {reason_of(error)}; move it away, and it is made anew."]) from error
    rows = [_parse_line(line) for line in (*filter(None, lines), *filter(_parse_line, [last]))]
    whole = [row for row in rows if isinstance(row, dict) and row.get(_CHECK) in (None, _checksum(_unchecked(row)))]
    if len(whole) < len(rows):
        logger.warning("%s: damaged lines are left out (%d).", path, len(rows) - len(whole))
    return [_unchecked(row) for row in whole]


def _row_problem(row: Any, fields: Fields) -> str | None:
    if not isinstance(row, dict):
        return "is no row"
    wrong = [key for key, kind in fields.items() if type(row.get(key)) is not kind]
    if wrong:
        return f"has no good {', '.join(wrong)}"
    return None if row["index"] >= 0 else "has a negative index"


def _rows_asked(folder: Path) -> int | None:
    """As generation.json says; None where it is not there, or from before it did."""
    try:
        return (read_record(folder / "generation.json") or {}).get("rows")
    except ConfigError:
        return None  # `read` tells


def score_file(path: Path, fields: Fields, score: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
    """Score a predictions file and write score.json beside it.

    Raises:
        ConfigError: the file is not there, or broken.
    """
    result = score(read(path, fields))
    write_json(path.with_name("score.json"), result)
    return result


def answer_counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Metrics that every benchmark of generated answers has: answers without an end, refused ones, and their length.

    Args:
        rows: {"finished", "tokens"} each; "refusal" where an endpoint does not answer.

    Returns:
        {"unfinished", "mean_tokens"}, and "refused" if there are any: shares of the rows, and tokens.
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
    """One phrase for each way in which answers behind these metrics are not whole; empty if all are."""
    return [f"{metrics[name]:.1%} of the answers {what}" for name, what in _INCOMPLETE.items() if metrics.get(name)]


_INCOMPLETE = {
    "unfinished": "were cut at max_new_tokens (unfinished) and are scored as they are",
    "refused": "were refused by the endpoint and count as wrong",
}


def read(path: Path, fields: Fields = GENERATED) -> list[dict[str, Any]]:
    """Returns the rows of a finished predictions file, after checking each of them.

    Raises:
        ConfigError: the file is not there, or broken.
    """
    if not os.path.lexists(path):
        raise ConfigError([f"{path} is not there: generate the answers first (leave out score_only=true)."])
    try:
        rows = read_jsonl(path)
    except ConfigError as error:
        remedy = "the same command without score_only=true answers what is missing"
        raise ConfigError([f"{message.rstrip('.')}, or {remedy}." for message in error.errors]) from error
    wanted = _rows_asked(path.parent)
    if wanted is not None and len(rows) != wanted:
        raise ConfigError(
            [
                f"Broken file {path}: it has {len(rows)} of {wanted} rows; the same command without score_only=true "
                "answers what is missing."
            ]
        )
    for place, row in enumerate(rows):
        problem = _row_problem(row, fields) or (
            f"has index {row['index']}, not {place}" if row["index"] != place else None
        )
        if problem:
            raise ConfigError(
                [f"Broken file {path}: row {place + 1} {problem}; generate anew (leave out score_only=true)."]
            )
    if problem := _made_otherwise(path):
        raise ConfigError([f"Broken file {path}: it {problem}; generate anew (leave out score_only=true)."])
    return rows


def _made_otherwise(path: Path) -> str | None:
    """Why answers are not those that their generation.json names, or not of the adapter of the run they lie in."""
    made = read_record(path.with_name("generation.json"), "generate anew (leave out score_only=true)")
    if made is None:
        return None
    if problem := rows_problem(path, made):
        return problem
    folder, run = path.parent, path.parent.parent.parent
    if folder.parent.name != "eval" or "-checkpoint-" in folder.name or "weights" not in made:
        return None
    record = RunRecord.read(run, "run it anew, or put a whole copy back")
    trained = record.weights_sha256 if record else None
    if trained in (None, made["weights"]):
        return None
    return f"holds answers of other weights ({made['weights'][:12]}) than those of {run} ({trained[:12]})"
