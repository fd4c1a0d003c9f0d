"""ROP: random output perturbation, a baseline of the Bi-LoRA paper.

    logits + ε,   ε ~ N(0, ρ²) in each entry, drawn anew in each forward pass of the training

ρ is `rho.sigma`. Every rank and micro-batch has its own draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flatlora.config.experiment import Experiment
from flatlora.config.sections import RhoConfig
from flatlora.methods.base import REGULARIZERS, Regularizer, RhoMethod, Strength
from flatlora.noise import host, philox
from flatlora.utils.errors import SettingError


@REGULARIZERS.register("rop")
class Rop(RhoMethod):
    strength: ClassVar = Strength("standard deviation ρ", {"Bi-LoRA paper, Qwen2.5-14B": 0.0316})
    needs_plain_layers: ClassVar[bool] = True  # the fused head never holds all logits
    not_sharded: ClassVar[str | None] = None

    def errors(self, experiment: Experiment) -> Iterator[SettingError]:
        yield from super().errors(experiment)
        generates = experiment.dataset.kind == "text" and not experiment.model.traits.classifies
        if experiment.regularized and not generates:
            yield SettingError(
                ("rho", "rho.method", "dataset.kind", "model.family"),
                f"Invalid rho={experiment.rho.name} with model={experiment.model.name}: it perturbs the logits of a "
                "language model's head; use rho=flat, or a language model.",
            )

    def regularizer(self, model: nn.Module, config: RhoConfig, seed: int) -> Regularizer:
        return RopRegularizer(model, config.sigma, seed)


class RopRegularizer(Regularizer):
    """Adds noise to the output of the model's head in training passes.

    Args:
        model: has `get_output_embeddings`, as language models of transformers have.
        sigma: ρ > 0.
    """

    def __init__(self, model: nn.Module, sigma: float, seed: int) -> None:
        self.head, self.sigma = model.get_output_embeddings(), sigma
        self._key, self._step, self._micro_batch = philox.layer_key(seed, "logits"), 0, 0
        self._rank, self._world_size = 0, 1
        self._hook: RemovableHandle | None = None

    def sigma_at(self, step: int) -> float:
        return self.sigma

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.close()
        self._rank, self._world_size = args.process_index, args.world_size
        self._hook = self.head.register_forward_hook(self._add_noise)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._step, self._micro_batch = state.global_step, 0

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._micro_batch += 1

    def _add_noise(self, head: nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor | None:
        if not (head.training and torch.is_grad_enabled()):
            return None
        stream = philox.noise_stream(
            self._rank, self._micro_batch, self._world_size, per_rank=True, per_micro_batch=True
        )
        noise = host.normal_like(logits, self._key, self._step, stream)
        return logits + (self.sigma * noise).to(logits.dtype)

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
