"""The noise is what philox.py says it is: Philox, Box–Muller, a pure function, standard normal."""

import functools
import random

import numpy as np
import pytest
import torch

from flatlora.noise import host, philox, torch_passes

# Known answers of Random123 for philox4x32: counter, key, then the block after 7 and after 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "4dfccaba 190a87f0 c47362ba b6b5242a",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "seven", "ten"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, seven, ten):
    for rounds, words in ((7, seven), (10, ten)):
        assert philox.philox_reference(counter, key, rounds) == tuple(int(word, 16) for word in words.split())


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 17), (2, 2049), (33, 70)])
def test_equals_reference(shape):
    z = host.normal(2**40 + 3, 17, 5, "model.layers.0.q_proj", shape)
    expected = philox.normal_reference(2**40 + 3, 17, 5, "model.layers.0.q_proj", shape)
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-6)


def test_any_slice_is_the_same_slice():
    whole = host.normal(1, 2, 0, "w", (40, 300))
    for row, column, rows, columns in [(0, 0, 40, 300), (7, 13, 5, 50), (39, 299, 1, 1), (3, 8, 2, 290), (0, 5, 9, 3)]:
        part = host.normal(1, 2, 0, "w", (rows, columns), row=row, column=column)
        assert torch.equal(part, whole[row : row + rows, column : column + columns])


def test_result_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(host.normal(1, 2, 0, "w", (301, 517)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 1), (3, 7, 2), (130, 264, 8), (301, 1001, 17)])
def test_row_norms_are_the_references_on_any_number_of_threads(m, n, r, dtype):
    draw = torch.Generator().manual_seed(m)
    weight, A = torch.randn(m, n, generator=draw).to(dtype), torch.randn(r, n, generator=draw)
    B, squared = torch.randn(m, r, generator=draw), torch_passes.squared_row_norms(weight)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(host.merged_row_norms(weight, A, B, squared))
    torch.set_num_threads(threads)
    assert torch.equal(*results)
    expected = torch_passes.squared_row_norms(weight, A, B, squared).sqrt().float()
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=0)
    assert host.merged_row_norms(weight, torch.full((r, n), torch.nan), B, squared).isnan().all()
    with pytest.raises(ValueError, match=r"Invalid weight=torch\.float64 .*use perturb\.epsilon\.merged_row_norms"):
        host.merged_row_norms(weight.double(), A, B, squared)


def test_a_row_that_the_adapter_cancels_has_norm_zero():
    A, B = torch.ones(1, 16), torch.full((2, 1), -1.0)
    weight = torch.full((2, 16), 1.0)
    squared = torch_passes.squared_row_norms(weight) - 1e-9  # as rounding may leave it
    assert torch.equal(host.merged_row_norms(weight, A, B, squared), torch.zeros(2))


@pytest.mark.parametrize("count", [1, 3])
def test_shared_jobs_return_their_results_in_order(count):
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert host.share([functools.partial(int, number) for number in range(100)]) == list(range(100))
        with pytest.raises(ValueError, match="no number"):
            host.share([functools.partial(int, text) for text in ("1",) * 50 + ("no number",) + ("1",) * 50])
    finally:
        torch.set_num_threads(threads)


def test_every_word_of_the_address_matters():
    base = (1, 2, 0, "w", (8, 64))
    others = [(3, 2, 0, "w", (8, 64)), (1, 4, 0, "w", (8, 64)), (1, 2, 1, "w", (8, 64)), (1, 2, 0, "v", (8, 64))]
    z = host.normal(*base)
    assert all(abs(torch.corrcoef(torch.stack([z.ravel(), host.normal(*o).ravel()]))[0, 1]) < 0.2 for o in others)


def test_moments_tail_and_correlations():
    z = host.normal(11, 0, 0, "moments", (2000, 1000)).double()  # 2e6 values: std error of the mean 7e-4
    assert abs(z.mean()) < 3e-3
    assert abs(z.var() - 1) < 5e-3
    assert abs((z**3).mean()) < 1e-2
    assert abs((z**4).mean() - 3) < 3e-2
    assert 4.5 < z.abs().max() < 4.86  # 16-bit uniforms: sqrt(-2 ln 2^-17) = 4.855
    for bound, share in ((1, 0.31731), (2, 0.04550), (3, 0.0026998)):
        assert (z.abs() > bound).double().mean().item() == pytest.approx(share, rel=0.03)
    flat = z.ravel()
    for lag in (1, 2, 4, 8, 1000):  # within a word, a block, between blocks, between rows
        assert abs((flat[:-lag] * flat[lag:]).mean()) < 3e-3


