"""SAM, nBAR and oBAR, Bi-LoRA: each against its equations, on models and in whole runs."""

import json

import pytest
import torch
from peft import LoraConfig
from torch import nn

import run_exp
from flatlora import methods
from flatlora.config.sections import RhoConfig
from flatlora.methods.regularizers.bar import BarRegularizer
from flatlora.methods.regularizers.bi_lora import ASCENT, BiLoraConfig
from flatlora.methods.regularizers.sam import SamRegularizer
from flatlora.optim.lora_pro import Pair, lora_pairs
from flatlora.train.trainer import FlatTrainer
from tests.conftest import adapter_bytes, metrics_rows, run_folder, tiny_lora
from tests.methods_toolbox import batches_of, gradient, logits, trained


def test_sam_is_two_explicit_gradient_calls():
    model, batches = tiny_lora(), list(batches_of(2))
    start = [p.detach().clone() for p in trained(model)]
    first = gradient(model, batches)
    norm = torch.sqrt(sum(g.double().square().sum() for g in first)).float()
    with torch.no_grad():
        for parameter, g in zip(trained(model), first, strict=True):
            parameter.add_(0.7 * g / norm)
    expected = gradient(model, batches)
    with torch.no_grad():
        for parameter, value in zip(trained(model), start, strict=True):
            parameter.copy_(value)

    gradient(model, batches)
    sam = SamRegularizer(0.7)
    sam.ascend(trained(model))
    moved = torch.sqrt(sum((p - s).square().sum() for p, s in zip(trained(model), start, strict=True)))
    assert moved.item() == pytest.approx(0.7, rel=1e-5)
    second = gradient(model, batches)
    sam.descend()
    for parameter, value, got, wanted, plain in zip(trained(model), start, second, expected, first, strict=True):
        assert torch.equal(parameter, value)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(got, plain, rtol=1e-3)


def test_sam_in_the_trainer_takes_every_micro_batch_twice(tiny_settings, monkeypatch):
    """Four micro-batches a step: the second gradient is that of the whole batch, at the point of the first."""
    taken, points = [], []
    plain = FlatTrainer._micro_step

    def watch(trainer, model, inputs, items):
        taken.append(inputs["input_ids"].clone())
        points.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
        return plain(trainer, model, inputs, items)

    monkeypatch.setattr(FlatTrainer, "_micro_step", watch)
    words = [*tiny_settings, "rho=sam", "rho.sigma=0.5", "trainer.micro_batch_size=1", "trainer.max_steps=2"]
    assert run_exp.main(words) == 0
    assert len(taken) == 16
    for step in (0, 8):
        assert all(torch.equal(a, b) for a, b in zip(taken[step : step + 4], taken[step + 4 : step + 8], strict=True))
        assert all(torch.equal(points[step], point) for point in points[step : step + 4])
        assert all(torch.equal(points[step + 4], point) for point in points[step + 4 : step + 8])
        assert (points[step + 4] - points[step]).norm().item() == pytest.approx(0.5, rel=1e-4)
    record = json.loads((run_folder(words) / "run.json").read_text())
    assert record["perturbation"] == {"gradients_a_step": 2}


@pytest.mark.extra
def test_sam_does_not_depend_on_how_a_batch_is_cut(tiny_settings):
    rows = []
    for size in (1, 4):
        words = [f"{word}-{size}" if word.startswith("results_root=") else word for word in tiny_settings]
        words += ["rho=sam", "rho.sigma=0.2", f"trainer.micro_batch_size={size}"]
        assert run_exp.main(words) == 0
        rows.append(metrics_rows(run_folder(words)))
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("by", ["gradient", "norm"])
def test_bar_keeps_the_product_to_first_order_and_balances(by):
    generator = torch.Generator().manual_seed(0)
    A, B = (nn.Parameter(scale * torch.randn(4, 4, generator=generator)) for scale in (1.0, 3.0))
    A.grad, B.grad = torch.full((4, 4), 1.0), torch.full((4, 4), 0.1)
    product, before = (B @ A).detach(), (A.norm().item(), B.norm().item())
    alpha, lr = 0.5, 0.1
    BarRegularizer([Pair("layer", A, B, 1.0)], alpha, by=by).rescale(alpha, lr)
    torch.testing.assert_close(B @ A, (1 - (alpha * lr) ** 2) * product)
    assert A.norm().item() == pytest.approx((1 + alpha * lr) * before[0], rel=1e-5)  # g_A is larger, and A smaller
    assert B.norm().item() == pytest.approx((1 - alpha * lr) * before[1], rel=1e-5)
    A.grad, B.grad = B.grad, A.grad
    with torch.no_grad():
        A.mul_(10)
    before = A.norm().item()
    BarRegularizer([Pair("layer", A, B, 1.0)], alpha, by=by).rescale(alpha, lr)
    assert A.norm().item() == pytest.approx((1 - alpha * lr) * before, rel=1e-5)


