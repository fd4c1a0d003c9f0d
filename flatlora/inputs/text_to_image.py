"""Images with prompts, cropped to the training sizes of a diffusion model.

They are a split of a public data set (the hub, or `data_root`), or a folder of images, in which a metadata.jsonl with
rows {"file_name", "prompt"} gives each its prompt. `flatlora/shapes`, eight shapes, is drawn here.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from flatlora.inputs.images import (
    BROKEN,
    QUARTER_TURNS,
    bytes_of,
    check_images,
    decoded,
    file_in,
    open_head,
    parquet_table,
    png_of,
    row_name,
    turn_of,
    with_bytes,
)
from flatlora.inputs.rows import (
    MOST_BYTES,
    Source,
    fingerprint,
    gather,
    hub_data,
    local_file,
    read_jsonl,
    typed_columns,
)
from flatlora.utils.errors import ConfigError
from flatlora.utils.plain_files import read_plain

logger = logging.getLogger(__name__)

SHAPES = "flatlora/shapes"
METADATA = "metadata.jsonl"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_NO_PICTURES = (METADATA, "README.md", "LICENSE")  # files of a folder that are skipped without a warning
_MOST_SCALED = 16  # an image that would be scaled to more than this many times the crop's pixels is cropped first
LONGEST_PROMPT = 10_000  # letters; text encoders read 77 tokens, and a tokenizer would take minutes for megabytes
_WIDEST = 2.0  # aspect ratios of buckets are from 1:2 to 2:1


@dataclass
class TextToImageData:
    """Encoded images with a prompt each.

    Args:
        source: the data set's name in messages.
        read: index → the encoded image.
        names: file names, for messages.
    """

    source: str
    prompts: list[str]
    read: Callable[[int], bytes]
    names: Sequence[str] | None = None

    def tag(self, index: int) -> bytes:
        """The prompt of an image as bytes, for its digest."""
        return self.prompts[index].encode()


class View(NamedTuple):
    """An image as model input."""

    pixels: torch.Tensor  # 3 × H × W, FP32, −1 to 1
    time_ids: torch.Tensor  # (6,), FP32: height and width of the original, top and left of the crop, H and W


@dataclass
class TextToImageRows:
    """A subset of a data set's images with their crop sizes.

    Args:
        indices: indices into `images`.
        digests: digests of each row's file and prompt.
        sizes: (H, W) of each row's crop.
    """

    images: TextToImageData
    indices: Sequence[int]
    digests: list[bytes]
    sizes: list[tuple[int, int]]
    lengths: list[int] = field(init=False)  # all equal, for samplers that group by length

    def __post_init__(self) -> None:
        self.lengths = [1] * len(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def only(self, rows: Sequence[int]) -> TextToImageRows:
        """The given rows, in their order."""
        indices, digests, sizes = ([values[row] for row in rows] for values in (self.indices, self.digests, self.sizes))
        return TextToImageRows(self.images, indices, digests, sizes)

    def prompt(self, row: int) -> str:
        return self.images.prompts[self.indices[row]]

    def view(self, row: int, *, flipped: bool = False) -> View:
        """One image, scaled to cover its size and center-cropped."""
        picture = picture_of(self.images, self.indices[row])
        original = picture.size
        picture = ImageOps.mirror(picture) if flipped else picture
        cut, top, left = cover(picture, self.sizes[row])
        pixels = torch.from_numpy(np.asarray(cut, np.float32).transpose(2, 0, 1).copy()) / 127.5 - 1.0
        time_ids = (original[1], original[0], top, left, *self.sizes[row])
        return View(pixels, torch.tensor(time_ids, dtype=torch.float32))


def picture_of(images: TextToImageData, index: int) -> Image.Image:
    """Decodes an image in RGB, turned upright by its EXIF tag; transparent pixels become white."""
    picture = decoded(images, index)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def shape_of(images: TextToImageData, index: int) -> tuple[int, int]:
    """Width and height of an image after it is turned upright, without decoding it."""
    with open_head(images, index) as picture:
        return picture.size[::-1] if turn_of(picture) in QUARTER_TURNS else picture.size


def cover(picture: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, int, int]:
    """Returns (image scaled to cover H × W and center-cropped, top, left)."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    scaled = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    top, left = (scaled[1] - height) // 2, (scaled[0] - width) // 2
    if scaled[0] * scaled[1] > _MOST_SCALED * height * width:
        return _scaled_part(picture, scaled, (left, top, left + width, top + height)), top, left
    picture = picture.resize(scaled, Image.Resampling.LANCZOS)
    return picture.crop((left, top, left + width, top + height)), top, left


