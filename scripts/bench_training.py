"""Trainings for `python -m scripts.bench families`: this suite by run_exp.py, and transformers' Trainer with PEFT.

Both train the same rows in the same order, with random weights of a published shape that is written to a folder. Times
are wall-clock between the ends of steps, data loading and logging included; first steps, which compile and capture, are
left out, except for images, where the first epoch is what a user waits for.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow
import torch
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)
from transformers import TrainingArguments as Arguments
from transformers import trainer as trainer_module

import run_exp
from data import DATASETS, gsm8k
from flatlora.config.experiment import Experiment
from flatlora.experiment.run import EXIT_INTERRUPTED
from flatlora.inputs.images import check_images
from flatlora.inputs.pixel_cache import PixelCache
from flatlora.inputs.rows import Source, gather, jsonl, local_files, read_rows
from flatlora.methods.adapters.lora import find_targets
from flatlora.models import loading
from flatlora.models.family import FAMILIES
from flatlora.models.processors import load_tokenizer
from flatlora.models.random_weights import byte_tokenizer
from flatlora.train.samplers import EpochSampler
from scripts.bench_data import picture_files, timed
from scripts.bench_gpu import GIB, SEED, SHAPE, free_memory, gpu_state, random_backbone, stock_modeling

T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
EPOCH_STEPS, IMAGE_BATCH = 40, 128  # of images
FULL_ROWS, ROWS_IN_ONE = 320, 16  # GSM8K's rows have 100 to 400 tokens; 16 of them are cut at 1,024
_STOCK_INPUTS = ("input_ids", "attention_mask", "labels", "pixel_values")  # of Trainer; ours add what saves logits


class Timing(NamedTuple):
    """Optimizer steps that are left out, and `windows` of `window` steps each between two synchronizations."""

    left_out: int
    window: int
    windows: int

    @property
    def steps(self) -> int:
        return self.left_out + self.window * self.windows


class Place(NamedTuple):
    """Where a family is measured: a folder for its files, a device, and the folder of real data (None: the hub)."""

    folder: Path
    device: str
    data_root: str | None


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Args:
        words: overrides of run_exp.py, with {folder} for the family's folder.
        stock: arguments of transformers' Trainer; None is this suite.
        timing: None takes the family's.
    """

    words: tuple[str, ...] = ()
    stock: Mapping[str, Any] | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class TrainingFamily:
    """A model family whose trainings are compared.

    Args:
        title: of its table, and in the chart.
        model, rows: what is measured, for the file.
        settings: overrides of run_exp.py that all contenders share.
        write: writes the model, and the rows if there are none in `data_root`.
        timing: see `Timing`.
        compared: contenders that the table has ratios to.
        other_rows: contenders whose rows are not those of stock, which the chart leaves out.
        by_epoch: whether a window is an epoch of images, the first of which fills the cache of pixels.
        in_tokens: whether the speed is that of tokens without padding instead of steps.
    """

    title: str
    model: str
    rows: str
    settings: tuple[str, ...]
    write: Callable[[Place], None]
    timing: Timing
    contenders: Mapping[str, Contender]
    compared: tuple[str, ...] = ("stock", "LoRA")
    other_rows: tuple[str, ...] = ()
    by_epoch: bool = False
    in_tokens: bool = False

    def words(self, name: str, place: Place) -> list[str]:
        """All overrides of run_exp.py for a contender."""
        contender = self.contenders[name]
        own = [word.format(folder=place.folder) for word in (*self.settings, *contender.words)]
        reads_own = place.data_root is None or any(word.startswith("data_root=") for word in own)
        return [
            *own,
            *([] if reads_own else [f"data_root={place.data_root}"]),
            *(f"trainer.max_steps={(contender.timing or self.timing).steps}", f"trainer.device={place.device}"),
            *("eval=[]", "wandb.mode=disabled", "overwrite=true", f"results_root={place.folder / 'results'}"),
            f"seed={SEED}",
        ]

    def check(self, place: Place) -> None:
        """Composes every contender's experiment, and looks for the real rows that it reads.

        Raises:
            ConfigError: it lists every error.
        """
        experiments = gather(*(lambda n=name: run_exp.experiment_of(self.words(n, place)) for name in self.contenders))
        needed = {
            source
            for experiment in experiments
            if experiment.data_root is not None and experiment.data_root == place.data_root
            for source in DATASETS[experiment.dataset.loader].sources(experiment.dataset)
        }
        gather(*(lambda s=source: local_files(s, place.data_root) for source in sorted(needed)))

    def measure(self, name: str, place: Place) -> dict[str, Any]:
        """Trains with one contender; returns the seconds of a step in each window, and what else was measured."""
        contender = self.contenders[name]
        clock, on_gpu = Clock(contender.timing or self.timing), place.device == "cuda"
        with own_cache(place.folder / "cache" / name) if self.by_epoch else nullcontext():
            experiment = run_exp.experiment_of(self.words(name, place))
            rows = inputs_of(experiment).rows.train
            row: dict[str, Any] = {}
            if self.by_epoch and contender.stock is None:
                pixels = PixelCache(rows.processor)
                row["cache_s"] = timed(lambda: check_images(rows.images, rows.indices, pixels))
            if on_gpu:
                free_memory()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            with timed_by(clock):
                if contender.stock is None:
                    ours(self.words(name, place))
                else:
                    stock(experiment, contender.stock)
        row |= {"step_s": clock.seconds, "start_s": clock.first_step_at - began}
        if self.in_tokens:
            batch = experiment.optim.batch_size
            counts = window_tokens(rows.lengths, batch, contender.timing or self.timing)
            row["tokens_per_s"] = [count / s for count, s in zip(counts, clock.seconds, strict=True)]
        if on_gpu:
            row |= {
                "gpu_busy": clock.gpu_busy,
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                "clock_and_power": gpu_state(),
            }
        return row

    def speed(self, row: Mapping[str, Any]) -> float:
        """Tokens or steps a second; of images those of all epochs but the first."""
        if self.in_tokens:
            return statistics.median(row["tokens_per_s"])
        return 1 / statistics.median(row["step_s"][1:] if self.by_epoch else row["step_s"])

    def shown(self, row: Mapping[str, Any]) -> dict[str, str]:
        """{column: cell} of the family's table."""
        cells = {"step": f"{1000 / self.speed(row):.1f} ms"}
        if self.in_tokens:
            median = statistics.median(row["step_s"])
            cells = {"step": f"{median:.3f} s", "tokens/s": f"{self.speed(row):,.0f}"}
        if self.by_epoch:
            first, *later = (self.timing.window * seconds for seconds in row["step_s"])
            cells |= {"first epoch": f"{first + row.get('cache_s', 0.0):.2f} s"}
            cells |= {"later epochs": f"{statistics.median(later):.2f} s"}
        for column, key, text in (("start", "start_s", "{:.0f} s"), ("GPU busy", "gpu_busy", "{:.0%}")):
            cells[column] = "—" if row.get(key) is None else text.format(row[key])
        return cells


