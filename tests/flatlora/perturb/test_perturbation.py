"""WeightPerturbation: the modes agree bit for bit, the backbone stays, the noise is the paper's."""

import copy
import logging
import math

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import nn
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.integrations.bitnet import AutoBitLinear
from transformers.pytorch_utils import Conv1D

from flatlora.models.hashes import backbone_sha256
from flatlora.noise import host, philox
from flatlora.optim.lora_pro import lora_pairs
from flatlora.perturb.epsilon import HostEpsilon, merged_row_norms, merged_row_norms_reference
from flatlora.perturb.layers import AdapterTerm, PerturbedLayer, find_lora_layers, plain_name
from flatlora.perturb.perturbation import WeightPerturbation, choose_mode
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import hold
from tests.conftest import tiny_llama, tiny_lora

MODES = ("copy", "recompute", "inplace")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def perturb(layers, mode="copy", **changes) -> WeightPerturbation:
    settings = {"sigma": 0.3, "total_steps": 10, "seed": 3, "ramp": "constant"} | changes
    return WeightPerturbation(layers, mode=mode, **settings)


def linear_layer(dtype=torch.float32, bias=True, rows=6, columns=20) -> PerturbedLayer:
    torch.manual_seed(0)
    return PerturbedLayer("w", nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False))


def conv1d_layer(dtype=torch.float32) -> PerturbedLayer:
    torch.manual_seed(0)
    return PerturbedLayer("w", Conv1D(6, 20).to(dtype).requires_grad_(False))


def tiny_gpt2(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    model = GPT2LMHeadModel(config)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **changes))


def tiny_dora(dtype=torch.float32, *, dropout: float = 0.0, bias: bool = False) -> nn.Module:
    """`tiny_lora` with DoRA, FP32 factors and magnitudes."""
    torch.manual_seed(8)
    model = tiny_llama(attention_bias=bias).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", use_dora=True)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return model


def perturbed_by_hand(layer: PerturbedLayer, step: int, sigma: float = 0.3, seed: int = 3) -> torch.Tensor:
    """W + ε in the stored layout, by the paper's formula with W' formed as a whole."""
    merged = layer.as_rows(layer.weight.detach()).double()
    for term in layer.adapters():
        merged = merged + term.scaling * (term.B.detach().double() @ term.A.detach().double())
    c = sigma / math.sqrt(merged.shape[1]) * merged.norm(dim=1)
    z = host.normal(seed, step, 0, layer.name, tuple(merged.shape)).double()
    weight = layer.as_rows(layer.weight.detach()).double() + c[:, None] * z
    return layer.as_stored(weight).to(layer.weight.dtype)


def weight_read(layer: PerturbedLayer) -> torch.Tensor:
    """The weight that the layer's forward reads, m × n: its answer to the unit vectors."""
    bias = 0 if layer.module.bias is None else layer.module.bias
    return (layer.module(torch.eye(layer.as_rows(layer.weight).shape[1])) - bias).detach().t()


def loss_and_gradients(model, mode, *, autocast=False, checkpointing=False, micro_batches=1, **changes):
    """Loss, gradients and perturbed-step bytes of one optimizer step's micro-batches."""
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 12))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    perturbation = perturb(find_lora_layers(model), mode, **changes)
    perturbation.begin(4)
    losses = []
    for index in range(micro_batches):
        if index:
            perturbation.next_micro_batch(index)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    perturbation.end()
    perturbation.close()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(left, right):
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    assert left[1]
    for name in left[1]:
        assert torch.equal(left[1][name], right[1][name]), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_are_bit_identical(dtype, autocast):
    results = {mode: loss_and_gradients(tiny_lora(dtype), mode, autocast=autocast) for mode in MODES}
    assert_same(results["copy"], results["recompute"])
    assert_same(results["copy"], results["inplace"])
    plain = loss_and_gradients(tiny_lora(dtype), "copy", autocast=autocast, sigma=0.0)
    assert plain[0] != results["copy"][0]


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_gradient_checkpointing_changes_nothing(mode):
    assert_same(loss_and_gradients(tiny_lora(), mode), loss_and_gradients(tiny_lora(), mode, checkpointing=True))


