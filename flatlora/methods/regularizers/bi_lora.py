"""Bi-LoRA: a second LoRA branch ascends while the first descends, with one backward for both.

    W₀ + s·B₁A₁ + s·B₂A₂,   (A₁, B₁) ← descent,   (A₂, B₂) ← ascent,   then rescaled if ‖s·B₂A₂‖_F > ρ

The second branch is SAM's adversarial perturbation in weight space, kept from step to step instead of computed with a
second gradient. It is dropped at the end, and evaluations during training do not use it. ρ is `rho.sigma`; the norm is
over all layers together, like SAM's ball. The second branch is plain LoRA without dropout, updated by AdamW at
`lr_ratio` times optim.lr without weight decay; gradients of both branches are clipped together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from flatlora.config.experiment import Experiment
from flatlora.config.sections import RhoConfig
from flatlora.config.settings import setting
from flatlora.methods.adapters.lora import seeded
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.utils.errors import SettingError
from flatlora.utils.shards import gathering_device

ASCENT = "ascent"  # name of the second adapter


class BiLoraConfig(RhoConfig):
    lr_ratio: float = setting(
        1.0, gt=0, le=1e6, remedy="it is the learning rate of the ascending branch over the other's; 1 is usual"
    )


@REGULARIZERS.register("bi_lora")
class BiLora(RhoMethod):
    Config = BiLoraConfig
    strength: ClassVar = Strength("radius ρ", {"Bi-LoRA paper": 0.05, "SuperGLUE and Qwen2.5-14B there": 0.1})
    not_sharded = None

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        yield from super().errors(experiment)
        if experiment.regularized and experiment.optim.optimizer == "adamw_8bit":
            yield SettingError(
                ("rho", "rho.method", "optim.optimizer"),
                "Invalid optim.optimizer=adamw_8bit with rho=bi_lora: bitsandbytes' optimizer cannot maximize, as the "
                "second branch needs; use optim.optimizer=adamw.",
            )

    def prepare(self, model: nn.Module, config: BiLoraConfig, seed: int) -> None:
        first = model.peft_config["default"]
        plain = LoraConfig(
            task_type=first.task_type,
            r=first.r,
            lora_alpha=first.lora_alpha,
            target_modules=first.target_modules,
            fan_in_fan_out=first.fan_in_fan_out,
            use_rslora=first.use_rslora,
            rank_pattern=dict(first.rank_pattern or {}),
        )
        with seeded(seed + 1, model):
            PeftModel.add_adapter(model, ASCENT, plain)  # a classifier's own method would add a second head too
        device = gathering_device(model)
        for name, parameter in model.named_parameters():
            if f".{ASCENT}." in name:
                parameter.data = parameter.data.to(device, torch.float32)
        model.base_model.set_adapter(["default", ASCENT])

    def regularizer(self, model: nn.Module, config: BiLoraConfig, seed: int) -> Regularizer:
        return BiLoraRegularizer(model, config.sigma, config.lr_ratio)


class BiLoraRegularizer(Regularizer):
    """Trains the adapter `ascent` of a PEFT model by gradient ascent and keeps it in its ball."""

    def __init__(self, model: nn.Module, radius: float, lr_ratio: float) -> None:
        self.model, self.radius, self.lr_ratio = model, radius, lr_ratio
        self.parameters = [p for n, p in model.named_parameters() if f".{ASCENT}." in n]
        self._norm: torch.Tensor | None = None

    def sigma_at(self, step: int) -> float:
        return self.radius

    def extend_optimizer(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Move the second branch to its own parameter group, which ascends."""
        ascending = {id(parameter) for parameter in self.parameters}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ascending]
        optimizer.add_param_group(
            {"params": self.parameters, "lr": lr * self.lr_ratio, "maximize": True, "weight_decay": 0.0}
        )

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.clip()

    @torch.no_grad()
    def clip(self) -> None:
        """Scale A₂ and B₂ of all layers by one factor, so that ‖s·B₂A₂‖_F ≤ ρ over all layers."""
        squares = [
            layer.scaling[ASCENT] ** 2 * ((B.mT @ B) * (A @ A.mT)).sum()
            for layer in self.layers()
            for A, B in [(layer.lora_A[ASCENT].weight.flatten(1), layer.lora_B[ASCENT].weight.flatten(1))]
        ]
        norm = torch.stack(squares).sum().clamp_min(0.0).sqrt()
        shrink = (self.radius / norm.clamp_min(1e-30)).clamp_max(1.0).sqrt()  # the root, since both factors are scaled
        for parameter in self.parameters:
            parameter.mul_(shrink)
        self._norm = torch.minimum(norm, torch.full_like(norm, self.radius))

    def layers(self) -> Iterator[LoraLayer]:
        """Layers that have the second branch."""
        return (m for m in self.model.modules() if isinstance(m, LoraLayer) and ASCENT in m.lora_A)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.base_model.set_adapter("default")
        try:
            yield
        finally:
            self.model.base_model.set_adapter(["default", ASCENT])

    def record(self) -> dict[str, Any]:
        return {"ascent_norm": self._norm.item() if self._norm is not None else 0.0, "radius": self.radius}

    def close(self) -> None:
        """Drop the second branch."""
        if ASCENT in self.model.peft_config:
            self.model.delete_adapter(ASCENT)
            self.model.base_model.set_adapter("default")
