"""Rows to token ids and ids to batches.

The prompt (x and a blank) and the answer (y and end-of-sequence) are tokenised apart and joined, so that an evaluator,
which tokenises the prompt alone, continues from exactly the ids that training saw. Deviation from the published code,
which tokenises the joined text: there the blank may fuse with the answer's first token.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from data import Row, Splits
from data.selection import batched
from flatlora.config import ConfigError
from flatlora.rows import prompt_text

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token without loss
_ROWS_AT_ONCE = 1000


@dataclass
class TokenRows(Dataset):
    """Token ids of rows: `prompts` and `answers`, equally long lists of lists."""

    prompts: list[list[int]]
    answers: list[list[int]]
    cut: int = 0  # rows that were longer than the limit
    dropped: int = 0  # rows whose prompt alone left no room for an answer
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"prompt": self.prompts[index], "answer": self.answers[index]}


def tokenise(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenRows:
    """Ids of all rows, cut at `max_length` tokens (prompt + answer); a thousand rows a tokenizer call."""
    result = TokenRows([], [])
    for batch in batched(rows, _ROWS_AT_ONCE):
        prompts = tokenizer([prompt_text(row["x"]) for row in batch])["input_ids"]
        answers = tokenizer([row["y"] for row in batch], add_special_tokens=False)["input_ids"]
        for prompt, answer in zip(prompts, answers, strict=True):
            answer = [*answer, tokenizer.eos_token_id]
            room = max_length - len(prompt)
            result.cut += len(answer) > room
            if room < 1:
                result.dropped += 1
                continue
            result.prompts.append(prompt)
            result.answers.append(answer[:room])
    result.__post_init__()
    if result.cut:
        logger.warning(
            "%d rows are longer than dataset.max_length=%d tokens: %d lose the end of their answer, %d are left out.",
            result.cut,
            max_length,
            result.cut - result.dropped,
            result.dropped,
        )
    return result


@dataclass(frozen=True)
class CausalCollator:
    """Rows → right-padded batch of a decoder-only model, prompt tokens without loss.

    Only positions that some row of the batch has a loss on reach the output head: `logits_to_keep` names them and
    `shift_labels` holds their labels, which transformers' causal loss reads as they are. On short answers this saves
    most of the vocabulary-sized products; the loss is the same number.
    """

    pad_token_id: int
    pad_to_multiple: int = 8

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["prompt"]) + len(row["answer"]) for row in rows)
        length = -(-length // self.pad_to_multiple) * self.pad_to_multiple
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            start, stop = len(row["prompt"]), len(row["prompt"]) + len(row["answer"])
            input_ids[i, :stop] = torch.tensor(row["prompt"] + row["answer"])
            labels[i, start:stop] = input_ids[i, start:stop]
            attention_mask[i, :stop] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        supervised = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
        return {**batch, "logits_to_keep": supervised, "shift_labels": labels[:, supervised + 1]}


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Rows → batch of an encoder-decoder model: prompt to the encoder, answer as labels; both right-padded."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        prompts = [torch.tensor(row["prompt"]) for row in rows]
        answers = [torch.tensor(row["answer"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(prompts, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad(answers, batch_first=True, padding_value=IGNORED),
        }


class Prepared(NamedTuple):
    """Token ids of what training reads."""

    train: TokenRows
    validation: TokenRows


def prepare(splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Prepared:
    """Tokenise the train and validation rows.

    Raises:
        ConfigError: no train row is left, or none of the validation rows that there are; or answers cannot end.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            [
                f"Invalid model: the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, which ends "
                "each answer; choose a model whose tokenizer has one."
            ]
        )
    prepared = Prepared(*(tokenise(rows, tokenizer, max_length) for rows in (splits.train, splits.validation)))
    faults = [
        f"Empty data set: none of {len(rows)} {name} rows is left at dataset.max_length={max_length}; raise it, or "
        "choose another data set."
        for name, rows, left in zip(("train", "validation"), splits, prepared, strict=False)
        if not len(left) and (rows or name == "train")
    ]
    if faults:
        raise ConfigError(faults)
    return prepared


def fingerprint(prepared: Prepared) -> str:
    """SHA-256 of all token ids, in order."""
    digest = hashlib.sha256()
    for rows in prepared:
        for ids in itertools.chain(rows.prompts, rows.answers):
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()


def collator(family: str, pad_token_id: int) -> CausalCollator | Seq2SeqCollator:
    """The collator of a model family."""
    return Seq2SeqCollator(pad_token_id) if family == "seq2seq" else CausalCollator(pad_token_id)
