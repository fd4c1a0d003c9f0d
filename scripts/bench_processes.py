"""`python -m scripts.bench processes`: whole runs of Llama-2's shapes (random weights) on one GPU and on several.

Flat-LoRA on rows of 1,024 tokens, 32 a step, with `run_exp.py`: one process, DDP, FSDP2 and ZeRO-2, and with LoRA-Pro,
whose moments, two for each adapted weight, the processes divide. Prints tokens/s, ratios, peak memory, seconds from the
command to the end of the first step, and whether the processes drew equal noise.

--shape llama-2-70b writes 138 GB of weights into $TMPDIR and runs FSDP2 alone, as no GPU holds them.
"""

from __future__ import annotations

import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from flatlora.inputs.rows import jsonl
from flatlora.runs import environment
from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.utils import files
from scripts.bench_gpu import SEED, SHAPE

PROJECT = Path(__file__).parents[1]

SHAPES: dict[str, tuple[int, dict[str, int]]] = {  # layers, and changes of Llama-2-7B's shape
    "llama-2-7b": (32, {}),
    "llama-2-70b": (
        80,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    ),
}
LENGTH, MICRO_BATCH, BATCH, LEFT_OUT = 1024, 8, 32, 3  # steps that are left out: the first ones compile and allocate
console = Console(highlight=False, width=150)


def contenders(gpus: int) -> dict[str, list[str]]:
    """{name: overrides of run_exp.py}."""
    several, lora_pro = f"trainer.gpus={gpus}", "peft=lora_pro"
    return {
        "one": ["trainer=single"],
        "ddp": ["trainer=ddp", several],
        "fsdp": ["trainer=fsdp", several],
        "fsdp, recompute": ["trainer=fsdp", several, "rho.mode=recompute"],
        "fsdp, offload": ["trainer=fsdp_offload", several, "rho.mode=recompute"],
        "zero2": ["trainer=zero2", several],
        "one, LoRA-Pro": ["trainer=single", lora_pro],
        "ddp, LoRA-Pro": ["trainer=ddp", several, lora_pro],
        "fsdp, LoRA-Pro": ["trainer=fsdp", several, lora_pro],
        "ddp, own noise": ["trainer=ddp", several, "rho.per_rank=true", "trainer.max_steps=3"],
    }


def run(gpus: int, shape: str, only: Sequence[str] | None, *, layers: int | None, steps: int, out: Path) -> int:
    """Measure, print, and write `processes.json` (`processes_SHAPE.json` for another shape than Llama-2-7B's).

    Args:
        only: contenders; None takes all that fit a GPU, and FSDP2 in recompute mode for Llama-2-70B's shape.

    Returns:
        0; 1 if a contender failed, and the others were measured; 2 if there are fewer GPUs, or a name is unknown.
    """
    usual, known = shape == "llama-2-7b", contenders(gpus)
    chosen = list(only or (known if usual else ["fsdp, recompute"]))
    if unknown := [name for name in chosen if name not in known]:
        console.print(f"Invalid --only={unknown[0]}: contenders are {'; '.join(known)}.", soft_wrap=True)
        return 2
    if torch.cuda.device_count() < gpus:
        console.print(f"bench.py processes --gpus {gpus} needs as many GPUs; torch finds {torch.cuda.device_count()}.")
        return 2
    own_layers, changes = SHAPES[shape]
    layers, path = layers or own_layers, out / ("processes.json" if usual else f"processes_{shape}.json")
    report: dict[str, Any] = {
        "command": f"python -m scripts.bench processes --gpus {gpus} --shape {shape} --layers {layers} --steps {steps}"
        + (f' --only "{";".join(chosen)}"' if only else ""),
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "model": {**SHAPE, **changes, "num_hidden_layers": layers},
        "rows": {"length": LENGTH, "batch": BATCH},
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root / "model", layers, **changes)
        write_rows(root / "data", BATCH * (steps + LEFT_OUT))
        for name in chosen:
            try:
                report["runs"][name] = one_run(root, name, known[name], steps + LEFT_OUT)
            except subprocess.CalledProcessError as error:  # its output says why
                console.print(f"{name} failed with exit code {error.returncode}.")
                continue
            out.mkdir(parents=True, exist_ok=True)
            files.write_json(path, report)
    if report["runs"]:
        console.print(table_of(report["runs"], gpus, shape))
        console.print(f"written: {path}", soft_wrap=True)
    return int(len(report["runs"]) < len(chosen))