def test_mean_zero_across_layers_and_steps():
    means = [host.normal(5, step, 0, f"layer{i}", (64, 64)).mean() for step in range(6) for i in range(6)]
    assert abs(torch.stack(means).mean()) < 4 / (64 * 6)


def test_generators_are_left_alone():
    before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state())
    host.normal(1, 2, 3, "w", (64, 64))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "column"), [((5, 40), 0), ((3, 2051), 0), ((6, 33), 13)])
def test_add_normal_rounds_the_fp32_sum_once(dtype, shape, column):
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).view(shape).to(dtype)
    c = torch.linspace(0.01, 0.5, shape[0])
    z = host.normal(9, 1, 0, "w", shape, column=column)
    out = torch.empty_like(weight)
    host.add_normal(weight, c, out, philox.layer_key(9, "w"), 1, 0, column=column)
    assert torch.equal(out, (weight.float() + c[:, None] * z).to(dtype))
    host.add_normal(weight, c, weight, philox.layer_key(9, "w"), 1, 0, column=column)  # in place
    assert torch.equal(out, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"step": -1}, "step=-1"), ({"stream": 2**32}, "stream=4294967296"), ({"row": 2**32}, "row=")],
)
def test_counters_out_of_range_are_refused(arguments, message):
    settings = {"step": 0, "stream": 0, "row": 0} | arguments
    row = settings.pop("row")
    with pytest.raises(ValueError, match=message):
        host.normal(0, settings["step"], settings["stream"], "w", (2, 8), row=row)


def test_wrong_buffers_are_rejected():
    with pytest.raises(ValueError, match="contiguous FP32"):
        host.fill_normal(torch.empty(4, 4, dtype=torch.float64), (0, 0), 0, 0)
    weight = torch.zeros(4, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match="both FP32 or both BF16"):
        host.add_normal(weight, torch.ones(4), weight, (0, 0), 0, 0)


def test_streams_of_ranks_and_micro_batches_never_meet():
    for per_rank in (False, True):
        for per_micro_batch in (False, True):
            streams = {
                (rank, micro): philox.noise_stream(rank, micro, 4, per_rank=per_rank, per_micro_batch=per_micro_batch)
                for rank in range(4)
                for micro in range(3)
            }
            expected = (4 if per_rank else 1) * (3 if per_micro_batch else 1)
            assert len(set(streams.values())) == expected
            assert (0 in streams.values()) == (not per_rank and not per_micro_batch)


class TestWithoutNumba:
    """The library is installed without numba: plain torch operations make the same noise."""

    @pytest.fixture
    def without(self, monkeypatch):
        def use():
            monkeypatch.setattr(host, "_compiled", lambda: None)

        return use

    def test_fill(self, without):
        compiled = host.fill_normal(torch.empty(5, 37), (3, 4), 7, 1, row=2, column=5)
        without()
        torch.testing.assert_close(
            host.fill_normal(torch.empty(5, 37), (3, 4), 7, 1, row=2, column=5), compiled, rtol=0, atol=1e-6
        )

    @pytest.mark.parametrize("rounded", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_add(self, without, dtype, rounded):
        if rounded and dtype == torch.bfloat16:
            pytest.skip("BF16 weights are rounded anyway")
        weight, c = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).to(dtype), torch.full((5,), 0.1)
        compiled = host.add_normal(weight, c, torch.empty_like(weight), (3, 4), 7, 1, rounded=rounded)
        without()
        plain = host.add_normal(weight, c, torch.empty_like(weight), (3, 4), 7, 1, rounded=rounded)
        torch.testing.assert_close(plain, compiled, rtol=2**-7 if rounded or dtype != torch.float32 else 0, atol=1e-6)
        if rounded:
            assert torch.equal(plain, plain.bfloat16().float())

    def test_it_is_said_once(self, monkeypatch, caplog):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        host._compiled.cache_clear()
        try:
            assert host._compiled() is host._compiled() is None
        finally:
            host._compiled.cache_clear()
        assert [record.name for record in caplog.records] == ["flatlora.noise.host"]
