"""HiRA and DeLoRA, whose changes of W are not s·B·A: against their equations, with noise, saved and loaded."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import run_exp
from flatlora import LoRAPro, find_lora_layers, lora_pairs, methods
from flatlora.fused.lora_linear import fuse
from flatlora.models import hashes, saved_adapters
from flatlora.noise import host
from flatlora.optim.lora_pro import product_pairs
from flatlora.perturb.epsilon import merged_row_norms, merged_row_norms_reference
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils.errors import ConfigError
from tests.conftest import tiny_llama
from tests.flatlora.methods.test_architectures import tiny_gpt2, tiny_t5
from tests.methods_toolbox import IDS, config_of, logits, nudge

NAMES = ["hira", "delora"]


def merged_by_hand(module, weight):
    """W' of one PEFT layer from its parameters, m × n, in FP64."""
    factors = {
        name.partition(".")[0]: p.detach().double() for name, p in module.named_parameters() if "_layer" not in name
    }
    if "hira_A" in factors:
        return weight * (1 + factors["hira_B"] @ factors["hira_A"])
    A, B, strength = factors["delora_A"], factors["delora_B"], factors["delora_lambda"]
    merged = weight.clone()
    for a, b in zip(A, B.t(), strict=True):
        update = torch.outer(b / b.norm(), a / a.norm()) * weight.norm(dim=0)
        merged += strength / len(A) * update
    return merged


def adapted_modules(model):
    return {layer.name: model.base_model.model.get_submodule(layer.name) for layer in find_lora_layers(model)}


def with_merged_weights(model, backbone, *, noise=None):
    """`backbone` with W' in place of each adapted W; noise(name, W') → ε is added to it."""
    with torch.no_grad():
        for name, module in adapted_modules(model).items():
            weight = backbone.get_submodule(name).weight
            merged = merged_by_hand(module, weight.double())
            weight.copy_(merged if noise is None else merged + noise(name, merged))
    return backbone


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_adapter_computes_its_equation(name, adapt):
    model, _, _ = adapt(name)
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=0, atol=0)  # B = 0
    nudge(model, std=0.2)
    assert len(adapted_modules(model)) == 14
    expected = logits(with_merged_weights(model, tiny_llama()))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(tiny_llama()), atol=1e-2)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_the_start_is_peft_s_and_the_strength_the_setting(adapt):
    model, _, _ = adapt("delora", delora_lambda=3.0)
    for module in adapted_modules(model).values():
        assert module.delora_lambda["default"].item() == 3.0
        assert not module.delora_B["default"].any()
        assert module.delora_A["default"].any()
    again, _, _ = adapt("delora", delora_lambda=3.0)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_column_norms_are_fp32_whatever_the_backbone(adapt):
    model, _, _ = adapt("delora", dtype=torch.bfloat16)
    for module in adapted_modules(model).values():
        norms, weight = module.delora_w_norm["default"], module.get_base_layer().weight
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms, weight.float().norm(dim=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_fp32_and_the_saved_adapter_loads_in_plain_peft(name, dtype, adapt, tmp_path):
    model, config, start = adapt(name, dtype=dtype)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in trained)
    assert all(f".{name}_" in n for n in trained)
    nudge(model, std=0.2)
    expected = logits(model)
    methods.ADAPTERS[name].save(model, config, tmp_path, start)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path)), expected)
    loaded = saved_adapters.with_adapter(tiny_llama().to(dtype), tmp_path, family="causal_lm", name="tiny")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    untouched = tiny_llama().to(dtype).requires_grad_(False)
    assert hashes.backbone_sha256(loaded) == hashes.backbone_sha256(model) == hashes.backbone_sha256(untouched)


@pytest.mark.parametrize(("name", "make"), [("hira", tiny_gpt2), ("hira", tiny_t5), ("delora", tiny_t5)])
def test_other_architectures(name, make, tmp_path):
    model = methods.ADAPTERS[name].apply(make().requires_grad_(False), config_of(name), methods.Start(0))
    nudge(model, std=0.2)
    more = {"decoder_input_ids": IDS} if make is tiny_t5 else {}
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS, **more).logits
        methods.ADAPTERS[name].save(model, config_of(name), tmp_path, methods.Start(0))
        found = PeftModel.from_pretrained(make(), tmp_path).eval()(input_ids=IDS, **more).logits
        merged = model.merge_and_unload()(input_ids=IDS, **more).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_the_equation_does_not_hold_for_are_refused():
    with pytest.raises(ConfigError, match=r"Invalid peft=delora with transformer.h.0.attn.c_attn: .*Conv1D"):
        methods.ADAPTERS["delora"].check(tiny_gpt2(), config_of("delora"))
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = Doubled(32, 48, bias=False)
    with pytest.raises(ConfigError, match=r"Invalid peft=hira with model.layers.0.mlp.up_proj=Doubled \(1 in all\)"):
        methods.ADAPTERS["hira"].check(model, config_of("hira"))


