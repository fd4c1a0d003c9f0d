"""Rows of a public data set: from the hub, or from a local folder with the hub's layout and columns.

data_root=DIR reads DIR/<owner>/<name>/<config>/<split>.{jsonl,parquet}; no network is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
) -> list[dict[str, Any]]:
    """All rows of one split, cut to `columns`.

    Raises:
        ConfigError: no such file, no network, a missing column, a broken line or no row at all; with the way out.
    """
    if data_root is None:
        source, rows = f"{hub_id} ({config}, {split})", _read_hub(hub_id, config, split, revision)
    else:
        path = _local_file(Path(data_root), hub_id, config, split)
        source, rows = str(path), (read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path))
    if not rows:
        raise ConfigError([f"Empty data set: {source} holds no row; at least one is needed."])
    faults = [fault for column in columns if (fault := _column_fault(column, rows, source))]
    if faults:
        raise ConfigError(faults)
    return [{column: row[column] for column in columns} for row in rows]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped, a broken one is named."""
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):  # U+2028 and the like are no line ends here
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError([f"Broken row in {path}, line {number}: not JSON ({error.msg}); mend it."]) from error
        if not isinstance(row, dict):
            raise ConfigError([f"Broken row in {path}, line {number}: a JSON object is needed, not {line[:40]!r}."])
        rows.append(row)
    return rows


def _column_fault(column: str, rows: Sequence[dict[str, Any]], source: str) -> str | None:
    number = next((i for i, row in enumerate(rows, start=1) if column not in row), None)
    if number is None:
        return None
    found = ", ".join(rows[number - 1])
    return f"Missing column {column} in {source}, row {number}: it has {found}; name the columns as on the hub."


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"Broken file {path}: not UTF-8 at byte {error.start}; save it as UTF-8."]) from error


def prompt_text(x: str) -> str:
    """What a model is given to answer: x as it stands before the answer in the training text x + " " + y."""
    return x + " "


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """The text that `read_jsonl` reads back."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _local_file(root: Path, hub_id: str, config: str, split: str) -> Path:
    folder = root / hub_id / config
    for suffix in (".jsonl", ".parquet"):
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise ConfigError(
        [
            f"Invalid data_root={root}: {folder / split}.jsonl (or .parquet) is not there; put the split of {hub_id} "
            "in that file with the hub's columns, or leave data_root out to read the hub."
        ]
    )


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ConfigError([f"Broken file {path}: not Parquet ({error}); fetch it again."]) from error


def _read_hub(hub_id: str, config: str, split: str, revision: str | None) -> list[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, split=split, revision=revision).to_list()
    except (OSError, ValueError) as error:  # what datasets raises without a network, or for an unknown name
        raise ConfigError(
            [
                f"Cannot read {hub_id} ({config}, {split}) from the hub: {str(error).splitlines()[0]} "
                f"Connect to the network, or set data_root=DIR with DIR/{hub_id}/{config}/{split}.jsonl in it."
            ]
        ) from error
