"""Names that become folders or files: one rule for all of them, counted as file systems count, in bytes."""

from __future__ import annotations

import hashlib
import re

MOST_BYTES = 255
"""Of one part of a path, on every usual file system."""
UNPRINTED = r"\x00-\x1f\x7f-\x9f\ud800-\udfff"  # controls, which end and move lines, and halves of signs


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
    return re.sub(rf"(?![\n\t])[{UNPRINTED}]", lambda found: ascii(found[0])[1:-1], text)


def is_text(word: str) -> bool:
    """Whether a word of the command line is UTF-8: its other bytes could be neither printed nor recorded."""
    return not re.search(r"[\ud800-\udfff]", word)
