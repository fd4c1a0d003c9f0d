"""Accuracy on corrupted images, out of domain: CIFAR-10-C and CIFAR-100-C (Hendrycks and Dietterich 2019).

    python -m eval.corruptions PATH folder=DIR [key=value ...]

PATH is a run's folder or one of its checkpoints. Keys: folder, max_rows (of each corruption and severity), batch_size,
device, out=DIR, score_only=true. `folder` holds one .npy file per corruption, with the images of the five severities
one after the other (N × 32 × 32 × 3, UINT8), and labels.npy (N). The score is the mean over corruptions and severities;
it also has the mean of each severity and of each corruption. The four corruptions that the authors reserved for
validation are reported but not part of the means.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval import BENCHMARKS, predictions
from eval.backends import ImageBackend
from eval.images import classify, images_of, validate_labels
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, Section, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.images import resized
from flatlora.utils.errors import ConfigError, SettingError, reason_of
from flatlora.utils.plain_files import open_plain

SCORER_VERSION = 2
HEADLINE = "mean_accuracy"
SEVERITIES = 5
LABELS = "labels"
FOR_VALIDATION = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # the benchmark is the other 15
FIELDS: predictions.Fields = {"index": int, "corruption": str, "severity": int, "label": int, "prediction": int}


class Config(Section):
    folder: str = setting(min_length=1, remedy="name the folder of CIFAR-10-C or CIFAR-100-C")
    # Per corruption and severity.
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every image")
    batch_size: int = setting(128, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        try:
            read_folder(Path(self.folder))
        except ConfigError as error:
            return [SettingError(("folder",), message) for message in error.errors]
        return []


def read_folder(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the labels (N) and the memory-mapped images of each corruption (N × H × W × 3, UINT8).

    Raises:
        ConfigError: files are missing or broken, or do not fit together; all errors together.
    """
    files = sorted(folder.glob("*.npy"))
    errors, arrays = [], {}
    for path in files:
        try:
            open_plain(path).close()  # opening a named pipe would block
            arrays[path.stem] = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            errors.append(f"Broken file {path}: {reason_of(error)}; fetch it again.")
    labels = arrays.pop(LABELS, None)
    if labels is not None and (
        labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu" or labels.min() < 0
    ):
        errors.append(f"Invalid {folder / LABELS}.npy: one whole number from 0 up per image is needed; fetch it again.")
        labels = None
    if not errors and labels is not None and arrays and not set(arrays) - set(FOR_VALIDATION):
        errors.append(
            f"Invalid eval.corruptions.folder={folder}: {', '.join(arrays)} are for validation and not part of the "
            "score; the benchmark's other corruptions are needed."
        )
    if not errors and (labels is None or not arrays):
        errors.append(
            f"Invalid eval.corruptions.folder={folder}: labels.npy and one .npy file per corruption are needed, as in "
            f"CIFAR-10-C; found {', '.join(path.name for path in files) or 'none'}."
        )
    for name, images in arrays.items():
        fits = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
        if labels is None or not fits or len(images) != len(labels):
            errors.append(
                f"Invalid {folder / name}.npy: {'?' if labels is None else len(labels)} UINT8 images (N × H × W × 3) "
                f"are needed, not {images.dtype} {images.shape}; fetch it again."
            )
    if labels is not None and len(labels) % SEVERITIES:
        errors.append(f"Invalid {folder / LABELS}.npy: {len(labels)} rows are not five severities; fetch it again.")
    if errors:
        raise ConfigError(errors)
    return labels, arrays


def folder_sha256(folder: Path) -> str:
    """Returns the SHA-256 of all .npy files of a folder; predictions of other images must not be reused."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.npy")):
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean accuracy over corruptions and severities, of each severity, and of each corruption.

    Args:
        rows: {"corruption", "severity", "label", "prediction"} each.
    """
    groups: dict[tuple[str, int], list[bool]] = {}
    for row in rows:
        groups.setdefault((row["corruption"], row["severity"]), []).append(row["label"] == row["prediction"])
    shares = {key: sum(correct) / len(correct) for key, correct in groups.items()}
    names = sorted({name for name, _ in shares})
    counted = [name for name in names if name not in FOR_VALIDATION]

    def mean(selects: Callable[[str, int], bool]) -> float | None:
        selected = [share for (name, severity), share in shares.items() if selects(name, severity)]
        return float(np.mean(selected)) if selected else None

    metrics = {
        "n": len(rows),
        HEADLINE: mean(lambda name, _: name in counted),
        **{
            f"severity_{level}": mean(lambda name, severity, level=level: name in counted and severity == level)
            for level in range(1, SEVERITIES + 1)
        },
        **{name: mean(lambda other, _, name=name: other == name) for name in names},
    }
    return {"scorer": f"corruptions/{SCORER_VERSION}", "n": len(rows), "metrics": metrics}


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {row: 1.0 or 0.0}, without the corruptions for validation."""
    images_sha256, seen, scores = images_of(folder), Counter(), {}
    for row in rows:
        group = row["corruption"], row["severity"]
        if row["corruption"] not in FOR_VALIDATION:  # counted within its group, as "index" depends on max_rows
            scores[images_sha256, *group, seen[group]] = float(row["prediction"] == row["label"])
        seen[group] += 1
    return scores


def check_rows(rows: Any, source: str, config: Config, *, classes: Sequence[str] = (), **known: Any) -> None:
    """Checks that the folder's labels are classes of the model; the rows of the run's data set are not used.

    Raises:
        ConfigError: a label is no class of the model, such as CIFAR-100-C's for a model of CIFAR-10.
    """
    labels, _ = read_folder(Path(config.folder))
    validate_labels(labels.tolist(), f"{config.folder}/{LABELS}.npy", classes)


def run(
    backend: ImageBackend,
    rows: Any,
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Classifies and scores the corrupted images; writes predictions.jsonl and score.json, returns the score."""
    labels, corruptions = read_folder(Path(config.folder))
    per_severity = len(labels) // SEVERITIES
    selected = range(min(per_severity, config.max_rows or per_severity))
    sources = [
        (name, severity, severity * per_severity + i)
        for name in corruptions
        for severity in range(SEVERITIES)
        for i in selected
    ]

    def pixels(indices: list[int]) -> list[torch.Tensor]:
        pictures = (corruptions[name][row] for name, _, row in map(sources.__getitem__, indices))
        return [resized(backend.processor, Image.fromarray(picture)) for picture in pictures]

    path = classify(
        backend,
        [{"corruption": name, "severity": severity + 1, "label": int(labels[row])} for name, severity, row in sources],
        pixels,
        folder,
        fields=FIELDS,
        images_sha256=folder_sha256(Path(config.folder)),
        on_progress=on_progress,
    )
    return score_file(path, config)


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """As `predictions.score_file`."""
    return predictions.score_file(path, FIELDS, score)


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("corruptions", sys.argv[1:]))


BENCHMARKS.add(
    "corruptions",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="image",
        test_only=True,
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        row_columns={},
        fields=FIELDS,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
    ),
)
