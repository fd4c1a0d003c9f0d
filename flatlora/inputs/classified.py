"""Texts that an encoder classifies, one or a pair, the same in training and in evaluation.

A tab separates the texts of a pair: GLUE's files are separated by tabs, so its sentences contain none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flatlora.inputs.tokenizing import tokenized

SEPARATOR = "\t"


def joined_texts(texts: Sequence[str]) -> str:
    """Returns the first text and all others, separated by a tab."""
    first, *others = (text.replace(SEPARATOR, " ") for text in texts)
    return SEPARATOR.join([first, "\n".join(others)]) if others else first


def encoder_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int | None = None
) -> tuple[list[list[int]], int]:
    """Returns the ids of each text or pair, with the tokenizer's special tokens, and how many of them were cut.

    Args:
        most: maximum number of tokens; the longer text of a pair loses its end first.
    """
    rows = [text.split(SEPARATOR, 1) for text in texts]
    ids = _ids(tokenizer, rows)
    longer = [place for place, row in enumerate(ids) if most is not None and len(row) > most]
    cut = _ids(tokenizer, [rows[place] for place in longer], truncation=True, max_length=most)
    for place, row in zip(longer, cut, strict=True):
        ids[place] = row
    return ids, len(longer)


def _ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]], **options: Any) -> list[list[int]]:
    ids: list[list[int]] = [[]] * len(rows)
    for count in (1, 2):  # texts in a row
        places = [place for place, row in enumerate(rows) if len(row) == count]
        if not places:
            continue
        first, *second = (list(column) for column in zip(*(rows[place] for place in places), strict=True))
        pair = {"text_pair": second[0]} if second else {}
        found = tokenized(tokenizer, first, **pair, split_special_tokens=True, verbose=False, **options)["input_ids"]
        for place, row in zip(places, found, strict=True):
            ids[place] = row
    return ids


def encoder_inputs(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, described: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """Returns rows of ids as inputs of the encoder with this config.json, padded on the right, B × L."""
    ids = [torch.tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    batch = {"input_ids": input_ids, "attention_mask": mask}
    segments = getattr(described, "type_vocab_size", 0) > 1 and "token_type_ids" in tokenizer.model_input_names
    if segments:  # 1 for the tokens after the first separator, as in BERT
        ended = (input_ids == tokenizer.sep_token_id).cumsum(1)
        batch["token_type_ids"] = (functional.pad(ended, (1, 0))[:, :-1] > 0).long() * mask
    return batch
