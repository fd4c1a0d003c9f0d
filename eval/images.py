"""Image classification: the class with the largest score; accuracy over all images and as the mean over classes.

Scored at the end of a run, on the test split of its data set. Some data sets' own papers take the mean over classes
(SUN397, DTD), so both stand in every score; the Flat-LoRA paper's tables have the first.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from eval import predictions
from eval.backends import ImageBackend
from flatlora.config import Section, setting

KIND = "image"
SCORER_VERSION = 1
HEADLINE = "top1"
FIELDS: predictions.Fields = {"index": int, "label": int, "prediction": int}


class LabelledImages(Protocol):
    """Rows {"pixel_values", "labels"}, whose classes are known without reading a picture."""

    labels: list[int]
    digests: list[bytes]  # a hash of each picture and class

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Config(Section):
    max_rows: int | None = setting(None, ge=1, remedy="null scores every image of the data set's test split")
    batch_size: int = setting(128, ge=1, remedy="lower it when memory runs out")


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


def check_rows(rows: LabelledImages, source: str) -> None:
    """Nothing can be wrong here: the loader has tried every picture and label."""


def run(
    backend: ImageBackend,
    rows: LabelledImages,
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
    return score_file(path)


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


def score_file(path: Path) -> dict[str, Any]:
    """As `predictions.score_file`."""
    return predictions.score_file(path, FIELDS, score)


if __name__ == "__main__":
    sys.exit(
        "Pictures are scored at the end of a run: the run's command with resume=true and eval=[images] scores it anew."
    )