def test_nbar_follows_sam_s_drift_of_balancedness():
    """½(‖A‖² − ‖B‖²) after a step of SAM moves the way that nBAR moves it, on a product of two vectors."""
    generator = torch.Generator().manual_seed(2)
    G = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    a = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    gA, gB = b.t() @ G, G @ a.t()
    norm, rho, lr = (gA.square().sum() + gB.square().sum()).sqrt(), 1e-3, 1e-3
    A_moved, B_moved = a + rho * gA / norm, b + rho * gB / norm
    sam = [a - lr * B_moved.t() @ G, b - lr * G @ A_moved.t()]
    plain = [a - lr * gA, b - lr * gB]
    balance = lambda A, B: 0.5 * (A.square().sum() - B.square().sum())  # noqa: E731
    drift = balance(*sam) - balance(*plain)
    A, B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    A.grad, B.grad = gA, gB
    BarRegularizer([Pair("layer", A, B, 1.0)], 0.1, by="gradient").rescale(0.1, lr)
    assert torch.sign(balance(A, B) - balance(a, b)) == torch.sign(drift)


@pytest.mark.extra
def test_bar_s_strength_falls_to_zero(tiny_settings):
    for name in ("nbar", "obar"):
        words = [f"{word}-{name}" if word.startswith("results_root=") else word for word in tiny_settings]
        words += [f"rho={name}", "rho.sigma=0.6"]
        assert run_exp.main(words) == 0
        sigmas = [row["sigma"] for row in metrics_rows(run_folder(words))]
        assert sigmas == pytest.approx([0.6 * (1 - step / 6) for step in range(6)])


def bi_lora_model(radius=0.05):
    model, config = tiny_lora(), BiLoraConfig(name="bi_lora", method="bi_lora", sigma=radius)
    methods.REGULARIZERS["bi_lora"].prepare(model, config, seed=0)
    return model, methods.REGULARIZERS["bi_lora"].regularizer(model, config, seed=0)


def branch_norm(model):
    squares = 0.0
    for module in model.modules():
        if ASCENT in getattr(module, "lora_A", {}):
            delta = module.scaling[ASCENT] * module.lora_B[ASCENT].weight @ module.lora_A[ASCENT].weight
            squares += delta.square().sum().item()
    return squares**0.5


def test_bi_lora_starts_at_the_weights_and_its_second_branch_climbs_inside_the_ball():
    model, bi_lora = bi_lora_model()
    plain = logits(tiny_lora())
    torch.testing.assert_close(logits(model), plain)
    model.train()
    batches = list(batches_of(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    bi_lora.extend_optimizer(optimizer, lr=0.02)  # only the second branch moves
    losses, norms = [], []
    for _ in range(12):
        optimizer.zero_grad()
        loss = sum(model(**batch).loss for batch in batches)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        bi_lora.clip()
        norms.append(branch_norm(model))
        assert norms[-1] <= 0.05 * (1 + 1e-5)
    assert norms[-1] == pytest.approx(0.05, rel=1e-4)  # the ball's surface is reached
    assert losses[-1] > losses[0]
    assert bi_lora.record()["ascent_norm"] == pytest.approx(0.05, rel=1e-4)
    with bi_lora.evaluating():
        torch.testing.assert_close(logits(model), plain)
    assert not torch.allclose(logits(model), plain, atol=1e-5)
    bi_lora.close()
    torch.testing.assert_close(logits(model), plain)
    assert list(model.peft_config) == ["default"]
    assert not [n for n, _ in model.named_parameters() if ASCENT in n]


@pytest.mark.extra
def test_bi_lora_in_a_run_descends_with_the_first_branch_and_saves_it_alone(tiny_settings, tiny_model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = [*tiny_settings, "rho=bi_lora", "rho.sigma=0.1", "trainer.save_steps=3"]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    record = json.loads((folder / "run.json").read_text())
    assert 0 < record["perturbation"]["ascent_norm"] <= 0.1 * (1 + 1e-5)
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    assert sorted(path.name for path in (folder / "adapter").iterdir() if path.is_dir()) == []
    assert (folder / "checkpoint-3" / ASCENT / "adapter_model.safetensors").is_file()
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), folder / "adapter")


@pytest.mark.extra
def test_sigma_zero_is_plain_lora_bit_for_bit_whatever_the_method(tiny_settings):
    found = []
    for name in ("off", "sam", "nbar", "obar", "bi_lora"):
        words = [f"{word}-{name}" if word.startswith("results_root=") else word for word in tiny_settings]
        words += [f"rho={name}"] + ([] if name == "off" else ["rho.sigma=0"])
        assert run_exp.main(words) == 0
        found.append(adapter_bytes(run_folder(words)))
    assert len(set(found)) == 1


def test_rslora_and_rank_patterns_are_taken_over_by_the_second_branch():
    from peft import get_peft_model

    from tests.conftest import tiny_llama

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"]))
    methods.REGULARIZERS["bi_lora"].prepare(model, BiLoraConfig(name="b", method="bi_lora", sigma=1.0), seed=0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling[ASCENT] == layer.scaling["default"] == 4.0
    assert len(lora_pairs(model)) == 4
    assert RhoConfig(name="sam", method="sam").sigma == 0.0
