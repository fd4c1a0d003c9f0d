"""Pictures of several models side by side: a row for each prompt, in it the models' pictures of each seed."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora.files import write_atomic

Shown = tuple[str, Path, Sequence[Mapping[str, Any]]]  # (name of a model, folder, its rows {"prompt", "seed", "file"})
_CELL_INCHES, _TITLE_INCHES, _DPI = 1.6, 0.62, 150


def write_grid(path: Path, models: Sequence[Shown]) -> None:
    """Draw the pictures that all models have as a PNG: prompts down, seeds across and within each the models.

    Raises:
        ValueError: no prompt and seed that all of them drew.
    """
    write_atomic(path, grid_png(models))


def grid_png(models: Sequence[Shown]) -> bytes:
    """As `write_grid`, the file's bytes: the same for the same pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = [{(row["prompt"], row["seed"]): folder / row["file"] for row in rows} for _, folder, rows in models]
    shared = [key for key in known[0] if all(key in files for files in known[1:])]
    if not shared:
        raise ValueError("No prompt was drawn with one seed by all models: nothing can stand side by side.")
    prompts, seeds = (list(dict.fromkeys(key[place] for key in shared)) for place in (0, 1))
    columns = [(seed, number) for seed in seeds for number in range(len(models))]
    size = (_CELL_INCHES * len(columns), (_CELL_INCHES + _TITLE_INCHES) * len(prompts) + 0.3)
    figure, axes = pyplot.subplots(len(prompts), len(columns), figsize=size, squeeze=False, layout="constrained")
    for row, prompt in enumerate(prompts):
        for column, (seed, number) in enumerate(columns):
            axis = axes[row, column]
            axis.set_axis_off()
            if (file := known[number].get((prompt, seed))) is not None and (prompt, seed) in shared:
                with Image.open(file) as picture:
                    axis.imshow(picture.convert("RGB"), interpolation="nearest")
            name = models[number][0]
            axis.set_title("\n".join(filter(None, [name, f"seed {seed}"])), fontsize=7)
        text = "\n".join(textwrap.wrap(prompt, int(11 * len(columns) * _CELL_INCHES)))
        axes[row, 0].text(
            0, 1.32 if models[0][0] else 1.2, text, transform=axes[row, 0].transAxes, fontsize=8, fontweight="bold"
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
