"""Scores of classes with an encoder in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.backends import Completion, Sampling, check_numbers
from eval.backends.hf import adapted_model, context_of
from eval.backends.in_memory import InMemoryBackend
from eval.backends.tokenized import TokenizedBackend
from flatlora.inputs.classified import encoder_ids, encoder_inputs
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import autocast

logger = logging.getLogger(__name__)


class EncoderBackend(InMemoryBackend, TokenizedBackend):
    """Classifies texts; the likelihood of a choice is that of the class with its name.

    Texts that are longer than the model's table of positions are cut.

    Args:
        model: text classifier.
        settings: those of `InMemoryBackend`.
    """

    name = "encoder"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(adapted_model(model), **settings)
        self.tokenizer, self.ends = tokenizer, frozenset()
        self.classes: dict[str, int] = self.model.config.label2id
        self.context = context_of(self.model)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"tokenizer": self.tokenizer_sha256}

    def _ids(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Returns the ids that the model reads, and how many texts were cut."""
        limited = self.context is not None and self.context.kind == "learned"
        return encoder_ids(self.tokenizer, texts, self.context.limit if limited else None)

    def prompt_ids(self, prompt: str) -> list[int]:
        return self._ids([prompt])[0][0]

    def check_choices(self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool) -> None:
        """Checks that every choice is a class; warns of texts that are cut, or longer than the model was made for.

        Raises:
            ConfigError: a choice is no class.
        """
        if unknown := sorted({choice for each in choices for choice in each} - self.classes.keys()):
            raise ConfigError(
                [
                    f"Invalid choices {', '.join(unknown[:5])}: the model's classes are {', '.join(self.classes)}; use "
                    "rows of these classes."
                ]
            )
        ids, cut = self._ids(prompts)
        if cut:
            logger.warning(
                "%d of %d texts are longer than the %d tokens that the model has positions for, and lose their end.",
                *(cut, len(ids), self.context.limit),
            )
        self.check_lengths([len(row) for row in ids], 1)

    def first_token(self, choice: str) -> int:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            ["Invalid eval.glue.metric=published with an encoder: it scores classes; use eval.glue.metric=likelihood."]
        )

    @torch.inference_mode()
    def log_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, first_token: bool = False
    ) -> list[list[float]]:
        """Returns log p(class | text) for each choice of each prompt; raises as `check_numbers`."""
        inputs = encoder_inputs(self._ids(prompts)[0], self.tokenizer, self.model.config)
        with autocast(self.device, self.precision):
            logits = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).logits
        scores = logits.float().log_softmax(-1).cpu()
        check_numbers(scores)
        rows = scores.tolist()
        return [[row[self.classes[name]] for name in names] for row, names in zip(rows, choices, strict=True)]

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> list[Completion]:
        raise ConfigError(["Invalid model: an encoder generates no text; use a language model, or eval.glue."])
