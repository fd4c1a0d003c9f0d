"""Draws the images of several models side by side: one row per prompt, with each model's image for each seed."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from PIL import Image

from flatlora.inputs.images import head_of
from flatlora.utils.files import write_atomic

Shown = tuple[str, Path, Sequence[Mapping[str, Any]]]  # (name of a model, folder, its rows {"prompt", "seed", "file"})
_CELL, _ABOVE, _LINE, _GAP = 1.5, 0.2, 0.2, 0.08  # inches: an image, its caption, a line of its prompt, a gap
_LARGEST = 512  # pixels: images with longer sides are downscaled
_DPI = 150


def write_grid(path: Path, models: Sequence[Shown]) -> None:
    """Writes `grid_figure` as a PNG, with the same bytes for the same images."""
    buffer = io.BytesIO()
    grid_figure(models).savefig(buffer, dpi=_DPI, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def grid_figure(models: Sequence[Shown]) -> matplotlib.figure.Figure:
    """Returns a figure of the images that all models have: a row per prompt, a column per seed and model.

    Raises:
        ValueError: the models have no prompt and seed in common.
    """
    files_by_model = [
        {(row["prompt"], row["seed"]): folder / row["file"] for row in rows} for _, folder, rows in models
    ]
    shared = [key for key in files_by_model[0] if all(key in files for files in files_by_model[1:])]
    if not shared:
        raise ValueError("No prompt was drawn with the same seed by all models: there is nothing to compare.")
    prompts, seeds = (list(dict.fromkeys(key[part] for key in shared)) for part in (0, 1))
    columns = [(seed, number) for seed in seeds for number in range(len(models))]
    width = max(len(columns) * (_CELL + _GAP) + _GAP, 3.0)
    texts = ["\n".join(textwrap.wrap(prompt, int(width * 12))) for prompt in prompts]
    heights = [_LINE * (text.count("\n") + 1) + _ABOVE + _CELL + 2 * _GAP for text in texts]
    total_height = sum(heights) + _GAP
    figure = matplotlib.figure.Figure(figsize=(width, total_height))
    top = total_height  # inches above the lower edge
    for prompt, text, height in zip(prompts, texts, heights, strict=True):
        figure.text(
            _GAP / width, (top - _GAP) / total_height, text, fontsize=9, weight="bold", va="top", parse_math=False
        )
        for column, (seed, number) in enumerate(columns):
            if (prompt, seed) not in shared:
                continue
            left, bottom = _GAP + column * (_CELL + _GAP), top - height + _GAP
            axis = figure.add_axes((left / width, bottom / total_height, _CELL / width, _CELL / total_height))
            axis.set_axis_off()
            axis.imshow(_picture(files_by_model[number][prompt, seed]), interpolation="nearest")
            caption = ", ".join(filter(None, [models[number][0], f"seed {seed}"]))
            axis.set_title(caption, fontsize=7, pad=3, parse_math=False)
        top -= height
    return figure


def _picture(file: Path) -> Image.Image:
    with head_of(file.read_bytes()) as picture:
        rgb = picture.convert("RGB")
        rgb.thumbnail((_LARGEST, _LARGEST))
        return rgb
