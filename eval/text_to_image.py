"""Pictures of fixed prompts and seeds, and how near they are to their prompts and to the training pictures.

    python -m eval.text_to_image PATH [key=value ...]

PATH is a run's folder, one of its checkpoints, an adapter, or a whole pipeline. Every prompt is drawn with every seed,
as images/NNNN.png, and grid.png shows all of them. Scores are mean cosines in the space of `clip`:

    image_text    picture and prompt
    text_text     prompt and what `captioner` says of the picture; left out with captioner=null
    image_image   picture and each of the pictures that the run was trained on; left out where no run says which

Keys: prompts=NAME, FILE.yaml (prompts and seeds) or training (the pictures' own), steps, guidance, negative_prompt,
resolution, clip, captioner, max_rows, batch_size, device, out=DIR, score_only=true.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from eval import BENCHMARKS, predictions
from eval.backends.diffusion import DiffusionBackend
from eval.picture_grid import write_grid
from eval.similarity import Captioner, Similarity
from flatlora.config.sections import DiffusionModelConfig
from flatlora.config.settings import MOST_BATCH, MOST_PIXELS, MOST_ROWS, Section, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.images import png_of
from flatlora.inputs.rows import gather
from flatlora.inputs.text_to_image import TextToImageRows, long_prompts, picture_of
from flatlora.models.families.text_to_image import size_factor, warn_of_long_prompts
from flatlora.models.scorers import check_captioner, check_clip
from flatlora.trained.place import YAML_ERRORS
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic
from flatlora.utils.plain_files import place_inside, read_plain

logger = logging.getLogger(__name__)

SCORER_VERSION = 1
SCORES = ("image_text", "text_text", "image_image")
FIELDS: predictions.Fields = {"index": int, "prompt": str, "seed": int, "file": str, "image_text": float}
_TRAINING_PROMPTS, _TRAINING_SEEDS = 8, [0, 1, 2, 3]
PROMPTS = Path(__file__).parent / "prompts"
PICTURE = "grid.png"
_MOST_PROMPT_BYTES = 1 << 24  # of a file of them


class Config(Section):
    prompts: str = setting("training", min_length=1, remedy="training, a file of eval/prompts, or one of your own")
    steps: int = setting(30, ge=1, le=10**4, remedy="denoising steps of a picture; 30 are usual")
    guidance: float = setting(5.0, ge=0, le=1000, remedy="5 is SDXL's; 1 and less draws without guidance")
    negative_prompt: str = ""
    resolution: int = setting(1024, ge=16, le=MOST_PIXELS, remedy="the side of a square in pixels, 1024 for SDXL")
    clip: str = "openai/clip-vit-large-patch14"
    captioner: str | None = setting(
        "Salesforce/blip-image-captioning-base", remedy="null leaves the scores of captions out"
    )
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null draws every prompt with every seed")
    batch_size: int = setting(1, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")


class Prompts(NamedTuple):
    """What is drawn: each prompt with each seed."""

    prompts: list[str]
    seeds: list[int]


def read_prompts(name: str, rows: TextToImageRows | Sequence[Any] = ()) -> Prompts:
    """The prompts and seeds of a file of eval/prompts, or of one's own; "training": those of the first pictures.

    Raises:
        ConfigError: it is not there, or holds something else; with what is needed.
    """
    if name == "training" and len(rows):
        own = dict.fromkeys(rows.prompt(row) for row in range(len(rows)))
        return Prompts(list(own)[:_TRAINING_PROMPTS], _TRAINING_SEEDS)
    path = PROMPTS / f"{name}.yaml" if (PROMPTS / f"{name}.yaml").is_file() else Path(name)
    needed = 'prompts: ["a 3d icon of a boat"] and seeds: [0, 1]'
    try:
        found = yaml.safe_load(read_plain(path, _MOST_PROMPT_BYTES).decode())
    except (OSError, *YAML_ERRORS) as error:
        known = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.yaml")))
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise ConfigError(
            [f"Invalid eval.text_to_image.prompts={name}: {reason}; name one of {known}, or a YAML file with {needed}."]
        ) from error
    errors = []
    for key, kind, words in (("prompts", str, "texts"), ("seeds", int, "whole numbers from 0 to 2^63 − 1")):
        values = found.get(key) if isinstance(found, dict) else None
        good = isinstance(values, list) and values and all(type(value) is kind for value in values)
        if not good or (kind is int and not 0 <= min(values) <= max(values) < 2**63):
            errors.append(f"Invalid {key} in {path}: a list of {words} is needed, as in {needed}.")
        elif len(set(values)) < len(values):
            errors.append(f"Invalid {key} in {path}: one of them stands there twice; every picture is drawn once.")
        elif kind is str:
            errors += long_prompts(values, f"{key} in {path}")
    if isinstance(found, dict) and (unknown := sorted(found.keys() - {"prompts", "seeds"}, key=str)):
        errors.append(f"Unknown key {unknown[0]} in {path}: it has {needed}.")
    if errors:
        raise ConfigError(errors)
    return Prompts(found["prompts"], found["seeds"])


def check_settings(config: Config, model: DiffusionModelConfig) -> None:
    """What can be said without the training pictures.

    Args:
        model: what draws.

    Raises:
        ConfigError: prompts that cannot be read, a size that cannot be drawn, or models that score which are not there.
    """
    gather(
        lambda: read_prompts(config.prompts) if config.prompts != "training" else None,
        lambda: _validate_size(config.resolution, model),
        lambda: check_clip(config.clip),
        lambda: check_captioner(config.captioner) if config.captioner else None,
    )


def check_rows(
    rows: TextToImageRows | Sequence[Any], source: str, config: Config, *, model: DiffusionModelConfig, **known: Any
) -> None:
    """
    Args:
        model: what draws.

    Raises:
        ConfigError: prompts that cannot be read.
    """
    wanted = read_prompts(config.prompts, rows)
    if config.prompts != "training":  # whoever read the pictures has spoken of theirs
        warn_of_long_prompts(model, wanted.prompts)


def _validate_size(resolution: int, model: DiffusionModelConfig) -> None:
    factor = size_factor(model, drawn=True)
    if resolution % factor:
        raise ConfigError(
            [
                f"Invalid eval.text_to_image.resolution={resolution} (dataset.resolution where it is not given): "
                f"{model.hub_id} draws pictures whose sides are "
                f"multiples of {factor}; choose {resolution // factor * factor or factor}."
            ]
        )


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over all pictures; None for what they were not compared with."""
    found = {key: [row.get(key) for row in rows] for key in SCORES}
    metrics = {
        key: sum(values) / len(values) if values and None not in values else None for key, values in found.items()
    }
    return {"scorer": f"text_to_image/{SCORER_VERSION}", "n": len(rows), "metrics": {"n": len(rows), **metrics}}


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """{(prompt, seed): cosine of picture and prompt}."""
    return {(row["prompt"], row["seed"]): row["image_text"] for row in rows}