class Clock(TrainerCallback):
    """Seconds per step of each window, synchronized with the device at its ends."""

    def __init__(self, timing: Timing) -> None:
        self.timing, self.seconds = timing, []
        self.first_step_at: float | None = None
        self.gpu_busy: float | None = None  # after the first window
        self._window_began: float | None = None
        self._meter: subprocess.Popen | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.timing.left_out == 0:
            self._mark()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step_at = self.first_step_at or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.global_step - self.timing.left_out
        if steps >= 0 and steps % self.timing.window == 0:
            self._mark()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._window_began is not None:
            self.seconds.append((now - self._window_began) / self.timing.window)
        if len(self.seconds) == 1 and torch.cuda.is_available():
            query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100", "--id=0"]
            by_line = ["stdbuf", "--output=L", "nvidia-smi", *query]
            self._meter = subprocess.Popen(by_line, stdout=subprocess.PIPE, text=True)
        if len(self.seconds) == self.timing.windows:
            self.close()
        self._window_began = now

    def close(self) -> None:
        """Ends the measurement of the GPU's load."""
        if self._meter is None:
            return
        self._meter.terminate()
        shares = [int(line) for line in self._meter.communicate()[0].splitlines() if line.strip().isdecimal()]
        self.gpu_busy, self._meter = statistics.fmean(shares) / 100 if shares else None, None


