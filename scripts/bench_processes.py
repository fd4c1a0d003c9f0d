"""`python -m scripts.bench processes`: whole runs of Llama-2-7B's shape (random weights) on one GPU and on several.

Flat-LoRA on rows of 1,024 tokens, batches of 32 rows in micro-batches of 8, with `run_exp.py`: one process, DDP and
ZeRO-2. Prints tokens/s, the speedup over one GPU, peak memory, and whether the processes drew equal noise.
"""

from __future__ import annotations

import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from flatlora.inputs.rows import jsonl
from flatlora.runs import environment
from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.utils import files
from scripts.bench_gpu import random_backbone

PROJECT = Path(__file__).parents[1]

LENGTH, MICRO_BATCH, BATCH, LEFT_OUT = 1024, 8, 32, 3  # steps that are left out: the first ones compile and allocate
console = Console(highlight=False, width=150)


def run(gpus: int, *, layers: int, steps: int, out: Path) -> int:
    """Measure, print, and write `processes.json` into `out`; returns 2 if there are fewer GPUs."""
    if torch.cuda.device_count() < gpus:
        console.print(f"bench.py processes --gpus {gpus} needs as many GPUs; torch finds {torch.cuda.device_count()}.")
        return 2
    report: dict[str, Any] = {
        "command": f"python -m scripts.bench processes --gpus {gpus} --layers {layers} --steps {steps}",
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "rows": {"length": LENGTH, "micro_batch": MICRO_BATCH, "batch": BATCH},
        "runs": {},
    }
    contenders = {
        "one": ["trainer=single"],
        "ddp": ["trainer=ddp", f"trainer.gpus={gpus}"],
        "zero2": ["trainer=zero2", f"trainer.gpus={gpus}"],
        "ddp, own noise": ["trainer=ddp", f"trainer.gpus={gpus}", "rho.per_rank=true", "trainer.max_steps=3"],
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root / "model", layers)
        write_rows(root / "data", BATCH * (steps + LEFT_OUT))
        for name, words in contenders.items():
            report["runs"][name] = one_run(root, name, words, steps + LEFT_OUT)
            out.mkdir(parents=True, exist_ok=True)
            files.write_json(out / "processes.json", report)
    console.print(table_of(report["runs"], gpus))
    console.print(f"written: {out / 'processes.json'}", soft_wrap=True)
    return 0


def write_model(folder: Path, layers: int, device: str = "cuda", **changes: int) -> None:
    """Write random weights in BF16 and a byte tokenizer; `changes` are of Llama-2-7B's sizes."""
    model = random_backbone(layers, torch.device(device), **changes)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_rows(folder: Path, count: int) -> None:
    """Write rows in GSM8K's form that have at least LENGTH tokens, so that there is no padding."""
    draw = random.Random(0)
    rows = [
        {"question": f"Row {i}", "answer": "".join(draw.choices(string.ascii_letters, k=LENGTH)) + "\n#### 1"}
        for i in range(count)
    ]
    for split, taken in (("train", rows), ("test", rows[:1])):
        files.write_atomic(folder / "openai/gsm8k/main" / f"{split}.jsonl", jsonl(taken))


def one_run(root: Path, name: str, words: list[str], steps: int) -> dict[str, Any]:
    """Run once; returns tokens/s (median without the first steps), GPU memory, losses and hashes of the noise."""
    results_root = root / name.replace(", ", "-")
    command = [sys.executable, "run_exp.py", "model=llama", f"model.hub_id={root / 'model'}", "dataset=gsm8k"]
    command += [f"data_root={root / 'data'}", f"results_root={results_root}", "wandb.mode=disabled", "wandb.name=run"]
    command += [f"dataset.max_length={LENGTH}", f"optim.batch_size={BATCH}", f"trainer.micro_batch_size={MICRO_BATCH}"]
    command += [f"trainer.max_steps={steps}", "dataset.validation_rows=0", "eval=[]", "rho=flat", "rho.sigma=0.05"]
    subprocess.run([*command, *words], cwd=PROJECT, check=True)
    folder = next(results_root.glob(f"*/*/*/{RECORD_FILE}")).parent
    record = RunRecord.read(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return {
        "tokens_per_s": statistics.median(rates[LEFT_OUT:] or rates),
        "peak_gpu_gib": record.memory.peak_gpu_gib,
        "losses": [row["loss"] for row in rows if "loss" in row],
        "distributed": record.distributed.model_dump(),
        "noise_sha256": record.perturbation["noise_sha256"],
        "mode": record.perturbation["mode"],
        "backbone_unchanged": record.backbone_sha256.unchanged,
    }


def table_of(runs: dict[str, dict[str, Any]], gpus: int) -> Table:
    """The table of speed, memory and noise."""
    table = Table(title=f"Flat-LoRA, Llama-2-7B's shape, one GPU against {gpus}", title_justify="left")
    for column in ("", "tokens/s", "ratio to one", "peak GiB per GPU", "first noise", "loss difference", "backbone"):
        table.add_column(column, justify="left" if not column else "right")
    first = runs["one"]
    for name, result in runs.items():
        hashes = result["noise_sha256"]
        noise = "—" if hashes is None else "equal" if len(set(hashes)) == 1 else "differs"
        difference = max(abs(a - b) / b for a, b in zip(result["losses"], first["losses"], strict=False))
        table.add_row(
            name,
            f"{result['tokens_per_s']:,.0f}",
            f"{result['tokens_per_s'] / first['tokens_per_s']:.3f}",
            f"{result['peak_gpu_gib'] or 0:.2f}",
            noise,
            f"{difference:.1e}",
            "unchanged" if result["backbone_unchanged"] else "CHANGED",
        )
    return table
