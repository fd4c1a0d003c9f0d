"""Adapter methods, one file each. A file registers itself; importing this package finds them all.

A method is a class with `name`, its config section `Config` and `check` and `apply`; see `Method`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from torch import nn

from flatlora.config import PeftConfig


class Method(Protocol):
    """How a backbone becomes trainable."""

    Config: type[PeftConfig]

    def check(self, skeleton: nn.Module, config: PeftConfig) -> None:
        """Try the config on the architecture without weights.

        Raises:
            ConfigError: it does not fit this model (a target that matches nothing, a rank too large).
        """
        ...

    def apply(self, model: nn.Module, config: PeftConfig, seed: int) -> nn.Module:
        """The model to train, trainable parameters in FP32 and all others frozen."""
        ...


_METHODS: dict[str, Method] = {}


def register(name: str):
    """Class decorator: makes a method known as `peft.method: name`."""

    def add(cls: type) -> type:
        _METHODS[name] = cls()
        return cls

    return add


def method(name: str) -> Method:
    """The registered method; KeyError lists the known ones."""
    if name not in _METHODS:
        raise KeyError(f"Unknown peft method {name}: known are {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]


def names() -> list[str]:
    """Names of all registered methods."""
    return sorted(_METHODS)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
