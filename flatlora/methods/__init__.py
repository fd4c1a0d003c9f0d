"""Adapter methods (`peft=NAME`) and regularizers (`rho=NAME`), one file each, and their registries.

`python -m flatlora.methods` prints which pairs are compatible, and the reasons why others are not.
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
