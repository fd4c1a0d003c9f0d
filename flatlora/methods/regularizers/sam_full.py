"""SAM over the full weights of the adapted layers (Flat-LoRA paper, section 4.7), adapters descending.

    g = ∇_W L at W + s·B·A over all micro-batches of the step,   ε = ρ g/‖g‖,   (A, B) descend along ∇L at W + s·B·A + ε

The norm is taken over all adapted layers together. ρ is `rho.sigma`. A step costs two gradients, and the first one
needs memory for a gradient of each adapted weight and a copy of it, in the backbone's dtype: what Flat-LoRA avoids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from flatlora.config.experiment import Experiment
from flatlora.config.sections import RhoConfig
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.perturb.layers import find_lora_layers
from flatlora.utils.errors import SettingError

logger = logging.getLogger(__name__)


@REGULARIZERS.register("sam_full")
class SamFull(RhoMethod):
    strength: ClassVar = Strength("radius ρ", {"Flat-LoRA paper": 0.05})
    reads_gradients: ClassVar[bool] = True
    needs_plain_layers: ClassVar[bool] = True  # the fused ones make no gradient of W

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        yield from super().errors(experiment)
        if experiment.regularized and experiment.model.quantize != "none":
            yield SettingError(
                ("rho", "rho.method", "model.quantize"),
                f"Invalid model.quantize={experiment.model.quantize} with rho={experiment.rho.name}: it moves W along "
                "its gradient, which packed weights have none of; use model.quantize=none, or rho=sam.",
            )

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        return SamFullRegularizer(model, config.sigma)


class SamFullRegularizer(Regularizer):
    """Moves the frozen weights by ρ g/‖g‖ for the second gradient, and back to the same bytes.

    Args:
        model: PEFT model with LoRA layers.
        radius: ρ > 0.
    """

    second_gradient = True

    def __init__(self, model: nn.Module, radius: float) -> None:
        self.radius = radius
        self.weights = [layer.weight for layer in find_lora_layers(model)]
        self._origins: list[torch.Tensor] = []

    @property
    def extra_bytes(self) -> int:
        """Memory of the gradients and the copies."""
        return sum(2 * weight.numel() * weight.element_size() for weight in self.weights)

    def sigma_at(self, step: int) -> float:
        return self.radius

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        logger.info("rho=sam_full: gradients and copies of W take %.2f GiB.", self.extra_bytes / 2**30)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        for weight in self.weights:
            weight.requires_grad_(True)

    @torch.no_grad()
    def ascend(self, parameters: Sequence[nn.Parameter]) -> None:
        gradients = [weight.grad for weight in self.weights]
        if torch.distributed.is_initialized():  # DDP reduces gradients of what was trained when it was made
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient.div_(torch.distributed.get_world_size())
        norm = torch.linalg.vector_norm(torch.stack([gradient.float().norm() for gradient in gradients]))
        factor = self.radius / norm.clamp_min(1e-12)  # a gradient of zero moves nothing
        for weight, gradient in zip(self.weights, gradients, strict=True):
            self._origins.append(weight.detach().clone())
            weight.add_((gradient * factor).to(weight.dtype))
        self._freeze()

    @torch.no_grad()
    def descend(self) -> None:
        for weight, origin in zip(self.weights, self._origins, strict=False):  # an interrupt may have left a part
            weight.copy_(origin)
        self._origins = []

    def _freeze(self) -> None:
        for weight in self.weights:
            weight.requires_grad_(False)
            weight.grad = None

    def record(self) -> dict[str, Any]:
        return {"gradients_a_step": 2, "layers": len(self.weights), "extra_bytes": self.extra_bytes}

    def close(self) -> None:
        self.descend()
        self._freeze()
