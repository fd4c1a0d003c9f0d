"""Tokenizes rows and collates batches.

The prompt (x and a blank) and the answer (y and end-of-sequence) are tokenized separately and joined, so that an
evaluator, which only tokenizes the prompt, continues from exactly the ids of training. Deviation: the published code
tokenizes the joined text, in which the blank may merge with the answer's first token. Names of special tokens in a row
are text, and an end-of-sequence token that a tokenizer appends is removed from a decoder's prompt
(`flatlora.inputs.tokenizing`). With `loss_on=text`, where every token is learned, prompt and answer are tokenized
together; such a row has an empty prompt.

Rows of chats (`messages`) are tokenized by the tokenizer's own chat template, see `flatlora.inputs.chats`: the last
answer and those before it are learned, and what is between them has no loss.

Rows of own data are `joined`: the training text is x + y without a blank, and its ids are those of the whole text, as
in TRL. Where a token would span prompt and answer, they are tokenized separately like all others.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from data import Row, Splits
from data.byte_level import ChunkMemory, packed
from data.selection import batched
from flatlora.inputs.chats import ChatEncoder, template_errors, template_sha256
from flatlora.inputs.classified import encoder_ids, encoder_inputs
from flatlora.inputs.conversations import chat_of
from flatlora.inputs.rows import prompt_text
from flatlora.inputs.tokenizing import appended_ends, special_tokens, text_ids, tokenizing
from flatlora.utils.errors import ConfigError
from flatlora.utils.labels import IGNORED_LABEL

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1000
_ID_BYTES = 4
_SHOWN = 40  # letters of a row in a message
Gap = tuple[int, int, int]
Part = tuple[bytes, bytes, list[tuple[int, int]]]  # ids of a prompt and an answer, and where the answer has no loss


class TokenRows(Dataset):
    """Token ids of rows in flat arrays, as in the cache file; lists of ints would take nine times the memory.

    Args:
        ids: prompt and answer of all rows, concatenated, INT32.
        prompt_lengths, answer_lengths: numbers of tokens per row, INT32.
        gaps: parts of answers without a loss, such as the further questions of a chat: (row, start, stop) each, in
            order, counted in tokens of the row's answer, INT32.
        cut: number of rows that were longer than the limit.
        dropped: number of rows that were left out because their prompt left no room for an answer.
    """

    def __init__(
        self,
        ids: np.ndarray,
        prompt_lengths: np.ndarray,
        answer_lengths: np.ndarray,
        gaps: np.ndarray | None = None,
        *,
        cut: int = 0,
        dropped: int = 0,
    ) -> None:
        self.ids, self.prompt_lengths, self.answer_lengths = ids, prompt_lengths, answer_lengths
        self.gaps = np.zeros((0, 3), np.int32) if gaps is None else gaps
        self.cut, self.dropped = cut, dropped
        totals = prompt_lengths + answer_lengths
        self.lengths: list[int] = totals.tolist()
        self._starts = np.concatenate([[0], np.cumsum(totals, dtype=np.int64)])

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Sequence[list[int]], **counts: int) -> TokenRows:
        """Creates rows from a list of ids per prompt and per answer."""
        return cls.of_bytes([packed(ids) for pair in zip(prompts, answers, strict=True) for ids in pair], **counts)

    @classmethod
    def of_bytes(cls, parts: Sequence[bytes], gaps: Sequence[Gap] = (), **counts: int) -> TokenRows:
        """Creates rows from INT32 ids as bytes: prompt, answer, prompt, answer, and so on."""
        lengths = np.fromiter((len(part) // _ID_BYTES for part in parts), np.int32, len(parts))
        ids, unlearned = np.frombuffer(b"".join(parts), "<i4"), np.array(gaps, np.int32).reshape(-1, 3)
        return cls(ids, lengths[0::2].copy(), lengths[1::2].copy(), unlearned, **counts)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # ends iteration over the rows
        start, stop = self._starts[index % len(self)], self._starts[index % len(self) + 1]
        middle = start + self.prompt_lengths[index]
        row = {"prompt": self.ids[start:middle].tolist(), "answer": self.ids[middle:stop].tolist()}
        first, last = np.searchsorted(self.gaps[:, 0], [index % len(self), index % len(self) + 1])
        return row | ({"gaps": self.gaps[first:last, 1:].tolist()} if first < last else {})

    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments of `from_arrays`."""
        counts = np.array([self.cut, self.dropped], np.int32)
        return {
            "ids": self.ids,
            "prompt_lengths": self.prompt_lengths,
            "answer_lengths": self.answer_lengths,
            "gaps": self.gaps,
            "counts": counts,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TokenRows:
        cut, dropped = arrays["counts"].tolist()
        lengths = arrays["prompt_lengths"], arrays["answer_lengths"]
        return cls(arrays["ids"], *lengths, arrays["gaps"], cut=cut, dropped=dropped)


class Encoder:
    """Encodes texts to the ids of the tokenizer's own call, without its masks and other objects.

    Byte-level tokenizers encode each distinct chunk of text once; other fast ones encode on all cores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self._memory = tokenizer, None
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
            self._memory = ChunkMemory.of(tokenizer.backend_tokenizer)

    def __call__(self, texts: Sequence[str], *, special: bool = True) -> list[bytes]:
        """INT32 ids of each text; `special` adds special tokens, such as the beginning of the sequence."""
        if not self.tokenizer.is_fast:
            return [packed(text_ids(self.tokenizer, text, special=special)) for text in texts]
        self.tokenizer.backend_tokenizer.encode_special_tokens = True  # the tokenizer's own call sets it again
        encoded = [self._memory.encode(text, special) if self._memory else None for text in texts]
        left = [index for index, ids in enumerate(encoded) if ids is None]
        backend = self.tokenizer.backend_tokenizer
        rest = [texts[index] for index in left]
        encodings = tokenizing(
            self.tokenizer, rest, lambda: backend.encode_batch_fast(rest, add_special_tokens=special)
        )
        for index, encoding in zip(left, encodings, strict=True):
            encoded[index] = packed(encoding.ids)
        return encoded

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) // _ID_BYTES for ids in self(texts)]


def tokenize(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_progress: Callable[[int], None] = lambda done: None,
    *,
    encoder_decoder: bool = False,
    whole: bool = False,
) -> TokenRows:
    """Tokenizes all rows, cut at `max_length` tokens (prompt + answer).

    Args:
        on_progress: called with the number of rows after each batch.
        encoder_decoder: whether prompts keep the end-of-sequence token that the tokenizer appends.
        whole: whether the prompt belongs to what is learned, as with `loss_on=text`.
    """
    encode, chats = Encoder(tokenizer), bool(rows) and "messages" in rows[0]
    encoded = _chats(tokenizer, whole=whole) if chats else _texts(encode, encoder_decoder, whole=whole)
    parts, gaps, cut, dropped, most = [], [], 0, 0, max_length * _ID_BYTES
    names = _SpecialNames(tokenizer, encode)
    for batch in batched(rows, _ROWS_AT_ONCE):
        names.look(batch)
        for prompt, answer, holes in encoded(batch):
            room = most - len(prompt)
            cut += len(answer) > room
            if room <= 0:
                dropped += 1
                continue
            kept = room // _ID_BYTES
            gaps += [(len(parts) // 2, start, min(stop, kept)) for start, stop in holes if start < kept]
            parts += [prompt, answer[:room]]
        on_progress(len(batch))
    if cut:
        logger.warning(
            "%d rows are longer than dataset.max_length=%d tokens: %d lose the end of their answer, %d are left out.",
            cut,
            max_length,
            cut - dropped,
            dropped,
        )
    names.warn()
    return TokenRows.of_bytes(parts, gaps, cut=cut, dropped=dropped)


def tokenize_classified(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    classes: Sequence[str],
    on_progress: Callable[[int], None] = lambda done: None,
) -> TokenRows:
    """Tokenizes rows for an encoder: the prompt is the text, cut at `max_length` tokens, the answer its class."""
    number, parts, cut = {name: packed([n]) for n, name in enumerate(classes)}, [], 0
    for batch in batched(rows, _ROWS_AT_ONCE):
        ids, longer = encoder_ids(tokenizer, [row["x"] for row in batch], max_length)
        cut += longer
        parts += [part for row, text in zip(batch, ids, strict=True) for part in (packed(text), number[row["y"]])]
        on_progress(len(batch))
    if cut:
        logger.warning("%d rows are longer than dataset.max_length=%d tokens, and lose their end.", cut, max_length)
    return TokenRows.of_bytes(parts, cut=cut)


def _texts(encode: Encoder, encoder_decoder: bool, *, whole: bool) -> Callable[[list[Row]], list[Part]]:
    """Returns the function that encodes a batch of rows {"x", "y"}."""
    end = packed([encode.tokenizer.eos_token_id])
    appended = 0 if encoder_decoder else appended_ends(encode.tokenizer) * _ID_BYTES

    def encoded(batch: list[Row]) -> list[Part]:
        begins = [prompt_text(row) + (row["y"] if whole else "") for row in batch]
        begins = [ids[: len(ids) - appended] for ids in encode(begins)]
        if whole:
            return [(b"", ids + end, []) for ids in begins]
        prompts, answers = begins, encode([row["y"] for row in batch], special=False)
        # Choices are ranked by the ids of each by itself, and an encoder reads the prompt by itself.
        joined = (
            []
            if encoder_decoder
            else [index for index, row in enumerate(batch) if row.get("joined") and "choices" not in row]
        )
        texts = encode([prompt_text(batch[index]) + batch[index]["y"] for index in joined])
        for index, ids in zip(joined, texts, strict=True):
            if ids.startswith(prompts[index]):
                answers[index] = ids[len(prompts[index]) : len(ids) - appended]
        return [(prompt, answer + end, []) for prompt, answer in zip(prompts, answers, strict=True)]

    return encoded


def _chats(tokenizer: PreTrainedTokenizerBase, *, whole: bool) -> Callable[[list[Row]], list[Part]]:
    """Returns the function that encodes a batch of conversations.

    Raises:
        ConfigError: the template does not take some of them; it names the first one of each problem.
    """
    encoder, ends, warned = ChatEncoder(tokenizer), set(special_tokens(tokenizer).values()), False

    def encoded(batch: list[Row]) -> list[Part]:
        nonlocal warned
        learned = encoder.learned([chat_of(row) for row in batch], whole=whole)
        problems: dict[str, list[Row]] = {}
        for row, chat in zip(batch, learned, strict=True):
            if isinstance(chat, str):
                problems.setdefault(chat, []).append(row)
        if problems:
            raise ConfigError(
                f"Invalid chat that begins with {rows[0]['x'][:_SHOWN]!r}"
                f"{f' (and {len(rows) - 1} more)' if len(rows) > 1 else ''}: {problem}."
                for problem, rows in problems.items()
            )
        if not warned and any(chat.ids[-1] not in ends for chat in learned):
            warned = True
            logger.warning(
                "The chat template of %s ends answers without a special token that is learned, so the model does not "
                "learn to end them; put the end of a turn inside of the template's {%% generation %%} marks.",
                tokenizer.name_or_path,
            )
        return [_parted(*chat) for chat in learned]

    return encoded


def _parted(ids: list[int], has_loss: list[bool]) -> Part:
    """Splits the ids of a chat at the first one with a loss; finds where those after it have none."""
    first = has_loss.index(True)
    changes = [index for index in range(first + 1, len(ids)) if has_loss[index] != has_loss[index - 1]]
    gaps = [(start - first, stop - first) for start, stop in zip(changes[::2], changes[1::2], strict=True)]
    return packed(ids[:first]), packed(ids[first:]), gaps


class _SpecialNames:
    """Counts the rows whose text contains the name of a special token, such as "<s>" in HTML.

    Such a name is tokenized as text, except by tokenizers whose vocabulary has the name as a piece of text (Unigram
    and word-level tokenizers).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encode: Encoder) -> None:
        self.ids, self.encode = special_tokens(tokenizer), encode
        self.pattern = re.compile("|".join(map(re.escape, self.ids)) or r"(?!)")
        self.as_text: Counter[str] = Counter()
        self.as_token: Counter[str] = Counter()

    def look(self, rows: Sequence[Row]) -> None:
        for row in rows:
            text = f"{row['x']}\n{row['y']}"
            if not (names := set(self.pattern.findall(text))):
                continue
            if "messages" in row:  # `ChatEncoder` reads them as text with any tokenizer
                self.as_text.update(names)
                continue
            ids = set(np.frombuffer(self.encode([text], special=False)[0], "<i4").tolist())
            for name in names:
                (self.as_token if self.ids[name] in ids else self.as_text)[name] += 1

    def warn(self) -> None:
        for counts, reading in (
            (self.as_text, "they are tokenized as text, not as special tokens"),
            (self.as_token, "this tokenizer always reads them as special tokens; remove them from the rows"),
        ):
            if counts:
                occurrences = ", ".join(f"{name} in {count} rows" for name, count in sorted(counts.items()))
                logger.warning("Rows contain the names of special tokens (%s): %s.", occurrences, reading)


