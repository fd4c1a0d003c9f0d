"""Rows of a public data set: from the hub, or from a local folder with the hub's layout and columns.

data_root=DIR reads DIR/<owner>/<name>/<config>/<split>.{jsonl,parquet} without network access, or the shards of a
split as a download leaves them, <split>-00000-of-00003.parquet and so on. `OwnFiles` is a split of your own files.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import glob
import gzip
import hashlib
import io
import json
import logging
import os.path
import re
import socket
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flatlora.inputs.conversations import Chat
from flatlora.inputs.templates import STEP_BY_STEP
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.names import stays_inside
from flatlora.utils.plain_files import open_plain, read_plain

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """One split of a public data set, by its name on the hub."""

    hub_id: str
    config: str
    split: str
    revision: str | None = None
    key: str | None = None  # a setting that names it, and could have meant a folder or file

    def __str__(self) -> str:
        return f"{self.hub_id} ({self.config}, {self.split})"

    def rows(self, data_root: str | None) -> tuple[list[dict[str, Any]], str]:
        """Returns (all rows, where they come from)."""
        if data_root is None:
            return hub_data(self).to_list(), str(self)
        paths = local_files(self, data_root)
        return _rows_of(paths), _named(paths)

    def fingerprint(self, data_root: str | None) -> str:
        if data_root is not None:
            return _files_sha256(local_files(self, data_root))
        import datasets

        with _hub_errors(self):
            builder = datasets.load_dataset_builder(self.hub_id, self.config, revision=self.revision)
            return f"{self}@{builder.hash}"


class OwnFiles(NamedTuple):
    """One split of the user's own files; `data_root` does not change what they are."""

    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return _named(self.paths)

    def rows(self, data_root: str | None) -> tuple[list[dict[str, Any]], str]:
        """Returns (all rows, where they come from)."""
        return _rows_of(self.paths), str(self)

    def fingerprint(self, data_root: str | None) -> str:
        return _files_sha256(self.paths)


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else "")


def _rows_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [row for rows in gather(*(lambda path=path: read_file(path) for path in paths)) for row in rows]


def _files_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 of a file, or of the digests of several in order."""
    digests = []
    for path in paths:
        with _readable(path), open_plain(path) as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


Kind = Literal["text", "int", "number", "any"]
Columns = Sequence[str] | Mapping[str, Kind]  # names of text columns, or {column: kind of its values}


def read_rows(source: Source, *, columns: Columns, data_root: str | None = None) -> list[dict[str, Any]]:
    """Reads all rows of one split, with only `columns`.

    Raises:
        ConfigError: the file or the network is missing, a line is broken, there is no row, or a column is missing or
            has values of another kind; the message suggests a fix.
    """
    rows, name = source.rows(data_root)
    return typed_columns(rows, columns, name)


def fingerprint(source: Source | OwnFiles, data_root: str | None = None) -> str:
    """A text that changes whenever the split does: the hash of the local file, or the hub's hash of its current state.

    Raises:
        ConfigError: the file does not exist, or the hub cannot be reached.
    """
    return source.fingerprint(data_root)


def warn_of_unread_root(data_root: str | None, sources: Iterable[Source | OwnFiles], name: str) -> None:
    """Warns of a data_root if no source of the data set is read from it."""
    if data_root is not None and not any(isinstance(source, Source) for source in sources):
        logger.warning("Nothing reads data_root=%s: dataset=%s takes no files from it.", data_root, name)


def typed_columns(
    rows: Sequence[dict[str, Any]], columns: Columns, source: str, *, remedy: str = "name columns as on the hub"
) -> list[dict[str, Any]]:
    """`rows` with only `columns`, after checking the kinds of their values.

    Args:
        remedy: what the error about a missing column suggests.

    Raises:
        ConfigError: there is no row, or columns are missing or have values of another kind; names their first bad row.
    """
    kinds = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "text")
    if not rows:
        raise ConfigError([f"Empty data set: {source} has no rows; it needs at least one."])
    errors = [
        message for column, kind in kinds.items() if (message := _column_error(column, kind, rows, source, remedy))
    ]
    if errors:
        raise ConfigError(errors)
    return [{column: row[column] for column in kinds} for row in rows]


def gather(*steps: Callable[[], Any]) -> list[Any]:
    """Runs all steps and returns their results; raises one `ConfigError` with the errors of all steps."""
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
    """Reads all rows and columns of a file, in the format that its name ends with: a key of `READERS`.

    Raises:
        ConfigError: the file cannot be read, or is broken.
    """
    return next(read for suffix, read in READERS.items() if path.name.endswith(suffix))(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads a file with one JSON object per line; blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, or a line is broken.
    """
    return _json_lines(path, _text(path))


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unrepeated)
        except (ValueError, RecursionError) as error:  # not only JSONDecodeError: 5,000 digits, 10,000 brackets
            reason = getattr(error, "msg", error)
            raise ConfigError([f"Broken row in {path}, line {number}: not JSON ({reason}); fix it."]) from error
        if not isinstance(row, dict):
            raise ConfigError([f"Broken row in {path}, line {number}: it must be a JSON object, not {line[:40]!r}."])
        rows.append(row)
    return rows


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; a repeated key is an error, where Python would keep its last value alone."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {_printable(repeated)!r} is there twice; keep one")
    return unique