@contextmanager
def timed_by(clock: Clock) -> Iterator[None]:
    """Every Trainer that is created in the block, ours included, calls the clock."""
    try:
        with mock.patch.object(trainer_module, "DEFAULT_CALLBACKS", [*trainer_module.DEFAULT_CALLBACKS, clock]):
            yield
    finally:
        clock.close()


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Prepared data is kept in a fresh folder, so that a first epoch is one."""
    with mock.patch.dict(os.environ, FLATLORA_CACHE=str(folder)):
        yield


def inputs_of(experiment: Experiment) -> Any:
    """The rows of an experiment and how they are collated; images are not cached."""
    machine = experiment.trainer.model_copy(update={"cache_images": "off"})
    experiment = experiment.model_copy(update={"trainer": machine})
    return run_exp.prepare(experiment, loading.choose_device(experiment.trainer.device))


def window_tokens(lengths: list[int], batch: int, timing: Timing) -> list[float]:
    """Tokens without padding of a mean step of each window, in the order in which both sides read the rows."""
    sampler = EpochSampler(lengths, SEED)

    def steps() -> Iterator[int]:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            order = list(sampler)
            for start in range(0, len(order), batch):
                yield sum(lengths[index] for index in order[start : start + batch])

    counts = list(itertools.islice(steps(), timing.left_out, timing.steps))
    return [statistics.fmean(counts[i : i + timing.window]) for i in range(0, len(counts), timing.window)]


# --- the contenders


def ours(words: list[str]) -> None:
    """Train with run_exp.py in this process."""
    code = run_exp.main(words)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"run_exp.py ended with exit code {code}")


def stock(experiment: Experiment, arguments: Mapping[str, Any]) -> None:
    """Train as transformers' and PEFT's documentation has it, on the rows and with the settings of our run."""
    inputs, peft = inputs_of(experiment), experiment.peft
    model = stock_model(experiment, inputs)
    config = LoraConfig(
        task_type=FAMILIES[experiment.model.family].peft_task,
        r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        target_modules=find_targets(model, peft.target_modules),
    )
    try:
        with tempfile.TemporaryDirectory() as folder, stock_modeling():
            StockTrainer(
                get_peft_model(model, config),
                arguments_of(experiment, folder, arguments),
                train_dataset=SingleRows(inputs.rows.train),
                data_collator=functools.partial(stock_batch, inputs.collate),
            ).train()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False  # Trainer's tf32=True is for the whole process


def stock_model(experiment: Experiment, inputs: Any) -> nn.Module:
    """The model as from_pretrained reads it; CLIP with our head, since transformers has none for names of classes."""
    model = experiment.model
    if model.family == "clip":
        return loading.load_backbone(model, inputs.device, inputs.rows.classes)
    return FAMILIES[model.family].auto.from_pretrained(model.hub_id, dtype=getattr(torch, model.dtype))


class StockTrainer(Trainer):
    """Trainer with our order of the rows, so that both sides time the same ones."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(self.train_dataset.rows.lengths, SEED)


