"""`python -m scripts.bench methods`: an optimizer step of every method relative to LoRA's, Llama-2-7B's shape.

All contenders run as with trainer.kernels=auto: fused layers if they support the method, Liger's kernels, CUDA graphs
of micro-steps. Methods that only differ from LoRA in their initial adapter or scaling (PiSSA, OLoRA, CorDA, EVA,
LoRA-GA, rsLoRA) have LoRA's step; of these the table contains LoRA-GA, with the time of its initialization.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table
from transformers import LlamaForCausalLM

from flatlora import methods
from flatlora.config.sections import OptimConfig
from flatlora.fused.acceleration import GraphedMicroStep, accelerate
from flatlora.methods import Start, Training
from flatlora.utils import files
from scripts.bench_gpu import (
    GIB,
    RANK,
    SEED,
    SHAPE,
    console,
    fill_random,
    free_memory,
    gpu_state,
    random_backbone,
    report_head,
    shell_of,
    stock_modeling,
)
from scripts.train_step import update

SHAPES = ("2x1024x16",)
# label: (peft method, its settings, rho method)
CONTENDERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA": ("lora", {}, "off"),
    "LoRA-Pro, BF16 moments": ("lora_pro", {"moments": "bfloat16"}, "off"),
    "LoRA-Pro, FP32 moments": ("lora_pro", {"moments": "float32"}, "off"),
    "LoRA+": ("lora_plus", {}, "off"),
    "LoRA-FA": ("lora_fa", {}, "off"),
    "LoRA-GA": ("lora_ga", {"ga_batches": 1}, "off"),
    "nBAR": ("lora", {}, "nbar"),
    "LoRA-SAM": ("lora", {}, "sam"),
    "AdaLoRA": ("adalora", {}, "off"),
    "Bi-LoRA": ("lora", {}, "bi_lora"),
    "DoRA": ("dora", {}, "off"),
    "HiRA": ("hira", {}, "off"),
    "DeLoRA": ("delora", {}, "off"),
}
STEPS_IN_ALL = 1000  # steps of the run that the timed steps represent


def run(shapes: list[str], *, layers: int, steps: int, out: Path, command: str) -> int:
    """Measure, print, write `methods.json` into `out`."""
    device = torch.device("cuda")
    backbone = random_backbone(layers, device)
    report: dict[str, Any] = {**report_head(command, layers), "steps": {}}
    out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        rows = report["steps"][shape] = {}
        for label in CONTENDERS:
            with stock_modeling():
                rows[label] = measure(backbone, label, shape, steps, device)
            console.print(f"  {shape} {label}: {describe(rows[label])}", soft_wrap=True)
            files.write_json(out / "methods.json", report)  # after each contender, to keep what is measured
        console.print(table_of(shape, rows))
    console.print(f"written: {out / 'methods.json'}", soft_wrap=True)
    return 0


def measure(backbone: LlamaForCausalLM, label: str, shape: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds of each step and of the initialization, and the peak memory; or the error."""
    micro, length, accumulation = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(SEED)
    batch = torch.randint(SHAPE["vocab_size"], (accumulation, micro, length), generator=generator, device=device)
    free_memory()
    contender, row = None, {}
    try:
        began = time.perf_counter()
        contender = MethodStep(backbone, *CONTENDERS[label], batch)
        torch.cuda.synchronize()
        row["start_s"] = time.perf_counter() - began
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for number in range(steps + 1):  # the first compiles, allocates and captures
            torch.cuda.synchronize()
            began = time.perf_counter()
            loss = contender.step(number, batch)
            row["clock_and_power"] = gpu_state() if number == steps else ""
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        row |= {
            "step_s": seconds[1:],
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,  # includes the memory pools of graphs
            "loss": loss.item(),
        }
        row["kernels"] = contender.kernels
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).partition(". GPU")[0]
    if contender is not None:
        contender.close()
    if CONTENDERS[label][0] == "lora_ga":  # it has changed the shared weights
        fill_random(backbone)
    return row


class MethodStep:
    """The optimizer step of a method as in FlatTrainer, without a Trainer."""

    def __init__(
        self, backbone: LlamaForCausalLM, peft: str, settings: dict[str, Any], rho: str, batch: torch.Tensor
    ) -> None:
        method = methods.ADAPTERS[peft]
        config = method.Config(name=peft, method=peft, lora_r=RANK, **settings)

        def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
            return ({"input_ids": ids, "labels": ids} for ids in batch[:count])

        shell, device = shell_of(backbone), batch.device
        self.model = method.apply(shell, config, Start(SEED, batches=batches)).to(device).train()
        training = Training(OptimConfig(lr=1e-4), seed=SEED, accumulation=len(batch), fused=True)
        self.kernels = accelerate(self.model, device)
        self.regularizer = None
        if rho != "off":
            rho_config = methods.REGULARIZERS[rho].Config(name=rho, method=rho, sigma=0.05)
            methods.REGULARIZERS[rho].prepare(self.model, rho_config, SEED)
            self.regularizer = methods.REGULARIZERS[rho].regularizer(self.model, rho_config, SEED)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = method.optimizer(self.model, config, training) or torch.optim.AdamW(
            self.trained, lr=training.optim.lr, fused=True
        )
        if self.regularizer:
            self.regularizer.extend_optimizer(self.optimizer, training.optim.lr)
        self.state = SimpleNamespace(max_steps=STEPS_IN_ALL, global_step=0)
        self.callbacks = [*method.callbacks(self.model, config, training), *filter(None, [self.regularizer])]
        self._call("on_train_begin")
        self.optimizer.register_step_pre_hook(lambda *_: self._call("on_pre_optimizer_step"))
        self.optimizer.register_step_post_hook(lambda *_: self._call("on_optimizer_step"))
        self.graphed = GraphedMicroStep(self._loss, self.model)

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(input_ids=inputs["ids"], labels=inputs["ids"]).loss

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(None, self.state, None, optimizer=self.optimizer)

    def step(self, number: int, batch: torch.Tensor) -> torch.Tensor:
        """One optimizer step; batch is accumulation × micro-batch × length. Returns the first loss."""
        self.state.global_step = number
        losses = [self.graphed({"ids": ids}) for ids in batch]
        if self.regularizer and self.regularizer.second_gradient:
            self.regularizer.ascend(self.trained)
            self.graphed.restart()
            for ids in batch:
                self.graphed({"ids": ids})
            self.regularizer.descend()
        update(self.optimizer, max_norm=1.0)
        return losses[0]

    def close(self) -> None:
        self.graphed.close()
        self.optimizer.state.clear()


def describe(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    return f"{statistics.median(row['step_s']):.3f} s; {row['peak_gib']:.2f} GiB; {row['clock_and_power']}"


def table_of(shape: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=f"one optimizer step, micro-batch × length × accumulation = {shape}", title_justify="left")
    for column in ("", "median", "to LoRA", "peak GiB", "over LoRA", "start"):
        table.add_column(column, justify="right" if column else "left")
    lora = rows["LoRA"]
    for label, row in rows.items():
        if "error" in row:
            table.add_row(label, row["error"])
            continue
        median = statistics.median(row["step_s"])
        table.add_row(
            label,
            f"{median:.3f} s",
            f"{median / statistics.median(lora['step_s']):.3f}",
            f"{row['peak_gib']:.2f}",
            f"{row['peak_gib'] - lora['peak_gib']:+.2f}",
            f"{row['start_s']:.1f} s",
        )
    return table
