"""Image classification sets of the papers, and small ones: hub or `data_root`, preprocessed as CLIP has it.

Which repository, splits and columns a set has stands in conf/dataset; classes and prompts in class_names.yaml. `digits`
is scikit-learn's own (1,797 images of 8 × 8 pixels), which needs no network: its last fifth is the test split.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import yaml
from PIL import Image

from data.selection import ordered, take
from flatlora.clip import Classes
from flatlora.config import ConfigError, DatasetConfig, setting
from flatlora.images import EncodedImages, ImageRows, Images, check_images, read_images
from flatlora.rows import Source, gather

logger = logging.getLogger(__name__)

VERSION = 1
DIGITS = "scikit-learn/digits"
_DIGITS_TRAIN = 1437  # of 1,797


class Config(DatasetConfig):
    kind: ClassVar[Literal["text", "image"]] = "image"
    hub_id: str
    hub_config: str = "default"
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    classes: str = setting(remedy="it names an entry of data/class_names.yaml")
    train_rows: int | None = setting(None, ge=1, remedy="null takes all rows")
    validation_rows: int = setting(0, ge=0)
    test_rows: int | None = setting(None, ge=1, remedy="null takes all rows")
    subset: Literal["first", "shuffled"] = "first"
    revision: str | None = None

    def rule_faults(self) -> list[str]:
        known = _class_file()
        if self.classes in known:
            return []
        return [
            f"Invalid dataset.classes={self.classes}: data/class_names.yaml has {', '.join(known)}; name one of them, "
            "or add yours."
        ]


class PreparedImages(NamedTuple):
    """What a run on images reads."""

    train: ImageRows
    validation: ImageRows
    test: ImageRows
    classes: Classes

    @property
    def sha256(self) -> str:
        """Of the files and classes of all rows that training and validation read, in order."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            digest.update(len(rows).to_bytes(8, "little"))
            for one in rows.digests():
                digest.update(one)
        return digest.hexdigest()


def sources(config: Config) -> list[Source]:
    if config.hub_id == DIGITS:
        return []
    splits = (config.train_split, config.test_split)
    return [Source(config.hub_id, config.hub_config, split, config.revision) for split in splits]


def prepared(config: Config, data_root: str | None, processor: Any) -> PreparedImages:
    """Rows of all splits; every picture that will be read has been tried.

    Raises:
        ConfigError: files, columns, labels, sizes or pictures do not do; every fault at once.
    """
    train, test = _digits() if config.hub_id == DIGITS else _read(config, data_root)
    classes = classes_of(config.classes, train.names)
    places, validation, asked = _places(config, train, test)
    faults = [
        fault
        for images, chosen in ((train, np.concatenate([places, validation])), (test, asked))
        for fault in (*_label_faults(images, chosen, classes), *_broken(images, chosen))
    ]
    if faults:
        raise ConfigError(faults)
    rows = ImageRows(train, places, processor)
    learned, held_out = set(rows.digests()), ImageRows(train, validation, processor)
    fresh = [digest not in learned for digest in held_out.digests()]
    if not all(fresh):
        logger.warning("%d rows stand among the train rows already and do not validate.", fresh.count(False))
        held_out = ImageRows(train, validation[np.array(fresh)], processor)
    scored = ImageRows(test, asked, processor)
    if known := sum(digest in learned for digest in scored.digests()):
        logger.warning("%d of %d test rows stand among the train rows, as the data set has them.", known, len(scored))
    return PreparedImages(rows, held_out, scored, classes)


def _read(config: Config, data_root: str | None) -> list[EncodedImages]:
    columns = {"image": config.image_column, "label": config.label_column, "data_root": data_root}
    return gather(*(lambda s=source: read_images(s, **columns) for source in sources(config)))


def _places(config: Config, train: Images, test: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the train, validation and test rows."""
    order = ordered(range(len(train.labels)), config.subset)
    wanted = config.train_rows or max(1, len(order) - config.validation_rows)

    def learned() -> tuple[list[int], list[int]]:
        chosen = take(order, wanted, name="dataset.train_rows")
        rest = order[wanted:]
        return chosen, take(rest, config.validation_rows, name="dataset.validation_rows", remedy="lower it")

    def asked() -> list[int]:
        return take(range(len(test.labels)), config.test_rows, name="dataset.test_rows")

    (chosen, validation), scored = gather(learned, asked)
    return tuple(np.array(places, np.int64) for places in (chosen, validation, scored))


def _label_faults(images: Images, chosen: np.ndarray, classes: Classes) -> list[str]:
    count, labels = len(classes.names), images.labels[chosen]
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if not len(outside):
        return []
    place = int(chosen[outside[0]])
    return [
        f"Invalid label in {getattr(images, 'source', 'the data set')}, row {place + 1}: {images.labels[place]} is no "
        f"class of {count} (0 to {count - 1}), and {len(outside) - 1} more rows have one like it; use a split with "
        "labels, or another dataset.classes."
    ]


def _broken(images: Images, chosen: Sequence[int]) -> list[str]:
    try:
        check_images(images, [int(place) for place in chosen])
    except ConfigError as error:
        return error.faults
    return []


def classes_of(entry: str, own_names: Sequence[str] | None) -> Classes:
    """Names and prompts of an entry of class_names.yaml; `own_names` are the data set's.

    Raises:
        ConfigError: neither has names, or they are not equally many.
    """
    listed = _class_file()[entry]
    names = listed.get("names") or [name.replace("_", " ") for name in own_names or ()]
    fault = None
    if not names:
        fault = "the data set names no classes either; write them there, in the order of the labels"
    elif own_names and len(own_names) != len(names):
        fault = f"{len(names)} names stand there, and the data set has {len(own_names)} classes; name another entry"
    if fault:
        raise ConfigError([f"Invalid dataset.classes={entry} of data/class_names.yaml: {fault}."])
    return Classes(list(names), [[prompt.format(name) for prompt in listed["prompts"]] for name in names])


def _class_file() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "class_names.yaml").read_text(encoding="utf-8"))


def _digits() -> list[Images]:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)
    labels = found.target.astype(np.int64)

    def part(span: slice) -> EncodedImages:
        return EncodedImages(DIGITS, labels[span], lambda index: _png(pixels[span][index]))

    return [part(slice(0, _DIGITS_TRAIN)), part(slice(_DIGITS_TRAIN, None))]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def describe(config: Config) -> str:
    return f"{config.hub_id} ({config.train_split}, {config.test_split})"