def test_modes_agree_when_each_micro_batch_has_its_own_noise():
    results = [
        loss_and_gradients(tiny_lora(), mode, micro_batches=3, resample="micro_batch") for mode in ("copy", "recompute")
    ]
    assert_same(*results)
    assert len(set(results[0][0])) == 3  # same rows, three draws
    shared = loss_and_gradients(tiny_lora(), "copy", micro_batches=3)
    assert len(set(shared[0])) == 1


def test_modes_agree_on_conv1d():
    results = [loss_and_gradients(tiny_gpt2(), mode) for mode in MODES]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize(
    "make",
    [
        tiny_dora,
        lambda: tiny_dora(torch.bfloat16),
        lambda: tiny_dora(bias=True),
        lambda: tiny_dora(dropout=0.3, bias=True),
        lambda: tiny_gpt2(use_dora=True, lora_dropout=0.3),
    ],
    ids=["plain", "bfloat16", "bias", "dropout", "conv1d"],
)
def test_modes_agree_on_dora(make):
    """Its norm is that of W + ε + s·B·A in each, and with dropout its product is one with W + ε."""
    results = [loss_and_gradients(make(), mode) for mode in MODES]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert any("lora_magnitude_vector" in name for name in results[0][1])
    # Not those without checkpoints: with its input's gradients, torch sums some products in another order on some CPUs.
    assert_same(*(loss_and_gradients(make(), mode, checkpointing=True) for mode in ("copy", "recompute")))


@pytest.mark.parametrize("mode", MODES)
def test_dora_s_norm_holds_the_noise_as_in_the_published_code(mode):
    """PEFT alone, on a backbone whose weights were moved by hand."""
    twin = tiny_dora().train()
    layers = find_lora_layers(twin)
    for layer, weight in zip(layers, [perturbed_by_hand(layer, 4) for layer in layers], strict=True):
        layer.weight.data = weight
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 12))
    expected = twin(input_ids=ids, labels=ids).loss
    expected.backward()
    (loss,), gradients = loss_and_gradients(tiny_dora(), mode)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            assert (gradients[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name
    plain = loss_and_gradients(tiny_dora(), mode, sigma=0.0)
    assert abs(plain[0][0] - loss) > 1e-3


class Scaled(nn.Linear):
    def forward(self, x, factor=0.5):
        return factor * functional.linear(x, self.weight, self.bias)


class FakeQuantized(nn.Linear):
    """Ternary weights, and an observer that counts its calls."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        scale = self.weight.abs().mean()
        return functional.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


OWN_FORWARDS = {
    "scaled": Scaled,
    "fake-quantized": FakeQuantized,
    "bitnet, online": lambda *sizes: AutoBitLinear(*sizes, online_quant=True),
    "bitnet, offline": lambda *sizes: AutoBitLinear(*sizes, use_rms_norm=True),
}


@pytest.fixture
def without_compiler():
    """transformers compiles what quantizes BitNet's weights."""
    with torch.compiler.set_stance("force_eager"):
        yield


def own_forward_layer(kind: str) -> PerturbedLayer:
    torch.manual_seed(0)
    module = OWN_FORWARDS[kind](20, 6).requires_grad_(False)
    module.bias.requires_grad_()
    return PerturbedLayer("w", module)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("kind", OWN_FORWARDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_with_a_forward_of_its_own_computes_by_it(kind, mode):
    """Against a copy of the layer whose weight is W + ε, or W for σ → 0."""
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    for sigma in (1e-7, 0.3):
        layer = own_forward_layer(kind)
        twin = copy.deepcopy(layer.module)
        if sigma == 0.3:
            twin.weight.data = perturbed_by_hand(layer, 2)
        outputs = []
        perturbation = perturb([layer], mode, sigma=sigma)
        perturbation.begin(2)
        for module in (layer.module, twin):
            inputs = x.clone().requires_grad_()
            y = module(inputs)
            (y * torch.linspace(-1, 1, 6)).sum().backward()
            outputs.append((y.detach(), inputs.grad, module.bias.grad))
        perturbation.close()
        for found, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        plain = own_forward_layer(kind).module(x).detach()
        assert torch.allclose(outputs[0][0], plain, atol=1e-5) == (sigma < 0.3)


def llama_with_own_forwards() -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama()
    for block in model.model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.mlp, "down_proj")):
            plain = getattr(parent, name)
            module = Scaled(plain.in_features, plain.out_features, bias=False)
            module.load_state_dict(plain.state_dict())
            setattr(parent, name, module)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def test_modes_agree_on_layers_with_forwards_of_their_own():
    results = [loss_and_gradients(llama_with_own_forwards(), mode, autocast=True) for mode in MODES]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    for mode in ("copy", "recompute"):
        checkpointed = loss_and_gradients(llama_with_own_forwards(), mode, autocast=True, checkpointing=True)
        assert_same(results[0], checkpointed)


def test_trying_a_forward_leaves_no_trace():
    layer = own_forward_layer("fake-quantized")
    perturbation, before = perturb([layer]), torch.get_rng_state()
    perturbation.begin(1)
    layer.module(torch.ones(2, 20))
    assert layer.module.calls == 1
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_a_forward_that_does_not_read_the_weight_is_rejected(mode):
    class Cached(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.kept, self.bias)

    layer = PerturbedLayer("w", Cached(20, 6).requires_grad_(False))
    layer.module.kept = layer.weight.clone()
    perturbation = perturb([layer], mode)
    perturbation.begin(1)
    with pytest.raises(TypeError, match=r"Invalid layer w=Cached: its forward does not compute with its weight"):
        layer.module(torch.ones(2, 20))


def test_a_weight_that_is_computed_from_others_is_rejected():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(20, 6))
    with pytest.raises(TypeError, match=r"Invalid layer w=ParametrizedLinear: its weight is computed from other"):
        PerturbedLayer("w", module)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [linear_layer, conv1d_layer, lambda dtype: linear_layer(dtype, bias=False)])
