"""Greedy answers for `python -m scripts.bench families`: backend hf against the model's own `generate`.

Both answer the same prompts of GSM8K in the same batches, longest first, with the same model: Llama-2-7B's shape,
random weights in BF16, and an adapter that is not merged. Random weights hardly ever end an answer, so all answers have
the same length. A first batch, which compiles and captures, is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data import gsm8k
from eval.backends import Sampling
from eval.backends.hf import HFBackend
from flatlora.inputs.rows import Source, gather, local_files, prompt_text, read_rows
from flatlora.inputs.templates import prompt
from flatlora.utils.precision import choose_precision
from scripts.bench_gpu import GIB, SHAPE, free_memory, gpu_state, random_backbone, with_lora
from scripts.bench_training import Place, small_tokenizer

_SOURCE = Source(gsm8k.HUB_ID, gsm8k.CONFIG, "test")
Answer = Callable[[list[str]], int]  # prompts of a batch → number of tokens of all answers


@dataclass(frozen=True)
class AnswersFamily:
    """The speed of answering; fields are as in `TrainingFamily`.

    Args:
        batch: prompts at a time; GSM8K's default.
        rounds: how often our side answers all prompts; stock, which takes a multiple of the time, does so once.
        shape: changes of the model's config, for tests.
    """

    title: str = "Answers of Llama-2-7B's shape, BF16, greedy, 64 prompts of GSM8K"
    prompts: int = 64
    batch: int = 16
    new_tokens: int = 128
    rounds: int = 3
    layers: int = 32
    shape: Mapping[str, Any] = field(default_factory=dict)
    contenders: tuple[str, ...] = ("stock", "backend hf")
    compared: tuple[str, ...] = ("stock",)
    other_rows: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return f"Llama-2-7B's shape, {self.layers} layers, random weights, BF16, r = 8 on all linear layers"

    @property
    def rows(self) -> str:
        return f"{self.prompts} prompts of GSM8K in batches of {self.batch}, {self.new_tokens} new tokens each"

    def check(self, place: Place) -> None:
        """Looks for the prompts.

        Raises:
            ConfigError: their file does not exist.
        """
        if place.data_root is not None:
            gather(lambda: local_files(_SOURCE, place.data_root))

    def write(self, place: Place) -> None:
        """Writes the tokenizer."""
        small_tokenizer(place.folder, (SHAPE | dict(self.shape))["vocab_size"])

    def measure(self, name: str, place: Place) -> dict[str, Any]:
        """Answers all prompts `rounds` times; returns the tokens per second of each round."""
        device, tokenizer = torch.device(place.device), AutoTokenizer.from_pretrained(place.folder)
        if device.type == "cuda":
            free_memory()
            torch.cuda.reset_peak_memory_stats()
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = with_lora(random_backbone(self.layers, device, **dict(self.shape), **special)).eval()
        answer = (self._stock if name == "stock" else self._ours)(model, tokenizer)
        texts = [
            prompt_text({"x": prompt("qa", row["question"])})
            for row in read_rows(_SOURCE, columns=("question", "answer"), data_root=place.data_root)[: self.prompts]
        ]
        texts.sort(key=lambda text: -len(tokenizer(text)["input_ids"]))
        batches = [texts[i : i + self.batch] for i in range(0, len(texts), self.batch)]
        answer(batches[0])
        rates = []
        for _ in range(1 if name == "stock" else self.rounds):
            began = time.perf_counter()
            tokens = sum(map(answer, batches))
            rates.append(tokens / (time.perf_counter() - began))
        row: dict[str, Any] = {"tokens_per_s": rates}
        if device.type == "cuda":
            row |= {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "clock_and_power": gpu_state()}
        return row

    def _stock(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Answer:
        @torch.inference_mode()
        def answer(texts: list[str]) -> int:
            given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
            given.pop("token_type_ids", None)
            output = model.generate(**given, max_new_tokens=self.new_tokens, do_sample=False, use_cache=True)
            new = output[:, given["input_ids"].shape[1] :]
            return int((new != tokenizer.eos_token_id).cumprod(1).sum())

        return answer

    def _ours(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Answer:
        precision = choose_precision("auto", "bfloat16", next(model.parameters()).device)
        backend = HFBackend(model, tokenizer, batch_size=self.batch, precision=precision)
        sampling = Sampling(self.new_tokens)
        return lambda texts: sum(completion.tokens for completion in backend.generate(texts, sampling))

    def speed(self, row: Mapping[str, Any]) -> float:
        """Tokens a second."""
        return statistics.median(row["tokens_per_s"])

    def shown(self, row: Mapping[str, Any]) -> dict[str, str]:
        """{column: cell} of the family's table."""
        return {"tokens/s": f"{self.speed(row):,.0f}"}


ANSWERS = AnswersFamily()