def tokenize_reference(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenRows:
    """Slow reference for `tokenize` with a decoder-only model: calls the tokenizer for each prompt and each answer."""
    pairs = []
    for row in rows:
        prompt = tokenizer(prompt_text(row), split_special_tokens=True)["input_ids"]
        prompt = prompt[: len(prompt) - appended_ends(tokenizer)]
        answer = tokenizer(row["y"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        pairs.append((prompt, answer[: max(0, max_length - len(prompt))], len(prompt) + len(answer) > max_length))
    kept = [(prompt, answer) for prompt, answer, _ in pairs if answer]
    cut = sum(longer for _, _, longer in pairs)
    return TokenRows.of([p for p, _ in kept], [a for _, a in kept], cut=cut, dropped=len(pairs) - len(kept))


@dataclass(frozen=True)
class CausalCollator:
    """Collates rows to a right-padded batch for a decoder-only model, in which prompt tokens have no loss.

    The output head only computes positions where a row of the batch has a loss: `logits_to_keep` has these positions
    and `shift_labels` their labels, which transformers' causal loss uses without shifting. For short answers this saves
    most of the products with the vocabulary and does not change the loss.
    """

    pad_token_id: int
    pad_to_multiple: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["prompt"]) + len(row["answer"]) for row in rows)
        length = -(-length // self.pad_to_multiple) * self.pad_to_multiple
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED_LABEL)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            start, stop = len(row["prompt"]), len(row["prompt"]) + len(row["answer"])
            start = max(1, start)  # nothing predicts the first token
            input_ids[i, :stop] = torch.tensor(row["prompt"] + row["answer"])
            labels[i, start:stop] = input_ids[i, start:stop]
            for first, last in row.get("gaps", ()):
                labels[i, len(row["prompt"]) + first : len(row["prompt"]) + last] = IGNORED_LABEL
            attention_mask[i, :stop] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        supervised = (labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
        return {**batch, "logits_to_keep": supervised, "shift_labels": labels[:, supervised + 1]}


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Collates rows for an encoder-decoder model: prompts as inputs, answers as labels, both right-padded."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [torch.tensor(row["prompt"]) for row in rows]
        answers = [torch.tensor(row["answer"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(prompts, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad(answers, batch_first=True, padding_value=IGNORED_LABEL),
        }


class Prepared(NamedTuple):
    """The rows of a run on text: token ids for training, and test rows to be scored at the end."""

    train: TokenRows
    validation: TokenRows
    test: list[Row]
    chat_template_sha256: str | None = None  # of the text of the template that chats are written in
    classes: list[str] | None = None  # names of an encoder's classes; a row's answer is the number of one

    @property
    def sha256(self) -> str:
        """Hash of all token ids of the train and validation rows, of the rows' lengths, and of chats their template."""
        digest = hashlib.sha256((self.chat_template_sha256 or "").encode())
        for rows in (self.train, self.validation):
            for array in (
                rows.prompt_lengths,
                rows.answer_lengths,
                rows.ids,
                *((rows.gaps,) if len(rows.gaps) else ()),
            ):
                digest.update(len(array).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(array, "<i4").data)
        return digest.hexdigest()


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_progress: Callable[[int], None] = lambda done: None,
    *,
    encoder_decoder: bool = False,
    whole: bool = False,
    classes: list[str] | None = None,
) -> Prepared:
    """Tokenizes the train and validation rows; for `encoder_decoder` and `whole` see `tokenize`.

    Args:
        classes: names of an encoder's classes; see `tokenize_classified`.

    Raises:
        ConfigError: no train row or no validation row is left, the tokenizer has no end-of-sequence token, or rows are
            chats and it has no template for them.
    """
    if tokenizer.eos_token_id is None and classes is None:
        raise ConfigError(
            [
                f"Invalid model: the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token to end an "
                "answer; choose a model whose tokenizer has one."
            ]
        )
    chats = any("messages" in row for part in splits for row in part[:1])
    if chats:
        _check_chats(tokenizer)
    train, validation = (
        tokenize(rows, tokenizer, max_length, on_progress, encoder_decoder=encoder_decoder, whole=whole)
        if classes is None
        else tokenize_classified(rows, tokenizer, max_length, classes, on_progress)
        for rows in (splits.train, splits.validation)
    )
    errors = [
        f"Empty data set: none of {len(rows)} {name} rows is left at dataset.max_length={max_length}; raise it, or "
        "choose another data set."
        for name, rows, left in (("train", splits.train, train), ("validation", splits.validation, validation))
        if not len(left) and (rows or name == "train")
    ]
    if errors:
        raise ConfigError(errors)
    return Prepared(train, validation, splits.test, template_sha256(tokenizer) if chats else None, classes)


def _check_chats(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a tokenizer can write chats; warns of a template with a clock.

    Raises:
        ConfigError: it has no chat template, or is in Python.
    """
    errors = template_errors(tokenizer, "dataset.template")
    if not tokenizer.is_fast:
        errors.append(
            f"Invalid dataset.template=chat: the tokenizer of {tokenizer.name_or_path} is in Python, and does not say "
            "where a token stands in a text; use a model with a tokenizer.json."
        )
    if errors:
        raise ConfigError(errors)
    if "strftime_now" in str(tokenizer.chat_template):
        logger.warning(
            "The chat template of %s may write today's date, so that other days give other rows; replace strftime_now "
            "in a copy of it, in a folder of the model.",
            tokenizer.name_or_path,
        )


@dataclass(frozen=True)
class ClassCollator:
    """Collates rows for an encoder: texts as inputs, right-padded, and the numbers of their classes as labels, (B,)."""

    tokenizer: PreTrainedTokenizerBase
    described: PreTrainedConfig  # the encoder's config.json

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = encoder_inputs([row["prompt"] for row in rows], self.tokenizer, self.described)
        return {**inputs, "labels": torch.tensor([row["answer"][0] for row in rows])}


def collator(pad_token_id: int, *, encoder_decoder: bool) -> CausalCollator | Seq2SeqCollator:
    """The collator of a language model."""
    return Seq2SeqCollator(pad_token_id) if encoder_decoder else CausalCollator(pad_token_id)
