"""The choice of BF16 or FP32 products, and a BF16 backbone that is held in FP32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch

import run_exp
from flatlora.models import hashes, loading
from flatlora.noise import host
from flatlora.perturb.epsilon import Draw, write_perturbed
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils import precision
from flatlora.utils.precision import CPUFeatures, bf16_support, choose_precision
from tests.conftest import run_folder, tiny_llama, tiny_lora

PROJECT = Path(__file__).parents[3]
BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
AVX512 = CPUFeatures(avx512_bf16=True, amx_bf16=False, arm_bf16=False, onednn_bf16=True)
AMX = CPUFeatures(avx512_bf16=True, amx_bf16=True, arm_bf16=False, onednn_bf16=True)
ARM = CPUFeatures(avx512_bf16=False, amx_bf16=False, arm_bf16=True, onednn_bf16=True)
AVX2 = CPUFeatures(avx512_bf16=False, amx_bf16=False, arm_bf16=False, onednn_bf16=False)
OLD_AVX512 = AVX2._replace(onednn_bf16=True)  # oneDNN emulates BF16 there, several times slower than FP32
HIDDEN = AMX._replace(onednn_bf16=False)  # ONEDNN_MAX_CPU_ISA=AVX2
NOTHING_REPORTED = CPUFeatures()


class TestChoice:
    @pytest.mark.parametrize(
        ("features", "fast", "reason"),
        [
            (AVX512, True, "AVX512_BF16"),
            (AMX, True, "AMX"),
            (ARM, True, "Arm BF16"),
            (AVX2, False, "no BF16 instructions"),
            (OLD_AVX512, False, "no BF16 instructions"),
            (HIDDEN, False, "oneDNN does not use"),
            (NOTHING_REPORTED, False, "does not report"),
            (AMX._replace(onednn_bf16=None), False, "does not report whether oneDNN"),
        ],
    )
    def test_support_follows_what_is_reported(self, features, fast, reason):
        supported, reported = bf16_support(features)
        assert supported is fast
        assert reason in reported

    @pytest.mark.parametrize(
        ("setting", "stored", "features", "products", "autocast", "held"),
        [
            ("auto", "bfloat16", AMX, BF16, BF16, BF16),
            ("auto", "bfloat16", AVX2, FP32, None, FP32),
            ("none", "bfloat16", AMX, BF16, None, BF16),
            ("none", "bfloat16", AVX2, FP32, None, FP32),
            ("bfloat16", "bfloat16", AVX2, BF16, BF16, BF16),
            ("bfloat16", "float32", AMX, BF16, BF16, FP32),
            ("auto", "float32", AMX, FP32, None, FP32),
            ("auto", "float32", AVX2, FP32, None, FP32),
            ("auto", "float16", AMX, FP32, None, FP32),
        ],
    )
    def test_on_a_cpu(self, setting, stored, features, products, autocast, held):
        chosen = choose_precision(setting, stored, CPU, features)
        assert (chosen.products, chosen.autocast, chosen.held) == (products, autocast, held)
        assert chosen.stored == getattr(torch, stored)
        assert chosen.slow is (setting == "bfloat16" and features is AVX2)

    def test_a_gpu_computes_in_what_it_is_asked_for(self):
        assert choose_precision("auto", "bfloat16", "cuda", AVX2).autocast == BF16
        assert choose_precision("auto", "float32", "cuda", AVX2).autocast is None
        assert choose_precision("none", "bfloat16", "cuda", AVX2).products == BF16

    def test_a_torch_without_the_queries_is_safe(self, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.delattr(torch.cpu, name, raising=False)
        assert precision.cpu_features()[:2] in ((None, None), (False, False))  # False on Arm
        assert not bf16_support(precision.cpu_features())[0]

    def test_a_torch_with_single_queries_is_asked_by_them(self, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert precision.cpu_features()[:3] == (True, False, False)

    def test_the_librarys_dtype_says_once_that_torch_cannot_report(self, monkeypatch, caplog):
        for features, dtype, reported in ((AMX, BF16, 0), (AVX2, FP32, 0), (NOTHING_REPORTED, FP32, 1)):
            monkeypatch.setattr(precision, "cpu_features", lambda features=features: features)
            assert [precision.fast_dtype() for _ in range(3)] == [dtype] * 3
            assert precision.fast_dtype("cuda") == BF16
            assert len(caplog.records) == reported
        assert "the safe choice: torch" in caplog.text

    @pytest.mark.parametrize(
        ("limit", "allowed"),
        [
            (None, True),
            ("DEFAULT", True),
            ("all", True),
            ("SSE41", False),
            ("AVX", False),
            ("AVX2", False),
            ("AVX2_VNNI", False),
            ("AVX2_VNNI_2", False),
            ("AVX512_CORE", False),
            ("avx512_core", False),
            ("AVX512_CORE_VNNI", False),
            ("AVX512_CORE_BF16", True),
            ("AVX512_CORE_FP16", True),
            ("AVX512_CORE_AMX", True),
            ("AVX512_CORE_AMX_FP16", True),
            ("AVX10_1_512", True),
            ("AVX10_1_512_AMX", True),
            ("AVX10_1_512_AMX_FP16", True),
            ("AVX10_2_512", True),
            ("AVX10_2_512_AMX_2", True),
            ("unknown", True),  # oneDNN ignores it
        ],
    )
    def test_a_limit_of_onednn_may_exclude_bf16(self, limit, allowed, monkeypatch):
        assert precision.isa_limit_allows_bf16(limit) is allowed
        monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMX._asdict(), raising=False)
        monkeypatch.setattr(
            precision, "_query", lambda owner, name: getattr(owner, name)() if owner is torch.cpu else True
        )
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if limit is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        supported, reported = bf16_support(precision.cpu_features())
        assert supported is allowed
        assert ("ONEDNN_MAX_CPU_ISA" in reported) is not allowed

    def test_answers_of_other_arithmetic_are_distinguished(self):
        ways = [("auto", AMX), ("none", AMX), ("auto", AVX2)]
        labels = {choose_precision(setting, "bfloat16", CPU, features).label for setting, features in ways}
        assert labels == {"torch.bfloat16", "None", "torch.float32"}


def held(model):
    """The same model with its BF16 weights in FP32 tensors."""
    precision.hold(model, FP32)
    return model


class TestHeldBackbone:
    def test_values_names_and_hash_are_those_of_bf16(self):
        model, stored = held(tiny_llama().to(BF16)), tiny_llama().to(BF16)
        for (name, wide), narrow in zip(model.named_parameters(), stored.parameters(), strict=True):
            assert wide.dtype == FP32, name
            assert torch.equal(wide, narrow.float())
        values = [hashes.backbone_sha256(m.requires_grad_(False)) for m in (model, stored)]
        assert values[0] == values[1]

    def test_tied_weights_stay_tied(self):
        model = held(tiny_llama(tie_word_embeddings=True).to(BF16))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == FP32

    def test_the_smallest_change_changes_the_hash(self):
        model = held(tiny_llama().to(BF16)).requires_grad_(False)
        before = hashes.backbone_sha256(model)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))  # far below BF16's resolution
        assert hashes.backbone_sha256(model) != before

    @pytest.mark.parametrize("mode", ["copy", "recompute", "inplace"])
    def test_layers_read_the_weights_that_bf16_reads(self, mode):
        read = []
        for model in (tiny_lora(BF16), held(tiny_lora(BF16))):
            layers = find_lora_layers(model)
            perturbation = WeightPerturbation(layers, sigma=0.3, total_steps=4, seed=3, mode=mode)
            perturbation.begin(2)
            if mode == "inplace":
                read.append([layer.weight.detach().to(BF16).clone() for layer in layers])
            else:
                read.append([perturbation.reading(i).weight().to(BF16).clone() for i in range(len(layers))])
            wide = perturbation.reading(0).weight() if mode != "inplace" else layers[0].weight
            assert torch.equal(wide, wide.to(BF16).to(wide.dtype))
            perturbation.end()
            left = [layer.weight.detach().to(BF16).clone() for layer in layers]
            read[-1] += left  # what inplace leaves behind has drifted alike
            perturbation.close()
        assert all(torch.equal(a, b) for a, b in zip(*read, strict=True))

    @pytest.mark.parametrize(("shape", "row", "column"), [((3, 17), 0, 0), ((5, 8), 2, 3), ((2, 3000), 1, 5)])
    def test_compiled_rounding_is_bf16s(self, shape, row, column):
        weight = torch.randn(shape).to(BF16)
        c, out, wide = torch.rand(shape[0]), torch.empty(shape, dtype=BF16), torch.empty(shape)
        place = {"row": row, "column": column}
        host.add_normal(weight, c, out, (1, 2), 3, 4, **place)
        host.add_normal(weight.float(), c, wide, (1, 2), 3, 4, rounded=True, **place)
        assert torch.equal(out.float(), wide)

    def test_rounding_without_compiled_code_is_the_same(self):
        weight, draw = torch.randn(6, 5).to(BF16), Draw((1, 2), 3, 0, torch.rand(6))
        fused, plain = torch.empty(6, 5), torch.empty(5, 6).t()  # not contiguous
        write_perturbed(weight.float(), draw, fused, stored=BF16)
        write_perturbed(weight.float(), draw, plain, stored=BF16)
        assert torch.equal(fused, plain)
        assert np.all(fused.numpy().view(np.uint32) & 0xFFFF == 0)

    def test_load_backbone_follows_the_cpu(self, tiny_model_folder, monkeypatch, caplog):
        config = loading.ModelConfig(name="m", hub_id=str(tiny_model_folder), family="causal_lm", dtype="bfloat16")
        for features, dtype in ((AMX, BF16), (AVX2, FP32)):
            monkeypatch.setattr(precision, "cpu_features", lambda features=features: features)
            assert next(loading.load_backbone(config, CPU).parameters()).dtype == dtype
        assert not caplog.records
        model = loading.load_backbone(config, CPU, autocast="bfloat16")
        assert next(model.parameters()).dtype == BF16
        (record,) = caplog.records
        assert "times as long as an FP32 one on this CPU (measured, " in record.getMessage()
        assert record.getMessage().startswith("trainer.autocast=bfloat16: ")
        assert "trainer.autocast=auto" in record.getMessage()


def test_the_warning_times_a_layer_of_the_base(monkeypatch):
    """Of 14 layers and their 28 factors the commonest shape is A's, 4 × 32."""
    timed = []
    monkeypatch.setattr(precision, "measured_ratio", lambda m, n: timed.append((m, n)) or 2.0)
    for model in (tiny_lora(), tiny_llama()):
        bases = [tuple(p.shape) for n, p in tiny_llama().named_parameters() if "_proj" in n]
        reported = precision.slow_bf16_warning(model, "bf16=True", "leave it out")
        m, n = max(bases, key=bases.count)
        assert timed.pop() == (m, n)
        assert f"(measured, {m} × {n})" in reported


