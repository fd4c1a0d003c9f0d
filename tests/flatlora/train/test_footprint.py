"""The planned memory of a step is that of a step: on a CPU, and within a few percent that of a GPU's records."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPConfig, LlamaConfig, LlamaForCausalLM

import run_exp
from flatlora import plan as command
from flatlora.experiment import plan as planning
from flatlora.models import loading
from flatlora.models.clip import CLIPImageClassifier
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.train import footprint
from flatlora.train.footprint import step_memory
from flatlora.train.trainer import FlatTrainer
from scripts.bench_gpu import SHAPE
from tests.conftest import run_folder, tiny_lora

BENCH = Path(__file__).parents[3] / "results/bench"
GIB = 2**30


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_data_has_the_same_peak(checkpointing):
    ids = torch.randint(3, 96, (3, 40))
    model = tiny_lora().train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.get_base_model().enable_input_require_grads()
    live = footprint._LiveStorages()
    for parameter in model.parameters():
        live.add(parameter)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            live.add(parameter.grad)
    batch = {"input_ids": ids.clone(), "labels": ids.clone()}
    with live:
        model(**{name: value.clone() for name, value in batch.items()}).loss.backward()
    planned = step_memory(
        tiny_lora(), batch, dtype=torch.float32, autocast=None, kernels=False, checkpointing=checkpointing
    )
    weights = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.backbone == 4 * weights
    assert planned.trained == 16 * trained
    moments = 8 * trained
    assert planned.peak() - moments == pytest.approx(live.peak, rel=0.1 if checkpointing else 0.02)


def test_the_modes_add_what_the_perturbation_allocates():
    model = tiny_lora(torch.bfloat16)
    copy, recompute = footprint._of_perturbation(model, torch.bfloat16)
    layers = find_lora_layers(model)
    perturbation = WeightPerturbation(layers, sigma=0.1, total_steps=3, seed=0, mode="copy")
    copies = sum(each.numel() * each.element_size() for each in perturbation._copies)
    perturbation.close()
    rows = 12 * sum(len(layer.weight) for layer in layers)
    assert copy == copies + rows
    assert recompute == max(layer.weight.numel() for layer in layers) * 2 + rows


def llama(rows, length, *, kernels, **changes):
    shape = SHAPE | {"num_hidden_layers": 32} | changes
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False)).requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    return step_memory(model, batch, dtype=torch.bfloat16, autocast=torch.bfloat16, kernels=kernels)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ("1x1024x16", True),
        pytest.param("2x1024x16", True, marks=pytest.mark.extra),
        pytest.param("8x1024x4", True, marks=pytest.mark.extra),
        pytest.param("1x1024x16", False, marks=pytest.mark.extra),
        pytest.param("8x1024x4", False, marks=pytest.mark.extra),
    ],
)
def test_llama_on_a_gpu_had_this_peak(shape, kernels):
    """`bench gpu`: whole steps of Llama-2-7B's shape, this suite's and PEFT's."""
    measured = json.loads((BENCH / "gpu.json").read_text())["steps"][shape]
    rows, length, _ = map(int, shape.split("x"))
    planned = llama(rows, length, kernels=kernels)
    if not kernels:
        assert planned.peak() / GIB == pytest.approx(measured["PEFT"]["peak_gib"], rel=0.02)
        return
    for name, mode in (("LoRA", "off"), ("Flat-LoRA copy", "copy"), ("Flat-LoRA recompute", "recompute")):
        assert planned.peak(mode) / GIB == pytest.approx(measured[name]["peak_gib"], rel=0.02)


def of_each_process(report, tokens, **options):
    """The planned memory of each of two processes that share the weights, for micro-batches of joined rows."""
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**report["model"]))
    return llama(1, tokens, kernels=True, **report["model"]).shared(
        2, planning.gathered_bytes(skeleton, torch.bfloat16), **options
    )


