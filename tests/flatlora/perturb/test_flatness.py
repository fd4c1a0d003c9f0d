"""Flatness measures against their definitions: a whole Hessian, whole directions, and plain perturbed losses."""

import pytest
import torch

from flatlora.noise import host, philox
from flatlora.perturb import flatness
from flatlora.perturb.layers import PerturbedLayer, find_lora_layers
from flatlora.utils import precision
from tests.conftest import tiny_llama, tiny_lora

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def batches(count=2):
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in range(6, 6 + count):
        ids = torch.randint(3, 96, (2, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 3] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


@pytest.fixture
def model():
    found = tiny_llama(hidden_size=8, intermediate_size=6, num_attention_heads=2, num_key_value_heads=1)
    found.set_attn_implementation("eager")
    return found.eval().requires_grad_(False)


@pytest.fixture
def layers(model):
    return flatness.plain_layers(model, NAMES)


def stored(layers):
    return [layer.weight.clone() for layer in layers]


def test_the_loss_counts_every_token_alike(model):
    """The mean over both batches is that of one padded batch of all rows."""
    one, other = batches()
    pad = torch.nn.functional.pad
    joined = {key: torch.cat([pad(one[key], (0, 1), value=-100 if key == "labels" else 0), other[key]]) for key in one}
    assert flatness.mean_loss(model, [one, other]) == pytest.approx(flatness.mean_loss(model, [joined]), abs=1e-6)
    plain = (float(model(**one).loss) + float(model(**other).loss)) / 2
    assert flatness.mean_loss(model, [one, other]) != pytest.approx(plain, abs=1e-6)  # they differ in length


def test_directions_are_filter_normalized_and_equal_their_reference(layers):
    before = stored(layers)
    direction = flatness.Direction(layers, 5, 1)
    direction.add(-0.25)
    for layer, old in zip(layers, before, strict=True):
        moved = (layer.weight - old).double()
        assert torch.allclose(moved.norm(dim=1), 0.25 * old.double().norm(dim=1), rtol=1e-4)
        twin = flatness.direction_reference(PerturbedLayer(layer.name, _holding(old)), 5, 1)
        assert torch.allclose(moved, -0.25 * twin, atol=1e-6)
    a, b = (flatness.direction_reference(layers[0], 5, number) for number in (0, 1))
    assert abs(float((a * b).sum() / a.norm() / b.norm())) < 0.5  # two directions, not one


def _holding(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def test_the_landscape_is_the_loss_at_each_place_and_leaves_the_weights(model, layers):
    before, at = stored(layers), [-0.5, 0.0, 0.5]
    line = flatness.landscape(model, layers, batches(), at, dimensions=1, seed=2)
    plane = flatness.landscape(model, layers, batches(), at, dimensions=2, seed=2)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
    assert torch.allclose(plane[:, 1], line, atol=1e-7)
    assert float(plane[1, 1]) == flatness.mean_loss(model, batches())
    directions = [[flatness.direction_reference(layer, 2, number) for layer in layers] for number in (0, 1)]
    for i, a in enumerate(at):
        for j, b in enumerate(at):
            with flatness.restored(layers), torch.no_grad():
                for layer, one, two in zip(layers, *directions, strict=True):
                    layer.weight += (a * one + b * two).float()
                assert float(plane[i, j]) == pytest.approx(flatness.mean_loss(model, batches()), abs=1e-5)


def test_an_interrupted_measure_puts_the_weights_back(model, layers):
    before, at_rest = stored(layers), flatness.mean_loss(model, batches())

    def interrupt(count):
        raise KeyboardInterrupt

    for measure in (
        lambda: flatness.landscape(model, layers, batches(), [0.5], dimensions=1, seed=0, on_progress=interrupt),
        lambda: flatness.expected_rises(model, layers, batches(), 0.5, draws=1, seed=0, on_progress=interrupt),
    ):
        with pytest.raises(KeyboardInterrupt):
            measure()
        assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
        assert flatness.mean_loss(model, batches()) == at_rest


def test_expected_rises_are_those_of_noise_that_no_training_draws(model, layers):
    """ε_ij = σ/√n ‖W_i‖ z_ij by hand; z of a stream that is no rank's and no micro-batch's, with the run's own seed."""
    model.double()  # the rises of so small a model are of FP32's last digits
    layers = flatness.plain_layers(model, NAMES)
    found = flatness.expected_rises(model, layers, batches(), 0.3, draws=3, seed=4)
    at_rest, before = flatness.mean_loss(model, batches()), stored(layers)
    trained = {
        philox.noise_stream(rank, part, 8, per_rank=per_rank, per_micro_batch=per_micro_batch)
        for rank in range(8)
        for part in range(64)
        for per_rank in (False, True)
        for per_micro_batch in (False, True)
    }
    assert not trained & {flatness._RISE, flatness._DIRECTION, flatness._PROBE, flatness._START}
    for step, rise in enumerate(found):
        for stream, equal in ((flatness._RISE, True), *((stream, False) for stream in range(4))):
            with flatness.restored(layers), torch.no_grad():
                for layer, weight in zip(layers, before, strict=True):
                    z = host.normal(4, step, stream, layer.name, tuple(weight.shape))
                    layer.weight += 0.3 / weight.shape[1] ** 0.5 * weight.norm(dim=1, keepdim=True) * z
                by_hand = flatness.mean_loss(model, batches()) - at_rest
            assert (rise == pytest.approx(by_hand, rel=1e-3, abs=1e-7)) == equal
    assert len(set(found)) == 3
    assert flatness.expected_rises(model, layers, batches(), 0.0, draws=1, seed=4) == [0.0]


def test_merged_weights_are_perturbed_as_adapters_in_training_are():
    """Row norms are those of W', so the rise of a merged model is that of the adapted one."""
    adapted = tiny_lora().eval()
    adapted.requires_grad_(False)
    through = flatness.expected_rises(adapted, find_lora_layers(adapted), batches(), 0.2, draws=2, seed=1)
    names = [layer.name for layer in find_lora_layers(adapted)]
    merged = adapted.merge_and_unload()
    assert flatness.expected_rises(
        merged, flatness.plain_layers(merged, names), batches(), 0.2, draws=2, seed=1
    ) == pytest.approx(through, abs=1e-5)


@pytest.fixture
def whole(model, layers):
    """The Hessian of the mean loss as a matrix, FP64."""
    model.double()
    weights = [layer.weight for layer in layers]

    def loss(flat):
        parts = flat.split([weight.numel() for weight in weights])
        replaced = {f"{n}.weight": p.view_as(w) for n, p, w in zip(NAMES, parts, weights, strict=True)}
        counted = [(flatness._counted(model, batch), batch) for batch in batches()]
        losses = [torch.func.functional_call(model, replaced, kwargs=batch).loss * count for count, batch in counted]
        return sum(losses) / sum(count for count, _ in counted)

    return torch.autograd.functional.hessian(loss, torch.cat([weight.detach().flatten() for weight in weights]))


@pytest.mark.extra
def test_hessian_products_eigenvalue_and_trace_are_those_of_the_whole_matrix(model, layers, whole):
    hessian = flatness.Hessian(model, flatness.plain_layers(model, NAMES), batches())
    vector = [torch.randn_like(layer.weight) for layer in layers]
    product = torch.cat([part.flatten() for part in hessian.times(vector)])
    assert torch.allclose(product, whole @ torch.cat([v.flatten() for v in vector]), rtol=1e-5, atol=1e-9)
    assert not any(layer.weight.requires_grad for layer in layers)

    values = torch.linalg.eigvalsh(whole)
    largest = values[values.abs().argmax()]
    top = hessian.top_eigenvalue(seed=0, iterations=500, tolerance=1e-7)
    assert top.value == pytest.approx(float(largest), rel=1e-3)
    assert 1 < top.iterations < 500
    assert top.residual < 0.05

    samples = torch.tensor(hessian.trace_samples(seed=0, probes=200), dtype=torch.float64)
    spread = (2 * (whole.square().sum() - whole.diagonal().square().sum()) / len(samples)) ** 0.5  # of their mean
    assert abs(samples.mean() - whole.trace()) < 4 * spread


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_the_host_does(model, layers):
    def measured(batches):
        found = flatness.plain_layers(model, NAMES)
        hessian = flatness.Hessian(model, found, batches)
        return [
            *flatness.expected_rises(model, found, batches, 0.5, draws=3, seed=1),
            *flatness.landscape(model, found, batches, [-0.5, 0.25], dimensions=2, seed=1).flatten().tolist(),
            hessian.top_eigenvalue(seed=1, iterations=100, tolerance=1e-6).value,
            *hessian.trace_samples(seed=1, probes=2),
        ]

    here, before = measured(batches()), stored(layers)
    model.cuda()
    there = measured([{key: value.cuda() for key, value in batch.items()} for batch in batches()])
    assert there == pytest.approx(here, rel=1e-3, abs=1e-5)
    assert all(torch.equal(layer.weight.cpu(), old) for layer, old in zip(layers, before, strict=True))


def test_weights_that_are_too_coarse_are_rejected(model):
    with pytest.raises(ValueError, match=r"bfloat16.*widen"):
        flatness.plain_layers(model.bfloat16(), NAMES)


def test_a_backbone_that_is_held_in_fp32_is_measured_without_rounding():
    """W' + ε of a held BF16 backbone has FP32's digits: by hand from the merged weights, and no rise without noise."""
    adapted = tiny_lora(torch.bfloat16)
    precision.hold(adapted, torch.float32)
    names = [layer.name for layer in find_lora_layers(adapted)]
    with pytest.raises(ValueError, match=r"weights=torch.bfloat16: .*widen\(model\) first"):
        flatness.plain_layers(adapted.float().merge_and_unload(), names)
    adapted = tiny_lora(torch.bfloat16).eval()
    precision.hold(adapted, torch.float32)
    merged = precision.widen(adapted).merge_and_unload().requires_grad_(False)
    layers = flatness.plain_layers(merged, names)
    read = []
    hook = layers[0].module.register_forward_pre_hook(lambda module, args: read.append(module.weight.clone()))
    assert flatness.expected_rises(merged, layers, batches(1), 0.0, draws=2, seed=4) == [0.0, 0.0]
    hook.remove()
    weight = stored(layers)[0]
    assert not torch.equal(weight, weight.bfloat16().float())  # W' is no BF16 matrix, so rounding would move it
    assert all(torch.equal(each, weight) for each in read)
    perturbation = flatness._MeasuringPerturbation(layers, sigma=1e-3, total_steps=1, seed=4, ramp="constant")
    perturbation.begin(0)
    z = host.normal(4, 0, flatness._RISE, layers[0].name, tuple(weight.shape))
    by_hand = weight + 1e-3 / weight.shape[1] ** 0.5 * weight.norm(dim=1, keepdim=True) * z
    torch.testing.assert_close(perturbation.reading(0).weight(), by_hand, rtol=1e-6, atol=1e-8)
    perturbation.close()
