"""The fused LoRA layer against PEFT's forward and autograd in FP64; what it covers and what it leaves to PEFT."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora.fused import lora_linear
from flatlora.fused.lora_linear import FusedForward, fuse, groups_of, recompute_norm, unfuse
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from tests.conftest import tiny_llama, tiny_lora

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


class Siblings(nn.Module):
    """An attention's input side: three layers on one x, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 16, bias=True)
        self.k_proj = nn.Linear(24, 8, bias=False)
        self.v_proj = nn.Linear(24, 8, bias=False)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def siblings(dtype, device, **changes):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj"]} | changes
    model = get_peft_model(Siblings(), LoraConfig(**config)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(device)


def outputs_and_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), gradients | {"x": x.grad}


def test_outputs_and_gradients_are_autograds_in_fp64(device):
    model = siblings(torch.float64, device)
    x = torch.randn(2, 5, 24, dtype=torch.float64, device=device)
    y, gradients = outputs_and_gradients(model, x)
    assert fuse(model) == 3
    fused_y, fused_gradients = outputs_and_gradients(model, x)
    assert gradients.keys() == fused_gradients.keys()
    assert len(gradients) == 7
    torch.testing.assert_close(fused_y, y, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_has_no_gradient_and_x_is_kept_for_a_s_alone(device, frozen):
    model = siblings(torch.float64, device)
    x = torch.randn(2, 5, 24, dtype=torch.float64, device=device)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    y, gradients = outputs_and_gradients(model, x)
    fuse(model)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_y, fused_gradients = outputs_and_gradients(model, x)
    torch.testing.assert_close(fused_y, y, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == fused_gradients.keys()
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-12, atol=1e-12)
    assert any(tensor.shape == x.shape for tensor in kept) == (frozen == "lora_B")


def test_layers_of_one_input_are_computed_together(device, monkeypatch):
    model = siblings(torch.float32, device)
    fuse(model)
    calls = []
    apply = lora_linear._FusedLora.apply

    def counting(x, call, *factors):
        calls.append(len(call.branches))
        return apply(x, call, *factors)

    monkeypatch.setattr(lora_linear._FusedLora, "apply", counting)
    x = torch.randn(2, 24, device=device)
    model(x)
    assert calls == [3]
    model.base_model.model.k_proj(x.clone())  # another input: on its own, and nothing stale is handed out
    model(x)
    assert calls == [3, 1, 3]
    with torch.no_grad():
        left = model.base_model.model.q_proj(x)
        model.base_model.model.k_proj.lora_B["default"].weight.mul_(2)
        again = model(x)
    assert torch.equal(again[:, :16], left)


@pytest.mark.parametrize("way", ["forward", "hook", "pre-hook"])
def test_a_base_layer_that_another_library_wraps_is_called(device, way):
    """As PEFT calls it, also while a perturbation stands around the wrapped forward."""
    model = siblings(torch.float64, device)
    base = model.base_model.model.k_proj.base_layer
    if way == "forward":
        plain = base.forward
        base.forward = lambda x: 3 * plain(x)
    elif way == "hook":
        base.register_forward_hook(lambda module, inputs, y: 3 * y)
    else:
        base.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))
    x = torch.randn(2, 5, 24, dtype=torch.float64, device=device)
    results = []
    for fused in (False, True):
        if fused:
            fuse(model)
        perturbation = WeightPerturbation(find_lora_layers(model), sigma=0.2, total_steps=4, seed=1, mode="copy")
        results.append(outputs_and_gradients(model, x))
        perturbation.begin(3)
        results.append(outputs_and_gradients(model, x))
        perturbation.close()
    for plain, found in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(found[0], plain[0], rtol=1e-12, atol=1e-12)
        for name, gradient in plain[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(results[0][0], results[1][0])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_acts_on_the_branch_alone_and_its_gradient_sees_the_same_mask(device, dropout):
    model = siblings(torch.float64, device, lora_dropout=dropout, target_modules=["q_proj"]).train()
    fuse(model)
    x = torch.randn(64, 24, dtype=torch.float64, device=device, requires_grad=True)
    layer = model.base_model.model.q_proj

    def run(inputs):
        torch.manual_seed(3)
        return layer(inputs)

    base = layer.base_layer(x)
    dropped = ((run(x) - base).abs() > 0).double().mean()
    assert dropped == 1
    assert torch.autograd.gradcheck(run, (x[:3].detach().requires_grad_(),))
    model.eval()
    torch.testing.assert_close(run(x), layer.forward.plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_agrees_with_peft(device, dtype, autocast):
    results = []
    for fused in (False, True):
        model = tiny_lora(dtype).to(device).train()
        if fused:
            assert fuse(model) == 14
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS.to(device), labels=IDS.to(device)).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (fused_loss, fused_gradients) = results
    exact = dtype == torch.float32 and not autocast
    assert fused_loss == pytest.approx(loss, rel=1e-5 if exact else 1e-2)
    assert gradients.keys() == fused_gradients.keys()
    for name, gradient in gradients.items():
        assert fused_gradients[name].dtype == torch.float32
        error = (fused_gradients[name] - gradient).norm() / gradient.norm()
        assert error < (1e-4 if exact else 0.05), name


def step(model, mode, *, checkpointing=False, **changes):
    """Loss and gradients of a perturbed step with two micro-batches."""
    device = next(model.parameters()).device
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = {"sigma": 0.3, "total_steps": 10, "seed": 3, "ramp": "constant"} | changes
    perturbation = WeightPerturbation(find_lora_layers(model), mode=mode, **settings)
    perturbation.begin(4)
    losses = []
    for index in range(2):
        perturbation.next_micro_batch(index)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=IDS.to(device), labels=IDS.to(device)).loss
        loss.backward()
        losses.append(loss.item())
    perturbation.end()
    perturbation.close()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"resample": "micro_batch"}])