class SingleRows(Dataset):
    """Rows one by one: images are decoded and preprocessed when they are read, as by an image processor."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def stock_batch(collate: Callable[[list[Any]], dict[str, Any]], rows: list[Any]) -> dict[str, Any]:
    return {key: value for key, value in collate(rows).items() if key in _STOCK_INPUTS}


def arguments_of(experiment: Experiment, folder: str, more: Mapping[str, Any]) -> Arguments:
    optim, machine = experiment.optim, experiment.trainer
    return Arguments(
        output_dir=folder,
        use_cpu=machine.device == "cpu",
        per_device_train_batch_size=machine.micro_batch_size,
        gradient_accumulation_steps=optim.batch_size // machine.micro_batch_size,
        max_steps=machine.max_steps,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.lr_schedule,
        weight_decay=optim.weight_decay,
        bf16=experiment.model.dtype == "bfloat16",
        save_strategy="no",
        remove_unused_columns=False,  # the collator takes them all
        report_to=[],
        disable_tqdm=True,
        seed=experiment.seed,
        **more,
    )


# --- models and rows


def write_t5(place: Place, **changes: Any) -> None:
    """Write T5-base's shape with random weights and SmolLM2's tokenizer."""
    tokenizer = load_tokenizer(run_exp.experiment_of(["model=smollm"]).model)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(SEED)
    config = T5Config(
        **T5_BASE | changes, vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id, **special
    )
    T5ForConditionalGeneration(config).save_pretrained(place.folder / "t5")
    tokenizer.save_pretrained(place.folder / "t5")


def write_clip(
    place: Place,
    *,
    images: int = EPOCH_STEPS * IMAGE_BATCH,
    side: int = 224,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> None:
    """Write CLIP ViT-B/32's shape, transformers' default, with a byte tokenizer, and CIFAR-10-like PNGs as Parquet."""
    tokenizer, folder = byte_tokenizer(), place.folder / "clip"
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    torch.manual_seed(SEED)
    config = CLIPConfig(text_config=ids | dict(text or {}), vision_config={"image_size": side} | dict(vision or {}))
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size).save_pretrained(folder)
    rows = place.folder / "uoft-cs/cifar10/plain_text"
    rows.mkdir(parents=True)
    for seed, (split, count) in enumerate((("train", images), ("test", 10))):
        files = picture_files(count, seed)
        column = [{"bytes": file, "path": f"{number}.png"} for number, file in enumerate(files)]
        labels = np.random.default_rng(seed).integers(0, 10, count)
        parquet.write_table(pyarrow.table({"img": column, "label": labels}), rows / f"{split}.parquet")


def write_llama(place: Place, *, layers: int = 32, **changes: Any) -> None:
    """Write Llama-2-7B's shape with random weights in BF16, and rows of GSM8K that are joined to fill 1,024 tokens."""
    tokenizer = small_tokenizer(place.folder / "llama", changes.get("vocab_size", SHAPE["vocab_size"]))
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    random_backbone(layers, torch.device(place.device), **changes, **special).save_pretrained(place.folder / "llama")
    source = Source(gsm8k.HUB_ID, gsm8k.CONFIG, "train")
    rows = read_rows(source, columns=("question", "answer"), data_root=place.data_root)
    texts = itertools.cycle(f"{row['question']} {row['answer']}" for row in rows)
    full = [
        {"question": f"Solve {n}.", "answer": " ".join(itertools.islice(texts, ROWS_IN_ONE))} for n in range(FULL_ROWS)
    ]
    folder = place.folder / "full" / gsm8k.HUB_ID / gsm8k.CONFIG
    folder.mkdir(parents=True)
    for split, kept in (("train", full), ("test", rows[:1])):
        (folder / f"{split}.jsonl").write_text(jsonl(kept), encoding="utf-8")


