"""Image classification sets of the papers, and small ones: from the hub or `data_root`, preprocessed for CLIP.

conf/dataset has the repository, splits and columns of each set; class_names.yaml has its classes and prompts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import yaml

from data import DATASETS
from data.selection import fresh_places, ordered, take
from flatlora.config.sections import DatasetConfig
from flatlora.config.settings import MOST_ROWS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.images import DIGITS, ImageRows, LabeledImages, check_images, name_error, picture_of, read_images
from flatlora.inputs.pixel_cache import PixelCache
from flatlora.inputs.rows import Source, gather
from flatlora.models.clip import Classes
from flatlora.utils.errors import ConfigError, SettingError

logger = logging.getLogger(__name__)


class Config(DatasetConfig):
    kind: ClassVar[Literal["text", "image"]] = "image"
    hub_id: str
    hub_config: str = "default"
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    classes: str = setting(remedy="it names an entry of data/class_names.yaml")
    train_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    validation_rows: int = setting(0, ge=0, le=MOST_ROWS, remedy="0 takes none")
    test_rows: int | None = setting(None, identity=False, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    subset: Literal["first", "shuffled"] = "first"
    revision: str | None = None

    def rule_errors(self) -> list[SettingError]:
        errors, known = [], _class_file()
        if self.classes not in known:
            errors.append(
                SettingError(
                    ("classes",),
                    f"Invalid dataset.classes={self.classes}: data/class_names.yaml has {', '.join(known)}; choose one "
                    "of them, or add yours.",
                )
            )
        if self.hub_id == DIGITS and self.revision is not None:
            errors.append(
                SettingError(
                    ("revision", "hub_id"),
                    f"Invalid dataset.revision={self.revision} with dataset={self.name}: it is part of scikit-learn "
                    "and has no revisions; leave the key out.",
                )
            )
        return errors


class PreparedImages(NamedTuple):
    """The rows and classes of a run on images."""

    train: ImageRows
    validation: ImageRows
    test: ImageRows
    classes: Classes

    @property
    def sha256(self) -> str:
        """Hash of the files and classes of all train and validation rows, in order."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation):
            digest.update(len(rows).to_bytes(8, "little"))
            for row in rows.digests:
                digest.update(row)
        return digest.hexdigest()


def sources(config: Config) -> list[Source]:
    if config.hub_id == DIGITS:
        return []
    return [Source(config.hub_id, config.hub_config, split, config.revision) for split in _splits(config)]


def _splits(config: Config) -> tuple[str, ...]:
    """The train split, and the test split unless validation rows are scored."""
    return (config.train_split,) if config.evaluate == "validation" else (config.train_split, config.test_split)


def prepared(config: Config, data_root: str | None, processor: Any, *, cache: bool = False) -> PreparedImages:
    """Reads the rows of all splits; every image that will be used is decoded once.

    Args:
        cache: whether preprocessed images are kept on disk, see `flatlora.inputs.pixel_cache`.

    Raises:
        ConfigError: files, columns, labels, sizes or images are invalid; it lists every error.
    """
    train, *tests = _read(config, data_root)
    classes = classes_of(config.classes, train, *tests)
    test = tests[0] if tests else train
    places, validation, asked = _places(config, train, test)
    chosen = ((train, np.concatenate([places, validation])), (test, asked))
    if errors := [message for images, indices in chosen for message in _label_errors(images, indices, classes)]:
        raise ConfigError(errors)
    caches = [PixelCache(processor) if cache else None for _ in chosen]
    first, scored = gather(
        *(lambda i=i, j=j, c=c: check_images(i, j, c) for (i, j), c in zip(chosen, caches, strict=True))
    )
    rows = ImageRows(train, places, processor, first[: len(places)], caches[0])
    learned, held_out = set(map(picture_of, rows.digests)), first[len(places) :]
    fresh = fresh_places([picture_of(digest) for digest in held_out], learned)

    def of_train(kept: Sequence[int]) -> ImageRows:
        return ImageRows(train, validation[kept], processor, [held_out[row] for row in kept], caches[0])

    if not tests:
        return PreparedImages(rows, of_train(fresh), of_train(fresh[: config.test_rows]), classes)
    if known := sum(picture_of(digest) in learned for digest in scored):
        logger.warning("%d of %d test rows are also train rows; the data set contains them twice.", known, len(scored))
    return PreparedImages(rows, of_train(fresh), ImageRows(test, asked, processor, scored, caches[1]), classes)


def _read(config: Config, data_root: str | None) -> list[LabeledImages]:
    columns = {"image": config.image_column, "label": config.label_column, "data_root": data_root}
    splits = [Source(config.hub_id, config.hub_config, s, config.revision) for s in _splits(config)]
    return gather(*(lambda s=source: read_images(s, **columns) for source in splits))


def _places(config: Config, train: LabeledImages, test: LabeledImages) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the train, validation and test rows."""
    order = ordered(range(len(train.labels)), config.subset)
    wanted = config.train_rows or max(1, len(order) - config.validation_rows)

    def learned() -> tuple[list[int], list[int]]:
        chosen = take(order, wanted, name="dataset.train_rows")
        rest = order[wanted:]
        return chosen, take(rest, config.validation_rows, name="dataset.validation_rows", remedy="lower it")

    def asked() -> list[int]:
        if config.evaluate == "validation":
            return []
        return take(range(len(test.labels)), config.test_rows, name="dataset.test_rows")

    (chosen, validation), scored = gather(learned, asked)
    return tuple(np.array(places, np.int64) for places in (chosen, validation, scored))


def _label_errors(images: LabeledImages, chosen: np.ndarray, classes: Classes) -> list[str]:
    count, labels = len(classes.names), images.labels[chosen]
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if not len(outside):
        return []
    index = int(chosen[outside[0]])
    return [
        f"Invalid label in {images.source}, row {index + 1} (and {len(outside) - 1} more): {images.labels[index]} is "
        f"none of {count} classes (0 to {count - 1}); use a split with labels, or another dataset.classes."
    ]


def classes_of(entry: str, *splits: LabeledImages) -> Classes:
    """Names and prompts of an entry of class_names.yaml; they must agree with the class names of the splits, if any.

    Raises:
        ConfigError: there are no names, or their number or order differs.
    """
    listed, named = _class_file()[entry], [images for images in splits if images.names]
    names = listed.get("names") or [name.replace("_", " ") for name in (named[0].names if named else ())]
    where = f"data/class_names.yaml, entry {entry}"
    if not names:
        raise ConfigError(
            [
                f"Invalid dataset.classes={entry}: neither {where} nor the data set has class names; add them to "
                "that file, in the order of the labels."
            ]
        )
    errors = [message for images in named if (message := name_error(images, names, where))]
    errors = [
        f"Invalid dataset.classes={entry}: {message}; choose the entry that fits, or add one." for message in errors
    ]
    if not errors and named[1:] and named[0].names != named[1].names:
        label = next(i for i, pair in enumerate(zip(named[0].names, named[1].names, strict=True)) if pair[0] != pair[1])
        described = " and ".join(f"{images.names[label]} in {images.source}" for images in named)
        errors = [f"Invalid splits: label {label} is {described}; download both from one revision."]
    if errors:
        raise ConfigError(errors)
    return Classes(list(names), [[prompt.format(name) for prompt in listed["prompts"]] for name in names])


def _class_file() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "class_names.yaml").read_text(encoding="utf-8"))


def describe(config: Config) -> str:
    return f"{config.hub_id} ({', '.join(_splits(config))})"


DATASETS.add("images", DataSet(Config=Config, version=2, describe=describe, sources=sources))
