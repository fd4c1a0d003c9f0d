"""Data sets, one file a family: load → format → split.

A loader registers a `flatlora.experiment.plugins.DataSet`.

Rows of text are {"x", "y"}: the prompt and the answer to be learned; the text of a row is x + " " + y +
end-of-sequence, with the loss on y. A row to be scored by the likelihood of its possible answers also has "choices".
`images` is the loader of all labeled pictures and `text_to_image` of those with prompts; kinds.py reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flatlora.experiment.plugins import DataSet
from flatlora.utils.registry import Registry

Row = dict[str, Any]
CountTokens = Callable[[list[str]], list[int]]  # lengths of texts, counted by `dataset.limit_tokenizer`


class Splits(NamedTuple):
    """Rows of a data set; none of `train` stands in `validation` too."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]  # what an evaluator asks at the end


DATASETS: Registry[DataSet] = Registry("loader", "data")
