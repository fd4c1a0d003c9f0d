"""σ_t, the strength of the perturbation at optimizer step t of T (the paper's section 4; "cosine-increasing")."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(progress: float) -> float:
    """½ (1 − cos π t/T), the paper's ramp: rises from 0 to 1."""
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """t/T: the alternative in the paper's discussion."""
    return progress


def constant(progress: float) -> float:
    """1 at every step."""
    return 1.0


RAMPS: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}


def sigma_at(step: int, total_steps: int, sigma: float, ramp: str = "cosine") -> float:
    """σ_t of optimizer step `step`, counted from 0; steps after total_steps have the ramp's final value."""
    return sigma * RAMPS[ramp](min(step / total_steps, 1.0))
