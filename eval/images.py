"""Image classification: predicts the class with the largest logit; accuracy over images, and its mean over classes.

    python -m eval.images PATH [key=value ...]

PATH is a run's folder or one of its checkpoints: the run defines the classes, and the test split of its data set is
scored. Keys: max_rows, batch_size, rows=FILE.jsonl (rows {"image": path relative to the file, "label"}),
data_root=DIR, device, out=DIR, score_only=true. The papers of some data sets (SUN397, DTD) report the mean over
classes, so every score has both; the Flat-LoRA paper's tables have the accuracy over images.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from eval import BENCHMARKS, predictions
from eval.backends import ImageBackend
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, Section, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.utils.errors import ConfigError
from flatlora.utils.records import read_record

SCORER_VERSION = 1
HEADLINE = "top1"
FIELDS: predictions.Fields = {"index": int, "label": int, "prediction": int}


class LabeledImages(Protocol):
    """Rows {"pixel_values", "labels"}, whose labels are known without decoding an image."""

    labels: list[int]
    digests: list[bytes]  # a hash of each image and its label

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]: ...


class Config(Section):
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every image of the test split")
    batch_size: int = setting(128, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns top-1 accuracy and its mean over classes, for rows {"label", "prediction"}."""
    total, right, seen = len(rows), {}, {}
    for row in rows:
        seen[row["label"]] = seen.get(row["label"], 0) + 1
        right[row["label"]] = right.get(row["label"], 0) + (row["label"] == row["prediction"])
    metrics = {
        "n": total,
        HEADLINE: sum(right.values()) / total if total else None,
        "mean_per_class": sum(right[label] / count for label, count in seen.items()) / len(seen) if seen else None,
    }
    return {"scorer": f"images/{SCORER_VERSION}", "n": total, "metrics": metrics}


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {row: 1.0 or 0.0}."""
    images_sha256 = images_of(folder)
    return {(images_sha256, row["label"], row["index"]): float(row["prediction"] == row["label"]) for row in rows}


def images_of(folder: Path) -> str | None:
    """Returns the hash of the images that a folder's predictions belong to; None if it is not recorded."""
    try:
        return (read_record(folder / "generation.json") or {}).get("images_sha256")
    except ConfigError:
        return None


def check_rows(rows: LabeledImages, source: str, config: Config, *, classes: Sequence[str] = (), **known: Any) -> None:
    """Checks that every label is one of the model's classes.

    Raises:
        ConfigError: as `validate_labels`.
    """
    validate_labels(rows.labels, source, classes)


def validate_labels(labels: Sequence[int], source: str, classes: Sequence[str]) -> None:
    """Checks that every label is a class of the model.

    Raises:
        ConfigError: a label is not; its rows would all count as wrong.
    """
    outside = [row for row, label in enumerate(labels) if not 0 <= label < len(classes)]
    if outside:
        raise ConfigError(
            [
                f"Invalid label in {source}, row {outside[0] + 1} (and {len(outside) - 1} more): {labels[outside[0]]} "
                f"is no class of the model, which has {len(classes)}; use images of the same classes."
            ]
        )


def run(
    backend: ImageBackend,
    rows: LabeledImages,
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Classifies and scores the images; writes predictions.jsonl and score.json, returns the score."""
    labels = rows.labels[: config.max_rows]

    path = classify(
        backend,
        [{"label": label} for label in labels],
        lambda indices: [row["pixel_values"] for row in rows.__getitems__(indices)],
        folder,
        fields=FIELDS,
        images_sha256=hashlib.sha256(b"".join(rows.digests)).hexdigest(),
        on_progress=on_progress,
    )
    return score_file(path, config)


def classify(
    backend: ImageBackend,
    rows: Sequence[dict[str, Any]],
    pixels: Callable[[list[int]], list[torch.Tensor]],
    folder: Path,
    *,
    fields: predictions.Fields,
    images_sha256: str,
    on_progress: predictions.OnProgress | None,
) -> Path:
    """Adds the class with the largest logit to each row, in `folder`/predictions.jsonl; returns that path.

    Args:
        pixels: indices of rows → their preprocessed images, UINT8 or normalized.
        images_sha256: hash of all images; predictions of other images are not reused.
    """

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        logits = backend.logits(torch.stack(pixels(batch)))
        return [{"prediction": label} for label in logits.argmax(dim=1).tolist()]

    return predictions.collect(
        rows,
        answer,
        folder,
        fields=fields,
        lengths=[1] * len(rows),
        batch_size=backend.batch_size,
        settings={**backend.describe(), "images_sha256": images_sha256},
        on_progress=on_progress,
    )


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """As `predictions.score_file`."""
    return predictions.score_file(path, FIELDS, score)


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("images", sys.argv[1:]))


BENCHMARKS.add(
    "images",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="image",
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        row_columns={"image": "text", "label": "int"},
        fields=FIELDS,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
    ),
)