@pytest.mark.extra
def test_processes_that_shared_the_weights_had_this_peak():
    """`bench processes` on two GPUs; DDP's step is that of one."""
    report = json.loads((BENCH / "processes.json").read_text())
    measured = {name: run["peak_gpu_gib"] for name, run in report["runs"].items()}
    assert all("micro-batches of up to 16384 tokens" in run["kernels"] for run in report["runs"].values())
    assert llama(1, 16384, kernels=True).peak("copy") / GIB == pytest.approx(measured["ddp"], rel=0.01)
    planned = of_each_process(report, 16384)
    assert planned.peak("copy") / GIB == pytest.approx(measured["fsdp"], rel=0.01)
    assert planned.peak("recompute") / GIB == pytest.approx(measured["fsdp, recompute"], rel=0.01)


@pytest.mark.extra
def test_processes_with_their_shares_on_the_host_had_this_peak():
    report = json.loads((BENCH / "offload/processes.json").read_text())
    run = report["runs"]["fsdp, offload"]
    assert "micro-batches of up to 16384 tokens" in run["kernels"]
    planned = of_each_process(report, 16384, offload=True)
    assert planned.peak("recompute") / GIB == pytest.approx(run["peak_gpu_gib"], rel=0.01)


@pytest.mark.extra
def test_processes_that_shared_a_model_larger_than_a_gpu_had_this_peak():
    report = json.loads((BENCH / "processes_llama-2-70b.json").read_text())
    run = report["runs"]["fsdp, recompute"]
    (limit,) = [kernel for kernel in run["kernels"] if kernel.startswith("micro-batches of up to ")]
    planned = of_each_process(report, int(limit.split()[-2])).peak("recompute") / GIB
    assert planned == pytest.approx(run["peak_gpu_gib"], rel=0.07)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("name", "kernels", "autocast"),
    [("LoRA", True, None), ("Flat-LoRA copy", True, None), ("LoRA BF16", True, torch.bfloat16), ("stock", False, None)],
)
def test_clip_on_a_gpu_had_this_peak(name, kernels, autocast):
    """`bench families`: CLIP ViT-B/32's shape, 128 images."""
    measured = json.loads((BENCH / "families.json").read_text())["families"]["clip"]["contenders"][name]["peak_gib"]
    with torch.device("meta"):
        model = CLIPImageClassifier(CLIPConfig().vision_config, 10, "text").requires_grad_(False)
        names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=names))
    images = {"pixel_values": torch.zeros(128, 3, 224, 224), "labels": torch.zeros(128, dtype=torch.long)}
    planned = step_memory(model, images, dtype=torch.float32, autocast=autocast, kernels=kernels)
    assert planned.peak("copy" if "copy" in name else None) / GIB == pytest.approx(measured, rel=0.1)


@pytest.fixture
def planned(tiny_settings, monkeypatch, capsys):
    """Plans a run; returns the exit code and the words that were printed. Weights cannot be loaded."""

    def refused(*args, **kwargs):
        raise AssertionError("a plan loads no weights")

    monkeypatch.setattr(loading, "load_backbone", refused)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*more):
        replaced = {"model=clip_tiny": ("model.", "dataset."), "peft=full_ft": ("peft.",)}
        dropped = tuple(prefix for word in more for prefix in replaced.get(word, ()))
        own = [word for word in tiny_settings if not word.startswith(dropped)]
        code = run_exp.main([*own, *more, "plan=true"])
        read = capsys.readouterr()
        return code, " ".join((read.out + read.err).split())

    return run