def run(
    backend: DiffusionBackend,
    rows: TextToImageRows | Sequence[Any],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Draw and score; writes images/, predictions.jsonl, grid.png and score.json, returns the score.

    Args:
        rows: the training pictures; none where no run says which.
    """
    wanted = read_prompts(config.prompts, rows)
    asked = [{"prompt": prompt, "seed": seed} for prompt in wanted.prompts for seed in wanted.seeds][: config.max_rows]
    measure = _Measure(config, rows, backend.device)
    drawn = {key: getattr(config, key) for key in ("steps", "guidance", "negative_prompt")}

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        prompts, seeds = [asked[i]["prompt"] for i in batch], [asked[i]["seed"] for i in batch]
        made = backend.pictures(prompts, seeds, size=config.resolution, **drawn)
        pictures = [Image.fromarray(_bytes(one)) for one in made]
        files = [f"images/{index:04d}.png" for index in batch]
        for one, file in zip(pictures, files, strict=True):
            write_atomic(folder / file, png_of(np.asarray(one)))
        return [{"file": file, **scores} for file, scores in zip(files, measure(pictures, prompts), strict=True)]

    path = predictions.collect(
        asked,
        answer,
        folder,
        fields=FIELDS,
        lengths=[1] * len(asked),
        batch_size=backend.batch_size,
        settings={
            **backend.describe(),
            **drawn,
            "resolution": config.resolution,
            "clip": config.clip,
            "captioner": config.captioner,
            "compared_with": _pictures_sha256(rows),
        },
        on_progress=on_progress,
        is_valid=lambda row: _is_drawn(folder, row["file"]),
    )
    return score_file(path, config)


def _bytes(picture: torch.Tensor) -> np.ndarray:
    return (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _pictures_sha256(rows: TextToImageRows | Sequence[Any]) -> str | None:
    return hashlib.sha256(b"".join(rows.digests)).hexdigest() if len(rows) else None


class _Measure:
    """Cosines of pictures, with models that are loaded when the first one is there."""

    def __init__(self, config: Config, rows: TextToImageRows | Sequence[Any], device: torch.device) -> None:
        self.config, self.rows, self.device = config, rows, device
        self._clip: Similarity | None = None
        self._captioner: Captioner | None = None
        self._known: torch.Tensor | None = None

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, Any]]:
        if self._clip is None:
            self._load()
        seen, meant = self._clip.of_pictures(pictures), self._clip.of_texts(prompts)
        scores = [{"image_text": float(cosine)} for cosine in (seen * meant).sum(dim=1)]
        if self._known is not None:
            for one, cosines in zip(scores, seen @ self._known.t(), strict=True):
                one["image_image"] = float(cosines.mean())
        if self._captioner is not None:
            captions = self._captioner(pictures)
            said = self._clip.of_texts(captions)
            for one, caption, cosine in zip(scores, captions, (said * meant).sum(dim=1), strict=True):
                one |= {"text_text": float(cosine), "caption": caption}
        return scores

    def _load(self) -> None:
        self._clip = Similarity(self.config.clip, self.device)
        if self.config.captioner:
            self._captioner = Captioner(self.config.captioner, self.device)
        if len(self.rows):
            places = dict.fromkeys(self.rows.indices)
            known = [self._clip.of_pictures([picture_of(self.rows.images, place)]) for place in places]
            self._known = torch.cat(known)


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """As `predictions.score_file`; draws grid.png too, of pictures that are there."""
    result = predictions.score_file(path, FIELDS, score)
    rows = predictions.read(path, FIELDS)
    if lost := [row["file"] for row in rows if not _is_drawn(path.parent, row["file"])]:
        logger.warning("%d pictures of %s are not there, %s among them: no grid.", len(lost), path.parent, lost[0])
        (path.parent / PICTURE).unlink(missing_ok=True)
    else:
        write_grid(path.parent / PICTURE, [("", path.parent, rows)])
    return result


def _is_drawn(folder: Path, name: str) -> bool:
    """Whether a picture is there that a row names, in the row's own folder."""
    try:
        return place_inside(folder, name).is_file()
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("text_to_image", sys.argv[1:]))


BENCHMARKS.add(
    "text_to_image",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text_to_image",
        scorer_version=SCORER_VERSION,
        headline="image_text",
        row_columns={},
        fields=FIELDS,
        is_share=False,
        digits=4,
        picture=PICTURE,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
        check_settings=check_settings,
    ),
)