@pytest.mark.parametrize("name", NAMES)
def test_row_norms_are_those_of_the_merged_weight(name, adapt):
    model, _, _ = adapt(name)
    nudge(model, std=0.3)
    modules = adapted_modules(model)
    for layer in find_lora_layers(model):
        expected = merged_by_hand(modules[layer.name], layer.weight.detach().double()).norm(dim=1)
        found = merged_row_norms(layer.weight.detach(), layer.adapters(), multiplied=layer.multiplies)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        reference = merged_row_norms_reference(layer.weight, layer.adapters(), multiplied=layer.multiplies)
        torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-6)


def loss_and_gradients(model, mode, sigma=0.3):
    model.eval()
    perturbation = WeightPerturbation(
        find_lora_layers(model), sigma=sigma, total_steps=10, seed=3, mode=mode, ramp="constant"
    )
    perturbation.begin(4)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    perturbation.close()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_added_to_the_merged_weight(name, adapt):
    """The oracle is a plain model of W' + ε with ε by the paper's formula, in every mode that is allowed."""

    def noise(layer, merged):
        c = 0.3 / merged.shape[1] ** 0.5 * merged.norm(dim=1)
        return c[:, None] * host.normal(3, 4, 0, layer, tuple(merged.shape)).double()

    def make():
        model, _, _ = adapt(name)
        nudge(model, std=0.2)
        return model

    oracle = with_merged_weights(make(), tiny_llama(), noise=noise).eval()
    expected = oracle(input_ids=IDS, labels=IDS).loss.item()
    modes = ["copy", "recompute", *(["inplace"] if name == "delora" else [])]
    results = [loss_and_gradients(make(), mode) for mode in modes]
    assert results[0][0] == pytest.approx(expected, rel=1e-5)
    assert loss_and_gradients(make(), "copy", sigma=0.0)[0] != pytest.approx(expected, rel=1e-4)
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(gradients[key], gradient) for key, gradient in results[0][1].items())
    if name == "hira":
        with pytest.raises(
            ValueError, match=r"mode=inplace with HiRA's layers, such as model.layers.0.self_attn.q_proj"
        ):
            loss_and_gradients(make(), "inplace")


def test_bar_and_rwp_read_hira_s_pairs_and_lora_pro_refuses_both(adapt):
    model, _, _ = adapt("hira")
    pairs = product_pairs(model)
    assert len(pairs) == 14
    assert {id(factor) for pair in pairs for factor in (pair.A, pair.B)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    for name, kind in (("hira", "HiRA"), ("delora", "DeLoRA")):
        model, _, _ = adapt(name)
        for read in (lora_pairs, LoRAPro):
            with pytest.raises(ConfigError, match=f"{kind} does not add s·B·A to the weight; use plain LoRA"):
                read(model)
        assert fuse(model) == 0


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["model.quantize=nf4"], "Invalid model.quantize=nf4 with peft={}: this method computes with W"),
        (
            ["model=sdxl_tiny", "dataset=shapes"],
            r"Invalid peft={} with model=sdxl_tiny \(text_to_image\): diffusers reads pairs",
        ),
        (["peft.lora_alpha=16"], r"Invalid peft\.lora_alpha=16 with peft={}: it is a key of peft=lora"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_choices_that_it_cannot_take_are_refused(name, words, reported):
    with pytest.raises(ConfigError, match=reported.format(name)):
        run_exp.experiment_of([*words, f"peft={name}"])


def test_noise_in_place_is_refused_with_hira():
    words = ["peft=hira", "rho=flat", "rho.mode=inplace"]
    with pytest.raises(ConfigError, match=r"Invalid rho.mode=inplace with peft=hira: .*copy or recompute"):
        run_exp.experiment_of(words)
    assert run_exp.experiment_of([*words, "rho.sigma=0"]).peft.name == "hira"
    assert run_exp.experiment_of(["peft=delora", *words[1:]]).peft.delora_lambda == 15


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("hira", "r", 10**9),
        ("hira", "rank_pattern", {"q_proj": -1}),
        ("delora", "r", "4"),
        ("delora", "delora_lambda", float("nan")),
        ("delora", "lambda_pattern", {"q_proj": "much"}),
    ],
)
def test_sizes_that_the_tensors_of_a_saved_adapter_do_not_have_are_refused(name, key, value, adapt, tmp_path):
    model, config, start = adapt(name, **({"delora_lambda": 2000.0} if name == "delora" else {}))
    methods.ADAPTERS[name].save(model, config, tmp_path, start)
    saved_adapters.check_adapter(tmp_path)  # a strength is no size
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"Invalid {key}"):
        saved_adapters.check_adapter(tmp_path)
