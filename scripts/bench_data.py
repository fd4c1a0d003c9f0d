"""`python -m scripts.bench data`: tokenizing 100,000 generated rows in MetaMathQA's form, and starting from the cache;
and reading CIFAR-like images for CLIP, in one process.

row by row   one call of the tokenizer for each prompt and each answer, for a part of the rows
ours         `data.tokens.tokenize` on all rows
first start  `data.cache.prepared`: hash the file, read it, count tokens, tokenize, write the cache
second start the same, from the cache

processor    decode a PNG of 32 × 32 pixels, and call transformers' image processor (224 × 224, FP32), for each image
decoded      `ImageRows` without a cache: the model rescales and normalizes on its device
cached       `ImageRows` from the cache, verified
written      the cache: read, hash, decode, resize and write, on all cores
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import CLIPImageProcessorPil

from data import cache, meta_math, word_math
from data.instructions import formatted
from data.tokens import tokenize, tokenize_reference
from flatlora.config.sections import ModelConfig
from flatlora.inputs.images import ImageRows, LabeledImages, check_images, png_of
from flatlora.inputs.pixel_cache import PixelCache
from flatlora.inputs.rows import jsonl
from flatlora.models import loading
from flatlora.runs import environment
from flatlora.utils import files

ROWS, PART, ROUNDS = 100_000, 4_000, 5
PICTURES = 2_000
STORIES, JOINED = 3_000, 3  # problems, and problems per row: MetaMathQA's rows have 180 tokens, our problems 75
console = Console(highlight=False)


def run(model: ModelConfig, *, out: Path, command: str) -> int:
    """Measure, print, write `data.json` into `out`."""
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    tokenizer, rows = loading.load_tokenizer(model), made_rows(ROWS)
    config = meta_math.Config(
        name="meta_math", loader="meta_math", train_rows=ROWS - 1000, validation_rows=1000, max_length=1024
    )
    texts = list(formatted(meta_math.examples(rows, config), config.template))
    seconds: dict[str, list[float]] = {"row by row": [], "ours": []}
    for number in range(ROUNDS):  # in turn, so that other load on the machine slows down both
        part = texts[number * PART : (number + 1) * PART]
        seconds["row by row"].append(timed(lambda: tokenize_reference(part, tokenizer, 1024)) / PART)  # noqa: B023
        seconds["ours"].append(timed(lambda: tokenize(texts, tokenizer, 1024)) / len(texts))
    rates = {name: [1 / each for each in times] for name, times in seconds.items()}
    with tempfile.TemporaryDirectory() as root, mock.patch.dict(os.environ, FLATLORA_CACHE=f"{root}/cache"):
        write_rows(Path(root), rows)
        starts = [timed(lambda: cache.prepared(config, root, tokenizer)) for _ in range(4)]
    report = {
        "command": command,
        "env": environment.environment(),
        "git_sha": environment.git_sha(),
        "rows": ROWS,
        "tokens": sum(tokenize(texts[:PART], tokenizer, 1024).lengths) * ROWS // PART,
        "rows_per_s": rates,
        "ratios": [ours / plain for ours, plain in zip(rates["ours"], rates["row by row"], strict=True)],
        "pictures": PICTURES,
        "ms_per_picture": picture_times(),
        "start_s": {"first": starts[0], "second": starts[1:]},
    }
    console.print(table_of(report))
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "data.json", report)
    console.print(f"written: {out / 'data.json'}", soft_wrap=True)
    return 0


def made_rows(count: int) -> list[dict[str, str]]:
    """Distinct rows with MetaMathQA's columns, with several word problems each."""
    stories = word_math.generate("train", STORIES)
    rows = []
    for i in range(count):
        group = [stories[(7 * i + 13 * k + i // STORIES) % STORIES] for k in range(JOINED)]
        question = " ".join(story["question"] for story in group)
        answer = "\n".join(story["answer"].partition("\n####")[0] for story in group)
        rows.append(
            {
                "type": "GSM_Rephrased",
                "query": f"Problem {i}. {question}",
                "response": f"{answer}\n#### {i}\nThe answer is: {i}",
            }
        )
    return rows


def write_rows(root: Path, rows: list[dict[str, str]]) -> None:
    test = [{"question": "1 + 1?", "answer": "#### 2"}]
    for path, written in (
        (root / meta_math.HUB_ID / "default" / "train.jsonl", rows),
        (root / "openai/gsm8k" / "main" / "test.jsonl", test),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(jsonl(written), encoding="utf-8")


def picture_files(count: int, seed: int = 0) -> list[bytes]:
    """PNGs of CIFAR's size with random pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return list(map(png_of, noise))


def picture_times() -> dict[str, list[float]]:
    """Milliseconds per image of each way to read it, one per round."""
    files, processor = picture_files(PICTURES), CLIPImageProcessorPil()
    images = LabeledImages("generated images", np.zeros(PICTURES, np.int64), files.__getitem__)
    seconds: dict[str, list[float]] = {name: [] for name in ("processor", "decoded", "cached", "written")}
    every = range(PICTURES)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as root, mock.patch.dict(os.environ, FLATLORA_CACHE=root):
            cache = PixelCache(processor)
            seconds["written"].append(timed(lambda: check_images(images, every, cache)))  # noqa: B023
            digests = check_images(images, every, cache)
            for name, kept in (("cached", cache), ("decoded", None)):
                rows = ImageRows(images, np.arange(PICTURES), processor, digests, kept)
                seconds[name].append(timed(lambda: rows.__getitems__(every)))  # noqa: B023
        seconds["processor"].append(
            timed(lambda: [processor(Image.open(io.BytesIO(file)), return_tensors="pt") for file in files])
        )
    return {name: [1000 * each / PICTURES for each in times] for name, times in seconds.items()}


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table_of(report: dict[str, Any]) -> Table:
    title = f"{report['rows']:,} rows, {report['tokens'] / 1e6:.1f} M tokens, {os.cpu_count()} cores"
    table = Table(title=title, title_justify="left")
    for column in ("", "median", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, rates in report["rows_per_s"].items():
        ratio = statistics.median(report["ratios"]) if name == "ours" else 1.0
        table.add_row(name, f"{statistics.median(rates):,.0f} rows/s", f"{ratio:.2f}")
    table.add_row("first start", f"{report['start_s']['first']:.1f} s", "")
    table.add_row("second start, from the cache", f"{statistics.median(report['start_s']['second']):.2f} s", "")
    plain = report["ms_per_picture"]["processor"]
    for name, times in report["ms_per_picture"].items():
        ratio = statistics.median(one / other for one, other in zip(plain, times, strict=True))
        table.add_row(f"image, {name}", f"{statistics.median(times):.3f} ms", f"{ratio:.2f}")
    return table
