"""Labeled images of a public data set, decoded and preprocessed when they are read, in the loader's workers.

Sources are those of rows.py: the hub, or DIR/<owner>/<name>/<config>/<split>.{parquet,jsonl}. In a Parquet file an
image is the hub's {"bytes", "path"}; in a JSON-lines file it is a path relative to that file. `scikit-learn/digits`
(1,797 images of 8 × 8 pixels, of which the last fifth is the test split) is part of scikit-learn.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import Dataset

from flatlora.inputs.pixels import normalized, pixel_table
from flatlora.inputs.rows import Source, fingerprint, hub_data, local_file, read_jsonl, typed_columns
from flatlora.utils import caches
from flatlora.utils.caches import cache_error, kept_folder
from flatlora.utils.console import progress
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import cache_folder
from flatlora.utils.plain_files import place_inside, read_plain
from flatlora.utils.staging import remove

logger = logging.getLogger(__name__)

DIGITS = "scikit-learn/digits"
_DIGITS_TRAIN = 1437  # of 1,797
# Exceptions that PIL raises for broken files, malicious ones included.
BROKEN = (OSError, SyntaxError, ValueError, LookupError, ArithmeticError, EOFError, MemoryError, TypeError)
BROKEN += (RuntimeError, AttributeError, AssertionError, Image.DecompressionBombError, struct.error, zlib.error)
_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
)  # none for which PIL runs a program
_MOST_BYTES = 1 << 28
_MOST_PIXELS = 160_000_000  # the largest cameras make 151 million
_LARGE_PIXELS = 1 << 24  # larger images are decoded one at a time: they need much more memory than their files
_LONGEST = 32  # largest ratio of the sides
_CHECKERS = 8  # threads: PIL releases the GIL while it decodes
_BAR_FROM = 5000  # images; fewer need no progress bar
_LARGEST_LABEL = 2**31 - 1
_PICTURE_BYTES = 16


@dataclass
class LabeledImages:
    """Encoded images, in memory-mapped columns or separate files, with their classes.

    Args:
        source: the data set's name in messages.
        labels: INT64.
        read: index → the encoded image.
        names: names of the classes, if the data set has them.
    """

    source: str
    labels: np.ndarray
    read: Callable[[int], bytes]
    names: list[str] | None = None

    def tag(self, index: int) -> bytes:
        """The class of an image as bytes, for its digest."""
        return int(self.labels[index]).to_bytes(8, "little")


class ImageFiles(Protocol):
    """Encoded images, each with a tag (class or prompt) for its digest."""

    source: str
    read: Callable[[int], bytes]

    def tag(self, index: int) -> bytes: ...


class Pixels(Protocol):
    """Preprocessed images by their digests; see `flatlora.inputs.pixel_cache.PixelCache`."""

    @property
    def filled(self) -> bool: ...

    def fill(self, images: ImageFiles, indices: Sequence[int], digests: Sequence[bytes]) -> bool: ...

    def read(self, digests: Sequence[bytes]) -> tuple[torch.Tensor, list[int]]: ...


def read_images(source: Source, *, image: str, label: str, data_root: str | None = None) -> LabeledImages:
    """Reads the images and labels of one split, without decoding.

    Raises:
        ConfigError: the file or the network is missing, or a column is missing or has values of another kind; the
            message suggests a fix.
    """
    if source.hub_id == DIGITS:
        return _digits(source.split)
    if data_root is None:
        return _of_table(hub_data(source), image, label, str(source), None)
    path = local_file(source, data_root)
    if path.suffix == ".jsonl":
        return read_listed(path, image, label)
    return _of_table(parquet_table(path, fingerprint(source, data_root)), image, label, str(path), path.parent)


def parquet_table(path: Path, sha256: str) -> Any:
    """Loads a Parquet file as a memory-mapped `datasets.Dataset`.

    Args:
        sha256: hash of the file; the memory-mapped copy in the cache is named by it, so that a changed file is noticed.

    Raises:
        ConfigError: the file is broken.
    """
    import datasets
    import pyarrow

    def convert(folder: Path) -> None:
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder / "made"))
        except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise ConfigError([f"Broken file {path}: not Parquet ({reason_of(error)}); download it again."]) from error
        for number, shard in enumerate(table.cache_files):
            os.replace(shard["filename"], folder / f"{number:05d}.arrow")
        remove(folder / "made")

    folder = cache_folder() / "images" / sha256[:20]
    try:
        kept_folder(folder, convert)
    except OSError as error:
        raise cache_error("the memory-mapped copy of a Parquet file", error, cache_folder()) from error
    return datasets.concatenate_datasets(
        [datasets.Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))]
    )


def _of_table(table: Any, image: str, label: str, source: str, folder: Path | None) -> LabeledImages:
    table = with_bytes(table, image, (label,), source)
    names = getattr(table.features[label], "names", None)
    labels = _labels(table[label][:], label, source)
    return LabeledImages(source, labels, bytes_of(table, image, folder), names)


def with_bytes(table: Any, image: str, others: Sequence[str], source: str) -> Any:
    """The `datasets.Dataset` with encoded instead of decoded images.

    Raises:
        ConfigError: a column is missing, or there is no row.
    """
    import datasets

    missing = [column for column in (image, *others) if column not in table.column_names]
    if missing or not len(table):
        present = ", ".join(table.column_names)
        errors = [
            f"Missing column {column} in {source}: it has {present}; set its name in the config." for column in missing
        ]
        raise ConfigError(errors or [f"Empty data set: {source} has no rows; it needs at least one."])
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    return table


def bytes_of(table: Any, image: str, folder: Path | None) -> Callable[[int], bytes]:
    """Returns a function: index → encoded image, for a table from `with_bytes`.

    Args:
        folder: the folder of files that rows name; None: the caches of the hub's libraries.
    """

    def read(index: int) -> bytes:
        value = table[index][image]
        if isinstance(value, dict):
            value = value.get("bytes") or (_named_file(value["path"], folder) if value.get("path") else None)
        if not isinstance(value, bytes):
            raise OSError("the row has no image")
        return value

    return read


def _named_file(name: str, folder: Path | None) -> bytes:
    if folder is not None:
        return file_in(folder, name)
    import datasets
    import huggingface_hub

    known = datasets.config
    others = (known.DOWNLOADED_DATASETS_PATH, known.EXTRACTED_DATASETS_PATH, huggingface_hub.constants.HF_HUB_CACHE)
    return read_plain(place_inside(Path(known.HF_DATASETS_CACHE), name, *others), _MOST_BYTES)


def file_in(folder: Path, name: str) -> bytes:
    """Reads an encoded image by its name in a folder.

    Raises:
        OSError: it does not exist, is outside the folder (after links), is not a plain file, or is too large.
    """
    return read_plain(place_inside(folder, name), _MOST_BYTES)


def read_listed(path: Path, image: str, label: str) -> LabeledImages:
    """Reads images that a JSON-lines file names by paths relative to itself."""
    rows = typed_columns(read_jsonl(path), {image: "text", label: "int"}, str(path))
    labels = _labels([row[label] for row in rows], label, str(path))
    return LabeledImages(str(path), labels, lambda index: file_in(path.parent, rows[index][image]))


def _digits(split: str) -> LabeledImages:
    from sklearn.datasets import load_digits

    spans = {"train": slice(0, _DIGITS_TRAIN), "test": slice(_DIGITS_TRAIN, None)}
    if split not in spans:
        raise ConfigError([f"Invalid split {split} of {DIGITS}: it has {' and '.join(spans)}; choose one of them."])
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)[spans[split]]
    labels = digits.target.astype(np.int64)[spans[split]]
    return LabeledImages(f"{DIGITS} ({split})", labels, lambda index: png_of(pixels[index]))


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _labels(values: Sequence[Any], column: str, source: str) -> np.ndarray:
    broken = [
        number
        for number, value in enumerate(values, start=1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST_LABEL
    ]
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ConfigError(
            [
                f"Invalid {column} in {source}, row {broken[0]}{others}: it must be a whole number ≥ 0, not "
                f"{str(values[broken[0] - 1])[:40]}; use a split with labels."
            ]
        )
    return np.array(values, np.int64)


def check_images(images: ImageFiles, indices: Sequence[int], cache: Pixels | None = None) -> list[bytes]:
    """Decodes every image once, before a model is loaded; returns a digest of each file and its tag.

    A digest begins with that of the file (`picture_of`), since one image may occur with two classes.

    Decoding a large set takes minutes, so its success is cached under the digests; the files are still read.

    Args:
        cache: where the preprocessed pixels are kept; images in it are not decoded.

    Raises:
        ConfigError: with the number of broken images, and the first of them with its reason.
    """
    indices, problems = list(map(int, indices)), {}

    def attempt(index: int, work: Callable[[int], Any]) -> Any:
        try:
            return work(index)
        except BROKEN as error:
            reasons = {
                # PIL's message contains the address of a buffer.
                UnidentifiedImageError: f"it is not an image of a known format ({', '.join(_FORMATS)})",
                FileNotFoundError: "there is no such file",
                IsADirectoryError: "it names a folder, not a file",
            }
            problems[index] = reasons.get(type(error)) or reason_of(error)

    digests = _each(lambda i: attempt(i, lambda j: _digest(images, j)), indices, f"read {images.source}")
    if cache is not None and not problems and cache.fill(images, indices, digests):
        return digests
    folder, key = cache_folder() / "decoded", "" if problems else _key_of(digests)
    if problems or caches.find(folder, key, ".json") is None:
        left = [index for index in indices if index not in problems]
        _each(lambda i: attempt(i, lambda j: decode_in_turn(images, j, _one_large)), left, f"decode {images.source}")
        if problems:
            raise ConfigError([_broken(images, problems)])
        entry = {"pictures": len(indices), "pillow": PIL.__version__}
        caches.keep(folder, key, ".json", json.dumps(entry).encode())
    return digests


def _broken(images: ImageFiles, problems: Mapping[int, str]) -> str:
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    first = min(problems)
    return (
        f"Broken image in {images.source}, {row_name(images, first)}{others}: {problems[first]}; download the file "
        "again, or leave the row out."
    )


def _each(work: Callable[[int], Any], indices: Sequence[int], name: str) -> list[Any]:
    results = []
    with progress(name, len(indices), least=_BAR_FROM) as advance, ThreadPoolExecutor(_CHECKERS) as pool:
        for result in pool.map(work, indices):
            results.append(result)
            advance(1)
    return results


def _digest(images: ImageFiles, index: int) -> bytes:
    return hashlib.blake2b(images.read(index), digest_size=_PICTURE_BYTES).digest() + images.tag(index)


def picture_of(digest: bytes) -> bytes:
    """The part of a digest that is that of the file, without its tag."""
    return digest[:_PICTURE_BYTES]


def _key_of(digests: Sequence[bytes]) -> str:
    return hashlib.sha256(json.dumps(PIL.__version__).encode() + b"".join(sorted(digests))).hexdigest()[:32]


_one_large = threading.Lock()


def decode_in_turn(images: ImageFiles, index: int, one_large: contextlib.AbstractContextManager) -> Image.Image:
    """`open_image`; a large image is decoded while `one_large` is held."""
    picture = open_head(images, index)
    large = picture.width * picture.height > _LARGE_PIXELS
    with one_large if large else contextlib.nullcontext():
        return _decode(picture).convert("RGB")


def row_name(images: ImageFiles, index: int) -> str:
    """The name of an image in error messages: its row and, if there is one, its file name."""
    names = getattr(images, "names", None)
    name = "".join(letter if letter.isprintable() else "?" for letter in names[index][:80]) if names else ""
    return f"row {index + 1}" + (f" ({name})" if name else "")


def open_image(images: ImageFiles, index: int) -> Image.Image:
    """Decodes an image in RGB, turned upright, as transformers' `load_image` does."""
    return decoded(images, index).convert("RGB")


