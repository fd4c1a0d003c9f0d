"""Model class for lm-eval on `HFBackend`: lm-eval's tasks and scores, with this suite's token ids and decoding.

lm-eval's own class tokenizes texts as they are: an end-of-sequence token that the tokenizer appends is then scored in
place of an answer, and "<s>" in a question becomes a special token. It truncates long prompts on the left, and uses the
model's own generation config. Here ids are those of `TokenizedBackend`, nothing is truncated, and greedy decoding takes
the largest logit.
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
from flatlora.inputs.tokenizing import text_ids


class LMEvalModel(HFLM):
    """Likelihoods and greedy answers for lm-eval.

    Args:
        task: name of the prompts in errors and warnings.
    """

    def __init__(self, backend: HFBackend, task: str, batch_size: int) -> None:
        super().__init__(
            pretrained=adapted_model(backend.model),
            tokenizer=backend.tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=backend.precision and backend.precision.autocast,
            backend="seq2seq" if backend.encoder_decoder else "causal",
            max_length=sys.maxsize,  # never truncate: `check_lengths` below raises or warns instead
        )
        self._answering, self._task = backend, task

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return text_ids(self.tokenizer, string, special=False)
        return self._answering.prompt_ids(string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any) -> Any:
        """As in HFLM, after checking the lengths.

        Raises:
            ConfigError: a prompt with its answer is longer than the model's context.
            FloatingPointError: as `check_numbers`.
        """
        contexts = {tuple(context) for _, context, _ in requests}  # `requests` has a context once per choice
        longest = max((len(answer) for _, _, answer in requests), default=0)
        self._answering.check_lengths([len(context) for context in contexts], longest, task=self._task)
        results = super()._loglikelihood_tokens(requests, **options)
        check_numbers(torch.tensor([likelihood for likelihood, _ in results]))
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy answers, without the space between prompt and answer.

        SentencePiece's decoders drop that space, byte-level ones keep it, and exact_match would see the difference.

        Raises:
            ConfigError: a prompt with its answer is longer than the model's context.
        """
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(index)
        answers: dict[int, str] = {}
        for sampling, indices in groups.items():
            lengths = {index: self._answering.prompt_length(requests[index].args[0]) for index in indices}
            self._answering.check_lengths(list(lengths.values()), sampling.max_new_tokens, task=self._task)
            indices.sort(key=lambda index: -lengths[index])
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                completions = self._answering.generate([requests[index].args[0] for index in batch], sampling)
                answers |= {index: answer.text for index, answer in zip(batch, completions, strict=True)}
        return [answers[index].removeprefix(" ") for index in range(len(requests))]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        normalized = normalize_gen_kwargs(options, self.max_gen_toks)
        return Sampling(normalized["max_gen_toks"], stop=tuple(filter(None, normalized["until"])))
