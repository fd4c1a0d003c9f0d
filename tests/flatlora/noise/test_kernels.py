"""The noise and row-norm passes give host.py's stream and merged row norms, in torch anywhere, in Triton on a GPU.

The kernels run without a GPU too, in the interpreter: TRITON_INTERPRET=1 pytest tests/flatlora/noise/test_kernels.py
"""

import itertools

import numpy as np
import pytest
import torch

from flatlora.noise import host, philox, torch_passes, triton_kernels

KEY = (0x243F6A88, 0xF3198A2E)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # relative, at its largest
INTERPRETED = triton_kernels.HAS_TRITON and triton_kernels.available("cpu")
# Around a tile, which is 4 × 256; smaller ones in the interpreter, which is slow.
SHAPES = [(1, 1), (3, 7), (5, 8), *([(5, 517), (8, 512)] if INTERPRETED else [(17, 1001), (64, 4096)])]
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or (torch.cuda.is_available() and triton_kernels.available("cuda"))),
    reason="needs a CUDA GPU and Triton",
)


def stream_of(shape, step=7, stream=3, *, row=0, column=0, key=KEY):
    return host.fill_normal(torch.empty(shape), key, step, stream, row=row, column=column)


def perturb(weight, c, out=None, *, sign=1.0, row=0, column=0, key=KEY, step=7, stream=3):
    out = torch.empty_like(weight) if out is None else out
    triton_kernels.NoisePass([weight], [out], c, [key], rows=[row], columns=[column])(step, stream, sign)
    return out


def noise_on_device(shape, **address):
    """z as the pass makes it: FP32, W = 0 and c = 1."""
    return perturb(torch.zeros(shape, device=DEVICE), torch.ones(shape[0], device=DEVICE), **address).cpu()


def weight_and_c(shape, dtype, device, *, transposed=False):
    weight = torch.linspace(-1, 1, shape[0] * shape[1], device=device).reshape(shape).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    return weight, torch.linspace(0.01, 0.5, shape[0], device=device)


# --- Plain torch, any device


def test_torch_philox_equals_reference():
    counters = [(0, 0, 0, 0), (2**32 - 1,) * 4, (5, 6, 7, 8), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    for key, rounds in itertools.product([(0, 0), (2**32 - 1,) * 2, KEY], (7, 10)):
        words = torch_passes.philox_torch([torch.tensor(column) for column in zip(*counters, strict=True)], key, rounds)
        got = list(zip(*(word.tolist() for word in words), strict=True))
        assert got == [philox.philox_reference(counter, key, rounds) for counter in counters]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (2**31, 13), (7, 2**32)])