def decoded(images: ImageFiles, index: int) -> Image.Image:
    """Decodes an image in the mode of its file, turned upright by its EXIF tag. Gray values of 16 bits are scaled to 8
    bits, which PIL would clip at 255.
    """
    return _decode(open_head(images, index))


def open_head(images: ImageFiles, index: int) -> Image.Image:
    """Opens an image without decoding its pixels: format, size and EXIF tags.

    Raises:
        BROKEN: it is not an image, has an unknown format, or is too large.
    """
    return head_of(images.read(index))


def head_of(file: bytes) -> Image.Image:
    """`open_head` for an encoded image."""
    if len(file) > _MOST_BYTES:
        raise ValueError(f"it has {len(file) / 2**20:,.0f} MiB, and at most {_MOST_BYTES / 2**20:,.0f} are read")
    picture = Image.open(io.BytesIO(file), formats=_known_formats())
    if (pixels := picture.width * picture.height) > _MOST_PIXELS:
        raise ValueError(
            f"it has {picture.width} × {picture.height} pixels, {pixels / 1e6:.0f} million, and at most "
            f"{_MOST_PIXELS / 1e6:.0f} are decoded"
        )
    return picture


@functools.cache
def _known_formats() -> list[str]:
    """The formats in `_FORMATS` that this build of PIL supports."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def middle_of(picture: Image.Image) -> Image.Image:
    """The image, or the middle part of an extremely long one, since scaling it to a model's height would need
    gigabytes, and the model only sees the middle.
    """
    width, height = (min(side, _LONGEST * min(picture.size)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    whole = (width, height) == picture.size
    return picture if whole else picture.crop((left, top, left + width, top + height))


def _decode(picture: Image.Image) -> Image.Image:
    picture = _pixels_of(picture)
    turn = turn_of(picture)
    return picture if turn is None else picture.transpose(turn)


def _pixels_of(picture: Image.Image) -> Image.Image:
    with picture:
        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers of no known range")
        if picture.mode == "I" and picture.format != "PNG":  # a PNG has 16 bits
            raise ValueError("its pixels are 32-bit integers of no known range")
        if picture.mode.startswith("I"):
            return _in_8_bits(picture)
        picture.load()
        return picture


_STRIP_PIXELS = 1 << 20


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Scales gray values of 0–65,535 to round(gray / 257), in parts, to save memory.

    257 is odd, so no quotient is half-way between two integers.
    """
    gray = Image.new("L", picture.size)
    columns = min(picture.width, _STRIP_PIXELS)
    rows = max(1, _STRIP_PIXELS // columns)
    for top, left in itertools.product(range(0, picture.height, rows), range(0, picture.width, columns)):
        box = left, top, min(left + columns, picture.width), min(top + rows, picture.height)
        wide = np.asarray(picture.crop(box)).astype(np.uint32)
        gray.paste(Image.fromarray(((wide + 128) // 257).astype(np.uint8)), (left, top))
    gray.info = picture.info  # has the EXIF orientation
    return gray


_TURNS = {
    number: Image.Transpose[name]
    for number, name in enumerate(
        ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"),
        start=2,
    )
}
QUARTER_TURNS = [_TURNS[number] for number in (5, 6, 7, 8)]


def turn_of(picture: Image.Image) -> Image.Transpose | None:
    """The transposition that turns an image upright by its EXIF tag; None if it is upright or has no readable tag."""
    if picture.format == "TIFF":  # PIL turns those itself
        return None
    try:
        written = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # PIL raises many types for broken tags, which are ignored: the pixels are intact
        return None
    return _TURNS.get(written) if isinstance(written, int) else None


def resized(processor: Any, picture: Image.Image) -> torch.Tensor:
    """The UINT8 pixels of an RGB image, C × H × W, as an image processor resizes and crops them."""
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    return processor(middle_of(picture), **options)["pixel_values"][0]


@dataclass
class ImageRows(Dataset):
    """A subset of a data set's images, preprocessed when they are read, or read from a cache.

    A row is {"pixel_values": FP32 channels × height × width, "labels": int}. The rows of a batch (`__getitems__`, which
    torch's DataLoader calls) have UINT8 pixels and a "pixel_table", with which the model normalizes on its device.

    Args:
        indices: indices into `images`.
        processor: an image processor of transformers.
        digests: digests of each row's file and class from `check_images`; equal for two copies of one image.
        cache: the pixels of these images.
    """

    images: LabeledImages
    indices: np.ndarray
    processor: Any
    digests: list[bytes]
    cache: Pixels | None = None
    lengths: list[int] = field(init=False)  # all equal, for samplers that group by length

    def __post_init__(self) -> None:
        self.lengths = [1] * len(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._cached:
            pixels = normalized(self._pixels([index])[0], self.table)
        else:
            picture = open_image(self.images, int(self.indices[index]))
            pixels = self.processor(middle_of(picture), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self._label(index)}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        stacked = self._pixels(indices) if self._cached else None
        pixels = map(self._resized, indices) if stacked is None else stacked
        rows = [
            {"pixel_values": each, "pixel_table": self.table, "labels": self._label(index)}
            for index, each in zip(indices, pixels, strict=True)
        ]
        return rows if stacked is None else _StackedRows(rows, stacked)

    def _label(self, index: int) -> int:
        return int(self.images.labels[self.indices[index]])

    @property
    def _cached(self) -> bool:
        return self.cache is not None and self.cache.filled

    def _pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """Pixels from the cache, B × C × H × W; those that it does not have are decoded."""
        pixels, missing = self.cache.read([self.digests[index] for index in indices])
        for place in missing:
            pixels[place] = self._resized(indices[place])
        return pixels

    def _resized(self, index: int) -> torch.Tensor:
        return resized(self.processor, open_image(self.images, int(self.indices[index])))

    @functools.cached_property
    def table(self) -> torch.Tensor:
        return pixel_table(self.processor)

    @property
    def bytes_to_decode(self) -> int:
        """Bytes of a row that is decoded when it is read; 0 for rows that are cached."""
        return 0 if self._cached or not len(self) else self._resized(0).nbytes

    @property
    def labels(self) -> list[int]:
        return self.images.labels[self.indices].tolist()


def name_error(images: LabeledImages, names: Sequence[str], where: str) -> str | None:
    """Why a data set's class names contradict `names` from the file `where`; None if they agree or it has none.

    Wording may differ. A name that has another label in `names` means another order, which is an error; a name that is
    only more similar to another label's name gives a warning.
    """
    if not images.names:
        return None
    if len(images.names) != len(names):
        return f"{where} has {len(names)} names, and {images.source} has {len(images.names)} classes"
    own, theirs = [_words(name) for name in images.names], [_words(name) for name in names]
    for label, words in enumerate(own):
        if words != theirs[label] and words in theirs:
            return (
                f"label {label} is {images.names[label]} in {images.source}, and {names[label]} in {where}, where "
                f"{images.names[label]} has label {theirs.index(words)}"
            )
    for label, words in enumerate(own):
        alike = [_likeness(words, other) for other in theirs]
        if max(alike) > alike[label]:
            logger.warning(
                "Label %d is %s in %s and %s in %s, where label %d is more similar: check that the order is the same.",
                *(label, images.names[label], images.source, names[label], where, alike.index(max(alike))),
            )
            break
    return None


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))


def _likeness(left: Sequence[str], right: Sequence[str]) -> float:
    """Jaccard similarity of the words of two names."""
    return len({*left} & {*right}) / len({*left, *right} or {""})


class _StackedRows(list):
    """Rows whose pixels are those of one tensor, B × C × H × W, so that a batch of them needs no copy."""

    def __init__(self, rows: Sequence[dict[str, Any]], pixels: torch.Tensor) -> None:
        super().__init__(rows)
        self.pixels = pixels


def collate_images(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks rows: {"pixel_values": B × 3 × H × W, "labels": B}, and the table that rows with UINT8 pixels share."""
    stacked = isinstance(rows, _StackedRows)
    batch = {
        "pixel_values": rows.pixels if stacked else torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    return batch | {key: rows[0][key] for key in ("pixel_table",) if key in rows[0]}
