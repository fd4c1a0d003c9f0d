"""Fast byte-level BPE: the same ids as the tokenizer's, from a cache of chunks of text.

Such a tokenizer (that of GPT-2, SmolLM2 and many others) splits a text into words and encodes each separately; most of
its time goes into the splitting. A word never extends over a single blank between two other characters, but begins at
it. So texts can be split at such blanks, and each distinct chunk is encoded by the tokenizer only once.
"""

from __future__ import annotations

import json
import re

import numpy as np
from tokenizers import Tokenizer

# Texts that cannot be split at blanks: blanks next to each other, or other characters that may be white space.
_UNSAFE = re.compile(r"[^\S \n]|  | \n|\n ")
_MOST_CHUNKS = 1_000_000  # in the cache
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SPLITTERS = ([_BYTE_LEVEL], [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL])


class ChunkMemory:
    """Encodes texts to INT32 bytes; `of` creates one for a tokenizer that supports it."""

    def __init__(self, backend: Tokenizer, added: list[str]) -> None:
        self._backend = backend
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._first = _Chunks(backend, "")
        self._later = _Chunks(backend, " ")
        before, after = _special_ids(backend)
        self._before, self._after = packed(before), packed(after)

    @classmethod
    def of(cls, backend: Tokenizer) -> ChunkMemory | None:
        """The memory for a tokenizer; None if it is of another kind."""
        spec = json.loads(backend.to_str())
        model, splitter = spec["model"], spec["pre_tokenizer"]
        parts = splitter["pretokenizers"] if splitter and splitter["type"] == "Sequence" else [splitter]
        known = [part and {key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
        if spec["normalizer"] is not None or model["type"] != "BPE" or model.get("dropout") or known not in _SPLITTERS:
            return None
        return cls(backend, [token["content"] for token in spec["added_tokens"]])

    def encode(self, text: str, special: bool) -> bytes | None:
        """Ids of a text; None if the text must be encoded by the tokenizer itself."""
        body = text.rstrip(" \n")
        if _UNSAFE.search(body) or (self._added and self._added.search(text)) or text[:1].isspace():
            return None
        first, *later = body.split(" ")
        ids = self._first[first] + b"".join(map(self._later.__getitem__, later))
        if len(body) < len(text):
            ids += self._first[text[len(body) :]]  # blanks at the end are separate words
        return self._before + ids + self._after if special else ids


class _Chunks(dict[str, bytes]):
    """Chunk → ids of `prefix` + chunk."""

    def __init__(self, backend: Tokenizer, prefix: str) -> None:
        super().__init__()
        self._backend, self._prefix = backend, prefix

    def __missing__(self, chunk: str) -> bytes:
        if len(self) >= _MOST_CHUNKS:
            self.clear()
        ids = packed(self._backend.encode(self._prefix + chunk, add_special_tokens=False).ids) if chunk else b""
        self[chunk] = ids
        return ids


def packed(ids: list[int]) -> bytes:
    """Ids as INT32."""
    return np.array(ids, "<i4").tobytes()


def _special_ids(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor adds before and after those of a text."""
    ids, plain = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return ids[:start], ids[start + len(plain) :]
