"""Rows of a public data set: from the hub, or from a local folder with the hub's layout and columns.

data_root=DIR reads DIR/<owner>/<name>/<config>/<split>.{jsonl,parquet}; no network is touched.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os.path
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.names import stays_inside
from flatlora.utils.plain_files import open_plain, read_plain


class Source(NamedTuple):
    """One split of a public data set, by its name on the hub."""

    hub_id: str
    config: str
    split: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.hub_id} ({self.config}, {self.split})"


Kind = Literal["text", "int", "number", "any"]
Columns = Sequence[str] | Mapping[str, Kind]  # names of text columns, or of columns with what each holds


def read_rows(source: Source, *, columns: Columns, data_root: str | None = None) -> list[dict[str, Any]]:
    """All rows of one split, cut to `columns`.

    Raises:
        ConfigError: no such file, no network, a broken line, no row at all, or a column that is missing or holds
            something else; with the way out.
    """
    if data_root is None:
        return typed_columns(hub_data(source).to_list(), columns, str(source))
    path = local_file(source, data_root)
    return typed_columns(read_file(path), columns, str(path))


def fingerprint(source: Source, data_root: str | None = None) -> str:
    """What changes whenever the split does: the hash of the local file, or the hub's own of a pinned state.

    Raises:
        ConfigError: as `read_rows`, for a file that is not there or a hub out of reach.
    """
    if data_root is not None:
        with _readable(path := local_file(source, data_root)), open_plain(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    import datasets

    with _hub_errors(source):
        builder = datasets.load_dataset_builder(source.hub_id, source.config, revision=source.revision)
        return f"{source}@{builder.hash}"


def typed_columns(rows: Sequence[dict[str, Any]], columns: Columns, source: str) -> list[dict[str, Any]]:
    """`rows` cut to `columns`, each of them of its kind.

    Raises:
        ConfigError: no row; or columns that are missing or hold something else, each named with its first bad row.
    """
    kinds = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "text")
    if not rows:
        raise ConfigError([f"Empty data set: {source} holds no row; at least one is needed."])
    errors = [message for column, kind in kinds.items() if (message := _column_error(column, kind, rows, source))]
    if errors:
        raise ConfigError(errors)
    return [{column: row[column] for column in kinds} for row in rows]


def gather(*steps: Callable[[], Any]) -> list[Any]:
    """Results of all steps; one `ConfigError` with the errors of every step that has some."""
    results, errors = [], []
    for step in steps:
        try:
            results.append(step())
        except ConfigError as error:
            errors += error.errors
    if errors:
        raise ConfigError(errors)
    return results


def read_file(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl or .parquet file, with every column.

    Raises:
        ConfigError: it cannot be read, or is broken.
    """
    return read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


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


def _column_error(column: str, kind: Kind, rows: Sequence[dict[str, Any]], source: str) -> str | None:
    for number, row in enumerate(rows, start=1):
        if column not in row:
            found = _printable(", ".join(row)) or "none"
            return f"Missing column {column} in {source}, row {number}: it has {found}; name the columns as on the hub."
        if problem := _problem(row[column], kind):
            return f"Invalid {column} in {source}, row {number}: {problem}; mend the row, or leave it out."
    return None


_NEEDED = {"text": ("text", str), "int": ("a whole number", int), "number": ("a number", int | float)}


def _problem(value: Any, kind: Kind) -> str | None:
    if kind == "any":
        return None
    needed, types = _NEEDED[kind]
    if not isinstance(value, types) or isinstance(value, bool):
        found = "null" if value is None else json.dumps(value, default=str)
        return f"{needed} is needed, not {found if len(found) <= 40 else found[:40] + '…'}"
    if kind != "text":
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character; no tokenizer and no file can hold it
        return (
            f"its character {error.start + 1}, {_printable(value[error.start])}, is half of a pair (a lone surrogate)"
        )
    return None


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


MOST_BYTES = 4 << 30  # of a file of JSON lines, which is read whole


def _text(path: Path) -> str:
    try:
        with _readable(path):
            content = read_plain(path, MOST_BYTES)
        text = content.decode("utf-8-sig")  # with or without the mark that Windows editors put in front
        return text.replace("\r\n", "\n").replace("\r", "\n")
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
    """The text that `read_jsonl` reads back; a row with half a character in it, which no file holds, is escaped."""
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


def local_file(source: Source, data_root: str) -> Path:
    """The file of a split under `data_root`.

    Raises:
        ConfigError: it is not there; with the way out.
    """
    hub_id, config, split, _ = source
    if not all(map(stays_inside, (hub_id, config, split))):
        raise ConfigError(
            [
                f"Invalid name of a data set: {hub_id} ({config}, {split}) leads out of data_root={data_root}; write "
                "owner and name as on the hub, without a slash in front and without '..'."
            ]
        )
    root, folder = Path(data_root), Path(data_root) / hub_id / config
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
        with open_plain(path) as file:  # the path itself would be read as a data set of many files, with other rules
            return pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # a broken page is an OSError, a broken text neither
        raise ConfigError([f"Broken file {path}: not Parquet ({reason_of(error)}); fetch it again."]) from error


def hub_data(source: Source) -> Any:
    """A split of the hub as a `datasets.Dataset`.

    Raises:
        ConfigError: it cannot be had; with the ways out.
    """
    import datasets

    with _hub_errors(source):
        return datasets.load_dataset(source.hub_id, source.config, split=source.split, revision=source.revision)


@contextlib.contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """No network, an unknown or gated name, a broken file of the cache: as an error with the ways out."""
    import datasets

    reachable = hub_is_reachable()
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = UNREACHABLE if not reachable and speaks_of_the_network(error) else reason_of(error)
        raise ConfigError(
            [
                f"Cannot read {source} from the hub: {reason}. Connect to the network, or set data_root=DIR with "
                f"DIR/{source.hub_id}/{source.config}/{source.split}.jsonl (or .parquet) in it."
            ]
        ) from error


UNREACHABLE = "the hub cannot be reached from here, and it is not in the hub's cache"


def speaks_of_the_network(error: Exception) -> bool:
    """Whether a library of the hub failed for want of it, and not for a broken file of its cache, say."""
    words = ("offline", "couldn't connect", "couldn't reach", "network is unreachable", "no route to host")
    words += ("if you were trying to load it from",)  # transformers, of a tokenizer or processor that no cache has
    return any(word in str(error).lower() for word in words)


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers. If it does not, its libraries are told to look in their caches alone: they would try for
    a minute before they do so themselves. An offline mode that the user chose stays.
    """
    import datasets
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return False
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except ValueError as error:  # no URL
        raise ConfigError(
            [f"Invalid HF_ENDPOINT={huggingface_hub.constants.ENDPOINT}: {error}; write https://HOST, or unset it."]
        ) from error
    except OSError as error:
        # Anything else, such as a certificate that is unknown here, is left to the hub's own client.
        reason = getattr(error, "reason", error)
        unreachable = getattr(reason, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH)
        if unreachable or isinstance(reason, socket.gaierror | TimeoutError | ConnectionError):
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            return False
    return True
