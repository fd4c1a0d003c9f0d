"""`python -m scripts.bench gpu`: one optimizer step of Llama-2-7B's shape (random weights), for several contenders.

    PEFT         transformers' Llama with PEFT's LoRA under BF16 autocast: a Trainer's step in plain code
    PEFT+Liger   the same with Liger's kernels
    published    PEFT with Flat-LoRA as published: B·A formed in memory, torch.normal, W += ε in place, later W -= ε
    LoRA, Flat-LoRA copy / recompute / inplace      this suite: fused layers, Liger's kernels, CUDA graphs

All contenders share one backbone. A step is `accumulation` micro-batches, clipping, fused AdamW and zero_grad.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from flatlora.fused.acceleration import GraphedMicroStep, accelerate
from flatlora.noise import philox, triton_kernels
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.runs import environment
from flatlora.utils import files
from scripts.train_step import MicroStep, backward_of, train_step

matplotlib.use("Agg")
from matplotlib import pyplot

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
SHAPES = ("2x1024x16", "8x1024x4", "1x1024x16", "2x512x16")  # micro-batch × length × accumulation
OURS = ("LoRA", "Flat-LoRA copy", "Flat-LoRA recompute", "Flat-LoRA inplace")
CONTENDERS = ("PEFT", "PEFT+Liger", "published", *OURS)
SIGMA, SEED, RANK = 0.05, 0, 8
GIB = 2**30
console = Console(highlight=False, width=150)


def run(shapes: list[str], *, layers: int, steps: int, out: Path, command: str) -> int:
    """Measure, print, write `gpu.json` and `gpu_steps.png` into `out`."""
    device = torch.device("cuda")
    backbone = random_backbone(layers, device)
    report: dict[str, Any] = {
        **report_head(command, layers),
        "passes": measure_passes(backbone, device),
        "losses": compare_losses(backbone, device),
        "steps": {},
    }
    console.print(passes_table(report["passes"]))
    console.print(losses_line(report["losses"]))
    out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        report["steps"][shape] = measure_shape(backbone, shape, steps, device)
        console.print(steps_table(shape, report["steps"][shape]))
        files.write_json(out / "gpu.json", report)  # after each shape, to keep what is measured
        plot_steps(report["steps"], out / "gpu_steps.png")
    console.print(f"written: {out / 'gpu.json'}, {out / 'gpu_steps.png'}", soft_wrap=True)
    return 0


def report_head(command: str, layers: int) -> dict[str, Any]:
    """The command, the environment and the model, for the report."""
    return {
        "command": command,
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "model": f"Llama-2-7B's shape, {layers} layers, random weights, r={RANK} on all linear layers",
    }


def random_backbone(layers: int, device: torch.device, **changes: Any) -> LlamaForCausalLM:
    """Llama-2-7B's shape with random weights in BF16; `changes` are those of its config."""
    sizes = SHAPE | {"num_hidden_layers": layers} | changes
    config = LlamaConfig(**sizes, attn_implementation="sdpa", use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    fill_random(model)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False)


@torch.no_grad()
def fill_random(model: nn.Module) -> None:
    """Fill with the same random weights at every call, to undo the drift of an in-place contender."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(SEED)
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02, generator=generator)


def shell_of(backbone: LlamaForCausalLM) -> LlamaForCausalLM:
    """A separate model that shares the weights, so that patches of one model do not affect another."""
    with torch.device("meta"):
        model = LlamaForCausalLM(backbone.config)
    for name, parameter in backbone.named_parameters():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = parameter
    model.model.rotary_emb = backbone.model.rotary_emb
    return model


def with_lora(backbone: LlamaForCausalLM) -> nn.Module:
    """`shell_of` the backbone with PEFT's LoRA on all linear layers and nonzero B."""
    model, device = shell_of(backbone), next(backbone.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear"))
    model = model.to(device)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:  # nonzero as after some training, so that W' differs from W
            nn.init.normal_(parameter, std=0.005, generator=generator)
    return model.train()


@dataclass
class Contender:
    """A way to run an optimizer step."""

    name: str
    model: nn.Module
    micro_step: MicroStep = field(init=False)
    perturbation: Any = None
    graphed: GraphedMicroStep | None = None
    lr: float = 1e-4

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.lr, fused=True)
        self.micro_step = backward_of(lambda ids: self._loss({"ids": ids}))
        if self.name == "published":
            self.perturbation = Published(self.model)
        if self.name == "PEFT+Liger":
            from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model.get_base_model())
        if self.name in OURS:
            accelerate(self.model, self.trained[0].device)
            self.graphed = GraphedMicroStep(self._loss, self.model)
            self.micro_step = lambda ids: self.graphed(
                {"ids": ids}, state=self.perturbation is not None and self.perturbation.perturbed
            )
        if self.name.startswith("Flat-LoRA"):
            layers, mode = find_lora_layers(self.model), self.name.split()[1]
            self.perturbation = WeightPerturbation(
                layers, sigma=SIGMA, total_steps=1000, seed=SEED, ramp="constant", mode=mode
            )

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(input_ids=inputs["ids"], labels=inputs["ids"]).loss

    def step(self, number: int, batch: torch.Tensor) -> torch.Tensor:
        """One optimizer step; batch is accumulation × micro-batch × length. Returns the first loss."""
        settings = {"step": number, "perturbation": self.perturbation, "max_norm": 1.0}
        return train_step(self.micro_step, batch, self.optimizer, **settings)[0]

    def close(self) -> None:
        if self.perturbation is not None:
            self.perturbation.close()
        if self.graphed is not None:
            self.graphed.close()


