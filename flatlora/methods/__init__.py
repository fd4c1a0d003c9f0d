"""Adapter methods and regularisers, one file each. A file registers itself; importing this package finds them all.

`python -m flatlora.methods` prints which pairs are run and which are refused, and why.
"""

from __future__ import annotations

import importlib
import pkgutil

from flatlora.methods import adapters, regularizers
from flatlora.methods.base import (
    AdapterMethod,
    Regulariser,
    RhoMethod,
    Start,
    Training,
    combination_errors,
    method,
    names,
    owners,
    refusal,
    register,
    register_rho,
    rho,
    rho_names,
)

__all__ = [
    "AdapterMethod",
    "Regulariser",
    "RhoMethod",
    "Start",
    "Training",
    "combination_errors",
    "method",
    "names",
    "owners",
    "refusal",
    "register",
    "register_rho",
    "rho",
    "rho_names",
]

for _package in (adapters, regularizers):
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")
