"""Data sets, one file a family: load → format → split.

A loader module has `Config` (its config section), `load(config, data_root, count_tokens) -> Splits` and
`describe(config)`. Rows are {"x", "y"}: the prompt and the answer to be learned; the text of a row is
x + " " + y + end-of-sequence, with the loss on y.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

_SHARED = ("tokens", "selection")  # modules of this package that are not loaders

Row = dict[str, str]
CountTokens = Callable[[list[str]], list[int]]  # lengths of texts in the run's own tokenizer


class Splits(NamedTuple):
    """Rows of a data set; no row stands in two of them."""

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
