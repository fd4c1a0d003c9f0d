"""Every fast form of Flat-LoRA takes the steps of reference.py: all modes, the callback in a Trainer, fused layers."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from flatlora import FlatLoraCallback, WeightPerturbation, find_lora_layers, reference
from flatlora.fused.acceleration import accelerate
from flatlora.models.hashes import backbone_sha256
from scripts.train_step import backward_of, train_step
from tests.conftest import tiny_lora

SIGMA, STEPS, SEED, MICRO_BATCHES, LR = 0.3, 6, 5, 2, 1e-2


def batches() -> list[list[dict[str, torch.Tensor]]]:
    """STEPS × MICRO_BATCHES micro-batches of two rows; each row has as many labels as the others."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (STEPS, MICRO_BATCHES, 2, 12), generator=draws)
    return [[{"input_ids": part, "labels": part.clone()} for part in step] for step in ids]


def by_the_reference(model: nn.Module) -> list[float]:
    optimizer, losses = adamw(model), []
    for step, micro_batches in enumerate(batches()):
        epsilon = reference.draw(model, SIGMA, step, STEPS, SEED)
        losses.append(reference.train_step(model, optimizer, micro_batches, epsilon))
    return losses


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)


def by_hand(model: nn.Module, mode: str, device: torch.device) -> list[float]:
    """The loop of a user of `WeightPerturbation`."""
    layers = find_lora_layers(model)
    perturbation = WeightPerturbation(layers, sigma=SIGMA, total_steps=STEPS, seed=SEED, mode=mode)
    optimizer, losses = adamw(model), []

    def loss_of(batch):
        return model(**{key: value.to(device) for key, value in batch.items()}).loss / MICRO_BATCHES

    for step, micro_batches in enumerate(batches()):
        parts = train_step(backward_of(loss_of), micro_batches, optimizer, step=step, perturbation=perturbation)
        losses.append(sum(parts).item())
    perturbation.close()
    return losses


def assert_same_training(model: nn.Module, losses: list[float], **tolerance) -> None:
    expected = tiny_lora()
    torch.testing.assert_close(losses, by_the_reference(expected), **tolerance)
    wanted = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach().cpu(), wanted[name].detach(), **tolerance, msg=name)


def test_the_reference_learns_on_noise_and_leaves_w():
    model = tiny_lora()
    before = backbone_sha256(model)
    losses = by_the_reference(model)
    assert losses[-1] < losses[0]
    assert backbone_sha256(model) == before
    assert reference.draw(model, SIGMA, 0, STEPS, SEED).keys() == {layer.module for layer in find_lora_layers(model)}


def test_epsilon_has_the_std_of_the_paper():
    model = tiny_lora()
    for layer, epsilon in reference.draw(model, SIGMA, STEPS, STEPS, SEED).items():  # σ_T = σ
        merged = layer.weight.double() + next(
            module.get_delta_weight("default").double()
            for module in model.modules()
            if getattr(module, "base_layer", None) is layer
        )
        z = epsilon.double() / (SIGMA / merged.shape[1] ** 0.5 * merged.norm(dim=1, keepdim=True))
        assert abs(z.std().item() - 1) < 0.1
        assert abs(z.mean().item()) < 0.1


@pytest.mark.parametrize("mode", ["copy", "recompute", "inplace"])
def test_weight_perturbation(mode):
    model = tiny_lora()
    assert_same_training(model, by_hand(model, mode, torch.device("cpu")), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_fused_layers(mode, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny_lora().to(device)
    assert any("fused" in part for part in accelerate(model, torch.device(device)))
    assert_same_training(model, by_hand(model, mode, torch.device(device)), rtol=1e-3, atol=1e-5)


def test_the_callback_in_a_trainer(tmp_path):
    model = tiny_lora()
    rows = [
        {"input_ids": row, "labels": row.clone()} for step in batches() for part in step for row in part["input_ids"]
    ]
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(model, arguments, train_dataset=rows, callbacks=[FlatLoraCallback(SIGMA, seed=SEED)])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert_same_training(model, losses, rtol=1e-3, atol=1e-4)


class InOrder(Trainer):
    """A Trainer that takes its rows in their order."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)
