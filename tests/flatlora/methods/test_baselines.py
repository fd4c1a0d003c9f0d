"""Baselines of the papers: ROP, RWP_LoRA, SAM over W, LookSAM and ESAM, each against its equations."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import run_exp
from flatlora.experiment.commandline import compose_config
from flatlora.methods.regularizers.esam import EsamRegularizer
from flatlora.methods.regularizers.look_sam import LookSamRegularizer
from flatlora.methods.regularizers.rop import RopRegularizer
from flatlora.methods.regularizers.rwp_lora import RwpLoraRegularizer
from flatlora.methods.regularizers.sam_full import SamFullRegularizer
from flatlora.noise.philox import normal_reference
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils.labels import row_losses
from tests.conftest import metrics_rows, run_folder, tiny_lora
from tests.methods_toolbox import batches_of, gradient, trained

ARGUMENTS = SimpleNamespace(process_index=0, world_size=1, device="cpu", output_dir="none", resume_from_checkpoint=None)


def at(step):
    return SimpleNamespace(global_step=step, max_steps=10)


def test_rwp_lora_adds_noise_of_std_rho_to_both_factors_and_takes_it_away():
    model = tiny_lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    regularizer = RwpLoraRegularizer(model, 0.1, seed=3)
    regularizer.on_step_begin(ARGUMENTS, at(5), None)
    moved = 0
    for name, parameter in model.named_parameters():
        layer, _, factor = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".")
        if parameter.requires_grad:
            z = torch.from_numpy(normal_reference(3, 5, 0, f"{layer}.{factor}", tuple(parameter.shape)))
            torch.testing.assert_close(parameter.detach(), before[name] + 0.1 * z.float(), rtol=0, atol=2e-5)
            moved += 1
        else:
            assert torch.equal(parameter, before[name])
    assert moved == len(regularizer.factors) == 2 * len(find_lora_layers(model))
    regularizer.on_pre_optimizer_step(ARGUMENTS, at(5), None)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rop_perturbs_the_logits_of_training_passes_alone():
    model, (batch,) = tiny_lora(), list(batches_of(1))
    model.train()
    plain = model(**batch).logits
    regularizer = RopRegularizer(model, 0.3, seed=1)
    regularizer.on_train_begin(ARGUMENTS, at(0), None)
    regularizer.on_step_begin(ARGUMENTS, at(2), None)
    noise = []
    for _ in range(2):
        noise.append((model(**batch).logits - plain).detach() / 0.3)
        regularizer.on_substep_end(ARGUMENTS, at(2), None)
    z = normal_reference(1, 2, 1, "logits", (plain.shape[0] * plain.shape[1], plain.shape[2]))
    torch.testing.assert_close(noise[0].flatten(0, 1), torch.from_numpy(z).float(), rtol=0, atol=1e-3)
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)
    model.eval()
    assert torch.equal(model(**batch).logits, plain)
    model.train()
    regularizer.close()
    assert torch.equal(model(**batch).logits, plain)


def test_sam_full_takes_the_gradient_at_w_moved_along_its_own_gradient():
    model, batches = tiny_lora(), list(batches_of(2))
    weights = [layer.weight for layer in find_lora_layers(model)]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    loss = sum(model(**batch).loss for batch in batches)
    first = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    norm = torch.sqrt(sum(g.double().square().sum() for g in first)).float()
    with torch.no_grad():
        for weight, g in zip(weights, first, strict=True):
            weight.add_(0.7 * g / norm)
    wanted = gradient(model, batches)
    with torch.no_grad():
        for weight, origin in zip(weights, before, strict=True):
            weight.copy_(origin)
    plain = gradient(model, batches)

    regularizer, adapter = SamFullRegularizer(model, 0.7), trained(model)
    regularizer.on_step_begin(ARGUMENTS, at(0), None)
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    regularizer.ascend(trained(model))
    moved = torch.sqrt(sum((w - b).square().sum() for w, b in zip(weights, before, strict=True)))
    assert moved.item() == pytest.approx(0.7, rel=1e-5)
    assert [id(p) for p in trained(model)] == [id(p) for p in adapter]
    got = gradient(model, batches)
    regularizer.descend()
    assert all(torch.equal(w, b) and w.grad is None for w, b in zip(weights, before, strict=True))
    for ours, reference, unmoved in zip(got, wanted, plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(ours, unmoved, rtol=1e-3)


def test_look_sam_reuses_what_sam_finds_across_the_gradient():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(6, generator=generator))
    g, second, later = (torch.randn(6, generator=generator) for _ in range(3))
    regularizer = LookSamRegularizer([parameter], 0.1, every=2, reuse=0.7)
    regularizer.on_step_begin(ARGUMENTS, at(0), None)
    assert regularizer.second_gradient
    parameter.grad = g.clone()
    regularizer.ascend([parameter])
    parameter.grad = second.clone()
    regularizer.descend()
    regularizer.finish_gradient()
    assert torch.equal(parameter.grad, second)
    across = second - (second @ g) / (g @ g) * g
    assert (across @ g).abs() < 1e-5
    regularizer.on_step_begin(ARGUMENTS, at(1), None)
    assert not regularizer.second_gradient
    parameter.grad = later.clone()
    regularizer.finish_gradient()
    torch.testing.assert_close(parameter.grad, later + 0.7 * later.norm() / across.norm() * across)


def test_look_sam_goes_on_from_a_checkpoint_between_its_gradients(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(4))
    regularizer = LookSamRegularizer([parameter], 0.1, every=5, reuse=0.7)
    regularizer.on_step_begin(ARGUMENTS, at(0), None)
    parameter.grad = torch.tensor([1.0, 0, 0, 0])
    regularizer.ascend([parameter])
    parameter.grad = torch.tensor([1.0, 2, 0, 0])
    regularizer.descend()
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    regularizer.save_state(folder)
    resumed = LookSamRegularizer([parameter], 0.1, every=5, reuse=0.7)
    arguments = SimpleNamespace(**vars(ARGUMENTS) | {"output_dir": str(tmp_path)})
    resumed.on_train_begin(arguments, at(2), None)
    resumed.on_step_begin(arguments, at(2), None)
    parameter.grad = torch.tensor([3.0, 0, 4, 0])
    resumed.finish_gradient()
    torch.testing.assert_close(parameter.grad, torch.tensor([3.0, 0.7 * 5, 4, 0]))


def test_esam_moves_a_share_of_the_tensors_further():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(200)]
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    regularizer = EsamRegularizer(1.0, weights_share=0.25, rows_share=0.5, seed=0)
    regularizer.on_step_begin(ARGUMENTS, at(3), None)
    regularizer.ascend(parameters)
    moves = torch.cat([p.detach() for p in parameters])
    plain = 1 / 200**0.5
    assert sorted(moves.unique().tolist()) == pytest.approx([0.0, 4 * plain])
    assert 30 < int((moves > 0).sum()) < 70
    regularizer.descend()
    assert all(p.item() == 0 for p in parameters)


def test_esam_weighs_the_rows_whose_loss_rises_most():
    parameter = torch.nn.Parameter(torch.zeros(1))
    regularizer = EsamRegularizer(1.0, weights_share=1.0, rows_share=0.5, seed=0)
    regularizer.on_step_begin(ARGUMENTS, at(0), None)
    first = [torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0.0, 1.0])]
    assert all(torch.equal(regularizer.weigh_rows(losses), torch.ones(len(losses))) for losses in first)
    parameter.grad = torch.ones(1)
    regularizer.ascend([parameter])
    assert regularizer.weigh_rows(torch.tensor([2.0, 5.5, 2.1])).tolist() == [1, 1, 0]  # half of three is two
    assert regularizer.weigh_rows(torch.tensor([0.5, 2.0])).tolist() == [0, 1]


def test_row_losses_are_those_of_the_model():
    model, (batch,) = tiny_lora(), list(batches_of(1))
    outputs = model(**batch)
    sums, counts = row_losses(outputs.logits, batch["labels"], shifted=True)
    assert counts.tolist() == [9, 6]
    torch.testing.assert_close(sums.sum() / counts.sum(), outputs.loss)
    labels = torch.tensor([1, 0])
    sums, counts = row_losses(outputs.logits[:, 0], labels, shifted=False)
    torch.testing.assert_close(sums.mean(), functional.cross_entropy(outputs.logits[:, 0], labels))
    assert counts.tolist() == [1, 1]


def trained_by(words, tiny_settings, name):
    words = [f"{word}-{name}" if word.startswith("results_root=") else word for word in tiny_settings] + words
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    return (
        load_file(folder / "adapter/adapter_model.safetensors"),
        metrics_rows(folder),
        json.loads((folder / "run.json").read_text()),
    )


@pytest.mark.extra
def test_the_sam_family_agrees_where_its_members_are_sam(tiny_settings):
    """ESAM over all tensors and rows, and LookSAM with a second gradient in each step."""
    plain = ["trainer.kernels=off", "rho.sigma=0.2", "trainer.max_steps=3"]
    wanted, rows, _ = trained_by(["rho=sam", *plain], tiny_settings, "sam")
    for name, words in {
        "esam": ["rho=esam", "rho.weights_share=1", "rho.rows_share=1"],
        "look_sam": ["rho=look_sam", "rho.every=1"],
    }.items():
        got, ours, record = trained_by([*words, *plain], tiny_settings, name)
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
        for key, tensor in wanted.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-5)
        assert record["perturbation"]["gradients_a_step"] == 2


@pytest.mark.parametrize("mode", ["copy", "recompute", "inplace"])
def test_interval_perturbs_the_first_step_of_each_window_alone(mode):
    """The published code's T: all other steps read W, and the perturbed ones the ε of their own step."""
    model, (batch,) = tiny_lora(), list(batches_of(1))
    model.train()
    plain, losses = model(**batch).loss.item(), {}
    for interval in (1, 3):
        settings = {"sigma": 0.5, "ramp": "constant", "mode": mode, "interval": interval}
        perturbation = WeightPerturbation(find_lora_layers(model), total_steps=6, seed=2, **settings)
        for step in range(6):
            perturbation.begin(step)
            assert perturbation.perturbed == (step % interval == 0)
            assert perturbation.sigma_at(step) == (0.5 if step % interval == 0 else 0)
            losses[interval, step] = model(**batch).loss.item()
            perturbation.end()
        perturbation.close()
    for step in range(6):
        expected = losses[1, step] if step % 3 == 0 else plain
        assert losses[3, step] == pytest.approx(expected, rel=1e-6)
        assert losses[1, step] != pytest.approx(plain, rel=1e-5)


