"""Pictures of several models side by side: a row for each prompt, in it the models' pictures of each seed."""

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
_CELL, _ABOVE, _LINE, _GAP = 1.5, 0.2, 0.2, 0.08  # inches: a picture, its caption, a line of its prompt, between
_LARGEST = 512  # pixels of a side that are kept
_DPI = 150


def write_grid(path: Path, models: Sequence[Shown]) -> None:
    """Draw `grid_figure` as a PNG: the same bytes for the same pictures."""
    buffer = io.BytesIO()
    grid_figure(models).savefig(buffer, dpi=_DPI, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def grid_figure(models: Sequence[Shown]) -> matplotlib.figure.Figure:
    """The pictures that all models have: prompts down, seeds across, and within each seed the models.

    Raises:
        ValueError: no prompt and seed that all of them drew.
    """
    known = [{(row["prompt"], row["seed"]): folder / row["file"] for row in rows} for _, folder, rows in models]
    shared = [key for key in known[0] if all(key in files for files in known[1:])]
    if not shared:
        raise ValueError("No prompt was drawn with one seed by all models: nothing can stand side by side.")
    prompts, seeds = (list(dict.fromkeys(key[place] for key in shared)) for place in (0, 1))
    columns = [(seed, number) for seed in seeds for number in range(len(models))]
    width = max(len(columns) * (_CELL + _GAP) + _GAP, 3.0)
    texts = ["\n".join(textwrap.wrap(prompt, int(width * 12))) for prompt in prompts]
    heights = [_LINE * (text.count("\n") + 1) + _ABOVE + _CELL + 2 * _GAP for text in texts]
    whole = sum(heights) + _GAP
    figure = matplotlib.figure.Figure(figsize=(width, whole))
    top = whole  # inches above the lower edge
    for prompt, text, height in zip(prompts, texts, heights, strict=True):
        figure.text(_GAP / width, (top - _GAP) / whole, text, fontsize=9, weight="bold", va="top", parse_math=False)
        for place, (seed, number) in enumerate(columns):
            if (prompt, seed) not in shared:
                continue
            left, low = _GAP + place * (_CELL + _GAP), top - height + _GAP
            axis = figure.add_axes((left / width, low / whole, _CELL / width, _CELL / whole))
            axis.set_axis_off()
            axis.imshow(_picture(known[number][prompt, seed]), interpolation="nearest")
            caption = ", ".join(filter(None, [models[number][0], f"seed {seed}"]))
            axis.set_title(caption, fontsize=7, pad=3, parse_math=False)
        top -= height
    return figure


def _picture(file: Path) -> Image.Image:
    with head_of(file.read_bytes()) as picture:
        shown = picture.convert("RGB")
        shown.thumbnail((_LARGEST, _LARGEST))
        return shown
