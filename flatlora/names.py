"""Names that become folders or files: one rule for all of them, counted as file systems count, in bytes."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

MOST_BYTES = 255
"""Of one part of a path, on every usual file system."""
_LONGEST_NAME = 100  # bytes: two names are joined in one part, and numbers and hashes follow
_LONGEST_PATH = 2048  # bytes of a folder that is given; systems take 4096, and what is written in it has names, too
_UNPRINTED = r"\x00-\x1f\x7f-\x9f\ud800-\udfff"  # controls, which end and move lines, and halves of signs
_NAME = re.compile(rf"[^/\s.{_UNPRINTED}][^/\s{_UNPRINTED}]*")


def _folder_name(name: str) -> str:
    if _NAME.fullmatch(name) and size(name) <= _LONGEST_NAME:
        return name
    raise PydanticCustomError(
        "folder_name",
        f"it names a folder: at most {_LONGEST_NAME} bytes (a-z have one, é two, 漢 three), no slash, no blank, no "
        "control character, no dot in front",
    )


def _folder_path(path: str) -> str:
    if re.search(f"[{_UNPRINTED}]", path):
        problem = "a path has no control characters"
    elif size(path) > _LONGEST_PATH or any(size(part) > MOST_BYTES for part in path.split("/")):
        problem = f"a path has at most {_LONGEST_PATH} bytes, and {MOST_BYTES} between two slashes"
    else:
        return path
    raise PydanticCustomError("folder_path", problem)


FolderName = Annotated[str, AfterValidator(_folder_name)]
"""One part of a path: no slash and no blank, neither "." nor "..", short enough to be joined with another."""
FolderPath = Annotated[str, Field(min_length=1), AfterValidator(_folder_path)]
"""A folder that the user names, wherever it is."""


def size(text: str) -> int:
    """Bytes of a name on a disk."""
    return len(text.encode("utf-8", "surrogatepass"))


def fitting(name: str) -> str:
    """A part of a path for a text of any length: the text itself, or its beginning and a hash of the whole."""
    if size(name) <= MOST_BYTES:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return name.encode("utf-8", "ignore")[: MOST_BYTES - 13].decode("utf-8", "ignore") + f"-{digest}"


def stays_inside(path: str) -> bool:
    """Whether a path made of names is below the folder that it is joined to: neither absolute nor upwards."""
    return not path.startswith("/") and ".." not in path.split("/") and "\x00" not in path


def printable(text: str) -> str:
    """A text of one or several lines as a terminal may have it: control characters are spelled, as \\x1b."""
    return re.sub(rf"(?![\n\t])[{_UNPRINTED}]", lambda found: ascii(found[0])[1:-1], text)


def is_text(word: str) -> bool:
    """Whether a word of the command line is UTF-8: its other bytes could be neither printed nor recorded."""
    return not re.search(r"[\ud800-\udfff]", word)
