"""Flat-LoRA in plain PyTorch: the whole method of the paper (section 3), in slow and obvious code.

    min over A, B of  E_ε L(W' + ε),   W' = W + s·B·A,   ε_ij ~ N(0, σ_t²/n · ‖W'_i‖²)

Row i is output filter i, n is the input dimension, and σ_t = σ · ½ (1 − cos π t/T) rises over the training. ε is drawn
once per optimizer step and shared by its micro-batches. `WeightPerturbation`, `FlatLoraCallback` and the fused step
compute the same faster and with less memory; the tests compare each of them with this file.

    for step, micro_batches in enumerate(batches):
        epsilon = draw(model, 0.05, step, total_steps, seed)
        loss = train_step(model, optimizer, micro_batches, epsilon)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from flatlora.noise.host import normal


@torch.no_grad()
def row_std(layer: LoraLayer, sigma_t: float) -> torch.Tensor:
    """The standard deviation c of ε in each row of a LoRA layer's weight (m × n), shape (m,); paper section 3.3."""
    merged = layer.base_layer.weight + layer.get_delta_weight("default")  # W' = W + s·B·A
    return sigma_t / math.sqrt(merged.shape[1]) * merged.norm(dim=1)  # c_i = σ_t/√n · ‖W'_i‖


def draw(model: nn.Module, sigma: float, step: int, total_steps: int, seed: int) -> dict[nn.Linear, torch.Tensor]:
    """Draws ε of one optimizer step: {frozen linear layer: tensor of the shape, dtype and device of its weight}.

    Args:
        model: a PEFT model with LoRA around `nn.Linear` layers.
        sigma: σ, the strength at the end of the ramp.
        step, total_steps: t, counted from 0, and T, in optimizer steps.
        seed: seed of the noise, which is a pure function of (seed, step, layer name, element).
    """
    sigma_t = sigma * 0.5 * (1 - math.cos(math.pi * step / total_steps))  # section 4, "cosine-increasing"
    epsilon = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight, c = layer.base_layer.weight, row_std(layer, sigma_t)
            z = normal(seed, step, 0, name.removeprefix("base_model.model."), tuple(weight.shape))  # z_ij ~ N(0, 1)
            epsilon[layer.base_layer] = (c[:, None] * z.to(c.device)).to(weight.dtype)  # ε_ij = c_i z_ij
    return epsilon


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[dict[str, torch.Tensor]],
    epsilon: dict[nn.Linear, torch.Tensor],
) -> float:
    """One optimizer step of the adapter at W + ε; returns the mean loss of its micro-batches. W is restored."""
    weights = {layer: layer.weight.detach().clone() for layer in epsilon}
    with torch.no_grad():
        for layer, noise in epsilon.items():
            layer.weight.add_(noise)  # W ← W + ε
    losses = []
    for batch in micro_batches:
        loss = model(**batch).loss / len(micro_batches)
        loss.backward()  # ∇_A, ∇_B of L(W' + ε)
        losses.append(loss.item())
    with torch.no_grad():
        for layer, weight in weights.items():
            layer.weight.copy_(weight)  # the same bytes; subtracting ε would round
    optimizer.step()
    optimizer.zero_grad()
    return sum(losses)
