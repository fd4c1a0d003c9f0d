"""Kinds of benchmarks, by their rows: which rows a command scores, and the backend for a model in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.backends.clip import CLIPBackend
from eval.backends.diffusion import DiffusionBackend
from eval.backends.encoder import EncoderBackend
from eval.backends.hf import HFBackend, adapted_model
from eval.target import Target
from flatlora.config.families import trains_on
from flatlora.config.settings import Section
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs import conversations
from flatlora.inputs.chats import template_errors
from flatlora.inputs.images import ImageRows, LabeledImages, check_images, name_error, read_images, read_listed
from flatlora.inputs.pixel_cache import PixelCache
from flatlora.inputs.rows import Source, gather, read_jsonl, typed_columns
from flatlora.inputs.text_to_image import rows_of_run
from flatlora.models.clip import Classes
from flatlora.models.family import FAMILIES
from flatlora.models.fit import is_text_classifier
from flatlora.models.loading import model_of, saved_processor
from flatlora.models.processors import load_image_processor, load_tokenizer
from flatlora.trained.place import OTHER_VERSION, ResolvedModel
from flatlora.utils.errors import ConfigError

BENCHMARK = "benchmark"  # rows=benchmark: its own rows, also for a run that has test rows


@dataclass(frozen=True)
class Command:
    """A command line that scores something.

    Args:
        benchmark: what is scored.
        target: the settings that all benchmarks share.
        given: the benchmark's own settings as given.
        resolve, configure: return the model and the benchmark's settings; each may raise a ConfigError.
    """

    benchmark: Benchmark
    target: Target
    given: Mapping[str, Any]
    resolve: Callable[[], ResolvedModel]
    configure: Callable[[], Section]


class BenchmarkKind(ABC):
    """Benchmarks of one kind of rows (text, image, text_to_image).

    Attributes:
        backend: class that answers with a model in memory.
        does: what a run of this kind does, for error messages.
        needs: what its benchmarks can score, for error messages.
        of_pictures: whether images are classified or generated, rather than text.
        needs_run: whether it can only score runs, not a model without one.
    """

    backend: ClassVar[Callable[..., Any]]
    does: ClassVar[str]
    needs: ClassVar[str]
    of_pictures: ClassVar[bool] = True
    needs_run: ClassVar[bool] = False

    @abstractmethod
    def rows(self, command: Command) -> Sequence[Any]:
        """Returns the rows that a command scores.

        Raises:
            ConfigError: rows are missing or cannot be scored, or the command line has keys without effect.
        """

    def backend_settings(self, resolved: ResolvedModel, dtype: str) -> dict[str, Any]:
        """Returns keyword arguments for `backend` that only this kind has; `dtype` is that of the weights."""
        return {}


def text_backend(model: nn.Module, processor: PreTrainedTokenizerBase, **settings: Any) -> HFBackend | EncoderBackend:
    """Returns the backend of a language model, or of an encoder."""
    backend = EncoderBackend if is_text_classifier(adapted_model(model)) else HFBackend
    return backend(model, processor, **settings)


class Text(BenchmarkKind):
    """Text generation, or ranking of given answers."""

    backend = staticmethod(text_backend)
    does, needs = "generates text", "a language model"
    of_pictures = False

    def rows(self, command: Command) -> Sequence[Any]:
        benchmark, data_root = command.benchmark, command.target.data_root
        path, own = _rows_file(command), command.given.get("path")
        unread = {"data_root": data_root} if path or own else {}
        if path:
            unread |= {key: command.given.get(key) for key in ("template", "system", "path")}
        if errors := [
            f"Invalid {key}={value}: it has no effect, as the rows are those of {path or own}; drop it."
            for key, value in unread.items()
            if value is not None
        ]:
            raise ConfigError(errors)
        if path:
            rows, source = read_jsonl(path), str(path)
            typed_columns(rows, benchmark.row_columns, source)
        elif benchmark.benchmark_rows is None:
            columns = ", ".join(f'"{name}"' for name in benchmark.row_columns)
            raise ConfigError(
                [
                    "Missing rows: this benchmark has no rows of its own for a model without a run; name them with "
                    f"rows=FILE.jsonl ({{{columns}}}; a run's test.jsonl is such a file)."
                ]
            )
        else:
            data_root = data_root or command.resolve().data_root
            rows, source = benchmark.benchmark_rows(data_root, command.configure()), "the benchmark's own rows"
        benchmark.check_rows(rows, source, command.configure())
        _check_chats(command, rows, source)
        return rows


def _check_chats(command: Command, rows: Sequence[Any], source: str) -> None:
    """Checks the turns of rows that are chats, and that the model's tokenizer has a chat template for them.

    Raises:
        ConfigError: a row is no conversation, or there is no template.
    """
    numbered = enumerate(rows, start=1)
    chats = {number: row for number, row in numbered if isinstance(row, Mapping) and "messages" in row}
    problems = {number: conversations.problem(row["messages"], row.get("tools")) for number, row in chats.items()}
    errors = [
        f"Invalid messages in {source}, row {number}: {text}; fix it." for number, text in problems.items() if text
    ]
    asks = bool(chats) or getattr(command.configure(), "template", None) == "chat"
    if asks and not errors and command.target.backend != "openai":
        resolved = command.resolve()
        model = resolved.model or model_of(resolved.weights)
        saved = saved_processor(model, Path(resolved.weights))
        errors = template_errors(load_tokenizer(model.at(str(saved)) if saved else model))
    if errors:
        raise ConfigError(errors)


def _rows_file(command: Command) -> Path | None:
    """Returns the file with the rows to score; None for the benchmark's own rows.

    Its own are scored for a model without a run, and for a run whose data set has no test rows.
    """
    rows = command.target.rows
    if rows == BENCHMARK:
        return None
    if rows:
        path = Path(rows)
        if not path.is_file():
            columns = " and ".join(command.benchmark.row_columns)
            raise ConfigError([f"Invalid rows={path}: no such file; name a .jsonl file with {columns}."])
        return path
    run = None if command.benchmark.own_rows(command.configure()) else command.resolve().run
    if run is None:
        return None
    path = run / "test.jsonl"
    if not path.is_file():  # do not fall back to the benchmark's own rows, whose prompts differ from the run's
        raise ConfigError(
            [f"Missing file {path}: a run's test rows are in it; copy the run's folder whole, or name rows=FILE."]
        )
    return path if path.stat().st_size else None


class Image(BenchmarkKind):
    """Image classification: of rows=FILE, of the run's test split, or of the benchmark's own images."""

    backend = CLIPBackend
    does = "classifies images and generates no text"
    needs = "a run that classifies images"
    needs_run = True

    def rows(self, command: Command) -> Sequence[Any]:
        benchmark, target, resolved, config = command.benchmark, command.target, command.resolve(), command.configure()
        if resolved.run is None or not trains_on(resolved.model.family, benchmark.kind):
            return []  # `command` reports it
        unread = ["data_root"] if target.rows and target.data_root else []
        if not benchmark.row_columns:  # the benchmark has its own images
            unread = [key for key in ("rows", "data_root") if getattr(target, key)]
        if unread:
            raise ConfigError(
                [f"Invalid {' and '.join(unread)}: it has no effect on which images are scored; leave the key out."]
            )
        classes, rows, source = Classes.of_run(resolved.run).names, [], "the benchmark's own pictures"
        if benchmark.row_columns:
            if target.rows:
                images, count = read_listed(Path(target.rows), *benchmark.row_columns), None
            else:
                images, count = _test_split(resolved.dataset, target.data_root or resolved.data_root)
            if message := name_error(images, classes, "the run's classes.json"):
                raise ConfigError([f"Invalid classes of {images.source}: {message}; use images of the same classes."])
            source, indices = images.source, range(min(len(images.labels), count or len(images.labels)))
            processor = load_image_processor(resolved.model)
            cache = PixelCache(processor, write=False)  # for a single pass, writing takes longer than it saves
            digests = check_images(images, indices, cache)
            rows = ImageRows(images, np.array(indices), processor, digests, cache)
        benchmark.check_rows(rows, source, config, classes=classes)
        return rows


def _test_split(dataset: Mapping[str, Any], data_root: str | None) -> tuple[LabeledImages, int | None]:
    """Returns the test split of a run's data set, and the number of its rows that the run uses (None: all)."""
    try:
        source = Source(dataset["hub_id"], dataset["hub_config"], dataset["test_split"], dataset.get("revision"))
        columns = {"image": dataset["image_column"], "label": dataset["label_column"]}
    except KeyError as error:
        raise ConfigError(
            [f"Invalid dataset in the run's config.yaml: {error} is missing; {OTHER_VERSION}."]
        ) from error
    return read_images(source, **columns, data_root=data_root), dataset.get("test_rows")