def test_one_layer_reads_the_weight_that_the_formula_gives(make, dtype, mode):
    layer = make(dtype)
    weight = layer.as_rows(layer.weight.detach().clone())
    c = 0.3 / math.sqrt(weight.shape[1]) * weight.double().norm(dim=1)
    z = torch.from_numpy(philox.normal_reference(3, 2, 0, "w", tuple(weight.shape)))
    expected = (weight.double() + c[:, None] * z).to(dtype)
    perturbation = perturb([layer], mode)
    perturbation.begin(2)
    x = torch.eye(weight.shape[1], dtype=dtype)
    bias = layer.module.bias if layer.module.bias is not None else 0
    read = (layer.module(x) - bias).t()
    perturbation.end()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(read.double(), expected.double(), atol=tolerance, rtol=tolerance)
    assert (read - weight).abs().max() > 10 * c.max() / 100


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_backbone_bytes_are_untouched(mode):
    model = tiny_lora(torch.bfloat16)
    before = backbone_sha256(model)
    perturbation, losses = perturb(find_lora_layers(model), mode), set()
    ids = torch.arange(3, 15)[None]
    for step in range(10):
        perturbation.begin(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.add(loss.item())
        perturbation.end()
    assert len(losses) > 5  # noise was made, and another one each step
    assert backbone_sha256(model) == before
    assert perturbation.drift() is None


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_inplace_bf16_drifts_warns_and_is_measured(caplog, held):
    layer = linear_layer(torch.bfloat16, rows=64, columns=64)
    hold(layer.module, held)  # float32: a CPU without BF16 instructions
    original = layer.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        perturbation = perturb([layer], "inplace", sigma=0.05)
    assert "on a bfloat16 backbone" in caplog.text
    for step in range(30):
        perturbation.begin(step)
        perturbation.end()
    drift = perturbation.drift()
    assert drift["changed_share"] == pytest.approx((layer.weight != original).float().mean().item())
    assert drift["changed_share"] > 0.1
    assert drift["relative_norm"] > 1e-3


def test_sigma_zero_is_no_perturbation():
    for mode in MODES:
        plain = loss_and_gradients(tiny_lora(), mode, sigma=0.0)
        without = tiny_lora()
        torch.manual_seed(1)
        ids = torch.randint(3, 96, (3, 12))
        loss = without(input_ids=ids, labels=ids).loss
        loss.backward()
        assert_same(plain, ([loss.item()], {n: p.grad for n, p in without.named_parameters() if p.grad is not None}))


def test_tied_weights_of_other_modules_are_not_perturbed():
    embedding = nn.Embedding(6, 20)
    head = nn.Linear(20, 6, bias=False)
    head.weight = embedding.weight.requires_grad_(False)
    for mode in ("copy", "recompute"):
        perturbation = perturb([PerturbedLayer("head", head)], mode)
        before = embedding(torch.arange(6)).clone()
        perturbation.begin(1)
        assert torch.equal(embedding(torch.arange(6)), before)
        assert not torch.equal(head(torch.eye(20)).t(), before)
        perturbation.close()
        assert head.weight is embedding.weight


def test_a_tied_head_is_perturbed_by_itself_or_refused():
    model = tiny_llama(tie_word_embeddings=True)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    layers = find_lora_layers(model)
    assert {layer.name: layer.tied_to for layer in layers if layer.tied_to} == {"lm_head": ["model.embed_tokens"]}
    ids = torch.arange(3, 15)[None]
    hidden = model.get_submodule("base_model.model.model")
    outputs = []
    for mode in ("copy", "recompute"):
        perturbation = perturb(layers, mode)
        embedded = model.get_input_embeddings()(ids)
        perturbation.begin(1)
        assert torch.equal(model.get_input_embeddings()(ids), embedded)
        head, states = model.get_submodule("base_model.model.lm_head"), hidden(input_ids=ids).last_hidden_state
        index = [layer.name for layer in layers].index("lm_head")
        noisy = perturbation.reading(index).weight()
        expected = states @ noisy.t() + head.scaling["default"] * (states @ head.lora_A["default"].weight.t()) @ (
            head.lora_B["default"].weight.t()
        )
        outputs.append(model(input_ids=ids).logits)
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-5)
        perturbation.close()
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match=r"mode=inplace with tied weights, such as that of lm_head \(to model.embed"):
        perturb(layers, "inplace")


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norms_equal_the_materialized_ones(dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, 70).to(dtype)
    terms = [AdapterTerm(torch.randn(r, 70), torch.randn(50, r), s) for r, s in ((1, 2.0), (8, 0.25), (33, 1.0))]
    for chosen in ([], terms[:1], terms):
        expected = merged_row_norms_reference(weight, chosen)
        torch.testing.assert_close(merged_row_norms(weight, chosen).double(), expected, rtol=1e-5, atol=1e-5)


