"""Measures of how flat the loss is around a model's weights in the full weight space.

With W' the merged weights of the layers that adapters act on (paper § 3.1) and L the mean loss of a token (or image):

    expected rise   E_ε L(W' + ε) − L(W'),  ε as Flat-LoRA draws it at a σ (paper section 3.3)
    landscape       L(W' + a·d₁ + b·d₂),  d random, each row of it as long as that row of W' (Li et al. 2018, § 4)
    top eigenvalue  of ∇² L by power iteration; trace of ∇² L by Hutchinson's estimator

All random numbers come from the noise stream, keyed by seed and layer. So two models of one architecture are measured
with the same directions, draws and probes, and their differences are paired. The streams differ from those of training,
so no model is measured with an ε that it was trained on. Weights are restored after each measure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flatlora.noise import host, philox
from flatlora.perturb.epsilon import Draw, epsilon_of
from flatlora.perturb.layers import PerturbedLayer
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils.labels import IGNORED_LABEL

Batch = Mapping[str, torch.Tensor]
FIRST_STREAM = philox.RESERVED_STREAMS  # recorded with each measure: other streams give other draws
_RISE, _DIRECTION, _PROBE, _START = (FIRST_STREAM + number for number in range(4))


def plain_layers(model: nn.Module, names: Sequence[str]) -> list[PerturbedLayer]:
    """The named linear layers of a model without adapters.

    Raises:
        ValueError: weights are not FP32 or FP64, and would round small shifts away.
    """
    layers = [PerturbedLayer(name, model.get_submodule(name)) for name in names]
    fine = (torch.float32, torch.float64)
    coarse = sorted({str(layer.stored_dtype) for layer in layers if layer.stored_dtype not in fine})
    if coarse or any(layer.quantized for layer in layers):
        raise ValueError(
            f"Invalid weights={', '.join(coarse) or 'packed'}: small shifts would be lost in their rounding; call "
            "flatlora.utils.precision.widen(model) first."
        )
    return layers


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """L over all batches: the mean over all tokens with a label, or all images."""
    counts = [_counted(model, batch) for batch in batches]
    losses = [model(**batch).loss.double() * count for batch, count in zip(batches, counts, strict=True)]
    return float(torch.stack(losses).sum()) / sum(counts)


def _counted(model: nn.Module, batch: Batch) -> int:
    labels = batch["labels"]
    if labels.dim() == 1:
        return len(labels)
    # A decoder does not predict the first token.
    shifted = labels if getattr(model.config, "is_encoder_decoder", False) else labels[:, 1:]
    return int((shifted != IGNORED_LABEL).sum())


def expected_rises(
    model: nn.Module,
    layers: Sequence[PerturbedLayer],
    batches: Sequence[Batch],
    sigma: float,
    *,
    draws: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Returns L(W' + ε) − L(W') for each draw of ε; their mean estimates the expected rise.

    `on_progress(1)` is called after each draw.
    """
    unperturbed = mean_loss(model, batches)
    perturbation = _MeasuringPerturbation(layers, sigma=sigma, total_steps=draws, seed=seed, ramp="constant")
    rises = []
    try:
        for step in range(draws):
            perturbation.begin(step)
            rises.append(mean_loss(model, batches) - unperturbed)
            perturbation.end()
            on_progress(1)
    finally:
        perturbation.close()
    return rises


class _MeasuringPerturbation(WeightPerturbation):
    """Draws ε as in training, but from a stream that no training uses."""

    def draw(self, index: int, micro_batch: int = 0) -> Draw:
        return dataclasses.replace(super().draw(index, micro_batch), stream=_RISE)


