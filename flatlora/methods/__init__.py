"""Adapter methods (`peft=NAME`) and regularizers (`rho=NAME`), one file each, found by their registries.

`python -m flatlora.methods` prints which pairs are run and which are refused, and why.
"""

from flatlora.methods.base import (
    ADAPTERS,
    REGULARIZERS,
    AdapterMethod,
    Regularizer,
    RhoMethod,
    Start,
    Strength,
    Training,
    combination_errors,
    owners,
    refusal,
    uses_kernels,
)

__all__ = [
    "ADAPTERS",
    "REGULARIZERS",
    "AdapterMethod",
    "Regularizer",
    "RhoMethod",
    "Start",
    "Strength",
    "Training",
    "combination_errors",
    "owners",
    "refusal",
    "uses_kernels",
]
