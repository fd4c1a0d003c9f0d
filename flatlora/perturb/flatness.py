"""How flat the loss is around a model's weights, in the full weight space: what Flat-LoRA is to improve.

With W' the merged weights of the layers that adapters act on (paper § 3.1), L the mean loss of a token (or image):

    expected rise   E_ε L(W' + ε) − L(W'),  ε as Flat-LoRA draws it at a σ (paper section 3.3)
    landscape       L(W' + a·d₁ + b·d₂),  d random, each row of it as long as that row of W' (Li et al. 2018, § 4)
    top eigenvalue  of ∇² L by power iteration; trace of ∇² L by Hutchinson's probes

Every random number is host.py's, keyed by seed and layer, in streams of their own: two models of one architecture are
measured along the same directions, draws and probes, so that their differences are paired, and no model is measured on
an ε that it was trained on. Weights are put back after each measure.
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
FIRST_STREAM = philox.RESERVED_STREAMS  # kept with what was measured: other streams, other draws
_RISE, _DIRECTION, _PROBE, _START = (FIRST_STREAM + number for number in range(4))


def plain_layers(model: nn.Module, names: Sequence[str]) -> list[PerturbedLayer]:
    """The named linear layers of a model without adapters.

    Raises:
        ValueError: weights that cannot be shifted by a little: not FP32 or FP64.
    """
    layers = [PerturbedLayer(name, model.get_submodule(name)) for name in names]
    fine = (torch.float32, torch.float64)
    coarse = sorted({str(layer.stored_dtype) for layer in layers if layer.stored_dtype not in fine})
    if coarse or any(layer.quantized for layer in layers):
        raise ValueError(
            f"Invalid weights={', '.join(coarse) or 'packed'}: a small step would be lost in their rounding; call "
            "flatlora.utils.precision.widen(model) first."
        )
    return layers


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """L over all batches: of each token that counts, or image, alike."""
    counts = [_counted(model, batch) for batch in batches]
    losses = [model(**batch).loss.double() * count for batch, count in zip(batches, counts, strict=True)]
    return float(torch.stack(losses).sum()) / sum(counts)


def _counted(model: nn.Module, batch: Batch) -> int:
    labels = batch["labels"]
    if labels.dim() == 1:
        return len(labels)
    shifted = labels if getattr(model.config, "is_encoder_decoder", False) else labels[:, 1:]  # nothing tells the first
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
    """L(W' + ε) − L(W') of each draw of ε; their mean estimates the expected rise.

    `on_progress(1)` is called after each.
    """
    at_rest = mean_loss(model, batches)
    perturbation = _MeasuringPerturbation(layers, sigma=sigma, total_steps=draws, seed=seed, ramp="constant")
    rises = []
    try:
        for step in range(draws):
            perturbation.begin(step)
            rises.append(mean_loss(model, batches) - at_rest)
            perturbation.end()
            on_progress(1)
    finally:
        perturbation.close()
    return rises


class _MeasuringPerturbation(WeightPerturbation):
    """ε as in training, from a stream that no training draws from, whatever its seed."""

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
    """L at each place of a grid of `at` in one or two dimensions: len(at) or len(at) × len(at), FP64, on the host.

    1 is the length of W' itself, row by row. Rows of the result follow the first direction.
    """
    directions = [Direction(layers, seed, number) for number in range(dimensions)]
    grid = torch.empty([len(at)] * dimensions, dtype=torch.float64)
    with restored(layers) as originals:
        for place in itertools.product(range(len(at)), repeat=dimensions):
            _copy(originals, layers)
            for direction, index in zip(directions, place, strict=True):
                direction.add(at[index])
            grid[place] = mean_loss(model, batches)
            on_progress(1)
    return grid


class Direction:
    """One random filter-normalized direction through all layers: d_i = ‖W'_i‖ z_i / ‖z_i‖ of each row i.

    W' is what the layers hold when the direction is made; z is the noise of step `number` in a stream of its own.
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
    """Slow twin of `Direction`: d of one layer as a whole matrix (m × n, FP64), row by row."""
    rows = layer.as_rows(layer.dense()).double().cpu()
    z = torch.from_numpy(philox.normal_reference(seed, number, _DIRECTION, layer.name, tuple(rows.shape)))
    return torch.stack([row.norm() * one / one.norm() for row, one in zip(rows, z, strict=True)])


@dataclass(frozen=True)
class TopEigenvalue:
    """The Hessian's eigenvalue of the largest magnitude, its sign kept."""

    value: float
    iterations: int
    residual: float  # ‖Hv − λv‖ / |λ| of a unit v


class Hessian:
    """∇² L with respect to the layers' weights, as a product with vectors: exact, by a second backward.

    A vector has one tensor (FP32, the stored layout) a layer. Attention must be eager: the fused kernels have no second
    derivative.
    """

    def __init__(self, model: nn.Module, layers: Sequence[PerturbedLayer], batches: Sequence[Batch]) -> None:
        self.model, self.layers, self.batches = model, list(layers), batches
        self._counts = [_counted(model, batch) for batch in batches]

    def times(self, vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """∇² L · vector."""
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
        """By power iteration, until λ changes by less than `tolerance` of itself.

        `on_progress(1)` is called after each iteration.
        """
        vector, value = _unit(self._random(seed, _START, 0)), math.inf
        for iteration in range(1, iterations + 1):  # noqa: B007  (on_progress in the end)
            product = self.times(vector)
            before, value = value, _dot(vector, product)  # Rayleigh's quotient
            rest = [p - value * v for p, v in zip(product, vector, strict=True)]
            on_progress(1)
            if value == 0 or abs(value - before) <= tolerance * abs(value):
                break
            vector = _unit(product)
        return TopEigenvalue(value, iteration, math.sqrt(_dot(rest, rest)) / max(abs(value), 1e-30))

    def trace_samples(
        self, *, seed: int, probes: int, on_progress: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        """vᵀ∇²L v of each probe v of random signs (Hutchinson 1990); their mean estimates the trace."""
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
    """Gradients of these weights, and back to what was."""
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
    """Copies of the layers' weights, which are put back in the end, whatever happens."""
    originals = [layer.weight.detach().clone() for layer in layers]
    try:
        yield originals
    finally:
        _copy(originals, layers)


def _copy(originals: Sequence[torch.Tensor], layers: Sequence[PerturbedLayer]) -> None:
    for original, layer in zip(originals, layers, strict=True):
        layer.weight.detach().copy_(original)