def write_model(folder: Path, layers: int, device: str = "cuda", **changes: int) -> None:
    """Write random weights in BF16 and a byte tokenizer; `changes` are of Llama-2-7B's sizes.

    Files have the sizes of those on the hub, and few of them are in memory at a time.
    """
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": layers} | changes, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        parts = list(_parts(LlamaForCausalLM(config)))
    generator = torch.Generator(device).manual_seed(SEED)
    place: dict[str, str] = {}
    with ThreadPoolExecutor(_WRITERS) as pool:
        writing = []
        for number, part in enumerate(parts):
            tensors = {name: _random(shape, generator) for name, shape in part.items()}
            place |= dict.fromkeys(tensors, f"model-{number:05}.safetensors")
            writing.append(pool.submit(save_file, tensors, folder / place[next(iter(tensors))], {"format": "pt"}))
            if number >= _WRITERS:
                writing[number - _WRITERS].result()
        for each in writing:
            each.result()
    files.write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": place})
    if device == "cuda":
        torch.cuda.empty_cache()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


_WRITERS, _FILE_BYTES = 8, 5 * 10**9


def _parts(model: LlamaForCausalLM) -> Iterator[dict[str, torch.Size]]:
    """{name: shape} of the parameters of each file."""
    part, size = {}, 0
    for name, parameter in model.named_parameters():
        if part and size + 2 * parameter.numel() > _FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = parameter.shape
        size += 2 * parameter.numel()
    yield part


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0.0, 0.02, generator=generator)


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
    """Run once; returns tokens/s (median without the first steps), GPU memory, losses and hashes of the noise.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    results_root = root / name.replace(", ", "-")
    command = [sys.executable, "run_exp.py", "model=llama", f"model.hub_id={root / 'model'}", "dataset=gsm8k"]
    command += [f"data_root={root / 'data'}", f"results_root={results_root}", "wandb.mode=disabled", "wandb.name=run"]
    command += [f"dataset.max_length={LENGTH}", f"optim.batch_size={BATCH}", f"trainer.micro_batch_size={MICRO_BATCH}"]
    command += [f"trainer.max_steps={steps}", "dataset.validation_rows=0", "eval=[]", "rho=flat", "rho.sigma=0.05"]
    first_step_s = _run_until_its_end([*command, *words], results_root)
    seconds = {} if first_step_s is None else {"first_step_s": first_step_s}
    return {**seconds, **result_of(next(results_root.glob(f"*/*/*/{RECORD_FILE}")).parent)}


def result_of(folder: Path) -> dict[str, Any]:
    """What the record and the rows of a finished run say."""
    record = RunRecord.read(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return {
        "tokens_per_s": statistics.median(rates[LEFT_OUT:] or rates),
        "peak_gpu_gib": record.memory.peak_gpu_gib,
        "losses": [row["loss"] for row in rows if "loss" in row],
        "distributed": record.distributed.model_dump(),
        "kernels": record.kernels,
        "noise_sha256": record.perturbation["noise_sha256"],
        "mode": record.perturbation["mode"],
        "backbone_unchanged": record.backbone_sha256.unchanged,
    }


def _run_until_its_end(command: list[str], results_root: Path) -> float | None:
    """Returns the seconds from the command to the first logged step, which is the end of the first one."""
    began, first_step_s = time.perf_counter(), None
    process = subprocess.Popen(command, cwd=PROJECT)
    try:
        while process.poll() is None:
            if first_step_s is None and any(path.stat().st_size for path in results_root.glob("*/*/*/metrics.jsonl")):
                first_step_s = round(time.perf_counter() - began, 1)
            time.sleep(0.1)
    finally:
        process.terminate()  # after an interrupt
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return first_step_s


def table_of(runs: dict[str, dict[str, Any]], gpus: int, shape: str) -> Table:
    """The table of speed, memory and noise; ratios are to one GPU and to DDP, losses to those of the first run."""
    table = Table(title=f"Flat-LoRA, {shape}'s shape, {gpus} GPUs", title_justify="left")
    compared = [name for name in ("one", "ddp") if name in runs]
    for column in ("", "mode", "tokens/s", *(f"to {name}" for name in compared), "peak GiB per GPU", "first step"):
        table.add_column(column, justify="right" if column else "left")
    for column in ("first noise", "loss difference", "backbone"):
        table.add_column(column, justify="right")
    first = next(iter(runs.values()))
    for name, result in runs.items():
        hashes = result["noise_sha256"]
        noise = "—" if hashes is None else "equal" if len(set(hashes)) == 1 else "differs"
        difference = max(abs(a - b) / b for a, b in zip(result["losses"], first["losses"], strict=False))
        table.add_row(
            name,
            result["mode"],
            f"{result['tokens_per_s']:,.0f}",
            *(f"{result['tokens_per_s'] / runs[other]['tokens_per_s']:.3f}" for other in compared),
            f"{result['peak_gpu_gib'] or 0:.2f}",
            f"{result['first_step_s']:.0f} s" if "first_step_s" in result else "—",
            noise,
            f"{difference:.1e}",
            "unchanged" if result["backbone_unchanged"] else "CHANGED",
        )
    return table