def landscape(
    model: nn.Module,
    layers: Sequence[PerturbedLayer],
    batches: Sequence[Batch],
    at: Sequence[float],
    *,
    dimensions: int,
    seed: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """Returns L on a grid in one or two dimensions, shape (len(at),) or (len(at), len(at)), FP64, on the host.

    Args:
        at: coordinates along each direction; 1 is the norm of W', row by row.
        dimensions: 1 or 2; rows of the result follow the first direction.
        on_progress: called with 1 after each point.
    """
    directions = [Direction(layers, seed, number) for number in range(dimensions)]
    grid = torch.empty([len(at)] * dimensions, dtype=torch.float64)
    with restored(layers) as originals:
        for point in itertools.product(range(len(at)), repeat=dimensions):
            _copy(originals, layers)
            for direction, index in zip(directions, point, strict=True):
                direction.add(at[index])
            grid[point] = mean_loss(model, batches)
            on_progress(1)
    return grid


class Direction:
    """One random filter-normalized direction through all layers: d_i = ‖W'_i‖ z_i / ‖z_i‖ of each row i.

    W' are the weights when the direction is created; z is the noise of step `number` in the stream of directions.
    """

    def __init__(self, layers: Sequence[PerturbedLayer], seed: int, number: int) -> None:
        self.layers, self.number = list(layers), number
        self.keys = [philox.layer_key(seed, layer.name) for layer in layers]
        self._epsilon = epsilon_of(self.layers, self.keys)
        self._lengths = [self._row_lengths(layer, key) for layer, key in zip(self.layers, self.keys, strict=True)]

    def add(self, amount: float) -> None:
        """W += amount · d, in place."""
        scaled = self._epsilon.restore([amount * lengths for lengths in self._lengths])
        draws = [Draw(key, self.number, _DIRECTION, c) for key, c in zip(self.keys, scaled, strict=True)]
        self._epsilon.write(draws, [layer.weight.detach() for layer in self.layers])

    def _row_lengths(self, layer: PerturbedLayer, key: tuple[int, int]) -> torch.Tensor:
        """‖W'_i‖ / ‖z_i‖ (m, FP32)."""
        rows = layer.as_rows(layer.dense())
        z = host.normal_like(rows, key, self.number, _DIRECTION)
        return (rows.double().norm(dim=1) / z.double().norm(dim=1)).float()


def direction_reference(layer: PerturbedLayer, seed: int, number: int) -> torch.Tensor:
    """Slow reference for `Direction`: d of one layer as a matrix (m × n, FP64), row by row."""
    rows = layer.as_rows(layer.dense()).double().cpu()
    z = torch.from_numpy(philox.normal_reference(seed, number, _DIRECTION, layer.name, tuple(rows.shape)))
    return torch.stack([row.norm() * z_row / z_row.norm() for row, z_row in zip(rows, z, strict=True)])


@dataclass(frozen=True)
class TopEigenvalue:
    """The Hessian's eigenvalue of largest magnitude, with its sign."""

    value: float
    iterations: int
    residual: float  # ‖Hv − λv‖ / |λ| for the unit vector v


class Hessian:
    """∇² L with respect to the layers' weights; products with vectors are exact, by a second backward pass.

    A vector has one tensor per layer (FP32, in the stored layout). Attention must be eager: the fused kernels have no
    second derivative.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PerturbedLayer], batches: Sequence[Batch]) -> None:
        self.model, self.layers, self.batches = model, list(layers), batches
        self._counts = [_counted(model, batch) for batch in batches]

    def times(self, vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns ∇² L · vector."""
        weights = [layer.weight for layer in self.layers]
        product = [torch.zeros_like(weight) for weight in weights]
        with _trained(weights):
            for batch, count in zip(self.batches, self._counts, strict=True):
                loss = self.model(**batch).loss * (count / sum(self._counts))
                gradient = torch.autograd.grad(loss, weights, create_graph=True)
                along = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
                for total, part in zip(product, torch.autograd.grad(along, weights), strict=True):
                    total += part
        return product

    def top_eigenvalue(
        self,
        *,
        seed: int,
        iterations: int = 50,
        tolerance: float = 1e-3,
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> TopEigenvalue:
        """Runs power iteration until the relative change of λ is at most `tolerance`.

        `on_progress(1)` is called after each iteration.
        """
        vector, value = _unit(self._random(seed, _START, 0)), math.inf
        for iteration in range(1, iterations + 1):  # noqa: B007  (on_progress in the end)
            product = self.times(vector)
            before, value = value, _dot(vector, product)  # Rayleigh quotient
            rest = [p - value * v for p, v in zip(product, vector, strict=True)]
            on_progress(1)
            if value == 0 or abs(value - before) <= tolerance * abs(value):
                break
            vector = _unit(product)
        return TopEigenvalue(value, iteration, math.sqrt(_dot(rest, rest)) / max(abs(value), 1e-30))

    def trace_samples(
        self, *, seed: int, probes: int, on_progress: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        """Returns vᵀ∇²L v for each probe v of random signs (Hutchinson 1990); their mean estimates the trace."""
        samples = []
        for number in range(probes):
            vector = [part.sign() for part in self._random(seed, _PROBE, number)]
            samples.append(_dot(vector, self.times(vector)))
            on_progress(1)
        return samples

    def _random(self, seed: int, stream: int, number: int) -> list[torch.Tensor]:
        parts = []
        for layer in self.layers:
            z = host.normal_like(layer.as_rows(layer.dense()), philox.layer_key(seed, layer.name), number, stream)
            parts.append(layer.as_stored(z).to(layer.dtype))
        return parts


def _unit(vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    norm = math.sqrt(_dot(vector, vector))
    return [part / norm for part in vector]


def _dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)))


@contextlib.contextmanager
def _trained(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Turn gradients of these weights on, and restore `requires_grad` afterwards."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)


@contextlib.contextmanager
def restored(layers: Sequence[PerturbedLayer]) -> Iterator[list[torch.Tensor]]:
    """Yields copies of the layers' weights and restores the weights from them at the end, also after an error."""
    originals = [layer.weight.detach().clone() for layer in layers]
    try:
        yield originals
    finally:
        _copy(originals, layers)


def _copy(originals: Sequence[torch.Tensor], layers: Sequence[PerturbedLayer]) -> None:
    for original, layer in zip(originals, layers, strict=True):
        layer.weight.detach().copy_(original)