_REACH = 3  # radius of the Lanczos kernel in pixels of the coarser grid


def _scaled_part(picture: Image.Image, scaled: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """`picture.resize(scaled).crop(box)` up to rounding, without the whole scaled image in memory."""
    for axis in (0, 1):
        step = picture.size[axis] / scaled[axis]
        begin, end = box[axis] * step, min(box[axis + 2] * step, picture.size[axis])
        reach = math.ceil(_REACH * max(step, 1.0)) + 1
        first, last = max(math.floor(begin) - reach, 0), min(math.ceil(end) + reach, picture.size[axis])
        size, window, part = list(picture.size), [0, 0, *picture.size], [0, 0, *picture.size]
        size[axis], window[axis::2], part[axis::2] = (
            box[axis + 2] - box[axis],
            (first, last),
            (begin - first, end - first),
        )
        picture = picture.crop(tuple(window)).resize(tuple(size), Image.Resampling.LANCZOS, box=tuple(part))
    return picture


def rows_of(
    images: TextToImageData,
    indices: Sequence[int],
    *,
    resolution: int,
    bucket_step: int | None = None,
    min_side: int = 1,
) -> TextToImageRows:
    """Rows with crop sizes, after every image was decoded once.

    Args:
        resolution: side of a square crop, in pixels.
        bucket_step: if given, the crop of each image has the nearest aspect ratio, about as many pixels as the square,
            and sides that are multiples of this. None crops squares.
        min_side: smallest allowed side of an image, in pixels.

    Raises:
        ConfigError: images cannot be decoded, or are too small.
    """
    digests, shapes = gather(
        lambda: check_images(images, indices), lambda: _shapes_from(images, indices, min_side=min_side)
    )
    known = bucket_sizes(resolution, bucket_step) if bucket_step else [(resolution, resolution)]
    return TextToImageRows(
        images, list(indices), digests, [_nearest(known, width / height) for width, height in shapes]
    )


def _shapes_from(images: TextToImageData, indices: Sequence[int], *, min_side: int) -> list[tuple[int, int]]:
    """(width, height) of each image that can be opened.

    Raises:
        ConfigError: images are too small.
    """
    shapes, small = [], []
    for index in indices:
        try:
            shapes.append(shape_of(images, index))
        except BROKEN:
            continue  # reported by `check_images`
        if min(shapes[-1]) < min_side:
            small.append((index, shapes[-1]))
    if small:
        index, (width, height) = small[0]
        others = f" (and {len(small) - 1} more)" if small[1:] else ""
        raise ConfigError(
            [
                f"Invalid image in {images.source}, {row_name(images, index)}{others}: it is {width} × {height} "
                f"pixels, and its smaller side must be at least dataset.min_side={min_side}; use larger images, "
                "leave it out, or lower dataset.min_side."
            ]
        )
    return shapes


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of at most resolution² pixels whose sides are multiples of `step`, from 1:2 to 2:1."""
    sizes = {(resolution, resolution)}
    for width in range(step, int(resolution * math.sqrt(_WIDEST)) + step, step):
        height = resolution**2 // width // step * step
        if height and 1 / _WIDEST <= width / height <= _WIDEST:
            sizes.add((height, width))
    return sorted(sizes)


def _nearest(sizes: Sequence[tuple[int, int]], aspect: float) -> tuple[int, int]:
    """The size with the nearest aspect ratio; the larger one of a tie."""
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0] / aspect)), -size[0] * size[1]))


def read_text_to_image(
    source: Source, *, image: str, prompt: str | None, fixed: str | None, data_root: str | None
) -> TextToImageData:
    """Reads the images and prompts of a split.

    Args:
        image, prompt: names of the columns.
        fixed: one prompt for all images, instead of a column.

    Raises:
        ConfigError: the file or the network is missing, or a column is missing or has values of another kind; the
            message suggests a fix.
    """
    if source.hub_id == SHAPES:
        return _shapes(fixed)
    others = (prompt,) if prompt and fixed is None else ()
    if data_root is None:
        return _of_table(hub_data(source), image, others, str(source), fixed, None)
    path = local_file(source, data_root)
    if path.suffix == ".jsonl":
        return _listed(path, read_jsonl(path), image, others, fixed)
    table = parquet_table(path, fingerprint(source, data_root))
    return _of_table(table, image, others, str(path), fixed, path.parent)


def _of_table(
    table, image: str, others: tuple[str, ...], source: str, fixed: str | None, folder: Path | None
) -> TextToImageData:
    table = with_bytes(table, image, others, source)
    rows = [{others[0]: text} for text in table[others[0]][:]] if others else [{}] * len(table)
    return TextToImageData(source, _prompts(rows, others, fixed, source), bytes_of(table, image, folder))


def _listed(
    path: Path, rows: Sequence[dict], image: str, others: tuple[str, ...], fixed: str | None
) -> TextToImageData:
    """Reads images that a JSON-lines file names by paths relative to itself."""
    rows = typed_columns(rows, [image, *others], str(path))
    prompts, names = _prompts(rows, others, fixed, str(path)), [row[image] for row in rows]
    if twice := len(names) - len(set(names)):
        logger.warning("%s names %d images more than once: each of its rows is used.", path, twice)
    return TextToImageData(str(path), prompts, lambda index: file_in(path.parent, names[index]), names)


def _prompts(rows: Sequence[dict], others: tuple[str, ...], fixed: str | None, source: str) -> list[str]:
    if not others:
        return [fixed] * len(rows)
    prompts = [row[others[0]] for row in typed_columns(rows, others, source)]
    if blank := [number for number, prompt in enumerate(prompts, start=1) if not prompt.strip()]:
        more = f" (and {len(blank) - 1} more)" if blank[1:] else ""
        raise ConfigError(
            [
                f"Invalid {others[0]} in {source}, row {blank[0]}{more}: it is blank; write one, or set dataset.prompt "
                "for all images."
            ]
        )
    if errors := long_prompts(prompts, f"{others[0]} in {source}"):
        raise ConfigError(errors)
    return prompts


def long_prompts(prompts: Sequence[str], what: str) -> list[str]:
    """A validation error about the first prompt that is too long; an empty list if there is none."""
    long = [number for number, prompt in enumerate(prompts, start=1) if len(prompt) > LONGEST_PROMPT]
    if not long:
        return []
    more = f" (and {len(long) - 1} more)" if long[1:] else ""
    return [
        f"Invalid {what}, row {long[0]}{more}: it has {len(prompts[long[0] - 1]):,} letters, and a prompt has at most "
        f"{LONGEST_PROMPT:,}; shorten it: a text encoder reads no more than its first 77 tokens."
    ]


def read_folder(folder: str, fixed: str | None, key: str = "dataset.folder") -> TextToImageData:
    """Reads the images of a folder, in the order of its metadata.jsonl or else of their names.

    Args:
        fixed: one prompt for all images, instead of those in metadata.jsonl.
        key: the setting that names the folder, for messages.

    Raises:
        ConfigError: the folder, its images or their prompts are missing; the message suggests a fix.
    """
    path = Path(folder)
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        reason = {FileNotFoundError: "there is no such folder", NotADirectoryError: "it is a file, not a folder"}
        reason = reason.get(type(error), error.strerror)
        raise ConfigError([f"Invalid {key}={folder}: {reason}; name a folder of images."]) from error
    if os.path.lexists(path / METADATA):  # also for a broken link, which is then an error
        rows = read_jsonl(path / METADATA)
        rows = [{"prompt": row["text"], **row} if "text" in row else row for row in rows]  # the column name of datasets
        images = _listed(path / METADATA, rows, "file_name", () if fixed is not None else ("prompt",), fixed)
        if left := [f.name for f in entries if f.suffix.lower() in _SUFFIXES and f.name not in images.names]:
            logger.warning("%d images are not named in %s and are left out: %s …", len(left), path / METADATA, left[0])
        return images
    files = [file for file in entries if file.suffix.lower() in _SUFFIXES]
    skipped = [f for f in entries if f not in files and f.name not in _NO_PICTURES and not f.name.startswith(".")]
    kinds = ", ".join(_SUFFIXES)
    if not files:
        other = f", only {skipped[0].name}" if skipped else ""
        raise ConfigError(
            [f"Invalid {key}={folder}: it has no images ({kinds}){other}; put some into it, not into its subfolders."]
        )
    if skipped:
        logger.warning(
            "%d entries of %s are skipped, such as %s: images are %s.", len(skipped), path, skipped[0].name, kinds
        )
    if fixed is None:
        raise ConfigError(
            [
                f'Missing dataset.prompt: {folder} has no {METADATA}; set dataset.prompt="a photo of …" for all of its '
                'images, or write that file with rows {"file_name", "prompt"}.'
            ]
        )
    names = [file.name for file in files]
    return TextToImageData(str(path), [fixed] * len(files), lambda index: file_in(path, names[index]), names)


PICTURES_FILE = "pictures.json"  # in a run's folder: the images of the data set that it was trained on


def identities(rows: TextToImageRows) -> dict[str, list[Any]]:
    """The content of PICTURES_FILE: indices in the data set, and digests of files and prompts."""
    return {"indices": list(rows.indices), "digests": [digest.hex() for digest in rows.digests]}


def rows_of_run(run: Path, dataset: Mapping[str, Any], data_root: str | None) -> TextToImageRows:
    """Reads the images that a run was trained on.

    Args:
        dataset: the section of the run's config.yaml.

    Raises:
        ConfigError: the run has no valid PICTURES_FILE, or the images are missing or have changed.
    """
    path = run / PICTURES_FILE
    try:
        saved = json.loads(read_plain(path, MOST_BYTES))
        indices, digests = saved["indices"], saved["digests"]
        if [*map(type, indices)] != [int] * len(digests):
            raise ValueError("it must have an index and a digest for each image")
        settings = {key: dataset[key] for key in ("resolution", "min_side")}
        folder, fixed = dataset["folder"], dataset["prompt"]
        where = [dataset[key] for key in ("hub_id", "hub_config", "split", "revision")]
        columns = {"image": dataset["image_column"], "prompt": dataset["prompt_column"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            [
                f"Broken run {run}: {path.name} or the dataset of its config.yaml is not what a run writes ({error}); "
                "copy the whole folder of the run."
            ]
        ) from error
    if folder is not None:
        images = read_folder(folder, fixed)
    else:
        images = read_text_to_image(Source(*where), **columns, fixed=fixed, data_root=data_root)
    if beyond := [index for index in indices if not 0 <= index < len(images.prompts)]:
        raise ConfigError(
            [
                f"Invalid images of {run}: {images.source} has {len(images.prompts)}, and the run was trained on "
                f"number {beyond[0] + 1}; set data_root to the folder of the images that it was trained on."
            ]
        )
    rows = rows_of(images, indices, **settings)
    if others := [row for row, digest in enumerate(rows.digests) if digest.hex() != digests[row]]:
        raise ConfigError(
            [
                f"Invalid images of {run}: the image or the prompt of {row_name(images, indices[others[0]])} of "
                f"{images.source} has changed since the run was trained ({len(others)} of {len(indices)} have); "
                "restore them, or set data_root to their folder."
            ]
        )
    return rows


# --- The eight shapes.

_SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "bar", "hexagon")
_COLORS = ("red", "green", "blue", "orange", "purple", "teal", "gold", "navy")
_SIDE, _SMOOTH = 64, 4  # drawn at 4 × 64 pixels and scaled down


def _shapes(fixed: str | None) -> TextToImageData:
    prompts = [f"a {color} {shape}" for color, shape in zip(_COLORS, _SHAPES, strict=True)]
    if fixed is not None:
        prompts = [fixed] * len(prompts)
    return TextToImageData(SHAPES, prompts, lambda index: png_of(_drawn(_SHAPES[index], _COLORS[index])))


def _drawn(shape: str, color: str) -> np.ndarray:
    side = _SIDE * _SMOOTH
    picture = Image.new("RGB", (side, side), "white")
    draw, middle, reach = ImageDraw.Draw(picture), side / 2, side * 0.36
    box = (middle - reach, middle - reach, middle + reach, middle + reach)
    thick = reach * 0.4
    corners = {"square": (4, 45), "triangle": (3, 0), "diamond": (4, 0), "hexagon": (6, 0)}
    if shape in corners:
        sides, turn = corners[shape]
        draw.regular_polygon((middle, middle, reach), sides, rotation=turn, fill=color)
    elif shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "ring":
        draw.ellipse(box, outline=color, width=int(thick))
    else:
        draw.rectangle((box[0], middle - thick, box[2], middle + thick), fill=color)
        if shape == "cross":
            draw.rectangle((middle - thick, box[1], middle + thick, box[3]), fill=color)
    return np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