def small_tokenizer(folder: Path, count: int) -> PreTrainedTokenizerBase:
    """Write and read SmolLM2's tokenizer without its rarer tokens, for a vocabulary of at most `count` tokens."""
    load_tokenizer(run_exp.experiment_of(["model=smollm"]).model).save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    model = tokenizer["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < count}
    merges = [pair for pair in model["merges"] if all(part in vocabulary for part in (*pair, "".join(pair)))]
    path.write_text(json.dumps(tokenizer | {"model": model | {"vocab": vocabulary, "merges": merges}}))
    return AutoTokenizer.from_pretrained(folder)


# --- the families

_LORA, _FLAT = ("rho=off",), ("rho=flat", "rho.mode=copy")
_TF32, _BF16 = ("trainer.matmul_precision=high",), ("trainer.autocast=bfloat16",)

T5 = TrainingFamily(
    title="T5-base's shape on CoLA, FP32, 32 rows a step",
    model="T5-base's shape, random weights, FP32, r = 8 on all linear layers",
    rows="CoLA, 32 a step",
    settings=("model=t5base", "model.hub_id={folder}/t5", "dataset=cola", "dataset.validation_rows=0"),
    write=write_t5,
    timing=Timing(20, 10, 4),
    contenders={
        "stock": Contender(stock={}),
        "LoRA": Contender(_LORA),
        "Flat-LoRA copy": Contender(_FLAT),
        "Flat-LoRA recompute": Contender(("rho=flat", "rho.mode=recompute")),
        "stock TF32": Contender(stock={"tf32": True}),
        "LoRA TF32": Contender((*_LORA, *_TF32)),
        "Flat-LoRA copy TF32": Contender((*_FLAT, *_TF32)),
    },
)
_IMAGES, _IMAGES_OF_STOCK = Timing(0, EPOCH_STEPS, 4), Timing(0, EPOCH_STEPS, 2)  # epochs of stock are alike
CLIP = TrainingFamily(
    title="CLIP ViT-B/32's shape on CIFAR-like PNGs, FP32, 128 a step",
    model="CLIP ViT-B/32's shape, random weights, FP32, r = 8 on all linear layers",
    rows=f"{EPOCH_STEPS * IMAGE_BATCH:,} PNGs of 32 × 32 random pixels an epoch, {IMAGE_BATCH} a step",
    settings=("model=clip_b32", "model.hub_id={folder}/clip", "dataset=cifar10", "data_root={folder}"),
    write=write_clip,
    timing=_IMAGES,
    contenders={
        "stock": Contender(stock={}, timing=_IMAGES_OF_STOCK),
        "stock 12 workers": Contender(stock={"dataloader_num_workers": 12}, timing=_IMAGES_OF_STOCK),
        "LoRA": Contender(_LORA),
        "Flat-LoRA copy": Contender(_FLAT),
        "LoRA TF32": Contender((*_LORA, *_TF32)),
        "Flat-LoRA copy TF32": Contender((*_FLAT, *_TF32)),
        "LoRA BF16": Contender((*_LORA, *_BF16)),
        "Flat-LoRA copy BF16": Contender((*_FLAT, *_BF16)),
    },
    compared=("stock", "stock 12 workers", "LoRA"),
    by_epoch=True,
)
TEXT = TrainingFamily(
    title="Llama-2-7B's shape on GSM8K, BF16, 32 rows a step",
    model="Llama-2-7B's shape, random weights, BF16, r = 8 on all linear layers",
    rows="GSM8K, 32 a step",
    settings=("model=llama", "model.hub_id={folder}/llama", "dataset=gsm8k", "dataset.validation_rows=0"),
    write=write_llama,
    timing=Timing(6, 4, 4),
    contenders={
        "stock": Contender(("trainer.micro_batch_size=2",), stock={}, timing=Timing(1, 1, 3)),
        "stock with Liger": Contender(
            ("trainer.micro_batch_size=8",), stock={"use_liger_kernel": True}, timing=Timing(2, 2, 3)
        ),
        "LoRA": Contender(_LORA),
        "Flat-LoRA copy": Contender(_FLAT),
        "LoRA full rows": Contender(
            (*_LORA, "data_root={folder}/full", "dataset.max_length=1024"), timing=Timing(2, 2, 3)
        ),
    },
    compared=("stock", "stock with Liger", "LoRA"),
    other_rows=("LoRA full rows",),
    in_tokens=True,
)
