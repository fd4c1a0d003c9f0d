"""The Triton kernels compile for GPUs that this machine does not have, and stay within their limits."""

import pytest
import torch

from flatlora.noise import triton_kernels
from scripts import kernels

CARDS = [80, 86, 89, 90, 100]
needs_triton = pytest.mark.skipif(
    not triton_kernels.HAS_TRITON or triton_kernels.INTERPRETED, reason="needs Triton's compiler (Linux, x86-64)"
)
TYPES = {torch.int64: "*i64", torch.int32: "*i32"}


def without(constants: dict, *names: str) -> dict:
    return {name: value for name, value in constants.items() if name not in names}


@needs_triton
@pytest.mark.parametrize("card", [card for card in CARDS if card != 89])  # launched as on sm_86; see below
def test_the_kernels_of_the_default_settings_fit(card):
    bf16 = [
        (kernel, constants, types)
        for kernel, constants, types in kernels.every_launch(card)
        if constants.get("RANK", 16) == 16
        and constants.get("ALIGNED", True)
        and str(constants.get("DTYPE", "bf16")) == "bf16"
        and types.get("x", "*bf16") == "*bf16"
    ]
    usages = [kernels.compile_for(card, *launch) for launch in bf16]
    names = ["noise", "gram", "row_norm", "quick_gelu", "quick_gelu_backward"]
    assert [usage.kernel for usage in usages] == names
    assert all(usage.fits for usage in usages)
    assert all(usage.spilled_bytes == 0 for usage in usages)
    assert all(8 < usage.registers <= 255 for usage in usages)


@needs_triton
@pytest.mark.extra
@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_fits(card, capsys, monkeypatch):
    usages = []
    compile_for = kernels.compile_for
    monkeypatch.setattr(kernels, "compile_for", lambda *launch: usages.append(compile_for(*launch)) or usages[-1])
    assert kernels.main(["--cards", str(card)]) == 0
    assert capsys.readouterr().out.count(f"sm_{card}") == 5
    if card < 90:
        assert [usage for usage in usages if usage.spilled_bytes and "ALIGNED=False" not in usage.constants] == []


class Recorder:
    """Stands for a kernel; keeps the arguments and constants of its launches."""

    def __init__(self, kernel):
        self.kernel, self.grids, self.launches = kernel, [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **constants: self.launches.append((arguments, constants))


@pytest.fixture
def launches(monkeypatch):
    """What passes over tensors of the CPU launch, by name of the kernel; nothing runs."""
    monkeypatch.setattr(triton_kernels, "available", lambda device: True)
    recorders = {
        name: Recorder(getattr(triton_kernels, name)) for name in vars(triton_kernels) if name.endswith("_kernel")
    }
    for name, recorder in recorders.items():
        monkeypatch.setattr(triton_kernels, name, recorder)
    return recorders


@needs_triton
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_the_list_has_what_the_passes_launch(monkeypatch, capability, launches):
    monkeypatch.setattr(triton_kernels, "_capability", lambda device: capability)
    listed = [(kernel.kernel, constants) for kernel, constants, _ in triton_kernels.every_launch(capability)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        wide = torch.zeros(8, 32, dtype=dtype)
        for weight in (wide[:, :16].clone(), wide[:, ::2], wide.t(), wide[:, 1:8]):
            m, n = weight.shape
            weights = [weight, weight.clone(memory_format=torch.preserve_format)]
            keys = [(0, 0)] * 2
            for several in (weights, weights[:1]):
                c = torch.ones(m * len(several))
                outs = [torch.empty_strided(w.shape, w.stride(), dtype=dtype) for w in several]
                triton_kernels.NoisePass(several, outs, c, keys[: len(several)])(0, 0)
                for rank in (1, 20, 64, 128):
                    A, B = [torch.zeros(rank, n)] * len(several), [torch.zeros(m, rank)] * len(several)
                    triton_kernels.RowNormPass(several, A, B)()
    reached = []
    for recorder in launches.values():
        for arguments, constants in recorder.launches:
            assert (recorder.kernel, without(constants, "LONE")) in [(k, without(c, "LONE")) for k, c in listed]
            names = recorder.kernel.arg_names[: len(arguments)]
            given = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else "fp32" for a in arguments]
            assert given == [triton_kernels.ARGUMENT_TYPES[name] for name in names]
            reached.append((recorder.kernel, constants))
            assert constants["FIELDS"] == arguments[0].shape[1]
    assert [launch for launch in listed if launch not in reached] == []


@needs_triton
@pytest.mark.parametrize(
    ("capability", "width"), [((8, 0), 32), ((8, 6), 32), ((8, 9), 32), ((9, 0), 64), ((10, 0), 64), ((12, 0), 32)]
)
def test_the_card_chooses_the_blocks(monkeypatch, capability, width, launches):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = triton_kernels._capability(torch.device("cuda", 1))
    monkeypatch.setattr(triton_kernels, "_capability", lambda device: chosen)
    triton_kernels.RowNormPass([torch.zeros(100, 16).bfloat16()], [torch.zeros(64, 16)], [torch.zeros(100, 64)])()
    [(_, row_norm)] = launches["_row_norm_kernel"].launches
    assert row_norm["BN"] == row_norm["RANK_TILE"] == width
    [(_, gram)] = launches["_gram_kernel"].launches
    assert gram["BN"] == gram["TILE"] == width
    assert launches["_gram_kernel"].grids == [(1, 64 // width, 64 // width)]
    assert launches["_row_norm_kernel"].grids == [(2,)]


def test_a_kernel_beyond_a_limit_is_an_error(monkeypatch, capsys):
    usage = kernels.Usage(86, "noise", "ROWS=4", 1024 * 99, 255, 8, 128)
    assert usage.fits
    assert not usage._replace(shared_bytes=usage.shared_bytes + 1).fits
    assert usage._replace(shared_bytes=1024 * 163, card=80).fits
    assert not usage._replace(threads=512).fits
    monkeypatch.setattr(triton_kernels, "HAS_TRITON", True)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "every_launch", lambda card: [(None, {}, {})])
    monkeypatch.setattr(kernels, "compile_for", lambda *launch: usage._replace(threads=512))
    assert kernels.main(["--cards", "86"]) == 1
    assert "sm_86 lacks what noise needs" in capsys.readouterr().out


@pytest.mark.parametrize("cards", ["81", "80,ninety", ""])
def test_unknown_cards_are_named(cards, capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--cards", cards])
    assert "it must be among 80, 86, 89, 90, 100, 120" in capsys.readouterr().err


def test_without_triton_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setattr(triton_kernels, "HAS_TRITON", False)
    assert kernels.main([]) == 2
    assert "pip install" in capsys.readouterr().out
