"""Data sets, one file a family: load → format → split.

A loader module has

    Config                                          its config section
    VERSION                                         raised whenever the same config and files give other rows
    sources(config) -> list[Source]                 the public splits that it reads; none where rows are generated
    load(config, data_root, count_tokens) -> Splits
    describe(config) -> str

Rows of text are {"x", "y"}: the prompt and the answer to be learned; the text of a row is x + " " + y +
end-of-sequence, with the loss on y. A row to be scored by the likelihood of its possible answers also has "choices".
`images` is the loader of all labelled pictures and `text_to_image` of those with prompts; their rows are made by
`prepared` of theirs, and they have no `load`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

# Modules of this package that are not loaders.
_SHARED = ("__main__", "byte_level", "cache", "instructions", "kinds", "selection", "tokens")

Row = dict[str, Any]
CountTokens = Callable[[list[str]], list[int]]  # lengths of texts, counted by `dataset.limit_tokenizer`


class Splits(NamedTuple):
    """Rows of a data set; none of `train` stands in `validation` too."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]  # what an evaluator asks at the end


def loader(name: str) -> ModuleType:
    """The loader module; KeyError lists the known ones."""
    if name not in loader_names():
        raise KeyError(f"Unknown loader {name}: known are {', '.join(loader_names())}.")
    return importlib.import_module(f"{__name__}.{name}")


def loader_names() -> list[str]:
    """Names of all loader modules."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)
