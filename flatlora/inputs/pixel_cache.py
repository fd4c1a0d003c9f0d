"""Cache of preprocessed images: decoded, resized and cropped once, and memory-mapped by every later epoch and run.

The pixels of a set of images are in one folder of $FLATLORA_CACHE/pixels. Its name is the hash of all that determines
them: the digests of the files, the processor's settings, and the versions of the libraries that decode and resize. So
a changed image or library leads to another folder, and nothing in a folder is ever out of date.

pixels.raw is too large to be hashed at every start. Each image has a checksum instead, which is verified whenever the
image is read; the checksums are part of the folder's manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset

from flatlora.inputs.images import BROKEN, ImageFiles, decode_in_turn, picture_of, resized
from flatlora.utils.caches import MANIFEST, kept_folder
from flatlora.utils.console import console, progress
from flatlora.utils.errors import reason_of
from flatlora.utils.files import cache_folder
from flatlora.utils.staging import exclusively, remove

logger = logging.getLogger(__name__)

VERSION = 1  # raise it when this project's code gives other pixels for the same file
PIXELS, CHECKSUMS = "pixels.raw", "checksums.npy"
_CODECS = ("jpg", "libjpeg_turbo", "jpg_2000", "webp", "avif", "libtiff")  # of PIL; others are lossless
_FORK_FROM = 1000  # images; fewer are decoded before worker processes have started
_CHUNK = 32  # images that a worker decodes at a time
_PART = 16  # images that a thread reads at a time
_BAR_FROM = 5000  # images; fewer need no progress bar


class PixelCache:
    """The preprocessed pixels of a set of images, by the digests of their files; empty before `fill`.

    Args:
        processor: an image processor of transformers.
        write: whether pixels that are not in the cache are added to it.
    """

    def __init__(self, processor: Any, *, write: bool = True) -> None:
        self._processor, self._write = processor, write
        self._places: dict[bytes, int] = {}
        self._complained = False

    @property
    def filled(self) -> bool:
        return bool(self._places)

    def fill(self, images: ImageFiles, indices: Sequence[int], digests: Sequence[bytes]) -> bool:
        """Adds images, unless they are cached; returns whether all of them are in the cache now.

        If they are not, because of a broken image, a full disk or a folder that cannot be written, they are decoded
        whenever they are read. A warning names the reason, except for a broken image, which `check_images` reports.
        """
        pairs = {picture_of(digest): index for index, digest in zip(indices, digests, strict=True)}
        pictures, shape = dict(sorted(pairs.items())), _shape_of(self._processor)
        if not pictures or shape is None:
            return False
        folder = self._folder = cache_folder() / "pixels" / _key(self._processor, pictures)
        known = (folder / MANIFEST).is_file()
        if not (known or self._write):
            return False

        def write(fresh: Path) -> None:
            _write(fresh, images, list(pictures.values()), self._processor, shape)

        try:
            with contextlib.nullcontext() if known else exclusively(folder.parent):
                kept_folder(folder, write, sized=(PIXELS,))
            self._pixels = np.memmap(folder / PIXELS, np.uint8, "r", shape=(len(pictures), *shape))
            self._checksums = np.load(folder / CHECKSUMS)
        except _BrokenImageError:
            return False
        except (OSError, RuntimeError) as error:  # RuntimeError: a worker process was killed
            logger.warning(
                "Not caching the images of %s: %s; they are decoded in every epoch. Set FLATLORA_CACHE=DIR to a folder "
                "with enough space, or trainer.cache_images=off.",
                *(images.source, reason_of(error)),
            )
            return False
        self._places = {picture: place for place, picture in enumerate(pictures)}
        return True

    def read(self, digests: Sequence[bytes]) -> tuple[torch.Tensor, list[int]]:
        """The UINT8 pixels of images, B × C × H × W, and the indices of those that it does not have.

        Their pixels are undefined: they are not cached, or damaged.
        """
        places = np.array([self._places.get(picture_of(digest), -1) for digest in digests], np.int64)
        pixels, sums = np.empty((len(places), *self._pixels.shape[1:]), np.uint8), np.empty(len(places), np.uint64)

        def read_part(part: slice) -> None:
            np.take(self._pixels, places[part], axis=0, out=pixels[part], mode="wrap")  # other modes copy twice
            sums[part] = [xxhash.xxh3_64_intdigest(each) for each in pixels[part]]

        parts = [slice(start, start + _PART) for start in range(0, len(places), _PART)]
        threads = min(torch.get_num_threads(), len(parts))  # one in a worker process of a DataLoader
        if threads > 1:  # a pool that is kept would hang in processes that are forked later
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read_part, parts))
        else:
            read_part(slice(None))
        damaged = (places >= 0) & (sums != self._checksums[places])
        if damaged.any() and not self._complained:
            text = "The cache folder %s is broken (%s is not what was written): it will be rebuilt by the next run."
            logger.warning(text, self._folder, PIXELS)
            remove(self._folder, ignore_errors=True)  # this process goes on with what it has mapped
            self._complained = True
        return torch.from_numpy(pixels), np.flatnonzero(damaged | (places < 0)).tolist()


class _BrokenImageError(Exception):
    """An image cannot be decoded."""


def _shape_of(processor: Any) -> tuple[int, ...] | None:
    """C × H × W of preprocessed images; None if it depends on the image."""
    shapes = {tuple(resized(processor, Image.new("RGB", size)).shape) for size in ((48, 32), (32, 48))}
    return shapes.pop() if len(shapes) == 1 else None


def _key(processor: Any, pictures: Mapping[bytes, int]) -> str:
    settings = {
        "version": VERSION,
        "processor": [type(processor).__name__, processor.to_dict()],
        "packages": {name: importlib.metadata.version(name) for name in _packages(processor)},
        "codecs": {name: features.version(name) for name in _CODECS},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for picture in pictures:
        digest.update(picture)
    return digest.hexdigest()[:40]


def _packages(processor: Any) -> tuple[str, ...]:
    """Names of the packages that determine the pixels."""
    more = ("torch", "torchvision") if getattr(processor, "backend", None) == "torchvision" else ()
    return ("pillow", "transformers", *more)


def _write(folder: Path, images: ImageFiles, indices: list[int], processor: Any, shape: tuple[int, ...]) -> None:
    """Writes the pixels of images and their checksums, with a process per core.

    Raises:
        OSError: the disk is too small.
        _BrokenImageError: an image cannot be decoded.
    """
    size = len(indices) * math.prod(shape)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:  # the rest is left for checkpoints
        raise OSError(f"they need {_mib(1.1 * size)}, and {folder.parent} has {_mib(free)} free")
    text = f"caching {len(indices):,} images of {images.source}: {_mib(size)} in {folder.parent}"
    console.print(text, markup=False, soft_wrap=True)
    with open(folder / PIXELS, "wb") as file:
        file.truncate(size)
    checksums = np.zeros(len(indices), np.uint64)
    workers = len(os.sched_getaffinity(0)) if len(indices) >= _FORK_FROM else 0
    loader = DataLoader(
        _Writer(folder / PIXELS, images, indices, processor, shape),
        batch_size=_CHUNK,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # the functions that read images cannot be pickled
        collate_fn=list,
        generator=torch.Generator(),  # seeds the workers, to leave the global generator to training
    )
    with progress(f"decode {images.source}", len(indices), least=_BAR_FROM) as advance:
        for chunk in loader:
            for place, checksum in chunk:
                checksums[place] = checksum
            advance(len(chunk))
    np.save(folder / CHECKSUMS, checksums)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


class _Writer(Dataset):
    """Writes an image's pixels when it is read; an item is (place, checksum)."""

    def __init__(self, path: Path, images: ImageFiles, indices: list[int], processor: Any, shape: tuple) -> None:
        self.path, self.images, self.indices = path, images, indices
        self.processor, self.shape = processor, shape
        self.one_large = multiprocessing.Lock()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, int]:
        try:
            pixels = resized(self.processor, decode_in_turn(self.images, self.indices[place], self.one_large)).numpy()
        except BROKEN as error:
            raise _BrokenImageError(reason_of(error)) from None
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise RuntimeError(f"an image has {pixels.dtype} pixels of shape {pixels.shape}, not UINT8 {self.shape}")
        content = memoryview(np.ascontiguousarray(pixels)).cast("B")
        with open(self.path, "r+b") as file:
            file.seek(place * len(content))
            file.write(content)
        return place, xxhash.xxh3_64_intdigest(content)
