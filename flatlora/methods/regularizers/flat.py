"""rho=off (no perturbation) and rho=flat (Flat-LoRA; see flatlora/perturb/perturbation.py for the method)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar

from torch import nn

from flatlora.config.experiment import Experiment
from flatlora.config.sections import RhoConfig
from flatlora.config.settings import MOST_STEPS, setting
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.perturb.callback import FlatLoraCallback
from flatlora.perturb.settings import Mode, NoiseSettings, Ramp, Resample, Scale, errors_if_sharded
from flatlora.utils.errors import SettingError


class FlatConfig(RhoConfig):
    """`NoiseSettings` as keys of the command line."""

    ramp: Ramp = "cosine"
    mode: Mode = "auto"
    every: int = setting(1, ge=1, le=MOST_STEPS, remedy="1 draws a new ε at every optimizer step")
    interval: int = setting(
        1, identity="changed", ge=1, le=MOST_STEPS, remedy="1 perturbs every optimizer step; the published T"
    )
    resample: Resample = "step"
    per_rank: bool = False
    scale: Scale = "filter"
    fan_in: bool = True


_RWP = Strength("standard deviation ρ", {"Bi-LoRA paper, Qwen2.5-14B": 0.0316})


@REGULARIZERS.register("off")
class Off(RhoMethod):
    not_sharded = None
    Config = FlatConfig  # so that a key of rho=flat gives the error that there is no perturbation

    def regularizer(self, model: nn.Module, config: FlatConfig, seed: int) -> Regularizer:
        raise ValueError("rho=off has no regularizer: do not call this method for such a run.")


@REGULARIZERS.register("flat")
class Flat(RhoMethod):
    not_sharded = None
    Config = FlatConfig
    strength: ClassVar = Strength("strength σ", {"language models": 0.05, "CLIP": 0.15, "SDXL": 0.1})

    def strength_of(self, config: FlatConfig) -> Strength | None:
        return _RWP if config.name == "rwp_full" else self.strength

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        yield from super().errors(experiment)
        rho, model = experiment.rho, experiment.model
        if rho.every > 1 and rho.resample == "micro_batch":
            yield SettingError(
                ("rho.every", "rho.resample"),
                f"Invalid rho.every={rho.every} with rho.resample=micro_batch: one keeps ε over steps, the other draws "
                "several per step; leave one of them out.",
            )
        if rho.every > 1 and rho.interval > 1:
            yield SettingError(
                ("rho.every", "rho.interval"),
                f"Invalid rho.every={rho.every} with rho.interval={rho.interval}: one keeps ε over the steps of a "
                "window, the other takes it away after the first; drop one of them.",
            )
        if not experiment.regularized:
            return
        if experiment.trainer.fsdp:
            settings = {"offload": experiment.trainer.offload, "prefix": "rho."}
            for key, message in errors_if_sharded(rho.mode, rho.scale, rho.per_rank, **settings).items():
                yield SettingError(("trainer.fsdp", f"rho.{key}"), message)
        if experiment.resume and rho.mode == "inplace":
            yield SettingError(
                ("resume", "rho.mode"),
                "Invalid resume=true with rho.mode=inplace: the drifted backbone is in no checkpoint, so the run "
                "cannot be continued; use rho.mode=copy or recompute, or overwrite=true.",
            )
        if model.quantize != "none" and rho.mode in ("copy", "inplace"):
            yield SettingError(
                ("model.quantize", "rho.mode"),
                f"Invalid rho.mode={rho.mode} with model.quantize={model.quantize}: a copy would take the memory that "
                "packing saves, and noise cannot be added to 4 bits; use rho.mode=recompute (or auto).",
            )

    def tied_to_processes(self, config: FlatConfig) -> str | None:
        if config.per_rank == (config.resample == "micro_batch"):  # one draw in all, or one for each micro-batch of all
            return None
        return (
            f"rho.per_rank={str(config.per_rank).lower()} with rho.resample={config.resample} draws a number of ε in a "
            "step that depends on it (rho.per_rank=true with rho.resample=micro_batch, and the defaults, do not)"
        )

    def regularizer(self, model: nn.Module, config: FlatConfig, seed: int) -> Regularizer:
        return FlatRegularizer(
            seed=seed, **{field.name: getattr(config, field.name) for field in fields(NoiseSettings)}
        )


class FlatRegularizer(FlatLoraCallback, Regularizer):
    """`FlatLoraCallback` with the hooks and the record of a run."""

    @property
    def state(self) -> object:
        return self.perturbation is not None and self.perturbation.perturbed

    @property
    def seconds(self) -> float:
        return self.perturbation.seconds if self.perturbation else 0.0

    def sigma_at(self, step: int) -> float:
        return self.perturbation.sigma_at(step)

    def record(self) -> dict[str, Any]:
        perturbation = self.perturbation
        if perturbation is None:
            return {}
        return {
            "mode": perturbation.mode,
            "layers": len(perturbation.layers),
            "drift": perturbation.drift(),
            "noise_sha256": self.noise_sha256,
        }
