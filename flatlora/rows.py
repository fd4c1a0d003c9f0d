"""Rows of a public data set: from the hub, or from a local folder with the hub's layout and columns.

data_root=DIR reads DIR/<owner>/<name>/<config>/<split>.{jsonl,parquet}; no network is touched.
"""

from __future__ import annotations

import contextlib
import json
import os.path
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flatlora.config import ConfigError


def read_rows(
    hub_id: str,
    config: str,
    split: str,
    *,
    columns: Sequence[str],
    revision: str | None = None,
    data_root: str | None = None,
) -> list[dict[str, str]]:
    """All rows of one split, cut to `columns`.

    Raises:
        ConfigError: no such file, no network, a broken line, no row at all, or a column that is missing or holds no
            text; with the way out.
    """
    if data_root is None:
        return text_columns(_read_hub(hub_id, config, split, revision), columns, f"{hub_id} ({config}, {split})")
    path = _local_file(Path(data_root), hub_id, config, split)
    return text_columns(read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path), columns, str(path))


def text_columns(rows: Sequence[dict[str, Any]], columns: Sequence[str], source: str) -> list[dict[str, str]]:
    """`rows` cut to `columns`, all of them text.

    Raises:
        ConfigError: no row; or columns that are missing or hold no text, each named with its first bad row.
    """
    if not rows:
        raise ConfigError([f"Empty data set: {source} holds no row; at least one is needed."])
    faults = [fault for column in columns if (fault := _column_fault(column, rows, source))]
    if faults:
        raise ConfigError(faults)
    return [{column: row[column] for column in columns} for row in rows]


def gather(*steps: Callable[[], Any]) -> list[Any]:
    """Results of all steps; one `ConfigError` with the faults of every step that has some."""
    results, faults = [], []
    for step in steps:
        try:
            results.append(step())
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return results


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped, a broken one is named."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):  # U+2028 and the like are no line ends here
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ) as error:  # not only JSONDecodeError: an int of 5,000 digits, 10,000 brackets
            reason = getattr(error, "msg", error)
            raise ConfigError([f"Broken row in {path}, line {number}: not JSON ({reason}); mend it."]) from error
        if not isinstance(row, dict):
            raise ConfigError([f"Broken row in {path}, line {number}: a JSON object is needed, not {line[:40]!r}."])
        rows.append(row)
    return rows


def _column_fault(column: str, rows: Sequence[dict[str, Any]], source: str) -> str | None:
    for number, row in enumerate(rows, start=1):
        if column not in row:
            found = _printable(", ".join(row)) or "none"
            return f"Missing column {column} in {source}, row {number}: it has {found}; name the columns as on the hub."
        if problem := _text_problem(row[column]):
            return f"Invalid {column} in {source}, row {number}: {problem}; mend the row, or leave it out."
    return None


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        found = "null" if value is None else json.dumps(value, default=str)
        return f"text is needed, not {found if len(found) <= 40 else found[:40] + '…'}"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character; no tokenizer and no file can hold it
        return (
            f"its character {error.start + 1}, {_printable(value[error.start])}, is half of a pair (a lone surrogate)"
        )
    return None


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _text(path: Path) -> str:
    try:
        with _readable(path):
            return path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows editors put in front
    except UnicodeDecodeError as error:
        raise ConfigError([f"Broken file {path}: not UTF-8 at byte {error.start}; save it as UTF-8."]) from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError([f"Cannot read {path}: {reason}; make it a readable file, or name another."]) from error


def prompt_text(x: str) -> str:
    """What a model is given to answer: x as it stands before the answer in the training text x + " " + y."""
    return x + " "


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """The text that `read_jsonl` reads back."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _local_file(root: Path, hub_id: str, config: str, split: str) -> Path:
    folder = root / hub_id / config
    for suffix in (".jsonl", ".parquet"):
        if os.path.isfile(folder / f"{split}{suffix}"):  # false, where Path.is_file raises: for a closed folder
            return folder / f"{split}{suffix}"
    if not os.path.isdir(root):
        problem = "is a file, not a folder" if os.path.exists(root) else "is not there"
        raise ConfigError(
            [
                f"Invalid data_root={root}: it {problem}; name the folder that {hub_id}/{config}/SPLIT.jsonl (or "
                ".parquet) is in, or leave data_root out to read the hub."
            ]
        )
    raise ConfigError(
        [
            f"Invalid data_root={root}: {folder / split}.jsonl (or .parquet) is not there; put the split of {hub_id} "
            "in that file with the hub's columns, or leave data_root out to read the hub."
        ]
    )


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:  # the path itself would be read as a data set of many files, with other rules
            return pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a broken page is an OSError, a broken text neither
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError([f"Broken file {path}: not Parquet ({reason}); fetch it again."]) from error


def _read_hub(hub_id: str, config: str, split: str, revision: str | None) -> list[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, split=split, revision=revision).to_list()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # without a network, for an unknown name, for a broken file of the cache
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            [
                f"Cannot read {hub_id} ({config}, {split}) from the hub: {reason} "
                f"Connect to the network, or set data_root=DIR with DIR/{hub_id}/{config}/{split}.jsonl in it."
            ]
        ) from error
