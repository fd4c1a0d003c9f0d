"""ESAM on the adapter (ICLR 2022): SAM that moves a random share of the parameters and learns from a share of the rows.

    ε = ρ m⊙g/(β ‖g‖),   m draws each tensor with probability β,   descend along ∇L at θ + ε over the share γ of the
    rows of each micro-batch whose loss rose most from θ to θ + ε                                    θ: all A and B

ρ is `rho.sigma`, β `rho.weights_share`, γ `rho.rows_share`; both are one half in the Bi-LoRA paper. Deviation: rows are
selected within a micro-batch, and the second backward saves no time, for the rows that do not count are in it with
weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from flatlora.config.experiment import Experiment
from flatlora.config.sections import RhoConfig
from flatlora.config.settings import setting
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.methods.regularizers.sam import SamRegularizer
from flatlora.utils.errors import SettingError


class EsamConfig(RhoConfig):
    weights_share: float = setting(0.5, gt=0, le=1, remedy="it is a share of the adapter's tensors; 0.5 is usual")
    rows_share: float = setting(0.5, gt=0, le=1, remedy="it is a share of a micro-batch's rows; 0.5 is usual")


@REGULARIZERS.register("esam")
class Esam(RhoMethod):
    Config = EsamConfig
    strength: ClassVar = Strength("radius ρ", {"Bi-LoRA paper, of SAM": 0.01})
    reads_gradients: ClassVar[bool] = True
    not_sharded: ClassVar[str | None] = None
    needs_plain_layers: ClassVar[bool] = True  # the loss of each row is taken from all logits

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        yield from super().errors(experiment)
        if experiment.regularized and experiment.dataset.kind == "text_to_image":
            yield SettingError(
                ("rho", "rho.method", "dataset.kind"),
                f"Invalid rho={experiment.rho.name} with model={experiment.model.name}: it selects rows by their loss, "
                "and a diffusion model's is that of a random timestep; use rho=sam.",
            )

    def regularizer(self, model: nn.Module, config: EsamConfig, seed: int) -> Regularizer:
        return EsamRegularizer(config.sigma, config.weights_share, config.rows_share, seed)


class EsamRegularizer(SamRegularizer):
    """SAM over a random share of the tensors and the rows whose loss it raises most.

    Args:
        radius: ρ > 0.
        weights_share, rows_share: β and γ, in (0, 1].
        seed: of the choice of tensors, which is the same on all ranks.
    """

    reads_rows = True

    def __init__(self, radius: float, weights_share: float, rows_share: float, seed: int) -> None:
        super().__init__(radius)
        self.weights_share, self.rows_share, self.seed = weights_share, rows_share, seed
        self._step = 0
        self._before: list[torch.Tensor] = []  # losses of the rows at θ, one tensor a micro-batch

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._step, self._before = state.global_step, []

    def ascend(self, parameters: Sequence[nn.Parameter]) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._step)
        chosen = torch.rand(len(parameters), generator=generator) < self.weights_share
        super().ascend(parameters)
        with torch.no_grad():
            for (parameter, origin), is_chosen in zip(self._origins, chosen.tolist(), strict=True):
                parameter.copy_(origin + (parameter - origin) / self.weights_share if is_chosen else origin)

    def weigh_rows(self, losses: torch.Tensor) -> torch.Tensor:
        if not self._origins:
            self._before.append(losses.detach())
            return torch.ones_like(losses)
        rise = losses.detach() - self._before.pop(0)
        highest = rise.topk(math.ceil(self.rows_share * len(rise))).indices
        return torch.zeros_like(losses).index_fill(0, highest, 1.0)
