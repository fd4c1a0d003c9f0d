"""The optimizer step that benchmarks share, and ε as the published code adds it."""

import pytest
import torch
from torch import nn

from flatlora.perturb.epsilon import merged_row_norms_reference
from flatlora.perturb.layers import find_lora_layers
from scripts import bench_gpu
from scripts.train_step import backward_of, train_step
from tests.conftest import tiny_lora


class Recorded:
    def __init__(self, events):
        self.events = events

    def begin(self, step):
        self.events.append(f"begin {step}")

    def end(self):
        self.events.append("end")


def test_a_step_adds_up_its_micro_batches_and_clips_their_gradient():
    weight, events = nn.Parameter(torch.zeros(4)), []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: events.append("update"))

    def loss_of(batch):
        events.append("micro-batch")
        return (weight * batch).sum() + batch[0]

    batches = [torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0, 0.0])]
    losses = train_step(backward_of(loss_of), batches, optimizer, step=7, perturbation=Recorded(events), max_norm=1.0)
    assert events == ["begin 7", "micro-batch", "micro-batch", "end", "update"]
    assert [loss.item() for loss in losses] == [3.0, 0.0]
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8, 0.0, 0.0]))  # of norm 1, along −(3, 4)
    assert weight.grad is None


def test_the_published_contender_adds_noise_of_the_papers_strength_and_drifts(monkeypatch):
    monkeypatch.setattr(bench_gpu, "SIGMA", 0.5)
    model = tiny_lora(torch.bfloat16)
    layers = find_lora_layers(model)
    before = [layer.weight.detach().clone() for layer in layers]
    published = bench_gpu.Published(model)
    published.begin(3)
    for layer, weight in zip(layers, before, strict=True):
        c = 0.5 / weight.shape[1] ** 0.5 * merged_row_norms_reference(weight, layer.adapters())
        z = (layer.weight.detach().double() - weight.double()) / c[:, None]
        assert z.std().item() == pytest.approx(1.0, abs=0.1)
    published.end()
    changed = [(layer.weight != weight).float().mean().item() for layer, weight in zip(layers, before, strict=True)]
    assert all(0.0 < share < 0.5 for share in changed)  # (W + ε) − ε is not W in BF16, but close
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=0.02, atol=2e-3)