class Published:
    """ε as published: drawn by torch, added to the BF16 weights in place and subtracted again."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    @torch.no_grad()
    def begin(self, step: int) -> None:
        self.seed, self.c = step, [self._row_std(layer) for layer in self.layers]
        self._add(+1.0)

    @torch.no_grad()
    def end(self) -> None:
        self._add(-1.0)

    def close(self) -> None:
        """Does nothing: there are no buffers."""

    @staticmethod
    def _row_std(layer: LoraLayer) -> torch.Tensor:
        """`reference.row_std` with W' summed in BF16, as the published code does."""
        weight = layer.base_layer.weight
        merged = weight + layer.get_delta_weight("default").to(weight.dtype)
        return SIGMA / weight.shape[1] ** 0.5 * merged.float().norm(dim=1)

    def _add(self, sign: float) -> None:
        torch.manual_seed(self.seed)
        for layer, c in zip(self.layers, self.c, strict=True):
            weight = layer.base_layer.weight
            weight.add_(torch.normal(0.0, c[:, None].expand_as(weight)).to(weight.dtype), alpha=sign)


@contextmanager
def stock_modeling() -> Iterator[None]:
    """Undo Liger's changes to transformers' module, which would affect later models."""
    before = dict(vars(modeling_llama))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)


def measure_shape(backbone: nn.Module, shape: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Step times, peak memory and loss of every contender."""
    micro, length, accumulation = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(SEED)
    batch = torch.randint(SHAPE["vocab_size"], (accumulation, micro, length), generator=generator, device=device)
    rows: dict[str, Any] = {"matmul_s": accumulation * matmul_seconds(backbone, micro * length, device)}
    for name in CONTENDERS:
        with stock_modeling():
            weights = first_bytes(backbone)
            free_memory()
            contender = Contender(name, with_lora(backbone))
            torch.cuda.reset_peak_memory_stats()
            seconds, state = [], ""
            for number in range(steps + 1):  # the first compiles, allocates and captures
                torch.cuda.synchronize()
                started = time.perf_counter()
                loss = contender.step(number + 1, batch)
                state = gpu_state() if number == 1 else state  # while the GPU is still computing
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            contender.close()
            rows[name] = {
                "step_s": seconds[1:],
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                "loss": loss.item(),
                "tokens_per_s": batch.numel() / statistics.median(seconds[1:]),
                "backbone_unchanged": torch.equal(weights, first_bytes(backbone)),
                "clock_and_power": state,
            }
            del contender
            if not rows[name]["backbone_unchanged"]:
                fill_random(backbone)
        console.print(f"  {shape} {name}: {statistics.median(seconds[1:]):.3f} s; {state}", soft_wrap=True)
    free_memory()
    return rows


def gpu_state() -> str:
    """Clock and power under the current load; a GPU at its power limit lowers its clock."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()[0]


def first_bytes(backbone: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten()[:4096].clone() for p in backbone.parameters()])


def free_memory() -> None:
    """Free cached memory, also cuBLAS workspaces (64 MiB per stream), which would outlive their contender."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def gpu_seconds(work: Callable[[], object], repeats: int = 11) -> float:
    """Median device time of a call in seconds."""
    work()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return statistics.median(times)


def matmul_seconds(backbone: nn.Module, tokens: int, device: torch.device) -> float:
    """Seconds of the linear layers' own products for a micro-batch: forward, and gradient of the input."""
    total = 0.0
    counts: dict[tuple[int, int], int] = {}
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            counts[tuple(module.weight.shape)] = counts.get(tuple(module.weight.shape), 0) + 1
    for (m, n), count in counts.items():
        weight = torch.randn(m, n, dtype=torch.bfloat16, device=device)
        x, grad = (torch.randn(tokens, size, dtype=torch.bfloat16, device=device) for size in (n, m))
        total += count * (gpu_seconds(lambda: x @ weight.t()) + gpu_seconds(lambda: grad @ weight))  # noqa: B023
    return total


