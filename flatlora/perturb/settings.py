"""The settings of the noise and their validation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Ramp = Literal["cosine", "linear", "constant"]
Mode = Literal["auto", "copy", "recompute", "inplace"]
Resample = Literal["step", "micro_batch"]
Scale = Literal["filter", "iid"]


@dataclass(frozen=True)
class NoiseSettings:
    """How ε is drawn and added.

    Args:
        sigma: σ ≥ 0, the `rho` of the published command line. 0 means no noise.
        ramp: how σ_t rises over the training (section 4: "cosine-increasing").
        mode: how layers read W + ε; "auto" is "copy" if its buffer takes at most half of the free memory, else
            "recompute".
        every: number of optimizer steps that share one ε, including its σ_t and row norms.
        interval: perturb only the first of this many optimizer steps and train the others on W: the published code's T.
        resample: "step" keeps one ε for all micro-batches of a step, "micro_batch" draws one for each.
        per_rank: whether each rank draws its own ε, so that the gradient is averaged over several.
        scale: "filter" scales row i by ‖W'_i‖; "iid" gives every element of a layer the same standard deviation, with
            the same total variance.
        fan_in: whether to divide the variance by n, as in the paper; False only for the ablation.

    Raises:
        ValueError: values are out of range; the message lists all of them.
    """

    sigma: float
    ramp: Ramp = "cosine"
    mode: Mode = "auto"
    every: int = 1
    interval: int = 1
    resample: Resample = "step"
    per_rank: bool = False
    scale: Scale = "filter"
    fan_in: bool = True

    def __post_init__(self) -> None:
        errors = []
        if not (self.sigma >= 0 and math.isfinite(self.sigma)):
            errors.append(f"Invalid sigma={self.sigma}: it must be finite and ≥ 0; use sigma=0 for plain LoRA.")
        if self.every < 1:
            errors.append(f"Invalid every={self.every}: it counts optimizer steps and must be ≥ 1.")
        if self.interval < 1:
            errors.append(f"Invalid interval={self.interval}: it counts optimizer steps and must be ≥ 1.")
        if self.every > 1 and self.interval > 1:
            errors.append(f"Invalid every={self.every} with interval={self.interval}: set one of them.")
        for name, choices in (("ramp", Ramp), ("mode", Mode), ("resample", Resample), ("scale", Scale)):
            if (value := getattr(self, name)) not in get_args(choices):
                errors.append(f"Invalid {name}={value!r}: choose one of {', '.join(get_args(choices))}.")
        if errors:
            raise ValueError("\n".join(errors))


def errors_if_sharded(
    mode: str = "auto",
    scale: str = "filter",
    per_rank: bool = False,
    *,
    offload: bool = False,
    prefix: str = "",
    **others: Any,
) -> dict[str, str]:
    """Returns {setting: why it is invalid} if FSDP2 shards the weights.

    Args:
        offload: whether it keeps the shares on the host.
        prefix: of the names in messages, such as "rho.".
    """
    errors = {}
    if mode == "inplace":
        errors["mode"] = (
            f"Invalid {prefix}mode=inplace with weights that FSDP2 shards: they would drift, and a copy takes no more "
            f"memory than a share; use {prefix}mode=copy or recompute."
        )
    if mode == "copy" and offload:
        errors["mode"] = (
            f"Invalid {prefix}mode=copy with weights that FSDP2 keeps on the host: a copy would be moved there and "
            f"back in each step; use {prefix}mode=recompute (or auto)."
        )
    if scale == "iid":
        errors["scale"] = (
            f"Invalid {prefix}scale=iid with weights that FSDP2 shards: it takes the mean over all rows of a layer, "
            f"and each process has a part of them; use {prefix}scale=filter."
        )
    if per_rank and mode != "recompute":
        errors["per_rank"] = (
            f"Invalid {prefix}per_rank=true with {prefix}mode={mode} and weights that FSDP2 shards: the processes "
            f"share the copy, and so one ε; use {prefix}mode=recompute."
        )
    return errors