def test_torch_normals_equal_noise(shape, row, column):
    z = torch_passes.fill_normal_torch(torch.empty(shape), KEY, 2**32 - 1, 9, row=row, column=column)
    torch.testing.assert_close(z, stream_of(shape, 2**32 - 1, 9, row=row, column=column), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("column", [0, 13])
def test_torch_add_is_noise_add_bit_for_bit(dtype, column):
    weight, c = weight_and_c((33, 517), dtype, "cpu")
    expected = host.add_normal(weight, c, torch.empty_like(weight), KEY, 7, 3, row=5, column=column)
    got = torch_passes.add_normal_torch(weight, c, torch.empty_like(weight), KEY, 7, 3, row=5, column=column)
    assert torch.equal(got, expected)
    torch_passes.add_normal_torch(weight, c, weight, KEY, 7, 3, row=5, column=column)  # in place
    assert torch.equal(weight, expected)


def test_torch_chunks_and_slices_agree(monkeypatch):
    whole = torch_passes.fill_normal_torch(torch.empty(40, 300), KEY, 1, 0)
    monkeypatch.setattr(torch_passes, "_CHUNK_ELEMENTS", 1000)
    for row, column, rows, columns in [(0, 0, 40, 300), (7, 13, 5, 50), (39, 299, 1, 1), (3, 8, 2, 290)]:
        part = torch_passes.fill_normal_torch(torch.empty(rows, columns), KEY, 1, 0, row=row, column=column)
        assert torch.equal(part, whole[row : row + rows, column : column + columns])


def test_torch_path_of_a_pass_sums_fp64_in_fp64():
    weight, c = weight_and_c((5, 9), torch.float64, "cpu")
    assert torch.equal(perturb(weight, c, sign=-1.0), weight - c.double()[:, None] * stream_of((5, 9)).double())


@pytest.mark.parametrize("r", [0, 1, 8])
def test_torch_row_norms_equal_the_merged_weight(r):
    weight, A, B = torch.randn(9, 33), torch.randn(r, 33), torch.randn(9, r)
    expected = (weight.double() + 0.5 * B.double() @ A.double()).square().sum(dim=1)
    torch.testing.assert_close(
        triton_kernels.RowNormPass([weight], [A], [B], [0.5])().double(), expected, rtol=1e-5, atol=0
    )


def run_ptx(text, word):
    """The straight-line PTX of the Box–Muller assembly in NumPy, .approx instructions computed in FP64."""
    number = {"f": lambda t: np.uint32(int(t[2:], 16)).view(np.float32), "x": lambda t: np.uint32(int(t, 16))}
    steps = {
        "lop3": lambda a, b, c, table: (a & b) | c,  # table 0xEA
        "shr": lambda a, bits: a >> bits,
        "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
        "lg2": lambda a: np.log2(a.astype(np.float64)).astype(np.float32),
        "sqrt": lambda a: np.sqrt(a.astype(np.float64)).astype(np.float32),
        "cos": lambda a: np.cos(a.astype(np.float64)).astype(np.float32),
        "sin": lambda a: np.sin(a.astype(np.float64)).astype(np.float32),
        "mul": lambda a, b: a * b,
        "add": lambda a, b: a + b,
        "neg": lambda a: -a,
        "mov": lambda a: a.view(np.float32),
    }
    values = {"$2": word}
    for line in (part.strip() for part in text.split(";")):
        if " " in line and not line.startswith(("{", ".")):
            operation, _, operands = line.partition(" ")
            target, *sources = (operand.strip() for operand in operands.split(","))
            read = [
                values[t] if t in values else number[t[1]](t) if t[:1] == "0" else np.uint32(int(t)) for t in sources
            ]
            values[target] = steps[operation.partition(".")[0]](*read)
    return values["$0"], values["$1"]


def test_assembly_is_box_muller():
    halves = np.random.default_rng(0).permutation(65536).astype(np.uint32)
    word = np.arange(65536, dtype=np.uint32) | halves << np.uint32(16)  # every low and every high half once
    x, y = run_ptx(getattr(triton_kernels._BOX_MULLER_PTX, "value", triton_kernels._BOX_MULLER_PTX), word)
    radius = np.sqrt(-2 * np.log((np.arange(65536) + 0.5) / 65536))
    angle = 2 * np.pi * (halves + 0.5) / 65536
    np.testing.assert_allclose(x, radius * np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(y, radius * np.sin(angle), atol=2e-6)


# --- What is refused, before any kernel starts


def arguments(**changes):
    weight = torch.zeros(4, 8)
    given = {"weights": [weight], "outs": [torch.zeros(4, 8)], "coefficients": torch.ones(4), "keys": [KEY]}
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outs": [torch.zeros(4, 9)]}, r"out=torch.float32 \(4, 9\)"),
        ({"outs": [torch.zeros(4, 8).bfloat16()]}, "out=torch.bfloat16"),
        ({"outs": [torch.zeros(4, 1).expand(4, 8)]}, "expanded view"),
        ({"outs": []}, "0 outs"),
        ({"outs": [torch.zeros(4, 8, device="meta")]}, "devices="),
        ({"weights": [torch.zeros(4, 8, dtype=torch.int8)]}, "weight=torch.int8"),
        ({"weights": [torch.zeros(32)]}, r"weight=torch.float32 \(32,\)"),
        ({"coefficients": torch.ones(5)}, "a contiguous FP32 vector"),
        ({"coefficients": torch.ones(4).double()}, "coefficients=torch.float64"),
        ({"keys": [(0, 2**32)]}, r"key\[1\]=4294967296"),
        ({"rows": [2**32 - 3]}, "row=4294967293"),
        ({"columns": [-1]}, "column=-1"),
        ({"columns": [2**35]}, "column=34359738368"),
        ({"counter": torch.zeros(2)}, "counter=torch.float32"),
    ],
)
def test_errors_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        triton_kernels.NoisePass(**arguments(**changes))