def test_row_norms_where_the_adapter_nearly_cancels_the_weight():
    torch.manual_seed(0)
    A, B = torch.randn(4, 64), torch.randn(32, 4)
    weight = -2.0 * B @ A + 1e-2 * torch.randn(32, 64)
    terms = [AdapterTerm(A, B, 2.0)]
    error = merged_row_norms(weight, terms).double() ** 2 - merged_row_norms_reference(weight, terms) ** 2
    assert (error.abs() <= 1e-6 * weight.double().square().sum(dim=1)).all()  # of what canceled, as FP32 allows


def test_row_norms_of_a_model_are_those_of_the_merged_weights():
    model = tiny_lora()
    layers = find_lora_layers(model)
    assert len(layers) == 14
    norms = {layer.name: merged_row_norms(layer.weight, layer.adapters()) for layer in layers}
    merged = model.merge_and_unload()
    for name, norm in norms.items():
        torch.testing.assert_close(norm, merged.get_submodule(name).weight.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_output_variance_grows_by_one_plus_sigma_squared():
    """The paper's Proposition 3.2: whatever n, Var(W̃x) = (1 + σ²) Var(Wx) for x of independent unit entries."""
    torch.manual_seed(0)
    for columns in (64, 1024):
        layer = PerturbedLayer("w", nn.Linear(columns, 32, bias=False).requires_grad_(False))
        x = torch.randn(4000, columns)
        plain = layer.module(x).var()
        perturbation = perturb([layer], sigma=0.5)
        ratios = []
        for step in range(20):
            perturbation.begin(step)
            ratios.append(layer.module(x).var() / plain)
            perturbation.end()
        assert torch.stack(ratios).mean() == pytest.approx(1.25, abs=0.02)


def test_iid_noise_has_the_same_total_and_one_std():
    layer = linear_layer()
    layer.weight.data *= torch.linspace(0.1, 3, 6)[:, None]
    epsilon = HostEpsilon([layer])
    (by_filter,), (iid,) = (epsilon.coefficients(0.1, scale=scale, fan_in=True) for scale in ("filter", "iid"))
    assert iid.unique().numel() == 1
    assert by_filter.unique().numel() == 6
    assert iid.square().sum() == pytest.approx(by_filter.square().sum().item(), rel=1e-5)
    (without,) = epsilon.coefficients(0.1, scale="filter", fan_in=False)
    torch.testing.assert_close(without, by_filter * math.sqrt(20))


def test_every_keeps_the_draw_and_its_state_resumes_inside_a_window():
    def read_weights(perturbation, layer, steps):
        seen = {}
        for step in steps:
            perturbation.begin(step)
            seen[step] = weight_read(layer)
            perturbation.end()
        return seen

    layer = linear_layer(bias=False)
    factor = torch.zeros(6, 4)
    layer.adapters = lambda: [AdapterTerm(torch.ones(4, 20), factor, 1.0)]
    perturbation = perturb([layer], every=3)
    first = read_weights(perturbation, layer, [0, 1])
    state = perturbation.state_dict()
    factor += 1.0  # training moves the adapter: a fresh draw would have other norms
    rest = read_weights(perturbation, layer, [2, 3])
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], rest[2])
    assert not torch.equal(rest[2], rest[3])
    perturbation.close()

    resumed = perturb([layer], every=3)
    with pytest.raises(RuntimeError, match="every=3"):
        resumed.begin(2)
    resumed.load_state_dict(state)
    assert torch.equal(read_weights(resumed, layer, [2])[2], rest[2])


