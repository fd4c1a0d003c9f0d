"""LoRA-GA (NeurIPS 2024): initializes LoRA so that its first step is nearest to that of full fine-tuning.

G = U S Vᵀ, the mean gradient of W over a few batches (m×n):

    A₀ = m^¼/γ^½ · Vᵀ[:r],   B₀ = m^¼/γ^½ · U[:, r:2r],   W ← W − s·B₀·A₀,   s = α/√r

To first order a step of gradient descent then moves W by −η s² √m/γ · (the best rank-2r part of G). γ = 16 and s as in
rsLoRA are the published settings; the SVD is torch.svd_lowrank with q = 4r, as there.

Deviations: gradients are FP32 products of a layer's input and the gradient of its output, for every dtype of the
backbone; dropout is off while they are computed; singular vectors have their largest element positive, so that the
initial adapter does not depend on rounding. Layers are processed in groups whose gradients fit into `ga_memory_gib`,
with one pass over the batches per group. Processes share the batches, and their number changes the mean by rounding
alone. If FSDP2 shards the weights, each process still has the whole gradients of a group.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatlora.config.settings import setting
from flatlora.methods.adapters.computed_start import ComputedStart
from flatlora.methods.adapters.lora import LoraMethodConfig, find_targets, rank_of, rank_setting, seeded
from flatlora.methods.base import ADAPTERS, Start
from flatlora.models.starts import lora_layers
from flatlora.utils.shards import device_of


class LoraGaConfig(LoraMethodConfig):
    ga_batches: int = setting(8, ge=1, le=10**6, remedy="8 micro-batches are usual")  # of all processes
    ga_gamma: float = setting(16.0, gt=0, le=1e6, remedy="16 as published; a larger value starts closer to zero")
    ga_memory_gib: float = setting(4.0, gt=0, le=1e5, remedy="it limits the memory of the gradients of W")


@ADAPTERS.register("lora_ga")
class LoraGa(ComputedStart):
    Config = LoraGaConfig

    def needed_rank(self, rank: int, config: LoraGaConfig) -> tuple[int, str]:
        return 2 * rank, f"{rank_setting(config)}: A and B need r directions of a gradient each, {2 * rank} in all"

    def settings(self, model: nn.Module, config: LoraGaConfig) -> dict[str, Any]:
        return super().settings(model, config) | {"use_rslora": True}

    def begin(self, model: nn.Module, config: LoraGaConfig, start: Start) -> nn.Module:
        self.check(model, config)
        targets = {name: model.get_submodule(name) for name in find_targets(model, config.target_modules)}
        starts = {}
        for group in layer_groups(targets, config.ga_memory_gib * 2**30):
            gradients = mean_gradients(model, group, start.batches(config.ga_batches), start.rank, start.world_size)
            for name in group:
                with seeded(start.seed, model):
                    starts[name] = start_factors(gradients.pop(name), rank_of(model, config), config.ga_gamma)
        adapted = self.adapt(model, config, start)
        for name, layer in lora_layers(adapted):
            A, B = starts[name.removeprefix("base_model.model.")]
            layer.lora_A["default"].weight.data.copy_(A)
            layer.lora_B["default"].weight.data.copy_(B)
        return adapted


def start_factors(gradient: torch.Tensor, rank: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A₀ (r × n) and B₀ (m × r), FP32, for a mean gradient (m × n). Draws from torch's global generator."""
    m, n = gradient.shape
    U, _, V = torch.svd_lowrank(gradient.float(), q=min(4 * rank, m, n), niter=4)
    factor = m**0.25 / gamma**0.5
    A, B = V[:, :rank].t(), U[:, rank : 2 * rank]
    return factor * _with_signs(A, dim=1).contiguous(), factor * _with_signs(B, dim=0).contiguous()


def _with_signs(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Singular vectors with their largest element positive, since their signs in an SVD depend on rounding."""
    largest = vectors.gather(dim, vectors.abs().argmax(dim=dim, keepdim=True))
    return vectors * largest.sign()


def start_factors_reference(gradient: torch.Tensor, rank: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow reference for `start_factors`: the full SVD, in FP64."""
    U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    A = torch.stack([row * row[row.abs().argmax()].sign() for row in Vh[:rank]])
    B = torch.stack([column * column[column.abs().argmax()].sign() for column in U.t()[rank : 2 * rank]], dim=1)
    factor = gradient.shape[0] ** 0.25 / gamma**0.5
    return factor * A, factor * B


def layer_groups(layers: Mapping[str, nn.Module], budget_bytes: float) -> Iterator[dict[str, nn.Module]]:
    """Groups of layers, in order, whose FP32 gradients fit the budget; a group has at least one layer."""
    group: dict[str, nn.Module] = {}
    used = 0
    for name, layer in layers.items():
        size = 4 * layer.weight.numel()
        if group and used + size > budget_bytes:
            yield group
            group, used = {}, 0
        group[name], used = layer, used + size
    if group:
        yield group


def mean_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[dict[str, torch.Tensor]],
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, torch.Tensor]:
    """Gradient of the loss with respect to each layer's weight, mean over the batches: m × n, FP32, on every process.

    The weights stay frozen: a hook multiplies the gradient of a layer's output by its input, so that no gradients of
    other layers are computed.

    Args:
        batches: the same on every process; each computes its share of them.
    """
    totals = {
        name: torch.zeros(_rows_and_columns(layer), device=device_of(layer.weight), dtype=torch.float32)
        for name, layer in layers.items()
    }
    training, count = model.training, 0
    model.eval()
    try:
        with _gradients_flow(model):
            for group in _groups_of(world_size, batches):
                counts, batch = rank < len(group), group[min(rank, len(group) - 1)]
                with torch.enable_grad(), _collecting(layers, totals) if counts else contextlib.nullcontext():
                    model(**batch).loss.backward()  # on every process: with FSDP2 they gather the weights together
                count += len(group)
    finally:
        model.train(training)
    for total in totals.values():
        if world_size > 1:
            torch.distributed.all_reduce(total)
        total.div_(count)
    return totals


def _groups_of(size: int, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[list[dict[str, torch.Tensor]]]:
    left = iter(batches)
    while group := list(itertools.islice(left, size)):
        yield group


def _rows_and_columns(layer: nn.Module) -> Sequence[int]:
    return layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape


@contextlib.contextmanager
def _gradients_flow(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters and start the autograd graph at the outputs of embeddings and of `first_layers`."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]  # an encoder-decoder has several
    handles = [
        module.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        for module in [*embeddings, *getattr(model, "first_layers", ())]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _collecting(layers: Mapping[str, nn.Module], totals: Mapping[str, torch.Tensor]) -> Iterator[None]:
    def hook_of(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
                output.register_hook(lambda grad: _add_product(totals[name], grad, rows))

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_product(total: torch.Tensor, grad: torch.Tensor, rows: torch.Tensor) -> None:
    total.addmm_(grad.reshape(-1, grad.shape[-1]).float().t(), rows.float())
