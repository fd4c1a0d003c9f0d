"""Names that become folders or files; their length is counted in bytes, as file systems do."""

from __future__ import annotations

import hashlib
import re

MOST_BYTES = 255
"""Longest file name on the usual file systems, in bytes."""
UNPRINTED = r"\x00-\x1f\x7f-\x9f\ud800-\udfff"  # control characters and lone surrogates


def size(text: str) -> int:
    """Length of a name on disk in bytes."""
    return len(text.encode("utf-8", "surrogatepass"))


def fitting(name: str) -> str:
    """Returns `name`, or its beginning and a hash of all of it if it is too long for a file name."""
    if size(name) <= MOST_BYTES:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return name.encode("utf-8", "ignore")[: MOST_BYTES - 13].decode("utf-8", "ignore") + f"-{digest}"


def stays_inside(path: str) -> bool:
    """Whether a path stays below the folder that it is joined to: it is not absolute and has no '..'."""
    return not path.startswith("/") and ".." not in path.split("/") and "\x00" not in path


def printable(text: str) -> str:
    """The text with its control characters escaped, such as \\x1b; line feeds and tabs stay."""
    return re.sub(rf"(?![\n\t])[{UNPRINTED}]", lambda match: ascii(match[0])[1:-1], text)


def is_text(word: str) -> bool:
    """Whether an argument of the command line is valid UTF-8; other bytes can be neither printed nor recorded."""
    return not re.search(r"[\ud800-\udfff]", word)