def test_a_step_begun_again_sees_the_adapter_as_it_is_now():
    layer, factor = linear_layer(bias=False), torch.zeros(6, 4)
    layer.adapters = lambda: [AdapterTerm(torch.ones(4, 20), factor, 1.0)]
    perturbation = perturb([layer])
    perturbation.begin(1)
    first = weight_read(layer)
    perturbation.end()
    factor += 1.0
    perturbation.begin(1)
    assert not torch.equal(weight_read(layer), first)


def test_ranks_draw_their_own_noise_only_when_asked():
    def weight_of(rank, **changes):
        layer = linear_layer(bias=False)
        perturbation = perturb([layer], rank=rank, world_size=2, **changes)
        perturbation.begin(1)
        return weight_read(layer)

    assert torch.equal(weight_of(0), weight_of(1))
    assert not torch.equal(weight_of(0, per_rank=True), weight_of(1, per_rank=True))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (1, 3), (2, 2), (4, 2)])
def test_variance_of_the_gradient_falls_with_ranks_and_micro_batches(ranks, micro_batches):
    """That of ‖(W + ε)x − y‖² by x, averaged over R ranks × k micro-batches: its variance is 1/(R·k) of one's."""
    steps, x, y = 300, torch.linspace(-1.0, 1.0, 20), torch.ones(6)

    def gradients(rank: int, world_size: int, parts: int) -> torch.Tensor:
        layer = linear_layer(bias=False)
        own = {"per_rank": world_size > 1, "resample": "micro_batch" if parts > 1 else "step"}
        perturbation = perturb([layer], "copy", rank=rank, world_size=world_size, total_steps=steps, **own)
        found = []
        for step in range(steps):
            perturbation.begin(step)
            for part in range(parts):
                perturbation.next_micro_batch(part)
                place = x.clone().requires_grad_()
                ((layer.module(place) - y) ** 2).sum().backward()
                found.append(place.grad)
            perturbation.end()
        return torch.stack(found).view(steps, parts, -1).mean(dim=1)

    def variance(averaged: torch.Tensor) -> float:
        return averaged.var(dim=0).sum().item()

    averaged = torch.stack([gradients(rank, ranks, micro_batches) for rank in range(ranks)]).mean(dim=0)
    ratio = variance(averaged) / variance(gradients(0, 1, 1))
    assert ratio == pytest.approx(1 / (ranks * micro_batches), rel=0.2)