class TextToImage(BenchmarkKind):
    """Text-to-image generation: images are compared with those that the run was trained on."""

    backend = DiffusionBackend
    does, needs = "generates images and no text", "a text-to-image model"

    def rows(self, command: Command) -> Sequence[Any]:
        benchmark, target, resolved, config = command.benchmark, command.target, command.resolve(), command.configure()
        if target.rows:
            raise ConfigError(
                [
                    f"Invalid rows={target.rows}: the prompts come from prompts=FILE.yaml, and the images to compare "
                    "with from the run."
                ]
            )
        rows: Sequence[Any] = []
        if resolved.run is not None and trains_on(resolved.model.family, benchmark.kind):
            rows = rows_of_run(resolved.run, resolved.dataset, target.data_root or resolved.data_root)
        model = resolved.model or model_of(resolved.weights)
        gather(
            lambda: benchmark.check_settings(config, model),
            lambda: benchmark.check_rows(rows, "the run's training images", config, model=model),
        )
        return rows

    def backend_settings(self, resolved: ResolvedModel, dtype: str) -> dict[str, Any]:
        config = (resolved.model or model_of(resolved.weights)).model_copy(update={"dtype": dtype})
        return FAMILIES[config.family].backend_settings(config)


KINDS: dict[str, BenchmarkKind] = {"text": Text(), "image": Image(), "text_to_image": TextToImage()}
