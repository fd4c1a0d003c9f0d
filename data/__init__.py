"""Data sets, one file per family: load → format → split.

A loader registers a `flatlora.experiment.plugins.DataSet`.

Rows of text are {"x", "y"}: the prompt and the answer to be learned. The text of a row is x + " " + y +
end-of-sequence (without the blank in the template step_by_step), with the loss on y (`loss_on=text`: on x too). A row
that is scored by the likelihood of its possible answers also has "choices". A row with "joined": True has no blank
between x and y. "texts" are the parts of x that an encoder reads in its place. With `dataset.template=chat` a row also
has "messages", and their chat template replaces the blank; see `flatlora.inputs.conversations`.
`images` loads all sets of labeled images and `text_to_image` all sets of images with prompts; kinds.py prepares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flatlora.experiment.plugins import DataSet
from flatlora.utils.registry import Registry

Row = dict[str, Any]
CountTokens = Callable[[list[str]], list[int]]  # lengths of texts, counted by `dataset.limit_tokenizer`


class Splits(NamedTuple):
    """Rows of a data set; `validation` contains no row of `train`."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]  # scored at the end


DATASETS: Registry[DataSet] = Registry("loader", "data")
