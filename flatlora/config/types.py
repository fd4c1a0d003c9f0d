"""Types of settings in several sections: folder names, paths, URLs."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from flatlora.utils.masking import masked_url
from flatlora.utils.names import MOST_BYTES, UNPRINTED, size

_LONGEST_NAME = 100  # bytes: a folder's name may join two names, a number and a hash
_LONGEST_PATH = 2048  # bytes: systems allow 4096, and the files inside the folder need room too
_NAME = re.compile(rf"[^/\s.{UNPRINTED}][^/\s{UNPRINTED}]*")


def _folder_name(name: str) -> str:
    if _NAME.fullmatch(name) and size(name) <= _LONGEST_NAME:
        return name
    raise PydanticCustomError(
        "folder_name",
        f"it names a folder: at most {_LONGEST_NAME} bytes (a-z have one, é two, 漢 three), no slash, no blank, no "
        "control character, no leading dot",
    )


def _folder_path(path: str) -> str:
    if re.search(f"[{UNPRINTED}]", path):
        problem = "a path has no control characters"
    elif size(path) > _LONGEST_PATH or any(size(part) > MOST_BYTES for part in path.split("/")):
        problem = f"a path has at most {_LONGEST_PATH} bytes, and each of its parts at most {MOST_BYTES}"
    else:
        return path
    raise PydanticCustomError("folder_path", problem)


FolderName = Annotated[str, AfterValidator(_folder_name)]
"""One part of a path: no slash, blank or leading dot, and short enough to be joined with another name."""
FolderPath = Annotated[str, Field(min_length=1), AfterValidator(_folder_path)]
"""Path of a folder that the user names."""
Url = Annotated[str, PlainSerializer(masked_url, return_type=str, when_used="json")]
"""A URL whose password is masked in records."""