def test_nan_in_a_weight_is_named():
    layer = linear_layer()
    layer.weight.data[2, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="row norms of w are not finite"):
        perturb([layer]).begin(0)


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_begin_twice_and_close_after_an_error(mode):
    layer = linear_layer(bias=False)
    perturbation = perturb([layer], mode)
    perturbation.begin(0)
    with pytest.raises(RuntimeError, match=r"call end\(\) first"):
        perturbation.begin(1)
    assert not torch.equal(weight_read(layer), layer.weight)
    perturbation.close()
    assert torch.equal(weight_read(layer), layer.weight)
    assert "forward" not in layer.module.__dict__
    with pytest.raises(RuntimeError, match="was closed"):
        perturbation.begin(1)
    other = perturb([layer], mode)
    perturb([layer], mode)
    with pytest.raises(RuntimeError, match="replaced by another one"):
        other.begin(1)


@pytest.mark.parametrize("make", [linear_layer, conv1d_layer])
def test_a_trained_bias_gets_its_gradient_in_both_modes(make):
    gradients = []
    for mode in ("copy", "recompute"):
        layer = make()
        layer.module.bias.requires_grad_()
        perturbation = perturb([layer], mode)
        perturbation.begin(2)
        x = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
        layer.module(x).square().sum().backward()
        gradients.append(layer.module.bias.grad)
    assert gradients[0].abs().min() > 0
    assert torch.equal(*gradients)


def test_a_trained_weight_is_rejected():
    layer = linear_layer()
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="the weights of 1 of them are trained, such as w"):
        perturb([layer])


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_a_disabled_adapter_reads_the_weight_without_noise(mode):
    model, ids = tiny_lora(), torch.arange(3, 15)[None]
    model.train()
    with model.disable_adapter():
        reference = model(ids).logits
    perturbation = perturb(find_lora_layers(model), mode)
    perturbation.begin(4)
    perturbed = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, reference)
    assert torch.equal(model(ids).logits, perturbed)
    perturbation.close()
    assert not torch.equal(model(ids).logits, perturbed)


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_training_only_leaves_evaluation_alone_even_inside_a_step(mode):
    model, ids = tiny_lora().eval(), torch.arange(3, 15)[None]
    plain, weights = model(ids).logits, backbone_sha256(model)
    perturbation = perturb(find_lora_layers(model), mode, training_only=True)
    perturbation.begin(4)
    assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(model.train()(ids).logits, plain)
    assert backbone_sha256(model) == weights  # the parameters themselves are W, also in mid-step


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_training_only_leaves_passes_without_gradients_alone(mode):
    model, ids = tiny_lora().train(), torch.arange(3, 15)[None]
    plain = model(ids).logits
    perturbation = perturb(find_lora_layers(model), mode, training_only=True)
    perturbation.begin(4)
    perturbed = model(ids).logits
    assert not torch.equal(perturbed, plain)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
        with perturbation.within_pass(gradients=True):  # the first forward of a reentrant checkpoint
            assert torch.equal(model(ids).logits, perturbed)
        assert torch.equal(model(ids).logits, plain)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, plain)
    perturbation.close()
    asked = perturb(find_lora_layers(model), mode)  # a measure of W + ε takes no gradients
    asked.begin(4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, perturbed)


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_perturbation_is_taken_over(mode):
    layer = linear_layer(bias=False)
    weight = layer.weight.detach().clone()
    first = perturb([layer], mode, sigma=0.1)
    first.begin(4)  # and never ended: Ctrl-C in a notebook, then the cell again
    second = perturb([PerturbedLayer("w", layer.module)], mode, sigma=0.3)
    assert not first.active
    torch.testing.assert_close(weight_read(layer), weight)
    second.begin(4)
    reading = weight_read(layer)
    first.close()  # late, as a finalizer might
    assert torch.equal(weight_read(layer), reading)
    second.close()
    torch.testing.assert_close(weight_read(layer), weight)


