"""LoRA-Pro against its equations: the nearest update, Adam on the m×n gradient, BF16 moments, sharding."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from flatlora.optim.lora_pro import LoRAPro, Pair, _Frame, lora_pairs, nearest_update_reference, round_stochastically
from flatlora.utils.errors import ConfigError
from tests.conftest import tiny_llama, tiny_lora
from tests.processes import fork_two


def pair_and_gradient(m=9, n=7, r=3, scaling=1.7, seed=0, B_std=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = nn.Parameter(torch.randn(r, n, dtype=dtype, generator=generator))
    B = nn.Parameter(B_std * torch.randn(m, r, dtype=dtype, generator=generator))
    G = torch.randn(m, n, dtype=dtype, generator=generator)
    A.grad, B.grad = scaling * B.detach().mT @ G, scaling * G @ A.detach().mT
    return Pair("layer", A, B, scaling), G


def change_of_weight(pair, A_update, B_update):
    return pair.scaling * (pair.B.detach() @ A_update + B_update @ pair.A.detach())


@pytest.mark.parametrize("shape", [(9, 7, 3), (6, 12, 1), (8, 8, 8), (5, 11, 4)])
@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_update_is_the_least_squares_solution(shape, scaling):
    m, n, r = shape
    pair, G = pair_and_gradient(m, n, r, scaling)
    frame = _Frame.of([pair], 0.0)
    A_update, B_update = (part[0] for part in frame.nearest(pair.A.grad[None], pair.B.grad[None]))
    A_expected, B_expected = nearest_update_reference(pair.A.detach(), pair.B.detach(), scaling, G)
    for got, expected in ((A_update, A_expected), (B_update, B_expected)):
        assert (got - expected).norm() <= 1e-5 * expected.norm()
    left, right = frame.equivalent_gradient(pair.A.grad[None], pair.B.grad[None])
    equivalent = (left @ right)[0]
    torch.testing.assert_close(change_of_weight(pair, A_update, B_update), equivalent, rtol=1e-9, atol=1e-9)
    # The first-order conditions of the nearest point: nothing of the error lies in what A and B span.
    assert (pair.B.detach().mT @ (equivalent - G)).abs().max() < 1e-8
    assert ((equivalent - G) @ pair.A.detach().mT).abs().max() < 1e-8
    # Not farther than LoRA's own change, however long that is taken.
    lora = change_of_weight(pair, pair.A.grad, pair.B.grad)
    best = (lora * G).sum() / lora.square().sum()
    assert (equivalent - G).norm() <= (best * lora - G).norm() + 1e-12


def test_the_damped_update_is_the_least_squares_solution_to_1e_5():
    pair, G = pair_and_gradient()
    optimizer = LoRAPro([pair], lr=1.0, mode="sgd")
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    optimizer.step()
    A_expected, B_expected = nearest_update_reference(A, B, pair.scaling, G)
    assert ((A - pair.A) - A_expected).norm() <= 1e-5 * A_expected.norm()
    assert ((B - pair.B) - B_expected).norm() <= 1e-5 * B_expected.norm()


def test_start_at_zero_b_is_exact():
    pair, G = pair_and_gradient(B_std=0.0)
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    LoRAPro([pair], lr=1.0, mode="sgd").step()
    assert torch.equal(pair.A, A)
    projector = torch.linalg.pinv(A) @ A
    torch.testing.assert_close(pair.scaling * (B - pair.B) @ A, G @ projector, rtol=1e-6, atol=1e-6)
    assert pair.B.isfinite().all()


def deficient_pair(m, n, r, B_rank, A_rank, dtype, scaling=2.0):
    """A pair whose factors have ranks below r, and the full gradient."""
    generator = torch.Generator().manual_seed(0)

    def factor(rows, columns, rank):
        shapes = (rows, rank), (rank, columns)
        left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return nn.Parameter((left @ right).to(dtype))

    A, B = factor(r, n, A_rank), factor(m, r, B_rank)
    G = torch.randn(m, n, generator=generator).to(dtype)
    A.grad, B.grad = scaling * B.detach().mT @ G, scaling * G @ A.detach().mT
    return Pair("layer", A, B, scaling), G


def span(matrix, rank):
    """The projector on the column space of a matrix of known rank, by its SVD in FP64."""
    U = torch.linalg.svd(matrix.double(), full_matrices=False).U[:, :rank]
    return U @ U.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("m", "n", "r", "B_rank", "A_rank"),
    [(256, 256, 8, 5, 8), (256, 256, 8, 8, 3), (256, 256, 8, 5, 3), (4096, 16, 8, 2, 7), (5, 6, 8, 5, 6)],
)
def test_factors_below_their_rank_have_the_best_equivalent_gradient(m, n, r, B_rank, A_rank, dtype):
    """The nearest matrix to G among s·B·X + s·Y·A is G less what lies outside of both spans (Eckart and Young)."""
    pair, G = deficient_pair(m, n, r, B_rank, A_rank, dtype)
    frame = _Frame.of([pair], 1e-8)
    left, right = frame.equivalent_gradient(pair.A.grad[None], pair.B.grad[None])
    G, eye_m, eye_n = G.double(), torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    best = G - (eye_m - span(pair.B.detach(), B_rank)) @ G @ (eye_n - span(pair.A.detach().mT, A_rank))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-5
    assert ((left.double() @ right.double())[0] - best).norm() <= tolerance * G.norm()
    A_update, B_update = (part[0].double() for part in frame.nearest(pair.A.grad[None], pair.B.grad[None]))
    change = pair.scaling * (pair.B.detach().double() @ A_update + B_update @ pair.A.detach().double())
    assert (change - best).norm() <= tolerance * G.norm()


@pytest.mark.parametrize(("B_rank", "A_rank"), [(2, 4), (4, 1), (2, 3)])
def test_factors_below_their_rank_move_as_little_as_the_least_squares_solution(B_rank, A_rank):
    pair, G = deficient_pair(7, 9, 4, B_rank, A_rank, torch.float64)
    updates = _Frame.of([pair], 0.0).nearest(pair.A.grad[None], pair.B.grad[None])
    expected = nearest_update_reference(pair.A.detach(), pair.B.detach(), pair.scaling, G)
    for (got,), wanted in zip(updates, expected, strict=True):
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_fewer_tokens_than_ranks_train_in_fp32_as_in_fp64():
    """Three tokens give B at most three directions: every step of SGD meets null eigenvalues."""
    generator = torch.Generator().manual_seed(1)
    X, W, Y = (torch.randn(*shape, generator=generator) for shape in ((3, 16), (12, 16), (3, 12)))
    A_start, lr, scaling = torch.randn(6, 16, generator=generator), 3e-3, 2.0

    def trained(dtype):
        A, B = nn.Parameter(A_start.to(dtype, copy=True)), nn.Parameter(torch.zeros(12, 6, dtype=dtype))
        optimizer, losses = LoRAPro([("layer", A, B, scaling)], lr=lr, mode="sgd", damping=0.0), []
        for _ in range(40):
            optimizer.zero_grad()
            loss = 0.5 * (X.to(dtype) @ (W.to(dtype) + scaling * B @ A).mT - Y.to(dtype)).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def plain():
        """The steps as least squares over all updates, FP64."""
        A, B, losses = A_start.double(), torch.zeros(12, 6, dtype=torch.float64), []
        for _ in range(40):
            error = X.double() @ (W.double() + scaling * B @ A).mT - Y.double()
            losses.append(0.5 * error.square().sum().item())
            A_update, B_update = nearest_update_reference(A, B, scaling, error.mT @ X.double())
            A, B = A - lr * A_update, B - lr * B_update
        return losses

    found, expected = trained(torch.float32), plain()
    assert found == pytest.approx(expected, rel=1e-3)
    assert trained(torch.float64) == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < 0.5 * expected[0]


def test_a_diverged_pair_is_named():
    pairs = some_pairs()
    pairs[1].B.data.fill_(math.inf)
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
    with pytest.raises(FloatingPointError, match="A or B of layer1 contains NaN or infinity"):
        LoRAPro(pairs).step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_the_plain_loop_over_the_m_by_n_gradient(weight_decay):
    """Twenty steps on ‖W₀ + sBA − T‖², every matrix formed as the equations have it."""
    pair, _ = pair_and_gradient(B_std=0.0)
    (r, n), m, s = pair.A.shape, pair.B.shape[0], pair.scaling
    target = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    lr, betas, eps, damping = 0.02, (0.9, 0.99), 1e-8, 1e-8
    optimizer = LoRAPro([pair], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, damping=damping)
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    first, second = torch.zeros(m, n, dtype=torch.float64), torch.zeros(m, n, dtype=torch.float64)
    eye = torch.eye(r, dtype=torch.float64)

    def closed_form(A, B, gA, gB):
        B_inverse, A_inverse = torch.linalg.inv(B.T @ B + damping * eye), torch.linalg.inv(A @ A.T + damping * eye)
        right = -(B_inverse @ gA @ A.T) / s**2
        system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T) + damping * torch.eye(r * r, dtype=A.dtype)
        X = torch.linalg.solve(system, right.flatten()).view(r, r)
        outside = torch.eye(m, dtype=A.dtype) - B @ B_inverse @ B.T
        return B_inverse @ gA / s**2 + X @ A, outside @ gB @ A_inverse / s**2 - B @ X

    for step in range(1, 21):
        loss = ((pair.scaling * pair.B @ pair.A - target) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        G = 2 * (s * B @ A - target)
        gA, gB = closed_form(A, B, s * B.T @ G, s * G @ A.T)
        equivalent = s * B @ gA + s * gB @ A
        first = betas[0] * first + (1 - betas[0]) * equivalent
        second = betas[1] * second + (1 - betas[1]) * equivalent**2
        direction = (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
        gA, gB = closed_form(A, B, s * B.T @ direction, s * direction @ A.T)
        A, B = (1 - lr * weight_decay) * A - lr * gA, (1 - lr * weight_decay) * B - lr * gB
        torch.testing.assert_close(pair.A.detach(), A, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(pair.B.detach(), B, rtol=1e-7, atol=1e-9)
    state = optimizer.state[pair.A]
    torch.testing.assert_close(state["exp_avg"], first, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(state["exp_avg_sq"], second, rtol=1e-7, atol=1e-9)


def train(optimizer, pairs, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randn(p.B.shape[0], p.A.shape[1], generator=generator) for p in pairs]
    for _ in range(steps):
        loss = sum(((p.scaling * p.B @ p.A - t) ** 2).mean() for p, t in zip(pairs, targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def some_pairs():
    shapes = [(9, 7, 3), (9, 7, 3), (6, 12, 2)]
    return [
        pair_and_gradient(*shape, seed=i, B_std=0.0, dtype=torch.float32)[0]._replace(name=f"layer{i}")
        for i, shape in enumerate(shapes)
    ]


def test_pairs_of_one_shape_in_a_batch_are_those_on_their_own():
    together, alone = some_pairs(), some_pairs()
    train(LoRAPro(together, lr=0.05), together, 6)
    for index, pair in enumerate(alone):
        generator = torch.Generator().manual_seed(3)
        targets = [torch.randn(p.B.shape[0], p.A.shape[1], generator=generator) for p in alone]
        optimizer = LoRAPro([pair], lr=0.05)
        for _ in range(6):
            optimizer.zero_grad()
            ((pair.scaling * pair.B @ pair.A - targets[index]) ** 2).mean().backward()
            optimizer.step()
        torch.testing.assert_close(pair.A, together[index].A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pair.B, together[index].B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", [1, -1])
def test_state_goes_by_name_and_resumes_exactly(moments, order):
    whole = some_pairs()
    train(LoRAPro(whole, lr=0.05, moments=moments), whole, 7)
    resumed = some_pairs()
    first = LoRAPro(resumed, lr=0.05, moments=moments)
    train(first, resumed, 4)
    saved = first.state_dict()
    second = LoRAPro(resumed[::order], lr=0.05, moments=moments)
    second.load_state_dict(saved)
    assert {s["exp_avg"].dtype for s in second.state.values()} == {getattr(torch, moments)}
    for pair in resumed:
        assert torch.equal(second.state[pair.A]["exp_avg"], first.state[pair.A]["exp_avg"])
    train(second, resumed, 3)
    for a, b in zip(whole, resumed, strict=True):  # a batch in another order may round differently
        tolerance = 0.0 if order == 1 else 1e-3 if moments == "float32" else 3e-2
        tolerance = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(a.A, b.A, **tolerance)
        torch.testing.assert_close(a.B, b.B, **tolerance)
    with pytest.raises(ValueError, match="its pairs differ"):
        LoRAPro([p._replace(name=f"x{p.name}") for p in resumed]).load_state_dict(saved)


@pytest.mark.extra
def test_bf16_moments_do_not_lose_small_moves():
    value = torch.full((40_000,), 1.0 + 2.0**-10)  # an eighth of a BF16 step above 1
    out = torch.empty_like(value, dtype=torch.bfloat16)
    round_stochastically(value, out, torch.Generator().manual_seed(0))
    assert set(out.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(out.double().mean() - value.double().mean()) < 4 * (2.0**-7 * 0.34) / 200
    exact = torch.tensor([0.0, 1.5, -3.0, math.inf])
    out = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically(exact, out, torch.Generator().manual_seed(0))
    assert out.tolist() == exact.tolist()
    lean, full = some_pairs(), some_pairs()
    losses = [train(LoRAPro(p, lr=0.05, moments=m), p, 150) for p, m in ((lean, "bfloat16"), (full, "float32"))]
    start = train(LoRAPro(some_pairs(), lr=0.0), some_pairs(), 1)
    assert losses[0] < 0.8 * start
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_global_generators_are_left_alone():
    pairs = some_pairs()
    before = torch.get_rng_state()
    train(LoRAPro(pairs, moments="bfloat16"), pairs, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_other_parameters_get_adamw():
    pairs, other = some_pairs(), nn.Parameter(torch.ones(5))
    twin = nn.Parameter(torch.ones(5))
    ours = LoRAPro(pairs, lr=0.1, weight_decay=0.01, others=[("gate", other)])
    plain = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.01)
    for step in range(5):
        other.grad = twin.grad = torch.linspace(-1, 2, 5) * (step + 1)
        ours.step()
        plain.step()
    torch.testing.assert_close(other, twin)


def test_errors_are_reported_together():
    A, B = nn.Parameter(torch.zeros(2, 4, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="r × n") as caught:
        LoRAPro([("a", A, B, 1.0), ("a", A, B, -1.0)], lr=-1, betas=(0.9, 1.0), mode="lion", moments="int8")
    reported = str(caught.value)
    for part in ("names occur twice", "must be FP32", "scaling=-1.0", "lr=-1", "betas=(0.9, 1.0)", "lion", "int8"):
        assert part in reported
    with pytest.raises(ValueError, match="at least one"):
        LoRAPro([])


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_copies_and_pickles_go_on_as_the_original_would(moments):
    pairs = some_pairs()
    optimizer = LoRAPro(pairs, lr=0.05, moments=moments)
    train(optimizer, pairs, 3)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    train(optimizer, pairs, 2)
    train(twin, twin.pairs, 2)
    for one, other in zip(pairs, twin.pairs, strict=True):
        assert one.name == other.name
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)


def test_pairs_of_a_model_have_the_backbone_s_names():
    pairs = lora_pairs(tiny_lora())
    assert len(pairs) == 14
    assert pairs[0].name == "model.layers.0.self_attn.q_proj"
    assert pairs[0].scaling == 2.0


def adapted(**changes):
    """A tiny Llama with biases, adapted as asked."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | changes
    model = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(**config))
    return model.train()


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"lora_embedding_A", "lora_embedding_B"}),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save"}),
        ({"use_dora": True}, {"lora_magnitude_vector"}),
        ({"bias": "lora_only"}, {"bias"}),
        ({}, set()),
    ],
)
def test_what_a_model_trains_besides_its_pairs_moves_as_adamw_moves_it(changes, kinds):
    model, ids = adapted(**changes), torch.arange(3, 15)[None]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    twins = {
        name: nn.Parameter(p.detach().clone())
        for name, p in trained.items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    assert all(any(kind in name for kind in kinds) for name in twins)
    assert bool(twins) == bool(kinds)
    ours = LoRAPro(model, lr=0.01)  # as docs/library.md has it
    plain = torch.optim.AdamW(twins.values(), lr=0.01, weight_decay=0.0) if twins else None
    for _ in range(3):
        ours.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, twin in twins.items():
            twin.grad = trained[name].grad.clone()
        ours.step()
        if plain:
            plain.step()
    for name, twin in twins.items():
        torch.testing.assert_close(trained[name], twin, rtol=1e-5, atol=1e-7)
    still = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert not still


def test_others_may_be_named_or_left_out(caplog):
    model = adapted(modules_to_save=["lm_head"])
    assert len(LoRAPro(lora_pairs(model)).param_groups) == 2
    assert len(LoRAPro(lora_pairs(model), others=[]).param_groups) == 1
    assert len(LoRAPro(model).param_groups) == 2
    assert caplog.text == ""
    assert len(LoRAPro(list(lora_pairs(model))).param_groups) == 1
    assert "a plain list of pairs without others=: other trained parameters" in caplog.text
    caplog.clear()
    assert len(LoRAPro(list(lora_pairs(model)), others=lora_pairs(model).others).param_groups) == 2
    assert len(LoRAPro(lora_pairs(model)[:1], others=()).param_groups) == 1
    assert caplog.text == ""


@pytest.mark.parametrize(("dtype", "scaled", "named"), [(16, False, True), (16, True, False), (32, False, False)])
def test_an_fp16_backbone_without_loss_scaling_is_named(caplog, dtype, scaled, named):
    model = tiny_lora(torch.float16 if dtype == 16 else torch.float32)
    for pairs in (model, lora_pairs(model)):
        LoRAPro(pairs, loss_scaled=scaled)
    assert caplog.text.count("The backbone is float16 and the loss is not scaled") == 2 * named


def test_adapters_that_are_no_pair_are_rejected_by_name():
    adalora = get_peft_model(
        tiny_llama(), AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    )
    with pytest.raises(ConfigError, match=r"Invalid adapter of model.layers.0.self_attn.q_proj: AdaLoRA's"):
        lora_pairs(adalora)
    of_parameters = adapted(target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(
        ConfigError, match=r"Invalid target_parameters=model.layers.0.self_attn.q_proj.weight \(2 in all"
    ):
        lora_pairs(of_parameters)


def share_moments(words: list[str]) -> int:
    """One of two processes that train the same pairs, the moments of each pair on one of them."""
    moments = words[0]
    dist.init_process_group("gloo")
    alone, sharded = some_pairs(), some_pairs()
    train(LoRAPro(alone, lr=0.05, moments=moments), alone, 7)
    first = LoRAPro(sharded, lr=0.05, moments=moments, shard=True)
    train(first, sharded, 4)
    assert 0 < len(first.state) < 3, len(first.state)  # a part of the pairs, each of them whole
    first.consolidate_state_dict()
    saved = [first.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    assert len(saved[0]["state"]) == 3
    second = LoRAPro(sharded, lr=0.05, moments=moments, shard=True)
    second.load_state_dict(saved[0])
    assert len(second.state) == len(first.state)
    train(second, sharded, 3)
    for a, b in zip(alone, sharded, strict=False):
        both = [torch.empty_like(b.B) for _ in range(2)]
        dist.all_gather(both, b.B.detach())
        assert torch.equal(*both), a.name
        tolerance = 1e-3 if moments == "float32" else 3e-2  # smaller batches may round differently
        torch.testing.assert_close(a.A, b.A, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a.B, b.B, rtol=tolerance, atol=tolerance)
    lone = some_pairs()[:1]
    train(LoRAPro(lone, lr=0.05, shard=True), lone, 1)  # fewer pairs than processes: all get the one that moves
    both = [torch.empty_like(lone[0].B) for _ in range(2)]
    dist.all_gather(both, lone[0].B.detach())
    assert torch.equal(*both)
    assert both[0].any()
    dist.destroy_process_group()
    return 0


@pytest.mark.slow
@pytest.mark.extra  # test_pairs has two processes of LoRA-Pro
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_two_processes_share_the_moments_and_give_the_same_bytes(moments, tmp_path):
    runs = fork_two([moments, f"results_root={tmp_path / 'results'}"], entry=share_moments)
    assert [run.wait(240) for run in runs] == [0, 0], [run.log.read_text()[-2000:] for run in runs]
