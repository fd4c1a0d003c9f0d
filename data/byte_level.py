"""Byte-level BPE chunk by chunk: the ids that the tokenizer gives, from a memory of chunks.

Such a tokenizer (GPT-2's kind: SmolLM2, and many more) cuts a text into words before it encodes each by itself, and
most of its time goes into the cutting. A word never reaches over a single blank between two characters that are none:
it begins at the blank. So a text may be cut there, at once, and a chunk's ids are what the tokenizer says, once.
"""

from __future__ import annotations

import json
import re

import numpy as np
from tokenizers import Tokenizer

# Where a blank is no safe place to cut: beside another one, or where something else may be one to the tokenizer.
_UNSAFE = re.compile(r"[^\S \n]|  | \n|\n ")
_MOST_CHUNKS = 1_000_000  # remembered at a time
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_CUTTERS = ([_BYTE_LEVEL], [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL])


class ChunkMemory:
    """Ids of texts as INT32 bytes; `of` says for which tokenizers there is one."""

    def __init__(self, backend: Tokenizer, added: list[str]) -> None:
        self._backend = backend
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._first = _Chunks(backend, "")
        self._later = _Chunks(backend, " ")
        before, after = _special_ids(backend)
        self._before, self._after = packed(before), packed(after)

    @classmethod
    def of(cls, backend: Tokenizer) -> ChunkMemory | None:
        """None where the tokenizer is of another kind."""
        made_of = json.loads(backend.to_str())
        model, cutter = made_of["model"], made_of["pre_tokenizer"]
        parts = cutter["pretokenizers"] if cutter and cutter["type"] == "Sequence" else [cutter]
        known = [part and {key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
        if made_of["normalizer"] is not None or model["type"] != "BPE" or model.get("dropout") or known not in _CUTTERS:
            return None
        return cls(backend, [token["content"] for token in made_of["added_tokens"]])

    def encode(self, text: str, special: bool) -> bytes | None:
        """Ids of a text, None where the tokenizer must be asked."""
        body = text.rstrip(" \n")
        if _UNSAFE.search(body) or (self._added and self._added.search(text)) or text[:1].isspace():
            return None
        first, *later = body.split(" ")
        ids = self._first[first] + b"".join(map(self._later.__getitem__, later))
        if len(body) < len(text):
            ids += self._first[text[len(body) :]]  # blanks at the end are words of their own
        return self._before + ids + self._after if special else ids


class _Chunks(dict[str, bytes]):
    """Chunk → its ids, `prefix` put before it."""

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
    """What a post-processor puts before and after the ids of a text."""
    ids, plain = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
    return ids[:start], ids[start + len(plain) :]
