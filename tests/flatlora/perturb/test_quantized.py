"""Flat-LoRA on a backbone of 4 bits: what layers read is dequant(W) + ε, and the packed bytes stay."""

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import run_exp
from flatlora.config.sections import ModelConfig
from flatlora.models import loading
from flatlora.noise import host, philox
from flatlora.perturb.epsilon import merged_row_norms_reference
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils.errors import ConfigError
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder

bitsandbytes = pytest.importorskip("bitsandbytes")


GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def model(tiny_model_folder, device):
    config = ModelConfig(
        name="tiny", hub_id=str(tiny_model_folder), family="causal_lm", dtype="float32", quantize="nf4"
    )
    torch.manual_seed(0)
    adapted = get_peft_model(loading.load_backbone(config, device), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted.train()


def expected_weights(layers, sigma, step, seed):
    """dequant(W) + ε, each row's std from the merged weight."""
    made = {}
    for layer in layers:
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        c = sigma / weight.shape[1] ** 0.5 * merged_row_norms_reference(weight, layer.adapters())
        z = torch.empty(weight.shape)
        host.fill_normal(z, philox.layer_key(seed, layer.name), step, 0, row=0)
        made[layer.name] = weight + c[:, None].float() * z.to(weight.device)
    return made


def test_a_layer_reads_its_dequantized_weight_plus_noise(model):
    layers = find_lora_layers(model)
    assert all(layer.quantized for layer in layers)
    assert layers[0].shape == (32, 32)
    assert layers[0].weight.shape != (32, 32)
    before = [layer.weight.detach().clone() for layer in layers]
    perturbation = WeightPerturbation(layers, sigma=0.3, total_steps=4, seed=1, ramp="constant")
    assert perturbation.mode == "recompute"
    perturbation.begin(2)
    weights = expected_weights(layers, 0.3, 2, 1)
    for index, layer in enumerate(layers):
        assert torch.allclose(perturbation.reading(index).weight(), weights[layer.name], atol=1e-5)
        x = torch.randn(3, layer.shape[1], device=layer.weight.device, requires_grad=True)
        y = layer.module(x)
        assert torch.allclose(y, x @ weights[layer.name].t(), atol=1e-4)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.allclose(gradient, 2 * y @ weights[layer.name], atol=1e-3)
    perturbation.end()
    x = torch.randn(3, layers[0].shape[1], device=layers[0].weight.device)
    assert torch.allclose(layers[0].module(x), x @ layers[0].dense().t(), atol=1e-4)
    perturbation.close()
    assert all(torch.equal(old, layer.weight) for old, layer in zip(before, layers, strict=True))


def test_an_evaluation_leaves_the_weights_readable(tiny_model_folder):
    """On a CPU with AVX512-BF16, bitsandbytes packs them anew in its first forward without gradients."""
    config = ModelConfig(
        name="tiny", hub_id=str(tiny_model_folder), family="causal_lm", dtype="bfloat16", quantize="nf4"
    )
    model = get_peft_model(
        loading.load_backbone(config, torch.device("cpu")), LoraConfig(r=4, target_modules="all-linear")
    )
    layers = find_lora_layers(model)
    before = [layer.dense().clone() for layer in layers]
    with torch.no_grad():
        model.eval()(torch.arange(3, 19)[None])
    assert all(torch.equal(layer.dense(), old) for layer, old in zip(layers, before, strict=True))


def test_validation_does_not_change_the_adapter(tiny_settings):
    settings = [word for word in tiny_settings if not word.startswith(("model.dtype", "dataset.validation"))]
    settings += ["model.quantize=nf4", "model.dtype=bfloat16", "trainer.max_steps=4", "dataset.validation_rows=4"]
    other = [word.replace("/results", "/often") for word in settings]
    assert run_exp.main([*settings, "optim.eval_steps=4"]) == 0
    assert run_exp.main([*other, "optim.eval_steps=1"]) == 0
    assert adapter_bytes(run_folder(settings)) == adapter_bytes(run_folder(other))


def test_products_in_another_dtype_are_cast_as_the_layer_does(tiny_model_folder):
    config = ModelConfig(
        name="tiny", hub_id=str(tiny_model_folder), family="causal_lm", dtype="bfloat16", quantize="nf4"
    )
    model = get_peft_model(
        loading.load_backbone(config, torch.device("cpu")), LoraConfig(r=4, target_modules="all-linear")
    ).train()
    layers = find_lora_layers(model)
    perturbation = WeightPerturbation(layers, sigma=0.3, total_steps=4, seed=1, ramp="constant")
    perturbation.begin(0)
    y = layers[0].module(torch.randn(3, 32))
    assert y.dtype == torch.float32
    perturbation.close()


@pytest.mark.parametrize("mode", ["copy", "inplace"])
def test_other_modes_are_rejected(model, mode):
    with pytest.raises(ValueError, match=f"Invalid mode={mode} with packed weights"):
        WeightPerturbation(find_lora_layers(model), sigma=0.1, total_steps=2, seed=0, mode=mode)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rho=flat", "rho.mode=copy"], "Invalid rho.mode=copy with model.quantize=nf4"),
        (["rho=flat", "rho.mode=inplace"], "Invalid rho.mode=inplace with model.quantize=nf4"),
        (["peft=pissa"], "Invalid model.quantize=nf4 with peft=pissa"),
        (["peft=lora_ga"], "Invalid model.quantize=nf4 with peft=lora_ga"),
        (["peft=full_ft"], "Invalid model.quantize=nf4 with peft=full_ft"),
        (["model=clip_tiny", "dataset=digits"], "Invalid model.quantize=nf4 with model=clip_tiny"),
    ],
)
def test_what_4_bits_cannot_do_is_rejected_before_anything_is_loaded(words, message):
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of(["model.quantize=nf4", *words])
    (reported,) = caught.value.errors
    assert reported.startswith(message)


def test_a_missing_package_is_named(tiny_settings, monkeypatch, capsys):
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else plain(name, *a)
    )
    assert run_exp.main([*tiny_settings, "model.quantize=nf4"]) == 2
    assert "the package bitsandbytes is not installed; run pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_run_leaves_the_packed_bytes_and_resumes(tiny_settings, monkeypatch, device):
    settings = [*tiny_settings, f"trainer.device={device}", "model.quantize=nf4", "rho=flat", "rho.sigma=0.3"]
    settings += ["trainer.save_steps=2"]
    assert run_exp.main(settings) == 0
    whole = run_folder(settings)
    record = json.loads((whole / "run.json").read_text())
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"] is not None
    assert record["perturbation"]["mode"] == "recompute"
    die_at(3, monkeypatch)
    again = [word.replace("/results", "/again") for word in settings]
    with pytest.raises(Killed):
        run_exp.main(again)
    monkeypatch.undo()
    assert run_exp.main([*again, "resume=true"]) == 0
    assert adapter_bytes(run_folder(again)) == adapter_bytes(whole)
    assert metrics_rows(run_folder(again)) == metrics_rows(whole)


@pytest.mark.extra
def test_a_sweep_of_steps_differs_from_plain_training(tiny_settings):
    assert run_exp.main([*tiny_settings, "model.quantize=nf4", "trainer.max_steps=2"]) == 0
    other = [word.replace("/results", "/flat") for word in tiny_settings]
    assert run_exp.main([*other, "model.quantize=nf4", "trainer.max_steps=2", "rho=flat", "rho.ramp=constant"]) == 0
    assert adapter_bytes(run_folder(tiny_settings)) != adapter_bytes(run_folder(other))