def _read_json(path: Path) -> list[dict[str, Any]]:
    """Reads a file with one list of objects, or with one object per line."""
    text = _text(path)
    try:
        rows = json.loads(text, object_pairs_hook=_unrepeated)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ConfigError([f"Broken file {path}: not JSON ({error}); fix it."]) from error
        return _json_lines(path, text)
    if isinstance(rows, dict) and any(isinstance(value, list | dict) for value in rows.values()):
        raise ConfigError(
            [
                f"Broken file {path}: it is one JSON object ({', '.join(rows)[:80]}), not a row; write a list of rows, "
                "or one row a line."
            ]
        )
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ConfigError([f"Broken row in {path}, row {number}: it must be a JSON object, not {str(row)[:40]!r}."])
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Reads a comma-separated file whose first line names the columns. Every value is text, as it is in the file.

    Libraries that guess types would read 007 as 7 and the text "NA" as a missing value.
    """
    csv.field_size_limit(min(MOST_BYTES, 2**31 - 1))  # Python's own limit is 128 KiB
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header, *lines = [line for line in reader if line] or [[]]
    except csv.Error as error:
        raise ConfigError([f"Broken file {path}, line {reader.line_num}: not CSV ({error}); fix it."]) from error
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise ConfigError(
            [f"Broken file {path}: its columns are separated by {other!r}; save it with commas between the columns."]
        )
    if repeated := sorted(name for name, count in Counter(header).items() if count > 1):
        raise ConfigError([f"Broken file {path}: it has several columns {', '.join(repeated)}; rename or remove them."])
    for number, line in enumerate(lines, start=1):
        if len(line) != len(header):
            raise ConfigError(
                [
                    f"Broken row in {path}, row {number}: it has {len(line)} values for {len(header)} columns; put "
                    'values with a comma between quotes ("…, …").'
                ]
            )
    return [dict(zip(header, line, strict=True)) for line in lines]


def _column_error(column: str, kind: Kind, rows: Sequence[dict[str, Any]], source: str, remedy: str) -> str | None:
    for number, row in enumerate(rows, start=1):
        if column not in row:
            present = _printable(", ".join(row)) or "none"
            return f"Missing column {column} in {source}, row {number}: it has {present}; {remedy}."
        if problem := _problem(row[column], kind):
            return f"Invalid {column} in {source}, row {number}: {problem}; fix the row, or leave it out."
    return None


_NEEDED = {"text": ("text", str), "int": ("a whole number", int), "number": ("a number", int | float)}


def _problem(value: Any, kind: Kind) -> str | None:
    if kind == "any":
        return None
    needed, types = _NEEDED[kind]
    if not isinstance(value, types) or isinstance(value, bool):
        given = "null" if value is None else json.dumps(value, default=str)
        return f"it must be {needed}, not {given if len(given) <= 40 else given[:40] + '…'}"
    if kind != "text":
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape a lone surrogate, which tokenizers and files do not support
        return (
            f"its character {error.start + 1}, {_printable(value[error.start])}, is half of a pair (a lone surrogate)"
        )
    return None


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


MOST_BYTES = 4 << 30  # of a JSON-lines file, which is read into memory


def _text(path: Path) -> str:
    try:
        with _readable(path):
            content = read_plain(path, MOST_BYTES)
            if path.suffix == ".gz":
                content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MOST_BYTES + 1)
                if len(content) > MOST_BYTES:
                    raise OSError(f"it has more than {MOST_BYTES / 2**20:,.0f} MiB without compression")
        text = content.decode("utf-8-sig")  # with or without a byte-order mark
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except (EOFError, zlib.error) as error:
        raise ConfigError([f"Broken file {path}: not gzip ({error}); compress it again."]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"Broken file {path}: not UTF-8 at byte {error.start}; save it as UTF-8."]) from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError([f"Cannot read {path}: {reason}; make it a readable file, or name another."]) from error


def prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt that a model answers: the part of a row's training text before y.

    It is x and a blank; x alone for a row that is `joined`, and if x is in the template step_by_step.
    """
    return row["x"] if row.get("joined") or row["x"].endswith(STEP_BY_STEP) else f"{row['x']} "


def prompt_of(row: Mapping[str, Any]) -> str | Chat:
    """What a model is asked: `prompt_text`, or the turns before the answer of a row that is a chat."""
    return Chat(row["messages"][:-1], row.get("tools")) if "messages" in row else prompt_text(row)


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """The rows in the format of `read_jsonl`; a row with a lone surrogate is escaped, since files cannot hold one."""
    return "".join(_line(row) + "\n" for row in rows)


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


def local_file(source: Source, data_root: str) -> Path:
    """The file of a split under `data_root`, as `local_files`; a split in several shards is an error.

    Raises:
        ConfigError: it does not exist; the message suggests a fix.
    """
    path, *others = local_files(source, data_root)
    if others:
        raise ConfigError(
            [f"Invalid files of {source}: it has {len(others) + 1} shards, {path} and others; write them to one file."]
        )
    return path