def test_modes_are_bit_identical_in_fused_layers(device, dtype, changes):
    results = {}
    for name, mode, checkpointing in [
        ("copy", "copy", False),
        ("recompute", "recompute", False),
        ("saving", "recompute", True),
    ]:
        model = tiny_lora(dtype).to(device).train()
        fuse(model)
        results[name] = step(model, mode, checkpointing=checkpointing, **changes)
    for name in ("recompute", "saving"):
        assert results[name][0] == results["copy"][0]
        for parameter, gradient in results["copy"][1].items():
            assert torch.equal(results[name][1][parameter], gradient), (name, parameter)
    plain = tiny_lora(dtype).to(device).train()
    fuse(plain)
    assert step(plain, "copy", sigma=0.0)[0] != results["copy"][0]


@pytest.mark.parametrize("mode", [None, "copy", "recompute"])
@pytest.mark.parametrize("fused", [True, False])
def test_outputs_may_be_changed_in_place_as_debertas_attention_does(device, mode, fused):
    def results(change):
        model, x = siblings(torch.float32, device), torch.arange(48.0, device=device).sin().view(1, 2, 24)
        if fused:
            assert fuse(model) == 3
        model.get_base_model().q_proj.register_forward_hook(lambda module, inputs, y: change(y.transpose(0, 1)))
        settings = {"sigma": 0.3, "total_steps": 10, "seed": 3, "ramp": "constant"}
        perturbation = WeightPerturbation(find_lora_layers(model), mode=mode, **settings) if mode else None
        if perturbation:
            perturbation.begin(4)
        y, gradients = outputs_and_gradients(model, x.expand(2, 2, 24).contiguous())
        if perturbation:
            perturbation.close()
        return y, gradients

    (y, gradients), (expected, others) = (
        results(lambda y: y.div_(3.0).transpose(0, 1)),
        results(lambda y: y.div(3.0).transpose(0, 1)),
    )
    assert torch.equal(y, expected)
    for name, gradient in others.items():
        assert torch.equal(gradients[name], gradient), name


def test_what_is_not_covered_goes_peft_s_way(device, caplog):
    model = siblings(torch.float32, device, use_dora=True)
    with caplog.at_level(logging.WARNING):
        assert fuse(model) == 0
    assert "3 LoRA layers keep PEFT's forward: 3 with a variant of LoRA" in caplog.text
    model = siblings(torch.float32, device)
    x = torch.randn(2, 24, device=device)
    with model.disable_adapter():
        plain = model(x)
    adapted = model(x)
    fuse(model)
    torch.testing.assert_close(model(x), adapted)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted)
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    torch.testing.assert_close(model(x), adapted)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x), adapted)  # the second adapter's B is zero
    unfuse(model)
    assert not any(isinstance(module.__dict__.get("forward"), FusedForward) for module in model.modules())


def test_saved_names_are_peft_s(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    names = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_managed_groups_add_their_gradients_in_place_and_follow_the_factors(device, dtype):
    plain, managed = (siblings(torch.float32, device).train() for _ in range(2))
    fuse(plain), fuse(managed)
    for model in (plain, managed):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
            else:
                parameter.grad = torch.zeros_like(parameter)
    for group in groups_of(managed):
        group.managed = True
    x = torch.randn(40, 24, device=device, dtype=dtype)
    for _ in range(2):
        for model in (plain, managed):
            lora_linear.refresh([cast for group in groups_of(model) for cast in group.casts()])
            for _ in range(2):
                model(x).float().square().sum().backward()
        for (name, a), (_, b) in zip(plain.named_parameters(), managed.named_parameters(), strict=True):
            if a.requires_grad:
                assert (a.grad - b.grad).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * a.grad.norm(), name
        with torch.no_grad():
            for model in (plain, managed):
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter -= 1e-3 * parameter.grad.sign()
                        parameter.grad.zero_()
    managed.eval()
    with torch.no_grad():
        for parameter in managed.parameters():
            parameter.mul_(0.5)
        fresh = managed(x)  # evaluation never reads the factors of the last step
        unfuse(managed)
        torch.testing.assert_close(fresh, managed(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_all_layers_are_cast_as_one_after_the_other(device, dtype):
    model = siblings(torch.float32, device).train()
    fuse(model)
    (group,) = groups_of(model)
    group.managed = True
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
    model(torch.randn(4, 24, device=device, dtype=dtype))
    (cast,) = group.casts()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    found = []
    for function in (lora_linear.refresh_reference, lora_linear.refresh):
        function([cast])
        found.append([cast.A.clone(), *(B.clone() for B in cast.Bs)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_norm_s_output_is_made_again_instead_of_kept(device):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(24), Siblings()

        def forward(self, x):
            return self.inner(self.norm(x))

    results = []
    for again in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(Block(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])).to(device)
        fuse(model.train())
        if again:
            recompute_norm(model.base_model.model.norm)
        kept: set[int] = set()
        x = torch.randn(6, 24, device=device, generator=torch.Generator(device).manual_seed(1))

        def keep(tensor, kept=kept):
            kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results.append(outputs_and_gradients(model, x))
        results.append(len(kept))
    (y, gradients), kept, (y_again, gradients_again), kept_again = results
    assert kept_again == kept - 1
    assert torch.equal(y, y_again)
    assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())