def test_shared_memory_is_rejected():
    memory = torch.zeros(8, 8)
    with pytest.raises(ValueError, match="shares part of its memory"):
        triton_kernels.NoisePass(**arguments(weights=[memory[:4]], outs=[memory[2:6]]))
    with pytest.raises(ValueError, match="shares part of its memory"):
        triton_kernels.NoisePass(**arguments(weights=[memory], outs=[memory.t()], coefficients=torch.ones(8)))
    tied = {"weights": [memory] * 2, "outs": [memory] * 2, "coefficients": torch.ones(16), "keys": [KEY] * 2}
    with pytest.raises(ValueError, match="1 of them occur twice"):
        triton_kernels.NoisePass(**tied)


@pytest.mark.parametrize(
    ("step", "stream", "message"), [(-1, 0, "step=-1"), (2**32, 0, "step="), (0, 2**32, "stream=")]
)
def test_counters_out_of_range_are_refused(step, stream, message):
    with pytest.raises(ValueError, match=message):
        triton_kernels.NoisePass(**arguments())(step, stream)


@pytest.mark.parametrize(
    ("A", "B"),
    [((2, 9), (4, 2)), ((2, 8), (5, 2)), ((2, 8), (4, 3))],
)
def test_factors_that_do_not_fit_are_rejected(A, B):
    with pytest.raises(ValueError, match="A is r × n and B m × r"):
        triton_kernels.RowNormPass([torch.zeros(4, 8)], [torch.zeros(A)], [torch.zeros(B)])
    with pytest.raises(ValueError, match="both FP32"):
        triton_kernels.RowNormPass([torch.zeros(4, 8)], [torch.zeros(2, 8).bfloat16()], [torch.zeros(4, 2)])


def test_a_pass_without_rows_or_columns_does_nothing():
    for shape in [(0, 8), (4, 0)]:
        weight = torch.zeros(shape)
        triton_kernels.NoisePass([weight], [weight], torch.ones(shape[0]), [KEY])(0, 0)
        norms = triton_kernels.RowNormPass([weight], [torch.ones(2, shape[1])], [torch.ones(shape[0], 2)])()
        assert torch.equal(norms, torch.zeros(shape[0]))


# --- The kernels


def words_of(z):
    """The 32-bit words behind pairs of normals (…, 2): |z| and direction give back both 16-bit halves."""
    x, y = z.double().unbind(-1)
    low = torch.exp(-(x * x + y * y) / 2) * 65536 - 0.5
    high = torch.remainder(torch.atan2(y, x) / (2 * torch.pi), 1) * 65536 - 0.5
    return low, high


@pytest.mark.gpu
@needs_triton
def test_integers_are_those_of_the_reference():
    step, stream, row = 2**32 - 1, 2**31 + 5, 2**32 - 40
    z = noise_on_device((16, 512), step=step, stream=stream, row=row).view(16, 64, 4, 2)
    low, high = words_of(z)
    blocks, rows = torch.arange(64), torch.arange(row, row + 16)[:, None]
    words = torch.stack(torch_passes.philox_torch((blocks, rows, step, stream), KEY), dim=-1)
    assert philox.philox_reference((63, row + 15, step, stream), KEY) == tuple(words[15, 63].tolist())
    assert ((low - (words & 0xFFFF)).abs() < 0.45).all()  # nearest integer is unique: every half is the right one
    clear = z.double().square().sum(-1) > 0.01  # of a tiny radius the direction is lost in its rounding
    assert ((high - (words >> 16)).abs()[clear] < 0.45).all()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (2**31, 8), (3, 13), (0, 2**33 + 7)])
