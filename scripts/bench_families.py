"""`python -m scripts.bench families`: a training step of T5-base's shape, against transformers' Trainer and PEFT.

    stock                               transformers.Trainer with PEFT's LoRA and fused AdamW, on the same rows
    LoRA, Flat-LoRA copy / recompute    this suite, by run_exp.py with trainer.kernels=auto
    ... TF32                            the same with trainer.matmul_precision=high, stock with tf32=True

Weights are random, the tokenizer is SmolLM2's; the rows are CoLA's, 32 a step, in FP32 as published.
Times are wall-clock between the ends of steps, data loading and logging included; the first steps, which compile and
capture, are left out.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

import run_exp
from flatlora.config.experiment import Experiment
from flatlora.models.processors import load_tokenizer
from flatlora.runs import environment
from flatlora.train.recorder import StepRecorder
from flatlora.utils import files
from scripts.bench_gpu import GIB, SEED, console, free_memory, gpu_state

T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
LEFT_OUT = 20  # first steps, in which every length that occurs is captured
WINDOW = 10  # steps between two synchronizations
CONTENDERS: dict[str, list[str] | None] = {  # settings of run_exp.py; None is stock
    "stock": None,
    "LoRA": ["rho=off"],
    "Flat-LoRA copy": ["rho=flat", "rho.mode=copy"],
    "Flat-LoRA recompute": ["rho=flat", "rho.mode=recompute"],
    "stock TF32": None,
    "LoRA TF32": ["rho=off", "trainer.matmul_precision=high"],
    "Flat-LoRA copy TF32": ["rho=flat", "rho.mode=copy", "trainer.matmul_precision=high"],
}


def run(*, steps: int, out: Path, command: str, data_root: str | None) -> int:
    """Measure, print, write `families.json` into `out`."""
    report: dict[str, Any] = {
        "command": command,
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "model": "T5-base's shape, random weights, FP32, r = 8 on all linear layers",
        "rows": "CoLA, 32 a step",
        "contenders": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        write_t5(Path(folder) / "t5")
        for name, words in CONTENDERS.items():
            free_memory()
            settings = settings_of(Path(folder), steps, data_root, "cuda") + (words or [])
            torch.cuda.reset_peak_memory_stats()
            times = ours(settings) if words is not None else stock(settings, tf32="TF32" in name)
            report["contenders"][name] = {
                "step_s": times,
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                "clock_and_power": gpu_state(),
            }
            console.print(f"  {name}: {1000 * statistics.median(times):.1f} ms a step", soft_wrap=True)
            out.mkdir(parents=True, exist_ok=True)
            files.write_json(out / "families.json", report)  # after each contender, to keep what is measured
    console.print(table_of(report["contenders"]))
    console.print(f"written: {out / 'families.json'}", soft_wrap=True)
    return 0


def write_t5(folder: Path, **changes: Any) -> None:
    """Write T5-base's shape with random weights and SmolLM2's tokenizer."""
    tokenizer = load_tokenizer(run_exp.experiment_of(["model=smollm"]).model)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(SEED)
    config = T5Config(
        **T5_BASE | changes, vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id, **special
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings_of(folder: Path, steps: int, data_root: str | None, device: str) -> list[str]:
    return [
        *("model=t5base", f"model.hub_id={folder / 't5'}", "dataset=cola", "eval=[]", "wandb.mode=disabled"),
        *(f"trainer.max_steps={steps + LEFT_OUT}", "dataset.validation_rows=0", "overwrite=true"),
        *(f"trainer.device={device}", f"results_root={folder / 'results'}", f"seed={SEED}"),
        *([f"data_root={data_root}"] if data_root else []),
    ]


class Clock(TrainerCallback):
    """Seconds per step of each window of `WINDOW` steps, synchronized with the device at its ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < LEFT_OUT or (state.global_step - LEFT_OUT) % WINDOW:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._started is not None:
            self.seconds.append((now - self._started) / WINDOW)
        self._started = now


def stock(settings: list[str], tf32: bool) -> list[float]:
    """Train as transformers' and PEFT's documentation has it, on the rows and with the settings of our run."""
    experiment = run_exp.experiment_of(settings)
    device = torch.device(experiment.trainer.device)
    inputs = run_exp.prepare(experiment, device)
    model = AutoModelForSeq2SeqLM.from_pretrained(experiment.model.hub_id, dtype=torch.float32)
    peft = experiment.peft
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=peft.lora_r, lora_alpha=peft.lora_alpha, target_modules="all-linear"
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            get_peft_model(model, config),
            arguments_of(experiment, folder, tf32),
            train_dataset=inputs.rows.train,
            data_collator=inputs.collate,
            callbacks=[clock],
        )
        trainer.train()
    torch.backends.cuda.matmul.allow_tf32 = False  # Trainer's tf32=True is for the whole process
    return clock.seconds


def arguments_of(experiment: Experiment, folder: str, tf32: bool) -> Arguments:
    optim, machine = experiment.optim, experiment.trainer
    return Arguments(
        output_dir=folder,
        use_cpu=machine.device == "cpu",
        per_device_train_batch_size=machine.micro_batch_size,
        gradient_accumulation_steps=optim.batch_size // machine.micro_batch_size,
        max_steps=machine.max_steps,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.lr_schedule,
        tf32=tf32 or None,
        save_strategy="no",
        remove_unused_columns=False,  # the collator takes them all
        report_to=[],
        disable_tqdm=True,
        seed=experiment.seed,
    )


def ours(settings: list[str]) -> list[float]:
    """Train with run_exp.py in this process; the clock is read where the run records its own times."""
    clock = Clock()
    with also_at_step_end(clock.on_step_end):
        if code := run_exp.main(settings):
            raise RuntimeError(f"run_exp.py ended with exit code {code}")
    return clock.seconds


@contextmanager
def also_at_step_end(call: Callable[..., None]) -> Iterator[None]:
    original = StepRecorder.on_step_end

    def on_step_end(self: StepRecorder, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        call(*args, **kwargs)

    StepRecorder.on_step_end = on_step_end
    try:
        yield
    finally:
        StepRecorder.on_step_end = original


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="T5-base's shape, CoLA, one step of 32 rows", title_justify="left")
    for column in ("", "step", "to stock", "to our LoRA", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    median = {name: statistics.median(row["step_s"]) for name, row in rows.items()}
    for name, row in rows.items():
        table.add_row(
            name,
            f"{1000 * median[name]:.1f} ms",
            f"{median[name] / median['stock']:.3f}",
            f"{median[name] / median['LoRA']:.3f}",
            f"{row['peak_gib']:.2f}",
        )
    return table