def test_threads_are_the_physical_cores(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(joblib, "cpu_count", lambda **_: 1)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        precision.use_physical_cores()
        assert torch.get_num_threads() == 2  # the user has said how many
        monkeypatch.delenv("OMP_NUM_THREADS")
        precision.use_physical_cores()
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(joblib, "cpu_count", lambda **_: 64)
        precision.use_physical_cores()
        assert torch.get_num_threads() == 1  # never more
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("words", "features", "reported"),
    [
        ([], AMX, "bfloat16 weights, products in bfloat16 by autocast: this CPU has AMX and AVX512_BF16"),
        ([], AVX2, "bfloat16 weights, products in float32: this CPU has no BF16 instructions"),
        (["trainer.autocast=bfloat16"], AVX2, "products in bfloat16 by autocast: requested, and this CPU has no BF16"),
        ([], HIDDEN, "products in float32: oneDNN does not use this CPU's AMX and AVX512_BF16"),
        (["model.dtype=float32"], AMX, "float32 weights, products in float32: the weights are float32"),
    ],
)
def test_a_dry_run_shows_the_choice_and_its_reason(words, features, reported, monkeypatch, capsys):
    monkeypatch.setattr(precision, "cpu_features", lambda: features)
    assert run_exp.main(["trainer=cpu", *words, "dry_run=true"]) == 0
    assert reported in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(("setting", "warned"), [("auto", 0), ("bfloat16", 1)])
