"""`python -m scripts.bench sdxl`: an optimizer step of SDXL-base's UNet, 1024 px, batch 1, random weights.

    diffusers    the step of diffusers' DreamBooth example: its UNet with PEFT's LoRA under BF16 autocast, AdamW
    LoRA, Flat-LoRA copy / recompute      this suite: fused layers, products in BF16, CUDA graphs

All use the same BF16 weights, r = α = 4 on attention's projections, and latents and prompts that are encoded before. A
step is one image, clipping, AdamW and zero_grad. The contenders take turns in each round, with new adapters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.table import Table
from torch import nn
from torch.nn import functional

from flatlora import methods
from flatlora.fused.acceleration import GraphedMicroStep, accelerate
from flatlora.methods import Start
from flatlora.methods.adapters.lora import LoraMethodConfig
from flatlora.models.diffusion import TextToImageModel
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.runs import environment
from flatlora.utils import files
from scripts.bench_gpu import GIB, SEED, console, free_memory, gpu_state
from scripts.train_step import backward_of, train_step

UNET = {  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
CONTENDERS = ("diffusers", "LoRA", "Flat-LoRA copy", "Flat-LoRA recompute")
SIGMA, RANK = 0.1, 4
WINDOWS = 3  # measurements of `steps` steps each, in every round
Batch = dict[str, torch.Tensor]


def run(*, steps: int, rounds: int, out: Path, command: str) -> int:
    """Measure, print, write `sdxl.json` into `out`."""
    device = torch.device("cuda")
    unet, schedule, batch = random_unet(device), noise_schedule(), random_batch(device)
    count = sum(p.numel() for p in unet.parameters())
    report: dict[str, Any] = {
        "command": command,
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "model": f"SDXL-base's UNet, {count / 1e9:.3f} billion random weights, BF16, r = α = {RANK} on attention",
        "micro_step": "one image of 1024 × 1024",
        "rounds": [],
    }
    for number in range(rounds):
        rows: dict[str, dict[str, Any]] = {}
        for name in CONTENDERS:
            rows[name] = measure(unet, schedule, name, batch, steps)
            console.print(f"  round {number + 1}, {name}: {describe(rows[name])}", soft_wrap=True)
        report["rounds"].append(rows)
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "sdxl.json", report)  # after each round, to keep what is measured
    console.print(table_of(report["rounds"]))
    console.print(f"written: {out / 'sdxl.json'}", soft_wrap=True)
    return 0


def random_unet(device: torch.device, **changes: Any) -> nn.Module:
    """SDXL-base's UNet with random weights in BF16."""
    import diffusers

    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            unet = diffusers.UNet2DConditionModel(**UNET | changes)
    finally:
        torch.set_default_dtype(default)
    return unet.requires_grad_(False)


def noise_schedule() -> Any:
    """SDXL's noise schedule for training."""
    import diffusers

    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def random_batch(device: torch.device, side: int = 128, width: int = 2048, pooled: int = 1280) -> Batch:
    """Latents, noise and an encoded prompt of one image; `side` is in latents, an eighth of the pixels."""
    generator = torch.Generator().manual_seed(SEED)
    batch = {
        "latents": torch.randn(1, 4, side, side, generator=generator),
        "noise": torch.randn(1, 4, side, side, generator=generator),
        "timesteps": torch.randint(1000, (1,), generator=generator),
        "weights": torch.ones(1),
        "time_ids": torch.tensor([[8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side]]),
        "prompt_embeds": torch.randn(1, 77, width, generator=generator).bfloat16(),
        "pooled": torch.randn(1, pooled, generator=generator).bfloat16(),
    }
    return {key: value.to(device) for key, value in batch.items()}


def measure(unet: nn.Module, schedule: Any, name: str, batch: Batch, steps: int) -> dict[str, Any]:
    """Seconds of a step and the peak memory; the first step, which compiles and captures, only counts for memory.

    A time is the mean of `steps` steps between two synchronizations, as between two logged rows of a run.
    """
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    shared = shell_of(unet)
    step, close = (diffusers_step if name == "diffusers" else our_step)(shared, schedule, name)
    first, seconds, number = float(step(0, batch)), [], 1
    for _ in range(WINDOWS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            step(number, batch)
            number += 1
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / steps)
    for _ in range(3):
        step(number, batch)
    state = gpu_state()  # while the GPU is still computing
    torch.cuda.synchronize()
    row = {
        "step_s": seconds,
        "first_loss": first,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,  # includes the memory pool of the graph
        "clock_and_power": state,
    }
    close()
    return row