def test_a_forward_that_another_library_wrapped_is_kept():
    layer = linear_layer(bias=False)
    plain = layer.module.forward
    layer.module.forward = lambda x: 2 * plain(x)
    wrapped = layer.module.forward
    perturbation = perturb([layer])
    assert torch.equal(weight_read(layer), 2 * layer.weight)
    perturbation.begin(2)
    torch.testing.assert_close(weight_read(layer), 2 * perturbed_by_hand(layer, 2))
    perturbation.close()
    assert layer.module.forward is wrapped


def test_all_errors_at_once():
    with pytest.raises(ValueError, match="layers") as error:
        WeightPerturbation([], sigma=-0.1, total_steps=0, seed=0, ramp="sine", mode="add", every=0, resample="x")
    text = str(error.value)
    for word in ("layers=[]", "sigma=-0.1", "total_steps=0", "every=0", "'sine'", "'add'", "resample='x'"):
        assert word in text
    with pytest.raises(ValueError, match="twice"):
        perturb([linear_layer(), linear_layer()])
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        PerturbedLayer("table", nn.Embedding(3, 3))


def test_auto_takes_copy_only_where_memory_allows(monkeypatch):
    layers = find_lora_layers(tiny_lora())
    needed = sum(layer.weight.numel() * 4 for layer in layers)
    for free, expected in ((2 * needed, "copy"), (2 * needed - 2, "recompute")):
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr("flatlora.perturb.perturbation.psutil.virtual_memory", lambda memory=memory: memory)
        assert choose_mode(layers) == expected


def test_copies_have_their_memory_before_the_first_noise():
    """The limit of joined rows is measured in step 0, where a rising σ is 0."""
    layer = linear_layer()
    perturbation = perturb([layer], ramp="cosine")
    buffers = [copy.data_ptr() for copy in perturbation._copies]
    assert len(buffers) == 1
    perturbation.begin(5)
    assert [copy.data_ptr() for copy in perturbation._copies] == buffers
    assert not torch.equal(perturbation._copies[0], layer.weight)
    assert not perturb([layer], sigma=0.0)._copies


def test_names_are_those_of_the_untouched_model():
    names = {name for name, _ in tiny_lora().base_model.model.named_modules()}
    for layer in find_lora_layers(tiny_lora()):
        assert layer.name in names
    assert plain_name("module.base_model.model.h.0.attn.base_layer.weight") == "h.0.attn.weight"


def tiny_mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "parameter", "name"),
    [
        (tiny_llama, "q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        (tiny_mixtral, "experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
@pytest.mark.parametrize("find", [find_lora_layers, lora_pairs])
def test_adapters_of_parameters_are_rejected_by_name(find, make, parameter, name):
    config = LoraConfig(r=2, target_modules=["k_proj"], target_parameters=[parameter])
    with pytest.raises(ConfigError, match=rf"Invalid target_parameters={name} \(\d in all\): .* name linear layers"):
        find(get_peft_model(make(), config))


@pytest.mark.parametrize("find", [find_lora_layers, lora_pairs])
def test_variants_that_add_no_product_are_rejected_by_name(find):
    config = LoraConfig(r=4, target_modules=["q_proj"], kasa_config=KasaConfig())
    with pytest.raises(ConfigError, match=r"Invalid LoRA variant of model\.layers\.0\.self_attn\.q_proj \(KasaLinear"):
        find(get_peft_model(tiny_llama(), config))


def test_adapters_that_noise_passes_over_are_named(caplog):
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    layers = find_lora_layers(get_peft_model(tiny_llama(), config))
    assert len(layers) == 2
    assert "LoRA layers without noise: 1 around Embedding." in caplog.text
    assert "they have no LoRA" not in caplog.text
    caplog.clear()
    for plain in (tiny_lora(), get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))):
        find_lora_layers(plain)
    find_lora_layers(get_peft_model(tiny_llama(), AdaLoraConfig(total_step=9, target_modules=["q_proj"])))
    assert not caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head."),
        ({"trainable_token_indices": [3, 4]}, "model.embed_tokens."),
        ({"bias": "all"}, "model.layers.0.self_attn.q_proj.bias, "),
        ({"bias": "lora_only"}, "model.layers.0.self_attn.q_proj.bias, "),
    ],
)
def test_what_is_trained_without_lora_is_named_once(changes, named, caplog):
    model = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], **changes))
    find_lora_layers(model)
    (record,) = caplog.records
    reported = record.getMessage()
    assert reported.startswith("Parameters trained without noise, as they have no LoRA: ")
    assert named in reported
    beside = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert ("and " in reported) == (len(beside) > 4)