def measure_passes(backbone: nn.Module, device: torch.device) -> dict[str, float]:
    """Seconds of the noise and row-norm passes over all linear layers, and of a copy and a read of the same bytes."""
    weights = [m.weight for n, m in backbone.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    outs = [torch.empty_like(weight) for weight in weights]
    rows = sum(weight.shape[0] for weight in weights)
    c = torch.full((rows,), 1e-3, device=device)
    keys = [philox.layer_key(SEED, str(i)) for i in range(len(weights))]
    noise_pass = triton_kernels.NoisePass(weights, outs, c, keys)
    A = [torch.randn(RANK, weight.shape[1], device=device) for weight in weights]
    B = [torch.randn(weight.shape[0], RANK, device=device) for weight in weights]
    norm_pass = triton_kernels.RowNormPass(weights, A, B)
    elements = sum(weight.numel() for weight in weights)
    source, target = (torch.empty(elements, dtype=torch.bfloat16, device=device) for _ in range(2))
    return {
        "bytes": 2 * elements,
        "noise_s": gpu_seconds(lambda: noise_pass(3, 0)),
        "row_norm_s": gpu_seconds(norm_pass),
        "read_s": gpu_seconds(lambda: source.view(-1, 1 << 12).amax(dim=1)),
        "copy_s": gpu_seconds(lambda: target.copy_(source)),
    }


def compare_losses(backbone: nn.Module, device: torch.device) -> dict[str, Any]:
    """Losses of twenty optimizer steps, PEFT's and ours, from the same adapter on the same rows."""
    generator = torch.Generator(device).manual_seed(SEED + 1)
    batches = torch.randint(SHAPE["vocab_size"], (20, 1, 2, 512), generator=generator, device=device)
    curves = {}
    for name in ("PEFT", "LoRA"):
        with stock_modeling():
            free_memory()
            contender = Contender(name, with_lora(backbone), lr=1e-3)
            curves[name] = [contender.step(number, batch).item() for number, batch in enumerate(batches)]
            contender.close()
            del contender
    differences = [abs(a - b) / b for a, b in zip(curves["LoRA"], curves["PEFT"], strict=True)]
    return {**curves, "largest_relative_difference": max(differences)}


def passes_table(passes: dict[str, float]) -> Table:
    table = Table(title=f"passes over {passes['bytes'] / 1e9:.2f} GB of BF16 weights", title_justify="left")
    for column in ("pass", "time", "ratio"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for name, base, what in (("noise", "copy", "a device copy"), ("row_norm", "read", "a read")):
        seconds, plain = passes[f"{name}_s"], passes[f"{base}_s"]
        table.add_row(what, f"{1000 * plain:.2f} ms", "1")
        table.add_row(f"{name.replace('_', '-')} pass", f"{1000 * seconds:.2f} ms", f"{seconds / plain:.3f}")
    return table


def losses_line(losses: dict[str, Any]) -> str:
    return (
        f"losses of 20 steps, ours against PEFT's: largest relative difference "
        f"{losses['largest_relative_difference']:.2e} (last: {losses['LoRA'][-1]:.4f}, {losses['PEFT'][-1]:.4f})"
    )


def steps_table(shape: str, rows: dict[str, Any]) -> Table:
    table = Table(title=f"one optimizer step, micro-batch × length × accumulation = {shape}", title_justify="left")
    columns = ("", "median", "to PEFT", "to PEFT+Liger", "to our LoRA", "tokens/s", "of matmul", "peak GiB", "loss")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    median = {name: statistics.median(rows[name]["step_s"]) for name in CONTENDERS}
    for name in CONTENDERS:
        row = rows[name]
        table.add_row(
            name,
            f"{median[name]:.3f} s",
            *(f"{median[name] / median[base]:.3f}" for base in ("PEFT", "PEFT+Liger", "LoRA")),
            f"{row['tokens_per_s']:,.0f}",
            f"{rows['matmul_s'] / median[name]:.0%}",
            f"{row['peak_gib']:.2f}",
            f"{row['loss']:.3f}",
        )
    return table


def plot_steps(steps: dict[str, Any], path: Path) -> None:
    """Plot the time of a micro-step against its tokens, one line per contender."""
    figure, axes = pyplot.subplots(figsize=(6.2, 4.0), layout="constrained")
    points = {shape: tuple(map(int, shape.split("x"))) for shape in steps}
    order = sorted((shape for shape in steps if points[shape][1] == 1024), key=lambda shape: points[shape][0])
    for name, style in zip(CONTENDERS, ("k-o", "-s", "--x", "-v", "-^", "-D", ":+"), strict=True):
        tokens = [points[shape][0] * points[shape][1] for shape in order]
        times = [1000 * statistics.median(steps[shape][name]["step_s"]) / points[shape][2] for shape in order]
        axes.plot(tokens, times, style, label=name, markersize=4)
    axes.set(
        xlabel="tokens of a micro-batch (length 1024)",
        ylabel="time of a micro-step (ms)",
        title="Llama-2-7B's shape, LoRA r = 8",
        xscale="log",
        yscale="log",
    )
    ticks = sorted({points[shape][0] * points[shape][1] for shape in order})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