def test_a_run_logs_and_records_the_choice_once(setting, warned, tiny_settings, monkeypatch, capsys):
    monkeypatch.setattr(precision, "cpu_features", lambda: AVX2)
    settings = [word for word in tiny_settings if not word.startswith("model.dtype")]
    settings += ["model.dtype=bfloat16", f"trainer.autocast={setting}", "trainer.max_steps=1"]
    assert run_exp.main(settings) == 0
    output = " ".join("".join(capsys.readouterr()).split())
    record = json.loads((run_folder(settings) / "run.json").read_text())["precision"]
    assert output.count(f"precision: {choose_precision(setting, 'bfloat16', CPU, AVX2)}") == 1
    assert output.count("BF16 product takes") == warned
    assert record == choose_precision(setting, "bfloat16", CPU, AVX2).record()


_NAMES = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.skipif(
    not bf16_support(precision.cpu_features())[0], reason="this CPU has no choice: it has no BF16 instructions"
)
@pytest.mark.slow
@pytest.mark.extra
def test_a_run_makes_the_choice_of_its_cpu(tiny_settings):
    settings = [word for word in tiny_settings if not word.startswith(("model.dtype", "wandb.name"))]
    settings += ["trainer.max_steps=3", "rho=flat", "model.dtype=bfloat16"]
    records = {}
    assert run_exp.main([*settings, "wandb.name=fast"]) == 0
    command = [sys.executable, str(PROJECT / "run_exp.py"), *settings, "wandb.name=slow"]
    subprocess.run(command, env=os.environ | _NAMES, check=True, capture_output=True, cwd=PROJECT)
    for name in ("fast", "slow"):
        folder = next(path.parent for path in run_folder(settings).parents[1].glob(f"{name}/*/run.json"))
        records[name] = json.loads((folder / "run.json").read_text())
    fast, slow = records["fast"], records["slow"]
    assert (fast["precision"]["products"], slow["precision"]["products"]) == ("bfloat16", "float32")
    assert (fast["precision"]["autocast"], slow["precision"]["autocast"]) == ("bfloat16", None)
    assert "oneDNN" in slow["precision"]["reason"]
    hashes = {value for record in (fast, slow) for value in record["backbone_sha256"].values()}
    assert len(hashes) == 1
    assert slow["metrics"]["first_loss"] == pytest.approx(fast["metrics"]["first_loss"], rel=2e-2)


def test_tf32_is_refused_where_torch_would_compute_in_fp32(tiny_settings, capsys):
    assert run_exp.main([*tiny_settings, "trainer.matmul_precision=high"]) == 2
    assert "Invalid trainer.matmul_precision=high on the CPU: only NVIDIA GPUs" in capsys.readouterr().err
    assert not (Path(next(w for w in tiny_settings if w.startswith("results_root=")).partition("=")[2])).exists()