@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, False)])
def test_an_fp16_backbone_without_loss_scaling_is_named(dtype, scaled, caplog):
    layers = find_lora_layers(tiny_lora(dtype))
    WeightPerturbation(layers, sigma=0.1, total_steps=2, seed=0, loss_scaled=scaled).close()
    named = dtype == torch.float16 and not scaled
    assert caplog.text.count("The backbone is float16 and the loss is not scaled") == named


def test_attention_that_reads_its_weights_itself_is_rejected():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"Invalid target_modules=0: it is an nn.MultiheadAttention"):
        find_lora_layers(adapted)


def test_torch_compile_changes_no_name_and_with_it_no_noise():
    names = [layer.name for layer in find_lora_layers(tiny_lora())]
    assert [layer.name for layer in find_lora_layers(torch.compile(tiny_lora(), backend="eager"))] == names
    parts = tiny_lora()
    decoder = parts.base_model.model.model
    decoder.layers = nn.ModuleList(torch.compile(block, backend="eager") for block in decoder.layers)
    assert "_orig_mod" in "".join(name for name, _ in parts.named_modules())
    assert [layer.name for layer in find_lora_layers(parts)] == names
    assert plain_name("module._orig_mod.base_model.model.h.0.attn.weight") == "h.0.attn.weight"
    assert plain_name("base_model.model.h.0._checkpoint_wrapped_module.attn.weight") == "h.0.attn.weight"


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_a_compiled_model_reads_the_noise_of_each_step(mode):
    """Against the same model uncompiled: loss and gradients of three steps, the graph made in the first."""

    def adapted():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
        return get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))

    def steps(model):
        x = torch.linspace(-1, 1, 36).view(3, 12)
        perturbation, seen = perturb(find_lora_layers(model), mode, training_only=True), []
        model.train()
        for step in range(3):
            perturbation.begin(step)
            loss = model(x).square().sum()
            loss.backward()
            perturbation.end()
            seen.append(loss.item())
        perturbation.close()
        return seen, [p.grad for p in model.parameters() if p.grad is not None]

    torch.compiler.reset()
    plain, compiled = steps(adapted()), steps(torch.compile(adapted(), backend="eager"))
    assert len(set(plain[0])) == 3
    assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
    for left, right in zip(plain[1], compiled[1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_weights_that_are_elsewhere_are_rejected():
    for weight, reported in ((torch.empty(6, 20, device="meta"), "offloaded"), (torch.empty(0), "sharded")):
        layer = linear_layer()
        layer.weight = layer.module.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=rf"are not on this device, such as w \({reported}.*DDP or ZeRO-2"):
            perturb([layer])
    wrapped = nn.Module()
    wrapped.add_module(FSDP_WRAPPED_MODULE, tiny_lora())
    with pytest.raises(TypeError, match="FSDP shards its weights"):
        find_lora_layers(wrapped)


def test_layers_on_several_devices_are_rejected():
    layers = [
        PerturbedLayer(name, nn.Linear(20, 6).requires_grad_(False), runs_on=device)
        for name, device in (("a", None), ("b", torch.device("cuda:1")))
    ]
    with pytest.raises(ValueError, match=r"on 2 devices \(cpu, cuda:1\).*without device_map='auto'.*DDP or ZeRO-2"):
        perturb(layers)
