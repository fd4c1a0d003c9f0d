"""Generates with transformers: batched decoding, KV cache, left padding, rows that are done leave the batch.

Greedy decoding takes the largest logit at every step and ignores the model's own generation_config.json (a repetition
penalty, suppressed tokens, sampling). At a temperature each row has a random generator with its own seed, so that its
answer is independent of the rest of the batch, and a resumed evaluation gives the same answers.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from eval.backends import Completion, Sampling, check_numbers, cut_at
from eval.backends.decoding import Decoder, reason_against
from eval.backends.in_memory import InMemoryBackend
from eval.backends.tokenized import Context, TokenizedBackend, end_ids
from flatlora.fused.graphs import GraphCapture
from flatlora.inputs.tokenizing import text_ids
from flatlora.models.fit import first_position, position_tables, rotary_positions
from flatlora.utils.labels import IGNORED_LABEL
from flatlora.utils.precision import autocast

logger = logging.getLogger(__name__)

_TRIAL_TOKENS = 16  # most tokens of the row, and tokens of padding, in the trial of padding
_MARGIN = 4  # extra tokens to decode before a stop, as decoding can lose the first space


class HFBackend(InMemoryBackend, TokenizedBackend):
    """Generates, and computes likelihoods, with a model in memory.

    Args:
        model: causal or encoder-decoder model.
        settings: those of `InMemoryBackend`.
    """

    name = "hf"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.tokenizer = tokenizer
        self.on_token: Callable[[int], None] | None = None
        self._padding_is_read: bool | None = None  # None: not tried yet
        self.encoder_decoder = model.config.is_encoder_decoder
        own = getattr(model, "generation_config", None)  # of chat models, its eos_token_id is often a list
        self.ends = end_ids(tokenizer.eos_token_id, getattr(own, "eos_token_id", None))
        self.context = context_of(model)
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_contiguous)
        self._decoder: Decoder | None = None
        self._reason = reason_against(adapted_model(model))  # None: `_decoder` generates
        self._most_rows: int | None = None  # of a batch, once memory has run out
        if self._reason is None:
            capture = GraphCapture(self.device) if self.device.type == "cuda" else None
            self._decoder = Decoder(adapted_model(model), capture)
        if first := first_position(model):
            adapted_model(model).register_forward_pre_hook(functools.partial(_shift_positions, first), with_kwargs=True)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"ends": sorted(self.ends), "tokenizer": self.tokenizer_sha256}

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> list[Completion]:
        self.check_lengths([len(prompt) for prompt in prompts], sampling.max_new_tokens)
        if self._reads_padding(prompts):
            own = [None] * len(prompts) if seeds is None else [[seed] for seed in seeds]
            return [self._generate([ids], sampling, seed)[0] for ids, seed in zip(prompts, own, strict=True)]
        answers = self._answers(prompts, sampling, seeds)
        return [self._completion(*pair, sampling) for pair in zip(prompts, answers, strict=True)]

    def _answers(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> list[list[int]]:
        """Returns the tokens of each answer, with the one that ended it."""
        answers: list[list[int]] = []

        def report(token: int) -> None:
            if self.on_token:
                self.on_token((len(answers) * sampling.max_new_tokens + len(batch) * token) // len(prompts))

        while len(answers) < len(prompts):
            part = slice(len(answers), self._most_rows and len(answers) + self._most_rows)
            batch, drawn = prompts[part], None if seeds is None else seeds[part]
            if self._decoder is None:
                name = type(adapted_model(self.model)).__name__
                _log_once(f"{name} decodes with transformers' generate, as {self._reason}.")
                answers += self._by_generate(batch, sampling, drawn, report)
                continue
            try:
                answers += self._by_decoder(batch, sampling, drawn, report)
            except torch.OutOfMemoryError:
                self._take_fewer_rows(len(batch))
        return answers

    def _take_fewer_rows(self, rows: int) -> None:
        """Halves the batches, as the cache of `rows` rows does not fit into memory; `generate` takes a single one."""
        self._decoder.release()
        torch.cuda.empty_cache()
        if rows == 1:
            self._decoder, self._reason = None, "the cache of one row does not fit into the GPU's memory"
            return
        self._most_rows = rows // 2
        logger.warning(
            "batch_size=%d: the cache of %d rows does not fit into the GPU's memory; %d rows at a time are answered.",
            *(self.batch_size, rows, self._most_rows),
        )

    def _by_decoder(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        report: Callable[[int], None],
    ) -> list[list[int]]:
        draw = SeededDraw(sampling, seeds) if sampling.temperature else None
        answers: list[list[int]] = [[] for _ in prompts]
        rows: list[int | None] = list(range(len(prompts)))  # at each place of the batch; None: it is done
        input_ids, mask = self._left_padded(prompts)
        with autocast(self.device, self.precision, cache_enabled=self._decoder.casts_may_be_cached):
            logits = self._decoder.start(input_ids, mask, sampling.max_new_tokens)
            for count in range(1, sampling.max_new_tokens + 1):
                check_numbers(logits)
                tokens = (draw(input_ids, logits) if draw else logits).argmax(-1)
                for place, token in enumerate(tokens.tolist()):
                    if (row := rows[place]) is None:
                        continue
                    answers[row].append(token)
                    stopped = sampling.stop and self._is_stopped(prompts[row], answers[row], sampling)
                    if stopped or token in self.ends:
                        rows[place] = None
                report(count)
                running = [place for place, row in enumerate(rows) if row is not None]
                if not running or count == sampling.max_new_tokens:
                    break
                order = self._decoder.keep(running)
                if len(order) < len(rows):
                    rows, tokens = [rows[place] for place in order], tokens[order]
                    if draw:
                        draw.keep(order)
                logits = self._decoder.step(tokens)
        return answers

    def _by_generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        report: Callable[[int], None],
    ) -> list[list[int]]:
        input_ids, mask = self._left_padded(prompts)
        start = 1 if self.encoder_decoder else input_ids.shape[1]
        stops = StopTexts(len(prompts), start, lambda row, ids: self._is_stopped(prompts[row], ids, sampling))
        greedy = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # `SeededDraw` below samples: the token with its largest score
            use_cache=True,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.tokenizer.pad_token_id,
            decoder_start_token_id=self._decoder_start(),
        )
        with self._autocast(), _without_own_generation_config(self.model):
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=greedy,
                logits_processor=LogitsProcessorList(
                    [CheckedLogits(), *([SeededDraw(sampling, seeds)] if sampling.temperature else [])]
                ),
                streamer=TokenCounter(report) if self.on_token else None,
                stopping_criteria=StoppingCriteriaList([stops] if sampling.stop else []),
            )
        return [ids[:length] for ids, length in zip(output[:, start:].tolist(), stops.lengths, strict=True)]

    def _left_padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tokens of prompts and their mask."""
        mask = self._padded([[1] * len(ids) for ids in prompts], left=True, fill=0)
        return self._padded(prompts, left=True, fill=self.tokenizer.pad_token_id), mask

    def _is_stopped(self, prompt: list[int], answer: list[int], sampling: Sampling) -> bool:
        """Whether an answer contains a stop; it had none before its last token."""
        ids = self._before_end(answer)
        newest = max(len(stop.encode()) for stop in sampling.stop) + _MARGIN  # tokens, which are at least a byte each
        if len(ids) > newest and not cut_at(self._decode(ids[-newest:]), sampling.stop)[1]:
            return False
        return sampling.cut(self._text(prompt, ids))[1]

    def first_token(self, choice: str) -> int:
        return self._choice_ids(choice, first_token=True)[0]

    def check_choices(self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool) -> None:
        """Checks that every prompt followed by the longest of all choices fits the model's context.

        Raises:
            ConfigError: as `check_lengths`.
        """
        distinct = {choice for row_choices in choices for choice in row_choices}
        longest = max((len(self._choice_ids(choice, first_token)) for choice in distinct), default=0)
        self.check_lengths([self.prompt_length(prompt) for prompt in prompts], longest + 1)

    @torch.inference_mode()
    def log_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool = False
    ) -> list[list[float]]:
        """Returns log p(choice, end of sequence | prompt), summed over tokens, for each choice of each prompt.

        Prompt and choice are tokenized separately. `first_token` takes only the first token of each choice, without
        the end of the sequence.

        Raises:
            FloatingPointError: as `check_numbers`.
        """
        if self._decoder:
            self._decoder.release()  # its memory
        pairs = [
            (prompt, choice) for prompt, row_choices in zip(prompts, choices, strict=True) for choice in row_choices
        ]
        prompt_ids = {prompt: self.prompt_ids(prompt) for prompt in prompts}
        choice_ids = {choice: self._choice_ids(choice, first_token) for _, choice in pairs}
        sums: list[float] = []
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            with self._autocast():
                sums += self._sequence_scores([prompt_ids[p] for p, _ in batch], [choice_ids[c] for _, c in batch])
        scores = iter(sums)
        return [[next(scores) for _ in row_choices] for row_choices in choices]

    def _choice_ids(self, choice: str, first_token: bool) -> list[int]:
        ids = text_ids(self.tokenizer, choice, special=False)
        return ids[:1] if first_token else [*ids, self.tokenizer.eos_token_id]

    def _sequence_scores(self, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        """Returns Σ log p of the answer's tokens for each pair of prompt and answer."""
        if self._reads_padding([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]):
            pairs = zip(prompts, answers, strict=True)
            return [score for ids, answer in pairs for score in self._sequence_scores([ids], [answer])]
        width = max(map(len, answers))
        self.check_lengths([len(prompt) for prompt in prompts], width + 1)
        labels = self._padded(answers, left=not self.encoder_decoder, fill=IGNORED_LABEL)
        if self.encoder_decoder:
            input_ids = self._padded(prompts, left=False, fill=self.tokenizer.pad_token_id)
            mask = self._padded([[1] * len(ids) for ids in prompts], left=False, fill=0)
            logits = adapted_model(self.model)(input_ids=input_ids, attention_mask=mask, labels=labels).logits
        else:
            # Padding is on the left, so that every answer ends at the last position: only the last logits are needed.
            joined = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            input_ids, mask = self._left_padded(joined)
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            logits = self.model(
                input_ids=input_ids, attention_mask=mask, position_ids=positions, logits_to_keep=width + 1
            ).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        likelihoods = -losses.view(labels.shape).sum(1)
        check_numbers(likelihoods)
        return likelihoods.tolist()

    def _reads_padding(self, rows: list[list[int]]) -> bool:
        """Whether rows must run one by one: their lengths differ, and the model reads the padding in spite of its mask.

        Recurrent models such as RWKV do. This is tried once, on the shortest row.
        """
        if self.encoder_decoder or len(set(map(len, rows))) == 1:
            return False
        if self._padding_is_read is None:
            self._padding_is_read = self._changes_with_padding(min(rows, key=len))
            if self._padding_is_read:
                name = type(adapted_model(self.model)).__name__
                logger.warning("%s reads padding as text: rows of different lengths run one by one.", name)
        return self._padding_is_read

    @torch.inference_mode()
    def _changes_with_padding(self, row: list[int]) -> bool:
        ids = row[-_TRIAL_TOKENS:]
        mask = torch.tensor([[0] * _TRIAL_TOKENS + [1] * len(ids)], device=self.device)
        padded = torch.tensor([[self.tokenizer.pad_token_id] * _TRIAL_TOKENS + ids], device=self.device)
        with self._autocast():
            alone = self.model(input_ids=padded[:, _TRIAL_TOKENS:]).logits[0, -1].float()
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            other = self.model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[0, -1].float()
        in_fp32 = next(self.model.parameters()).dtype == torch.float32 and self.precision is None
        tolerance = 1e-3 if in_fp32 else 5e-2
        return bool((other - alone).abs().max() > tolerance * alone.abs().max())

    def _padded(self, rows: list[list[int]], *, left: bool, fill: int) -> torch.Tensor:
        side = "left" if left else "right"
        tensors = [torch.tensor(row) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        return pad(tensors, batch_first=True, padding_value=fill, padding_side=side).to(self.device)

    def _decoder_start(self) -> int | None:
        """Returns the first token of an encoder-decoder model's answer, from whichever of its configs has it."""
        own = getattr(self.model, "generation_config", None)
        tokens = [getattr(config, "decoder_start_token_id", None) for config in (own, self.model.config)]
        return next((token for token in tokens if token is not None), None)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device, self.precision)


def adapted_model(model: nn.Module) -> nn.Module:
    """Returns the model inside PEFT's wrapper, with the adapter layers.

    AdaLoRA's wrapper adds its training penalty whenever there are labels, which fails if the adapter was loaded for
    inference.
    """
    wrapped = isinstance(model, PeftModel) and isinstance(model.base_model, BaseTuner)
    return model.base_model.model if wrapped else model


def _shift_positions(
    first: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adds the model's first position to positions that count from 0, as those of `generate` do."""
    if kwargs.get("position_ids") is not None:
        kwargs = {**kwargs, "position_ids": kwargs["position_ids"] + first}
    return args, kwargs


def _contiguous(head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Makes hidden states contiguous: for a view, torch would copy the head's weight once per row."""
    return (arguments[0].contiguous(), *arguments[1:])


class TokenCounter(BaseStreamer):
    """Reports the index of each token of a batch as it is generated."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self.report, self.tokens = report, -1  # `generate` streams the prompt first

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens:
            self.report(self.tokens)

    def end(self) -> None:
        """Does nothing; the last token has been reported."""


def context_of(model: nn.Module) -> Context | None:
    """Returns the number of positions of a model; None if they are relative or unbounded."""
    if tables := position_tables(model):
        return Context(min(tables.values()), "learned")
    trained = rotary_positions(model)
    return None if trained is None else Context(trained, "rotary")


class StopTexts(StoppingCriteria):
    """Ends a row at the token that completes a stop text in its answer; its prompt is not searched.

    Args:
        start: index of the first token of the answers in `input_ids`.
        is_stopped: (row, ids of its answer) → whether the answer contains a stop.

    Attributes:
        lengths: number of tokens of each row's answer when it stopped; None if it has not.
    """

    def __init__(self, rows: int, start: int, is_stopped: Callable[[int, list[int]], bool]) -> None:
        self.lengths: list[int | None] = [None] * rows
        self.start, self.is_stopped = start, is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            if self.lengths[row] is None and self.is_stopped(row, ids):
                self.lengths[row] = len(ids)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


class CheckedLogits(LogitsProcessor):
    """Returns the logits of a step as they are; raises as `check_numbers`."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_numbers(scores)
        return scores


class SeededDraw(LogitsProcessor):
    """Returns scores whose argmax is a sample from the nucleus of softmax(logits / temperature) (Gumbel-max trick).

    Args:
        seeds: one per row; the k-th token of a row uses the k-th vector of uniforms of its generator.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops the other rows."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float() / self.sampling.temperature
        if self.sampling.top_p < 1:
            ordered, indices = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            outside = torch.zeros_like(before, dtype=torch.bool).scatter(1, indices, before >= self.sampling.top_p)
            logits = logits.masked_fill(outside, -torch.inf)
        uniform = torch.stack([torch.rand(logits.shape[1], generator=generator) for generator in self.generators])
        return logits - (-uniform.clamp_min(1e-20).log()).log().to(logits.device)


@functools.cache
def _log_once(text: str) -> None:
    logger.warning("%s", text)


@contextlib.contextmanager
def _without_own_generation_config(model: nn.Module) -> Iterator[None]:
    """Replaces the model's generation config by an empty one, as `generate` takes fields that are not set from it.

    PEFT's wrapper has a second reference, which it assigns to the model at each call.
    """
    owners = {module: module.generation_config for module in model.modules() if "generation_config" in vars(module)}
    for module in owners:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, own in owners.items():
            module.generation_config = own