def local_files(source: Source, data_root: str) -> list[Path]:
    """The file of a split under `data_root`, or its shards in order.

    Raises:
        ConfigError: it does not exist; the message suggests a fix.
    """
    hub_id, config, split, *_ = source
    if not all(map(stays_inside, (hub_id, config, split))):
        raise ConfigError(
            [
                f"Invalid name of a data set: {hub_id} ({config}, {split}) is outside data_root={data_root}; write "
                "owner and name as on the hub, without a leading slash and without '..'."
            ]
        )
    root, folder = Path(data_root), Path(data_root) / hub_id / config
    for suffix in (".jsonl", ".parquet"):
        if os.path.isfile(folder / f"{split}{suffix}"):  # False for an unreadable folder, where Path.is_file raises
            return [folder / f"{split}{suffix}"]
    if shards := shards_in(folder, split):
        return shards
    if not os.path.isdir(root):
        problem = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ConfigError(
            [
                f"Invalid data_root={root}: it {problem}; name the folder that contains {hub_id}/{config}/SPLIT.jsonl "
                "(or .parquet), or leave data_root out to read the hub."
            ]
        )
    raise ConfigError(
        [
            f"Invalid data_root={root}: {folder / split}.jsonl (or .parquet) does not exist; write the split of "
            f"{hub_id} to that file with the hub's columns, or leave data_root out to read the hub{_or_path(source)}."
        ]
    )


_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


def shards_in(folder: Path, split: str) -> list[Path]:
    """The files SPLIT-00000-of-00003.parquet, … of a folder in order; [] without any.

    Raises:
        ConfigError: some are missing.
    """
    shards = sorted(folder.glob(f"{glob.escape(split)}-[0-9]*-of-[0-9]*.parquet")) if folder.is_dir() else []
    shards = {path: match for path in shards if (match := _SHARD.match(path.name, len(split)))}
    counts = sorted({int(match[2]) for match in shards.values()})
    if len(counts) > 1:
        raise ConfigError(
            [
                f"Invalid shards in {folder}: files {split}-… of {' and of '.join(map(str, counts))} parts are there; "
                "move those of one download away."
            ]
        )
    if counts and {int(match[1]) for match in shards.values()} != set(range(counts[0])):
        raise ConfigError(
            [
                f"Missing shards in {folder}: {len(shards)} of {counts[0]} files {split}-… are there; download the "
                "others."
            ]
        )
    return list(shards)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with open_plain(path) as file:  # given a path, pyarrow would read it as a data set of several files
            return pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # the type depends on what is broken
        raise ConfigError([f"Broken file {path}: not Parquet ({reason_of(error)}); download it again."]) from error


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
}
"""{end of a file's name: function that reads all rows}."""


def hub_data(source: Source) -> Any:
    """Loads a split of the hub as a `datasets.Dataset`.

    Raises:
        ConfigError: it cannot be loaded; the message suggests fixes.
    """
    import datasets

    with _hub_errors(source):
        return datasets.load_dataset(source.hub_id, source.config, split=source.split, revision=source.revision)


@contextlib.contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """Turns errors of the hub (no network, unknown or gated name, broken cache) into a `ConfigError` with fixes."""
    import datasets

    reachable = hub_is_reachable()
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = UNREACHABLE if not reachable and speaks_of_the_network(error) else reason_of(error)
        raise ConfigError(
            [
                f"Cannot read {source} from the hub: {reason}. Connect to the network, or set data_root=DIR with "
                f"DIR/{source.hub_id}/{source.config}/{source.split}.jsonl (or .parquet) in it{_or_path(source)}."
            ]
        ) from error


def _or_path(source: Source) -> str:
    """Returns a remedy for a path of the user's that was taken for a name of the hub, since nothing is there."""
    if source.key is None:
        return ""
    return f"; or, if a file or folder of yours is meant, correct {source.key}={source.hub_id}: no such path is here"


UNREACHABLE = "the hub cannot be reached from here, and it is not in the hub's cache"


def speaks_of_the_network(error: Exception) -> bool:
    """Whether a library of the hub failed because of the network, and not because of a broken cache, for example."""
    phrases = ("offline", "couldn't connect", "couldn't reach", "network is unreachable", "no route to host")
    phrases += ("if you were trying to load it from",)  # transformers, for a tokenizer or processor outside the cache
    return any(phrase in str(error).lower() for phrase in phrases)


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers. If not, its libraries are set to offline mode, since they would retry for a minute
    before they read their caches. An offline mode that the user has set stays.
    """
    import datasets
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        return False
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except ValueError as error:  # not a URL
        raise ConfigError(
            [f"Invalid HF_ENDPOINT={huggingface_hub.constants.ENDPOINT}: {error}; write https://HOST, or unset it."]
        ) from error
    except OSError as error:
        # Other errors, such as an unknown certificate, are left to the hub's client.
        reason = getattr(error, "reason", error)
        unreachable = getattr(reason, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH)
        if unreachable or isinstance(reason, socket.gaierror | TimeoutError | ConnectionError):
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            return False
    return True
