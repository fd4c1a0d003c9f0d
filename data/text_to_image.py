"""Images with prompts for a text-to-image model, and prior preservation (DreamBooth, CVPR 2023, section 3.2).

DreamBooth's loss is that of the images plus `prior_weight` times that of images of the class, which the untrained model
generates (`class_prompt`, `class_images`) or which are in `class_folder`. There is no test split: images that the
trained model generates are compared with those that it was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from data import DATASETS
from data.selection import fresh_places, ordered, take
from flatlora.config.sections import DatasetConfig, DiffusionModelConfig
from flatlora.config.settings import MOST_PIXELS, MOST_ROWS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.images import picture_of
from flatlora.inputs.rows import Source, gather
from flatlora.inputs.text_to_image import (
    LONGEST_PROMPT,
    SHAPES,
    TextToImageData,
    TextToImageRows,
    read_folder,
    read_text_to_image,
    rows_of,
)
from flatlora.models import latents
from flatlora.utils.errors import SettingError


class Config(DatasetConfig):
    kind: ClassVar[Literal["text", "image", "text_to_image"]] = "text_to_image"
    has_lengths: ClassVar[bool] = False
    hub_id: str | None = setting(None, remedy="null reads dataset.folder")
    hub_config: str = "default"
    split: str = "train"
    image_column: str = "image"
    prompt_column: str | None = "prompt"
    folder: str | None = setting(None, min_length=1, remedy="null reads dataset.hub_id")
    prompt: str | None = setting(
        None, min_length=1, max_length=LONGEST_PROMPT, remedy="null uses each image's own"
    )  # for every image
    resolution: int = setting(1024, ge=16, le=MOST_PIXELS, remedy="the side of a square in pixels, 1024 for SDXL")
    min_side: int = setting(256, ge=1, le=MOST_PIXELS, remedy="smaller images are an error")
    flip: bool = False  # each image is mirrored in half of its steps
    buckets: bool = False  # crop to the nearest of several aspect ratios instead of a square
    bucket_step: int = setting(64, ge=8, le=MOST_PIXELS, remedy="sides of buckets are multiples of it")
    repeats: int = setting(1, ge=1, le=10**6, remedy="it is the number of times that an epoch uses each image")
    # Default of eval.text_to_image.prompts, the prompts of images that are generated at the end.
    drawn: str = setting("training", identity=False)
    train_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null takes all images")
    validation_rows: int = setting(0, ge=0, le=MOST_ROWS, remedy="0 takes none")
    subset: Literal["first", "shuffled"] = "first"
    revision: str | None = None
    class_prompt: str | None = setting(
        None, min_length=1, max_length=LONGEST_PROMPT, remedy="null is training without prior preservation"
    )
    class_folder: str | None = setting(None, min_length=1, remedy="null lets the model generate dataset.class_images")
    class_images: int | None = setting(None, ge=1, le=10**6, remedy="100 are usual")
    class_steps: int = setting(30, ge=1, le=10**4, remedy="denoising steps of an image that the model generates")
    prior_weight: float = setting(1.0, ge=0, le=1e6, remedy="1 is usual")

    def rule_errors(self) -> list[SettingError]:
        errors = []
        if self.evaluate == "validation":
            errors.append(
                SettingError(
                    ("evaluate",),
                    f"Invalid dataset.evaluate=validation with dataset={self.name}: there are no test rows, and images "
                    "that the model generates are compared with those of the training; leave the key out.",
                )
            )
        if (self.hub_id is None) == (self.folder is None):
            errors.append(
                SettingError(
                    ("hub_id", "folder"),
                    f"Invalid dataset.hub_id={self.hub_id} with dataset.folder={self.folder}: exactly one of them must "
                    "be set; set dataset.folder=DIR with dataset=pictures, or choose another data set.",
                )
            )
        if self.hub_id is not None and self.prompt_column is None and self.prompt is None:
            errors.append(
                SettingError(
                    ("prompt", "hub_id", "prompt_column"),
                    "Missing dataset.prompt: without dataset.prompt_column it must be set, for every image.",
                )
            )
        if self.buckets and self.bucket_step > self.resolution:
            errors.append(
                SettingError(
                    ("bucket_step", "resolution"),
                    f"Invalid dataset.bucket_step={self.bucket_step} with dataset.resolution={self.resolution}: sides "
                    "of buckets are multiples of the step and about as long as the resolution; lower the step.",
                )
            )
        if self.revision is not None and self.hub_id in (None, SHAPES):
            errors.append(
                SettingError(
                    ("revision", "folder"),
                    f"Invalid dataset.revision={self.revision} with dataset={self.name}: only the hub has revisions; "
                    "leave the key out.",
                )
            )
        if self.buckets and self.class_prompt is not None:
            errors.append(
                SettingError(
                    ("buckets", "class_prompt"),
                    f"Invalid dataset.buckets=true with dataset.class_prompt={self.class_prompt}: an image and one "
                    "of its class are one row, so they must have the same size; leave one of the keys out.",
                )
            )
        return errors + self._prior_errors()

    def _prior_errors(self) -> list[SettingError]:
        if self.class_prompt is None:
            given = {"class_folder": None, "class_images": None, "class_steps": 30, "prior_weight": 1.0}
            return [
                SettingError(
                    (key, "class_prompt"),
                    f"Invalid dataset.{key}={getattr(self, key)} without dataset.class_prompt: it belongs to prior "
                    'preservation; set dataset.class_prompt="a photo of a dog", or leave the key out.',
                )
                for key, plain in given.items()
                if getattr(self, key) != plain
            ]
        if (self.class_folder is None) == (self.class_images is None):
            return [
                SettingError(
                    ("class_images", "class_folder"),
                    f"Invalid dataset.class_images={self.class_images} with dataset.class_folder={self.class_folder}: "
                    "exactly one of them must be set; set dataset.class_images=100 to let the model generate images "
                    "of dataset.class_prompt, or name a folder of them.",
                )
            ]
        return []


class ClassPictures(NamedTuple):
    """Images that the untrained model must generate for prior preservation."""

    prompt: str
    count: int
    steps: int


class PreparedTextToImage(NamedTuple):
    """The rows of a run that trains a text-to-image model."""

    train: TextToImageRows
    validation: TextToImageRows
    test: TextToImageRows  # generated images are compared with these: the train rows without repeats
    prior: TextToImageRows | ClassPictures | None

    @property
    def sha256(self) -> str:
        """Hash of the files and prompts of all train and validation rows, in order."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation, self.prior):
            if isinstance(rows, TextToImageRows):
                digest.update(len(rows).to_bytes(8, "little"))
                for row in rows.digests:
                    digest.update(len(row).to_bytes(8, "little") + row)
        return digest.hexdigest()


