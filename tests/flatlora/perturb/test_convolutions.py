"""Convolutions under the noise: a row is an output channel, n = c·kh·kw, and the modes agree as on linear layers."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora.methods import ADAPTERS, REGULARIZERS, Start
from flatlora.methods.adapters.lora import LoraMethodConfig, find_targets
from flatlora.models.hashes import backbone_sha256
from flatlora.noise import philox
from flatlora.perturb.epsilon import DeviceEpsilon, HostEpsilon, merged_row_norms, merged_row_norms_reference
from flatlora.perturb.flatness import Hessian, plain_layers
from flatlora.perturb.layers import PerturbedLayer, find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils.errors import ConfigError

MODES = ("copy", "recompute", "inplace")
NAMES = ("first", "strided", "even", "wrapped", "head")


class Net(nn.Module):
    """Convolutions of several kinds of padding and strides, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, padding="valid", bias=False)
        self.even = nn.Conv2d(6, 5, 2, padding="same")
        self.wrapped = nn.Conv2d(5, 7, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        for layer in (self.first, self.strided, self.even, self.wrapped, self.grouped):
            x = layer(x).relu()
        return self.head(x.mean(dim=(2, 3))).square().mean()


def adapted(dtype=torch.float32, names=NAMES):
    torch.manual_seed(3)
    model = get_peft_model(Net().to(dtype), LoraConfig(r=2, target_modules=list(names), init_lora_weights=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


def loss_and_gradients(model, mode, *, autocast=False, device="cpu", **settings):
    """Loss, gradient of the input and of the factors in one perturbed step."""
    settings = {"sigma": 0.3, "total_steps": 10, "seed": 1, "ramp": "constant"} | settings
    perturbation = WeightPerturbation(find_lora_layers(model), mode=mode, **settings)
    perturbation.begin(2)
    dtype = model.base_model.model.head.weight.dtype
    leaf = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = model(leaf * 2)
    loss.backward()
    perturbation.end()
    perturbation.close()
    return [loss.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_are_bit_identical(dtype, autocast):
    copy, recompute, inplace = (loss_and_gradients(adapted(dtype), mode, autocast=autocast) for mode in MODES)
    plain = loss_and_gradients(adapted(dtype), "copy", autocast=autocast, sigma=0.0)
    assert copy[0] != plain[0]
    for one, other, third in zip(copy, recompute, inplace, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layout", ["one picture", "contiguous", "channels last"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (2, 3), "padding": "same"},
        {"kernel_size": 3, "padding": (1, 0), "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_recomputed_convolutions_take_all_that_copies_take(settings, layout):
    """Also a trained bias: loss and all gradients have the same bits."""

    def gradients(mode):
        torch.manual_seed(3)
        model = get_peft_model(
            nn.Sequential(nn.Conv2d(4, 6, **settings)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        )
        (layer,) = find_lora_layers(model)
        layer.module.bias.requires_grad_(True)
        x = torch.randn(2, 4, 9, 9).contiguous(
            memory_format=torch.channels_last if layout == "channels last" else torch.contiguous_format
        )
        x = (x[0] if layout == "one picture" else x).requires_grad_()
        perturbation = WeightPerturbation([layer], mode=mode, sigma=0.3, total_steps=10, seed=1, ramp="constant")
        perturbation.begin(2)
        y = model(x)
        y.square().mean().backward()
        perturbation.close()
        return [y.detach(), x.grad, layer.module.bias.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    for one, other in zip(gradients("copy"), gradients("recompute"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_the_backbone_stays_and_sigma_zero_is_plain(mode):
    model = adapted()
    before = backbone_sha256(model)
    off = loss_and_gradients(model, mode, sigma=0.0)
    assert backbone_sha256(model) == before
    loss_and_gradients(model, mode)
    assert backbone_sha256(model) == before
    bare = adapted()
    leaf = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = bare(leaf * 2)
    loss.backward()
    assert torch.equal(off[0], loss.detach())
    assert torch.equal(off[1], leaf.grad)


def test_the_noise_is_its_references():
    """out = W + σ/√(c·kh·kw) · ‖W'_i‖ z, with z of the slow twin and W' as PEFT merges it."""
    model = adapted(names=("first", "strided"))
    for layer in find_lora_layers(model):
        module = model.base_model.model.get_submodule(layer.name)
        merged = (layer.weight + module.get_delta_weight("default")).flatten(1).double()
        rows, columns = layer.shape
        assert columns == math.prod(layer.weight.shape[1:])
        norms = merged_row_norms(layer.as_rows(layer.weight), layer.adapters())
        torch.testing.assert_close(norms.double(), merged.norm(dim=1), rtol=1e-6, atol=1e-6)
        reference = merged_row_norms_reference(layer.as_rows(layer.weight), layer.adapters())
        torch.testing.assert_close(reference, merged.norm(dim=1), rtol=1e-6, atol=1e-6)
        perturbation = WeightPerturbation([layer], sigma=0.2, total_steps=4, seed=9, ramp="constant", mode="recompute")
        perturbation.begin(3)
        read = perturbation.reading(0).weight().flatten(1).double()
        perturbation.close()
        z = torch.from_numpy(philox.normal_reference(9, 3, 0, layer.name, (rows, columns)))
        wanted = layer.weight.flatten(1).double() + 0.2 / math.sqrt(columns) * merged.norm(dim=1)[:, None] * z
        torch.testing.assert_close(read, wanted.detach(), rtol=1e-4, atol=1e-5)


def test_stored_and_rows_are_one_memory():
    layer = PerturbedLayer("c", nn.Conv2d(3, 5, (2, 4)).requires_grad_(False))
    rows = layer.as_rows(layer.weight.detach())
    assert rows.shape == layer.shape == (5, 24)
    assert layer.as_stored(rows).shape == layer.weight.shape
    assert rows.data_ptr() == layer.weight.data_ptr()


def test_a_weight_that_is_not_a_matrix_is_rejected():
    with pytest.raises(TypeError, match="groups=2"):
        PerturbedLayer("c", nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(TypeError, match="channels-last"):
        PerturbedLayer("c", nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last))


def test_targets_take_convolutions_where_they_are_asked_for():
    model = Net()
    assert find_targets(model, "all") == ["head"]
    assert find_targets(model, "all_conv") == list(NAMES)  # the grouped one is none of PEFT's
    assert find_targets(model, ["even", "head"]) == ["even", "head"]
    with pytest.raises(ConfigError, match=r"grouped matches no layer.*first"):
        find_targets(model, ["grouped"])


def config_of(name, **changes):
    return ADAPTERS[name].Config(name=name, method=name, lora_r=2, target_modules="all_conv", **changes)


@pytest.mark.parametrize("name", ["lora", "rslora", "lora_plus", "dora"])
def test_bar_and_sam_move_convolutions(name):
    torch.manual_seed(0)
    model = ADAPTERS[name].apply(Net().requires_grad_(False), config_of(name), Start(0)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model(torch.randn(1, 4, 12, 12)).backward()
    layer = model.base_model.model.first
    product, factor = layer.get_delta_weight("default"), layer.lora_A["default"].weight
    before = factor.detach().clone()

    def acting(name):
        return REGULARIZERS[name].regularizer(model, REGULARIZERS[name].Config(name=name, method=name, sigma=0.1), 0)

    acting("nbar").rescale(0.1, 0.1)
    assert not torch.equal(factor, before)  # by 1 ± αη, so that B·A keeps 1 − (αη)² of itself
    torch.testing.assert_close(layer.get_delta_weight("default"), product * (1 - 1e-4), rtol=1e-4, atol=1e-7)
    sam, trained = acting("sam"), [p for p in model.parameters() if p.requires_grad]
    at_rest = factor.detach().clone()
    sam.ascend(trained)
    assert not torch.equal(factor, at_rest)
    sam.descend()
    assert torch.equal(factor, at_rest)


def test_bi_lora_keeps_convolutions_in_their_ball():
    model = ADAPTERS["lora"].apply(Net().requires_grad_(False), config_of("lora"), Start(0))
    section = REGULARIZERS["bi_lora"].Config(name="bi_lora", method="bi_lora", sigma=0.1)
    REGULARIZERS["bi_lora"].prepare(model, section, 0)
    acting = REGULARIZERS["bi_lora"].regularizer(model, section, 0)
    for parameter in acting.parameters:
        nn.init.normal_(parameter)
    acting.clip()
    squares = [layer.get_delta_weight("ascent").square().sum() for layer in acting.layers()]
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", ["pissa", "olora", "lora_fa", "lora_pro", "lora_ga", "adalora"])
def test_methods_of_matrices_refuse_convolutions(name):
    with pytest.raises(ConfigError, match="are convolutions"):
        ADAPTERS[name].check(Net(), config_of(name))


def test_a_share_of_the_width_needs_one_width():
    config = LoraMethodConfig(name="lora", method="lora", lora_r=None, lora_relative_r=0.5, target_modules="all_conv")
    with pytest.raises(ConfigError, match=r"peft\.lora_relative_r=0\.5 with Net"):
        ADAPTERS["lora"].check(Net(), config)


def test_the_hessian_knows_convolutions():
    """Its trace by probes against a whole Hessian of a net of one convolution."""
    torch.manual_seed(2)
    net = nn.Conv2d(1, 2, 2, bias=False)
    x = torch.randn(3, 1, 4, 4)

    class Loss(nn.Module):
        config = type("Config", (), {"is_encoder_decoder": False})()

        def __init__(self):
            super().__init__()
            self.net = net.double()

        def forward(self, x, labels):
            return type("Output", (), {"loss": self.net(x).tanh().square().mean()})()

    model = Loss()
    batches = [{"x": x.double(), "labels": torch.zeros(3)}]
    whole = torch.autograd.functional.hessian(
        lambda w: torch.nn.functional.conv2d(x.double(), w.view(2, 1, 2, 2)).tanh().square().mean(),
        net.weight.detach().flatten(),
    )
    samples = Hessian(model, plain_layers(model, ["net"]), batches).trace_samples(probes=200, seed=0)
    spread = torch.tensor(samples).std() / math.sqrt(len(samples))
    assert abs(torch.tensor(samples).mean() - whole.trace()) < 5 * spread + 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_modes_agree_and_the_noise_is_the_hosts(dtype):
    torch.backends.cudnn.deterministic = True
    copy, recompute = (loss_and_gradients(adapted(dtype).cuda(), mode, device="cuda") for mode in MODES[:2])
    for one, other in zip(copy, recompute, strict=True):
        assert torch.equal(one, other)
    layers = find_lora_layers(adapted(names=("first", "strided")).cuda())
    keys = [philox.layer_key(5, layer.name) for layer in layers]
    device, host = DeviceEpsilon(layers, keys), HostEpsilon(find_lora_layers(adapted(names=("first", "strided"))))
    found, wanted = (one.coefficients(0.3, scale="filter", fan_in=True) for one in (device, host))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)
