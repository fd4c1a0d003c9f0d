"""Implementations of `flatlora.experiment.suite.RowKind`: text, labeled images, and images with prompts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data import cache, images, text_to_image, tokens
from flatlora.config.experiment import Experiment
from flatlora.config.sections import ModelConfig
from flatlora.experiment.suite import RowKind
from flatlora.inputs.images import collate_images
from flatlora.inputs.rows import jsonl
from flatlora.inputs.text_to_image import PICTURES_FILE, identities
from flatlora.models import fit, sources
from flatlora.models.clip import CLASSES_FILE, Classes
from flatlora.models.families.text_to_image import size_errors, warn_of_long_prompts
from flatlora.models.family import FAMILIES
from flatlora.models.latents import collate_latents
from flatlora.models.processors import load_tokenizer
from flatlora.train import distributed
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_atomic, write_json

logger = logging.getLogger(__name__)


class Text(RowKind):
    """Prompts and answers as token ids."""

    def read(self, experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> tokens.Prepared:
        """Token ids of a text data set."""
        counting = getattr(experiment.dataset, "limit_tokenizer", None)
        counting = load_tokenizer(experiment.model.counting_with(counting)) if counting else None
        return cache.prepared(
            experiment.dataset,
            experiment.data_root,
            tokenizer,
            counting,
            encoder_decoder=FAMILIES[experiment.model.family].encoder_decoder,
            classifier=experiment.model.traits.classifies,
        )

    def collator(self, model: ModelConfig, processor: PreTrainedTokenizerBase) -> Callable[..., Any]:
        if model.traits.classifies:
            return tokens.ClassCollator(processor, sources.described(model))
        return tokens.collator(processor.pad_token_id, encoder_decoder=FAMILIES[model.family].encoder_decoder)

    def known(self, experiment: Experiment, processor: Any, rows: tokens.Prepared) -> dict[str, Any]:
        return {"tokenizer": processor}

    def chat_template_sha256(self, rows: tokens.Prepared) -> str | None:
        return rows.chat_template_sha256

    def save(self, folder: Path, rows: tokens.Prepared) -> None:
        write_atomic(folder / "test.jsonl", jsonl(rows.test))
        if classes := self.classes(rows):
            write_json(folder / CLASSES_FILE, classes._asdict())

    def classes(self, rows: tokens.Prepared) -> Classes | None:
        return Classes(rows.classes, [[name] for name in rows.classes]) if rows.classes else None

    def check(self, experiment: Experiment, skeleton: nn.Module, processor: Any, rows: tokens.Prepared) -> None:
        """Check that every token of the rows, and the padding token, has an embedding.

        Warns of rows that are longer than the model's positions.

        Raises:
            ConfigError: a token has none.
        """
        name, parts = experiment.model.hub_id, (rows.train, rows.validation)
        lengths = itertools.chain.from_iterable(
            part.prompt_lengths.tolist() if rows.classes else part.lengths for part in parts
        )
        if (warning := fit.long_rows_warning(experiment.model, skeleton, lengths)) and distributed.is_main_process():
            logger.warning("%s", warning)
        errors = fit.vocabulary_errors(processor, skeleton, name)
        largest = max((int(part.ids.max()) for part in parts if len(part.ids)), default=0)
        known = fit.embedding_rows(skeleton)
        if largest >= known and not errors:
            token = processor.convert_ids_to_tokens(largest)
            errors.append(
                f"Invalid tokenizer of {name}: rows of {experiment.dataset.name} contain {token} ({largest}), but the "
                f"model has {known} embeddings; put the tokenizer that the model was trained with into its folder."
            )
        if errors:
            raise ConfigError(errors)


class Image(RowKind):
    """Labeled images of named classes."""

    def read(self, experiment: Experiment, processor: Any) -> images.PreparedImages:
        cache = experiment.trainer.cache_images == "auto"
        return images.prepared(experiment.dataset, experiment.data_root, processor, cache=cache)

    def collator(self, model: ModelConfig, processor: Any) -> Callable[..., Any]:
        return collate_images

    def known(self, experiment: Experiment, processor: Any, rows: images.PreparedImages) -> dict[str, Any]:
        return {"classes": rows.classes.names}

    def check(self, experiment: Experiment, skeleton: nn.Module, processor: Any, rows: images.PreparedImages) -> None:
        """Does nothing: images are resized to the size that the model reads."""

    def save(self, folder: Path, rows: images.PreparedImages) -> None:
        write_json(folder / CLASSES_FILE, rows.classes._asdict())

    def classes(self, rows: images.PreparedImages) -> Any:
        return rows.classes


class TextToImage(RowKind):
    """Images with prompts."""

    def read(self, experiment: Experiment, processor: None) -> text_to_image.PreparedTextToImage:
        """Read images with prompts; check that the model supports their sizes, and that there are enough for a batch.

        Raises:
            ConfigError: it lists every error.
        """
        rows = text_to_image.prepared(experiment.dataset, experiment.data_root)
        batch, count = experiment.optim.batch_size, len(rows.train)
        drawn = isinstance(rows.prior, text_to_image.ClassPictures)  # whether the model generates images of that size
        errors = size_errors(experiment.model, rows.train.sizes, drawn=drawn)
        if count < batch:
            errors.append(
                f"Invalid optim.batch_size={batch} with dataset={experiment.dataset.name}: it has {count} images to "
                "train on, fewer than a batch; lower optim.batch_size, or set dataset.repeats."
            )
        if errors:
            raise ConfigError(errors)
        return rows

    def collator(self, model: ModelConfig, processor: None) -> Callable[..., Any]:
        return collate_latents

    def known(self, experiment: Experiment, processor: Any, rows: text_to_image.PreparedTextToImage) -> dict[str, Any]:
        return {"model": experiment.model}

    def save(self, folder: Path, rows: text_to_image.PreparedTextToImage) -> None:
        write_json(folder / PICTURES_FILE, identities(rows.test))

    def check(
        self, experiment: Experiment, skeleton: nn.Module, processor: None, rows: text_to_image.PreparedTextToImage
    ) -> None:
        prompts = [part.prompt(row) for part in (rows.test, rows.validation) for row in range(len(part))]
        warn_of_long_prompts(experiment.model, [*prompts, *filter(None, [experiment.dataset.class_prompt])])

    def encode(
        self,
        experiment: Experiment,
        rows: text_to_image.PreparedTextToImage,
        device: torch.device,
        base: Callable[[], str],
    ) -> text_to_image.PreparedTextToImage:
        """Encode images and prompts before the model is loaded."""
        state = base()

        def encoded() -> text_to_image.PreparedTextToImage:
            source = sources.backbone_source(experiment.model)
            return text_to_image.encode(
                rows, experiment.dataset, experiment.model, source, device, state=state, seed=experiment.seed
            )

        return distributed.main_process_first(encoded)


KINDS: dict[str, RowKind] = {"text": Text(), "image": Image(), "text_to_image": TextToImage()}
