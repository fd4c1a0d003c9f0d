"""Labelled images of a public data set, decoded and preprocessed when they are read: in the loader's workers.

Sources are those of `flatlora.rows`: the hub, or DIR/<owner>/<name>/<config>/<split>.{parquet,jsonl}. In a Parquet file
an image is the hub's {"bytes", "path"}; in a JSON-lines file it is a path beside that file.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from flatlora.config import ConfigError
from flatlora.rows import Source, hub_faults, local_file, read_jsonl, typed_columns

_BROKEN = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)  # as PIL raises them
_CHECKERS = 8  # threads: PIL lets go of Python's lock while it reads


class Images(Protocol):
    """Pictures with their classes."""

    labels: np.ndarray  # INT64
    names: list[str] | None  # of the classes, where the data set says them

    def encoded(self, index: int) -> bytes:
        """The file's bytes."""
        ...


@dataclass
class EncodedImages:
    """Images as files in memory-mapped columns, or read from disk one by one."""

    source: str
    labels: np.ndarray
    read: Callable[[int], bytes]
    names: list[str] | None = None

    def encoded(self, index: int) -> bytes:
        return self.read(index)


def read_images(source: Source, *, image: str, label: str, data_root: str | None = None) -> EncodedImages:
    """The images and labels of one split; no picture is decoded.

    Raises:
        ConfigError: no such file, no network, or a column that is missing or holds something else; with the way out.
    """
    if data_root is not None:
        path = local_file(source, data_root)
        return _read_listed(path, image, label) if path.suffix == ".jsonl" else _read_columns(path, image, label)
    import datasets

    with hub_faults(source):
        table = datasets.load_dataset(source.hub_id, source.config, split=source.split, revision=source.revision)
    return _of_table(table, image, label, str(source))


def _read_columns(path: Path, image: str, label: str) -> EncodedImages:
    import datasets
    import pyarrow

    try:
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=False)
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError([f"Broken file {path}: not Parquet ({reason}); fetch it again."]) from error
    return _of_table(table, image, label, str(path))


def _of_table(table: Any, image: str, label: str, source: str) -> EncodedImages:
    import datasets

    missing = [column for column in (image, label) if column not in table.column_names]
    if missing or not len(table):
        found = ", ".join(table.column_names)
        faults = [f"Missing column {column} in {source}: it has {found}; name it in the config." for column in missing]
        raise ConfigError(faults or [f"Empty data set: {source} holds no row; at least one is needed."])
    names = getattr(table.features[label], "names", None)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    labels = _labels(table[label][:], label, source)

    def read(index: int) -> bytes:
        value = table[index][image]
        if isinstance(value, dict):
            value = value.get("bytes") or (Path(value["path"]).read_bytes() if value.get("path") else None)
        if not isinstance(value, bytes):
            raise OSError("the row holds no image")
        return value

    return EncodedImages(source, labels, read, names)


def _read_listed(path: Path, image: str, label: str) -> EncodedImages:
    rows = typed_columns(read_jsonl(path), {image: "text", label: "int"}, str(path))
    labels = _labels([row[label] for row in rows], label, str(path))
    return EncodedImages(str(path), labels, lambda index: (path.parent / rows[index][image]).read_bytes())


def _labels(values: Sequence[Any], column: str, source: str) -> np.ndarray:
    for number, value in enumerate(values, start=1):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(
                [
                    f"Invalid {column} in {source}, row {number}: a whole number from 0 is needed, not {value!r}; use "
                    "a split with labels."
                ]
            )
    return np.array(values, np.int64)


def check_images(images: Images, indices: Sequence[int]) -> None:
    """See that every picture can be decoded, before a model is loaded.

    Raises:
        ConfigError: the number of broken ones, the first of them and why.
    """

    def problem(index: int) -> str | None:
        try:
            with Image.open(io.BytesIO(images.encoded(index))) as picture:
                picture.load()
        except _BROKEN as error:
            return str(error).partition("\n")[0] or type(error).__name__
        return None

    with ThreadPoolExecutor(_CHECKERS) as pool:
        broken = [(i, told) for i, told in zip(indices, pool.map(problem, indices), strict=True) if told]
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        first, told = broken[0]
        source = getattr(images, "source", "the data set")
        raise ConfigError(
            [f"Broken image in {source}, row {first + 1}{others}: {told}; fetch the file again, or leave the row out."]
        )


@dataclass
class ImageRows(Dataset):
    """Some images of a data set, preprocessed when they are read.

    A row is {"pixel_values": FP32 channels × height × width, "labels": int}.
    """

    images: Images
    indices: np.ndarray
    processor: Any  # an image processor of transformers
    _digests: list[bytes] | None = field(init=False, default=None)
    lengths: list[int] = field(init=False)  # a sampler that groups by length finds all alike

    def __post_init__(self) -> None:
        self.lengths = [1] * len(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self.indices[index])
        with Image.open(io.BytesIO(self.images.encoded(place))) as picture:
            pixels = self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": int(self.images.labels[place])}

    @property
    def labels(self) -> list[int]:
        return self.images.labels[self.indices].tolist()

    def digests(self) -> list[bytes]:
        """A hash of each row's file and class: equal for two copies of one picture. Every file is read, once."""
        if self._digests is None:
            self._digests = [_digest(self.images, int(place)) for place in self.indices]
        return self._digests


def _digest(images: Images, place: int) -> bytes:
    hashed = hashlib.blake2b(images.encoded(place), digest_size=16)
    hashed.update(int(images.labels[place]).to_bytes(8, "little"))
    return hashed.digest()


def collate_images(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """{"pixel_values": B × 3 × H × W, "labels": B}."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