def test_a_plan_needs_no_weights_and_writes_nothing(planned, tiny_settings, tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    code, said = planned(f"model.hub_id={folder}", "model.dtype=bfloat16", "rho=flat")
    assert code == 0
    assert "micro-batches of 1,024 tokens 6 steps of 4 rows, the longest of" in said
    assert all(name in said for name in planning.CARDS)
    assert said.count("16,384: 0.") == 3 * len(planning.CARDS)
    assert not Path(next(w for w in tiny_settings if w.startswith("results_root=")).partition("=")[2]).exists()


@pytest.mark.extra
@pytest.mark.parametrize("model", ["t5", "clip"])
def test_other_families_are_planned_in_rows(planned, model, tiny_t5_folder):
    words = [f"model.hub_id={tiny_t5_folder}", "model.family=seq2seq"]
    if model == "clip":
        pytest.importorskip("sklearn")
        words = ["model=clip_tiny", "dataset=digits", "dataset.train_rows=24", "optim.batch_size=4"]
    code, said = planned(*words, "trainer.micro_batch_size=4")
    assert code == 0
    assert "micro-batches of 4 rows" in said
    assert said.count("4: 0.0") == 3 * len(planning.CARDS)
    assert "GPU hours" not in said  # products in FP32


def test_what_is_not_planned_is_named_at_once(planned):
    code, said = planned("peft=dora", "rho=sam", "rho.sigma=0.05")
    assert code == 2
    assert "Invalid peft=dora with plan=true: it keeps more than two factors" in said
    assert "Invalid rho=sam with plan=true: plans are for off and flat; leave plan out, and run" in said


@pytest.mark.extra
def test_shares_of_weights_are_planned_for_a_number_of_processes(planned, monkeypatch):
    words = ["trainer.fsdp=true", "eval=[]", "rho=flat", "model.dtype=bfloat16", "trainer.launch=any"]
    code, said = planned(*words)
    assert code == 2
    assert "its weights are split among two or more processes; set trainer.gpus=N" in said
    shown = []
    monkeypatch.setattr(planning, "shown", lambda plan, experiment: shown.append(plan) or "")
    for count in (2, 4):
        assert planned(*words, f"trainer.gpus={count}")[0] == 0
    monkeypatch.setattr(planning, "gathered_bytes", lambda skeleton, dtype: 10**9)
    assert planned(*words, "trainer.gpus=2")[0] == 0
    assert planned(*words, "trainer.gpus=2", "trainer.offload=true", "trainer.device=auto")[0] == 0
    on_host = shown.pop()
    assert on_host.modes == ("off", "recompute")
    assert on_host.memory[1024].backbone == 10**9
    assert on_host.start * GIB == pytest.approx(shown[2].memory[1024].backbone - 10**9)
    two, four, more = (plan.memory[1024] for plan in shown)
    assert two.copy == pytest.approx(2 * four.copy, rel=1e-3)
    assert two.backbone > four.backbone
    assert more.backbone > 10**9


def test_a_large_model_fits_where_its_weights_do():
    memory = {
        1: footprint.StepMemory(13 * GIB, GIB, 4 * GIB, 12 * GIB, 0, 0),
        4: footprint.StepMemory(13 * GIB, GIB, 16 * GIB, 12 * GIB, 0, 0),
    }
    plan = planning.Plan("rows", 512, 10, memory, (1, 2, 4, 8, 16), 2, 1e15)
    assert plan.peak(2, "off") == 22
    small, large = planning.CARDS["RTX 4090, 24 GB"], planning.CARDS["A100, 40 GB"]
    assert plan.largest(small, "off") == 2
    assert plan.largest(small, "copy") is None
    assert plan.largest(large, "copy") == 2
    assert plan.largest(planning.CARDS["H200, 141 GB"], "off") == 16


def test_full_fine_tuning_has_no_noise(planned):
    code, said = planned("peft=full_ft", "rho=off", "optim.lr=1e-4")
    assert code == 0
    assert "flat, copy" not in said
    assert "trained weights, gradients, moments" in said


def test_the_command_is_that_of_run_exp(monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda program, words: called.append((program, words)))
    monkeypatch.setattr(sys, "argv", ["plan.py", "model=llama", "rho=flat"])
    command.main()
    script = str(Path(run_exp.__file__).resolve())
    assert called == [(sys.executable, [sys.executable, script, "model=llama", "rho=flat", "plan=true"])]


@pytest.mark.parametrize(
    ("word", "plan"),
    [
        ("peft=lora", "GiB at the peak of a step, micro-batches of"),
        ("peft=dora", "Its memory is not planned: Invalid peft=dora"),
    ],
)
def test_a_run_that_is_out_of_memory_names_what_takes_less_and_prints_its_plan(
    tiny_settings, monkeypatch, capsys, word, plan
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has more.")

    monkeypatch.setattr(FlatTrainer, "training_step", full)
    assert run_exp.main([*tiny_settings, word]) == 1
    read = capsys.readouterr()
    said = " ".join((read.out + read.err).split())
    assert "The run failed: CUDA out of memory. Tried to allocate 2.00 GiB. A smaller trainer.micro_batch_size" in said
    assert plan in said
    assert "Traceback" not in said
    record = json.loads((run_folder(tiny_settings) / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["error"].startswith("MemoryError: CUDA out of memory.")
