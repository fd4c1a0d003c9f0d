"""Image classification: the class with the largest score; accuracy over all images and as the mean over classes.

    python -m eval.images PATH [key=value ...]

PATH is a run's folder or one of its checkpoints: the run says which classes there are, and its data set's test split is
scored. Keys: max_rows, batch_size, rows=FILE.jsonl (rows {"image": path beside the file, "label"}), data_root=DIR,
device, out=DIR, score_only=true. Some data sets' own papers take the mean over classes (SUN397, DTD), so both stand in
every score; the Flat-LoRA paper's tables have the first.
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
    """Rows {"pixel_values", "labels"}, whose classes are known without reading a picture."""

    labels: list[int]
    digests: list[bytes]  # a hash of each picture and class

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Config(Section):
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every image of the test split")
    batch_size: int = setting(128, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Top-1 accuracy and its mean over classes, of rows {"label", "prediction"}."""
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
    """{row: 1.0 or 0.0}."""
    pictures = images_of(folder)
    return {(pictures, row["label"], row["index"]): float(row["prediction"] == row["label"]) for row in rows}


def images_of(folder: Path) -> str | None:
    """The hash of the pictures that the answers of a folder are about."""
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
    """
    Raises:
        ConfigError: a label that is no class of the model; every row of it would count as wrong.
    """
    outside = [place for place, label in enumerate(labels) if not 0 <= label < len(classes)]
    if outside:
        raise ConfigError(
            [
                f"Invalid label in {source}, row {outside[0] + 1} (and {len(outside) - 1} more): {labels[outside[0]]} "
                f"is no class of the model, which tells {len(classes)} apart; name pictures of the same classes."
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
    """Classify the images and score them; writes predictions.jsonl and score.json, returns the score."""
    labels = rows.labels[: config.max_rows]

    path = classify(
        backend,
        [{"label": label} for label in labels],
        lambda index: rows[index]["pixel_values"],
        folder,
        fields=FIELDS,
        images_sha256=hashlib.sha256(b"".join(rows.digests)).hexdigest(),
        on_progress=on_progress,
    )
    return score_file(path, config)


def classify(
    backend: ImageBackend,
    asked: Sequence[dict[str, Any]],
    pixels: Callable[[int], torch.Tensor],
    folder: Path,
    *,
    fields: predictions.Fields,
    images_sha256: str,
    on_progress: predictions.OnProgress | None,
) -> Path:
    """Add to each row asked the class with the largest score, in `folder`/predictions.jsonl; returns that path.

    Args:
        pixels: place of a row → its preprocessed picture.
        images_sha256: of all pictures: others under the same labels have other answers.
    """

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        logits = backend.logits(torch.stack([pixels(index) for index in batch]))
        return [{"prediction": place} for place in logits.argmax(dim=1).tolist()]

    return predictions.collect(
        asked,
        answer,
        folder,
        fields=fields,
        lengths=[1] * len(asked),
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
