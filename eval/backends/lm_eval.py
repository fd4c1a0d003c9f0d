"""Model class for lm-eval on `HFBackend`: lm-eval's tasks and scores, with this suite's token ids and decoding.

lm-eval's own class tokenizes texts as they are: an end-of-sequence token that the tokenizer appends is then scored in
place of an answer, and "<s>" in a question becomes a special token. It truncates long prompts on the left, and uses the
model's own generation config. Here ids are those of `TokenizedBackend`, nothing is truncated, and greedy decoding takes
the largest logit. A chat template alone adds special tokens: a tokenizer's own beginning is not put before it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from eval.backends import Sampling, check_numbers
from eval.backends.hf import HFBackend, adapted_model
from flatlora.inputs.tokenizing import text_ids, tokenized


class LMEvalModel(HFLM):
    """Likelihoods and greedy answers for lm-eval.

    Args:
        task: name of the prompts in errors and warnings.
        chat: whether prompts are chats in the tokenizer's chat template.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(self, backend: HFBackend, task: str, batch_size: int, *, chat: bool = False) -> None:
        super().__init__(
            pretrained=adapted_model(backend.model),
            tokenizer=backend.tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=backend.precision and backend.precision.autocast,
            backend="seq2seq" if backend.encoder_decoder else "causal",
            max_length=sys.maxsize,  # never truncate: `check_lengths` below raises or warns instead
        )
        self._answering, self._task = backend, task
        self._chats = backend.chat_encoder if chat else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return super().apply_chat_template(self._chats.marked(chat_history), add_generation_prompt)

    def readable(self, prompt: str) -> str:
        """Returns a prompt of `apply_chat_template` without placeholders."""
        return self._chats.unmarked(prompt) if self._chats else prompt

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return text_ids(self.tokenizer, string, special=False)
        if self._chats is None:
            return self._answering.prompt_ids(string)
        if self.tokenizer.is_fast:
            return self._chats.rendered_ids(string)
        return tokenized(self.tokenizer, [self.readable(string)], add_special_tokens=False)["input_ids"][0]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any) -> Any:
        """As in HFLM, after checking the lengths.

        Raises:
            ConfigError: a prompt with its answer is longer than the model's context.
            FloatingPointError: as `check_numbers`.
        """
        if self._max_length == sys.maxsize:  # not a window of `loglikelihood_rolling`
            contexts = {tuple(context) for _, context, _ in requests}  # `requests` has a context once per choice
            longest = max((len(answer) for _, _, answer in requests), default=0)
            self._answering.check_lengths([len(context) for context in contexts], longest, task=self._task)
        results = super()._loglikelihood_tokens(requests, **options)
        check_numbers(torch.tensor([likelihood for likelihood, _ in results]))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As in HFLM, which cuts a text into windows as long as the model's context."""
        if self._answering.context is not None:
            self._max_length = self._answering.context.limit
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._max_length = sys.maxsize

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns answers without the space between prompt and answer: greedy ones, unless the task samples.

        SentencePiece's decoders drop that space, byte-level ones keep it, and exact_match would see the difference. The
        seed of an answer is its request's number.

        Raises:
            ConfigError: a prompt with its answer is longer than the model's context.
        """
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(index)
        answers: dict[int, str] = {}
        for sampling, indices in groups.items():
            prompts = {index: self.tok_encode(requests[index].args[0]) for index in indices}
            self._answering.check_lengths([*map(len, prompts.values())], sampling.max_new_tokens, task=self._task)
            indices.sort(key=lambda index: -len(prompts[index]))
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                seeds = batch if sampling.temperature else None
                completions = self._answering.generate_ids([prompts[index] for index in batch], sampling, seeds)
                answers |= {index: answer.text for index, answer in zip(batch, completions, strict=True)}
        return [answers[index].removeprefix(" ") for index in range(len(requests))]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        normalized = normalize_gen_kwargs(options, self.max_gen_toks)
        temperature = normalized.get("temperature", 0.0) if normalized["do_sample"] else 0.0
        top_p, stops = normalized.get("top_p", 1.0), tuple(filter(None, normalized["until"]))
        return Sampling(normalized["max_gen_toks"], temperature, top_p, stop=stops)