def sources(config: Config) -> list[Source]:
    if config.hub_id in (None, SHAPES):
        return []
    return [Source(config.hub_id, config.hub_config, config.split, config.revision)]


def read(config: Config, data_root: str | None) -> TextToImageData:
    """Reads the images of a data set's config.

    Raises:
        ConfigError: they do not exist; the message suggests a fix.
    """
    if config.folder is not None:
        return read_folder(config.folder, config.prompt)
    return read_text_to_image(
        Source(config.hub_id, config.hub_config, config.split, config.revision),
        image=config.image_column,
        prompt=config.prompt_column,
        fixed=config.prompt,
        data_root=data_root,
    )


def prepared(config: Config, data_root: str | None) -> PreparedTextToImage:
    """Reads the rows of a run; every image that will be used is decoded once.

    Raises:
        ConfigError: files, columns, sizes or images are invalid; it lists every error.
    """

    def own() -> tuple[TextToImageRows, TextToImageRows]:
        images = read(config, data_root)
        chosen, held_out = _places(config, len(images.prompts))
        return tuple(gather(lambda: _rows(images, chosen, config), lambda: _rows(images, held_out, config)))

    (train, held_out), prior = gather(own, lambda: _prior(config))
    validation = held_out.only(fresh_places(*(list(map(picture_of, rows.digests)) for rows in (held_out, train))))
    repeated = train.only([*range(len(train))] * config.repeats)
    return PreparedTextToImage(repeated, validation, train, prior)


def _rows(images: TextToImageData, indices: Sequence[int], config: Config) -> TextToImageRows:
    step = config.bucket_step if config.buckets else None
    return rows_of(images, indices, resolution=config.resolution, bucket_step=step, min_side=config.min_side)


def _places(config: Config, count: int) -> tuple[list[int], list[int]]:
    """Indices of the images for training and for validation."""
    order = ordered(range(count), config.subset)
    wanted = config.train_rows or max(1, count - config.validation_rows)
    chosen, held_out = gather(
        lambda: take(order, wanted, name="dataset.train_rows"),
        lambda: take(order[wanted:], config.validation_rows, name="dataset.validation_rows", remedy="lower it"),
    )
    return list(chosen), list(held_out)


def encode(
    rows: PreparedTextToImage,
    config: Config,
    model: DiffusionModelConfig,
    source: str,
    device: torch.device,
    *,
    state: str,
    seed: int,
) -> PreparedTextToImage:
    """Encodes the rows as latents and prompts; generates the images of the class first, if there is no folder of them.

    Args:
        source, state: of the pipeline, as in `latents.encoded`.

    Raises:
        ConfigError: the VAE returns NaN for an image.
    """
    common = (model, source, device)
    prior = rows.prior
    if isinstance(prior, ClassPictures):
        generated = latents.class_pictures(*prior, config.resolution, *common, state=state)
        prior = rows_of(generated, range(prior.count), resolution=config.resolution)
    train = latents.encoded(rows.train, *common, state=state, seed=seed, flip=config.flip)
    if prior is not None:
        train.prior = latents.encoded(prior, *common, state=state, seed=seed, flip=config.flip, name="prior")
        train.prior.weight = config.prior_weight
    validation = latents.encoded(rows.validation, *common, state=state, seed=seed, name="validation")
    return rows._replace(train=train, validation=validation)


def _prior(config: Config) -> TextToImageRows | ClassPictures | None:
    if config.class_prompt is None:
        return None
    if config.class_folder is None:
        return ClassPictures(config.class_prompt, config.class_images, config.class_steps)
    images = read_folder(config.class_folder, config.class_prompt, key="dataset.class_folder")
    return _rows(images, range(len(images.prompts)), config)


def describe(config: Config) -> Any:
    where = config.folder or f"{config.hub_id} ({config.split})"
    crops = "buckets" if config.buckets else "squares"
    return f"{where}, {crops} of {config.resolution} pixels"


DATASETS.add("text_to_image", DataSet(Config=Config, version=1, describe=describe, sources=sources))
