"""LoRA-GA: the gradient that it starts from, and that its first step is the best rank-2r step."""

import pytest
import torch

from flatlora import methods
from flatlora.methods.adapters.lora_ga import layer_groups, mean_gradients, start_factors, start_factors_reference
from flatlora.models import starts
from flatlora.utils.errors import ConfigError
from tests.conftest import tiny_llama
from tests.methods_toolbox import batches_of, config_of


def autograd_gradients(names, count=3):
    model = tiny_llama().double()
    for batch in batches_of(count):
        (model(**batch).loss / count).backward()
    return {name: model.get_submodule(name).weight.grad for name in names}


def targets(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}


def test_mean_gradients_are_autograd_s():
    model = tiny_llama().requires_grad_(False)
    layers = targets(model)
    got = mean_gradients(model, layers, batches_of(3))
    expected = autograd_gradients(layers)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm(), name
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("count", "size"), [(3, 2), (4, 3), (2, 3), (6, 3)])
def test_processes_share_the_batches_and_run_equally_many(monkeypatch, count, size):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: None)
    model, passes = tiny_llama().requires_grad_(False), []
    layers = targets(model)
    expected = mean_gradients(model, layers, batches_of(count))
    model.register_forward_hook(lambda *_: passes.append("forward"))
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (passes.append("backward"), backward(loss)))
    shares = []
    for rank in range(size):
        passes.clear()
        shares.append(mean_gradients(model, layers, batches_of(count), rank, size))
        assert passes == ["forward", "backward"] * -(-count // size)
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(share[name] for share in shares), gradient, rtol=1e-5, atol=1e-7)


def test_a_bf16_backbone_s_gradients_are_not_rounded_to_bf16():
    model = tiny_llama().bfloat16().requires_grad_(False)
    gradient = mean_gradients(model, targets(model), batches_of(2))["model.layers.1.mlp.down_proj"]
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_groups_keep_to_the_budget_and_take_every_layer_once():
    layers = targets(tiny_llama())
    sizes = {name: 4 * layer.weight.numel() for name, layer in layers.items()}
    groups = list(layer_groups(layers, 20_000))
    assert [name for group in groups for name in group] == list(layers)
    assert all(sum(sizes[name] for name in group) <= 20_000 for group in groups)
    assert len(groups) > 2
    assert [len(group) for group in layer_groups(layers, 1)] == [1] * len(layers)


@pytest.mark.extra
def test_groups_give_the_start_of_one_pass(adapt):
    whole, cut = adapt("lora_ga", folder="a")[0], adapt("lora_ga", folder="b", ga_memory_gib=1e-6)[0]
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, cut.state_dict()[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 12)])
def test_factors_are_the_singular_directions(shape):
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.diag(2.0 ** -torch.arange(min(shape)))
    U, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    V, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    gradient = U @ spectrum @ V.t()
    torch.manual_seed(0)
    for got, expected in zip(start_factors(gradient, 3, 16.0), start_factors_reference(gradient, 3, 16.0), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_first_step_is_the_best_rank_2r_part_of_the_gradient(adapt):
    model, config, _ = adapt("lora_ga", lora_r=3, ga_batches=3)
    expected = autograd_gradients(targets(tiny_llama()))
    layers = dict(starts.lora_layers(model))
    before = {
        name: (x.lora_A["default"].weight.clone(), x.lora_B["default"].weight.clone()) for name, x in layers.items()
    }
    for batch in batches_of(3):
        (model(**batch).loss / 3).backward()
    for name, layer in layers.items():
        A, B = before[name]
        scaling = layer.scaling["default"]
        assert scaling == pytest.approx(config.lora_alpha / 3**0.5)  # as in rsLoRA
        A_grad, B_grad = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        step = scaling * (B @ A_grad + B_grad @ A)  # to first order, over −η
        G = expected[name.removeprefix("base_model.model.")].float()
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        best = (U[:, :6] * S[:6]) @ Vh[:6]
        factor = scaling**2 * G.shape[0] ** 0.5 / config.ga_gamma
        assert (step - factor * best).norm() < 2e-2 * (factor * best).norm(), name


def test_needs_room_for_2r_directions():
    skeleton = tiny_llama()
    methods.ADAPTERS["lora"].check(skeleton, config_of("lora", lora_r=16))
    with pytest.raises(
        ConfigError, match=r"Invalid peft\.lora_r=17: A and B need r directions of a gradient each, 34 in all, but"
    ):
        methods.ADAPTERS["lora_ga"].check(skeleton, config_of("lora_ga", lora_r=17))