@pytest.mark.extra
def test_interval_in_a_run_is_recorded_step_by_step(tiny_settings):
    flat = ["rho=flat", "rho.sigma=0.3", "rho.ramp=constant", "rho.interval=3", "trainer.max_steps=6"]
    _, rows, _ = trained_by(flat, tiny_settings, "interval")
    assert [row["sigma"] for row in rows] == pytest.approx([0.3, 0, 0, 0.3, 0, 0])


@pytest.mark.extra
def test_baselines_run_and_leave_the_backbone(tiny_settings):
    for name in ("rop", "rwp_lora", "sam_full", "look_sam", "esam", "rwp_full"):
        _, rows, record = trained_by([f"rho={name}", "trainer.max_steps=4"], tiny_settings, name)
        assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
        assert len(rows) == 4
        assert rows[0]["sigma"] > 0


STRENGTHS = {  # as the papers have them
    "flat": {"clip_b32": 0.15, "t5base": 0.05, "llama": 0.05, "sdxl": 0.1},
    "sam": {"clip_b32": 0.003, "t5base": 0.003, "llama": 0.003},
    "sam_full": {"t5base": 0.05},
    "nbar": {"clip_b32": 0.25, "t5base": 0.25, "llama": 0.25},
    "obar": {"t5base": 0.25},
    "bi_lora": {"clip_b32": 0.05, "t5base": 0.05, "llama": 0.05, "sdxl": 0.05},
}