def test_normals_are_those_of_the_cpu(shape, row, column):
    error = (noise_on_device(shape, row=row, column=column) - stream_of(shape, row=row, column=column)).abs()
    assert error.max() < 1e-4
    assert error.mean() < (1e-6 if error.numel() > 100 else 1e-5)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_sum_is_rounded_once(dtype, shape, transposed):
    weight, c = weight_and_c(shape, dtype, DEVICE, transposed=transposed)
    exact = weight.cpu().double() - c.cpu().double()[:, None] * stream_of(shape).double()
    half_ulp = HALF_ULP[dtype] * (2 if INTERPRETED else 1)  # the interpreter truncates
    error = (perturb(weight, c, sign=-1.0).cpu().double() - exact).abs()
    assert (error <= half_ulp * exact.abs() + 5e-5).all()  # c ≤ ½ times the normals' 1e-4
    if dtype == torch.bfloat16 and not INTERPRETED:  # almost always the very bits of the CPU
        same = host.add_normal(weight.cpu().contiguous(), -c.cpu(), torch.empty(shape, dtype=dtype), KEY, 7, 3)
        assert (perturb(weight, c, sign=-1.0).cpu() != same).double().mean() < 1e-2


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_strided_and_transposed_give_the_same_bits(dtype, shape):
    weight, c = weight_and_c(shape, dtype, DEVICE)
    out = perturb(weight, c)
    strided = torch.zeros(shape[0], 2 * shape[1], dtype=dtype, device=DEVICE)[:, ::2]
    assert torch.equal(perturb(weight, c, strided), out)
    assert torch.equal(perturb(weight.t().contiguous().t(), c), out)
    assert torch.equal(perturb(weight, c, weight), out)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_give_the_bits_of_the_whole(dtype):
    weight, c = weight_and_c((40, 304), dtype, DEVICE)
    whole = perturb(weight, c)
    for row, column, rows, columns in [(7, 13, 5, 50), (39, 303, 1, 1), (3, 8, 2, 288), (0, 5, 40, 299)]:
        area = (slice(row, row + rows), slice(column, column + columns))
        part = perturb(weight[area].contiguous(), c[area[0]].contiguous(), row=row, column=column)
        assert torch.equal(part, whole[area])


@pytest.mark.gpu
@needs_triton
def test_grouped_equals_single():
    mixed = list(itertools.product(SHAPES[:4], DTYPES, (False, True)))
    weights, cs = zip(*(weight_and_c(s, d, DEVICE, transposed=t) for s, d, t in mixed), strict=True)
    keys = [philox.layer_key(1, str(index)) for index in range(len(mixed))]
    outs = [torch.empty_like(weight) for weight in weights]
    triton_kernels.NoisePass(weights, outs, torch.cat(cs), keys)(7, 3)
    for weight, c, key, out in zip(weights, cs, keys, outs, strict=True):
        assert torch.equal(perturb(weight, c, key=key), out)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 1), (3, 7, 2), (130, 264, 8), (150, 1001, 64), (70, 264, 256)])