def shell_of(unet: nn.Module) -> nn.Module:
    """A separate UNet that shares the weights, so that adapters of one do not affect another."""
    with torch.device("meta"):
        shell = type(unet).from_config(unet.config)
    for name, parameter in unet.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shell.get_submodule(owner)._parameters[leaf] = parameter
    return shell


Step = Callable[[int, Batch], torch.Tensor]


def diffusers_step(unet: nn.Module, schedule: Any, name: str) -> tuple[Step, Callable[[], None]]:
    """As in examples/dreambooth/train_dreambooth_lora_sdxl.py, with cached latents and prompts, without accelerate."""
    adapter = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
    unet.add_adapter(adapter)
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer, device = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4), trained[0].device

    def loss_of(batch: Batch) -> torch.Tensor:
        noisy = schedule.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        conditions = {"time_ids": batch["time_ids"], "text_embeds": batch["pooled"]}
        with torch.autocast(device.type, torch.bfloat16):
            prediction = unet(
                noisy.bfloat16(),
                batch["timesteps"],
                batch["prompt_embeds"],
                added_cond_kwargs=conditions,
                return_dict=False,
            )[0]
            return functional.mse_loss(prediction.float(), batch["noise"].float(), reduction="mean")

    def step(number: int, batch: Batch) -> torch.Tensor:
        return train_step(backward_of(loss_of), [batch], optimizer, max_norm=1.0)[0]

    return step, lambda: None


def our_step(unet: nn.Module, schedule: Any, name: str) -> tuple[Step, Callable[[], None]]:
    """The step of FlatTrainer for a diffusion model, without a Trainer."""
    config = LoraMethodConfig(
        name="attention", method="lora", lora_r=RANK, lora_alpha=float(RANK), target_modules="attention"
    )
    backbone, device = TextToImageModel(unet, schedule).requires_grad_(False), next(unet.parameters()).device
    backbone.alphas_cumprod = backbone.alphas_cumprod.to(device)
    model = methods.ADAPTERS["lora"].apply(backbone, config, Start(SEED)).train()
    accelerate(model, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    graphed = GraphedMicroStep(lambda inputs: model(**inputs).loss, model, largest=None)
    perturbation = None
    if name.startswith("Flat-LoRA"):
        layers, mode = find_lora_layers(model), name.split()[1]
        settings = {"sigma": SIGMA, "total_steps": 500, "seed": SEED, "ramp": "constant", "training_only": True}
        perturbation = WeightPerturbation(layers, mode=mode, **settings)

    def step(number: int, batch: Batch) -> torch.Tensor:
        return train_step(micro_step, [batch], optimizer, step=number, perturbation=perturbation, max_norm=1.0)[0]

    def micro_step(batch: Batch) -> torch.Tensor:
        return graphed(batch, state=perturbation is not None and perturbation.perturbed)

    def close() -> None:
        if perturbation is not None:
            perturbation.close()
        graphed.close()

    return step, close


def describe(row: dict[str, Any]) -> str:
    median, peak = statistics.median(row["step_s"]), row["peak_gib"]
    return f"{median:.4f} s; {peak:.2f} GiB; loss {row['first_loss']:.4f}; {row['clock_and_power']}"


def ratios(rounds: list[dict[str, dict[str, Any]]], name: str, other: str) -> list[float]:
    """Ratios of the medians of two contenders in each round."""
    return [statistics.median(rows[name]["step_s"]) / statistics.median(rows[other]["step_s"]) for rows in rounds]


def table_of(rounds: list[dict[str, dict[str, Any]]]) -> Table:
    table = Table(title="one optimizer step, SDXL-base's UNet, 1024 px, batch 1; medians", title_justify="left")
    for column in ("", "step", "to diffusers", "to our LoRA", "peak GiB", "reserved GiB"):
        table.add_column(column, justify="right" if column else "left")
    for name in CONTENDERS:
        numbers = [statistics.median(statistics.median(row[name]["step_s"]) for row in rounds)]
        numbers += [statistics.median(ratios(rounds, name, other)) for other in ("diffusers", "LoRA")]
        memory = [max(row[name][key] for row in rounds) for key in ("peak_gib", "reserved_gib")]
        table.add_row(
            name,
            f"{numbers[0]:.4f} s",
            *(f"{number:.3f}" for number in numbers[1:]),
            *(f"{number:.2f}" for number in memory),
        )
    return table
