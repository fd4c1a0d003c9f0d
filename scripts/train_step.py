"""One optimizer step without a Trainer, for benchmarks, the demo and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch


class Perturbation(Protocol):
    """`flatlora.WeightPerturbation`, or another implementation of training at W + ε."""

    def begin(self, step: int) -> None: ...

    def end(self) -> None: ...


MicroStep = Callable[[Any], torch.Tensor]  # micro-batch → its loss (0-d, detached); accumulates gradients


def backward_of(loss_of: Callable[[Any], torch.Tensor]) -> MicroStep:
    """Returns the micro-step of a loss function: forward and backward."""

    def micro_step(batch: Any) -> torch.Tensor:
        loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    return micro_step


def train_step(
    micro_step: MicroStep,
    micro_batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    step: int = 0,
    perturbation: Perturbation | None = None,
    max_norm: float | None = None,
) -> list[torch.Tensor]:
    """Take one optimizer step; returns the losses of its micro-batches.

    Args:
        step: number of the optimizer step, from 0, for the noise of `perturbation`.
        max_norm: maximum norm of the gradient; None does not clip.
    """
    if perturbation is not None:
        perturbation.begin(step)
    losses = [micro_step(batch) for batch in micro_batches]
    if perturbation is not None:
        perturbation.end()
    update(optimizer, max_norm)
    return losses


def update(optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> None:
    """Clip the gradients, step the optimizer, and zero the gradients."""
    if max_norm is not None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, max_norm)
    optimizer.step()
    optimizer.zero_grad()