@pytest.mark.parametrize(("rho", "model", "sigma"), [(r, m, s) for r, of in STRENGTHS.items() for m, s in of.items()])
def test_each_regularizer_has_the_strength_of_its_paper(rho, model, sigma):
    raw = compose_config(run_exp.SUITE.conf_dir, [f"model={model}", f"rho={rho}"])
    assert raw["rho"]["sigma"] == sigma
    assert "strengths" not in raw


def test_a_strength_far_from_all_published_ones_is_named(capsys, tiny_settings):
    words = [*tiny_settings, "rho=sam", "rho.sigma=0.15", "dry_run=true"]
    assert run_exp.main(words) == 0
    message = "rho.sigma=0.15 is the radius ρ of rho=sam, and far from what papers use: 0.003 (Flat-LoRA paper), 0.01"
    assert message in " ".join(capsys.readouterr().err.split())
    assert run_exp.main([*tiny_settings, "rho=sam", "dry_run=true"]) == 0
    assert "far from" not in capsys.readouterr().err


def test_options_of_one_method_have_strengths_of_their_own(capsys, tiny_settings):
    for option, known in (
        ("rwp_full", "standard deviation ρ of rho=rwp_full, and far from what papers use: 0.0316"),
        ("flat_iid", "strength σ of rho=flat_iid, and far from what papers use: 0.05"),
    ):
        assert run_exp.main([*tiny_settings, f"rho={option}", "rho.sigma=0.9", "dry_run=true"]) == 0
        assert f"rho.sigma=0.9 is the {known}" in " ".join(capsys.readouterr().err.split())