def test_row_norms_equal_fp64(dtype, m, n, r):
    weight = (0.05 * torch.randn(m, n)).to(DEVICE, dtype)
    A, B = torch.randn(r, n).div(n**0.5).to(DEVICE), torch.randn(m, r).mul(0.05).to(DEVICE)
    expected = (weight.double() + 1.5 * B.double() @ A.double()).square().sum(dim=1)
    got = triton_kernels.RowNormPass([weight], [A], [B], [1.5])()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    transposed = triton_kernels.RowNormPass([weight.t().contiguous().t()], [A], [B], [1.5])()
    torch.testing.assert_close(transposed, got, rtol=1e-6, atol=0)
    parts = [slice(0, n // 3), slice(n // 3, n)]
    shards = [triton_kernels.RowNormPass([weight[:, p]], [A[:, p]], [B], [1.5])().double() for p in parts]
    torch.testing.assert_close(sum(shards), expected, rtol=1e-5, atol=0)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [20, 128])
def test_row_norms_equal_fp64_with_the_blocks_of_other_cards(monkeypatch, dtype, r):
    weight, A, B = (t.to(DEVICE) for t in (0.05 * torch.randn(70, 264), torch.randn(r, 264), torch.randn(70, r)))
    weight, A, B = weight.to(dtype), A / 264**0.5, 0.05 * B
    expected = (weight.double() + B.double() @ A.double()).square().sum(dim=1)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(triton_kernels, "_capability", lambda device, capability=capability: capability)
        got = triton_kernels.RowNormPass([weight], [A], [B])()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.gpu
@needs_triton
def test_grouped_row_norms_read_the_factors_again_and_repeat():
    sizes = [(64, 72, 8), (40, 16, 0), (33, 65, 20), (0, 8, 4)]
    weights = [torch.randn(m, n, device=DEVICE).bfloat16() for m, n, _ in sizes]
    A = [torch.randn(r, n, device=DEVICE) for _, n, r in sizes]
    B = [torch.zeros(m, r, device=DEVICE) for m, _, r in sizes]
    norms = triton_kernels.RowNormPass(weights, A, B)
    torch.testing.assert_close(norms(), norms.squared_norms, rtol=1e-6, atol=0)
    for b in B:
        b.normal_()
    expected = torch.cat(
        [(w.double() + b.double() @ a.double()).square().sum(1) for w, a, b in zip(weights, A, B, strict=True)]
    )
    first = norms().clone()
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(norms(), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_moments_tail_and_correlations():
    z = noise_on_device((8000, 8192), key=philox.layer_key(11, "moments"), step=0, stream=0)
    flat = z.ravel().double()  # 6.6e7 values: std error of the mean 1.2e-4
    assert abs(flat.mean()) < 6e-4
    assert abs(flat.var() - 1) < 1e-3
    assert abs((flat**3).mean()) < 2e-3
    assert abs((flat**4).mean() - 3) < 6e-3
    assert 4.8 < flat.abs().max() < 4.86
    for bound, share in ((1, 0.31731), (2, 0.04550), (3, 0.0026998), (4, 6.334e-5)):
        assert (flat.abs() > bound).double().mean().item() == pytest.approx(share, rel=0.05)
    for lag in (1, 2, 4, 8, 8192):  # within a word, a block, between blocks, between rows
        assert abs((flat[:-lag] * flat[lag:]).mean()) < 6e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_mean_zero_across_layers_and_steps():
    keys = [philox.layer_key(5, f"layer{index}") for index in range(20)]
    weights = [torch.zeros(64, 64, device=DEVICE) for _ in keys]
    outs = [torch.empty_like(weight) for weight in weights]
    noise_pass = triton_kernels.NoisePass(weights, outs, torch.ones(64 * len(keys), device=DEVICE), keys)
    means = []
    for step in range(20):
        noise_pass(step, 0)
        means.append(torch.stack(outs).mean(dim=(1, 2)))
    assert abs(torch.stack(means).mean()) < 4 / (64 * 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_graph_draws_what_the_counter_says():
    weight, c = weight_and_c((64, 256), torch.bfloat16, DEVICE)
    out = torch.empty_like(weight)
    noise_pass = triton_kernels.NoisePass([weight], [out], c, [KEY])
    noise_pass(0, 0)  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noise_pass.launch()
        with pytest.raises(RuntimeError, match="captured"):
            noise_pass.set_counter(1, 0)
    for step in (1, 2):
        noise_pass.set_counter(step, 4)
        graph.replay()
        assert torch.equal(out, perturb(weight, c, step=step, stream=4))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_elements_than_an_int32_counts():
    rows, columns = 2**19 + 8, 4096
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    out = perturb(weight, torch.ones(rows, device=DEVICE), weight)
    expected = stream_of((8, columns), row=rows - 8).bfloat16()
    assert (out[-8:].cpu() != expected).double().mean() < 1e-2
