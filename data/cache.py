"""Cache of prepared rows, keyed by the hash of everything that determines them: files, config, loader, tokenizers.

Several processes may write the same file. A broken file is rebuilt; see `flatlora.utils.caches`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save
from transformers import PreTrainedTokenizerBase

import data
from data.selection import row_key
from data.tokens import Encoder, Prepared, TokenRows, prepare
from flatlora.config.sections import DatasetConfig, TextDatasetConfig
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.classified import joined_texts
from flatlora.inputs.conversations import as_chat
from flatlora.inputs.rows import fingerprint, gather
from flatlora.utils import caches
from flatlora.utils.console import progress
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import cache_folder

logger = logging.getLogger(__name__)

FORMAT = 5  # raise it whenever the same key would give another content: file format, templates, tokens, selection
_BAR_FROM = 5000  # rows; fewer need no progress bar


def prepared(
    config: TextDatasetConfig,
    data_root: str | None,
    tokenizer: PreTrainedTokenizerBase,
    limit_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    encoder_decoder: bool = False,
    classifier: bool = False,
) -> Prepared:
    """Returns the data set's rows as token ids, from the cache if they are there.

    Args:
        limit_tokenizer: counts tokens for `max_tokens`; None counts with `tokenizer`.
        encoder_decoder: whether prompts keep the end-of-sequence token that the tokenizer appends.
        classifier: whether the rows' answers are classes of an encoder.

    Raises:
        ConfigError: files, rows or sizes are invalid; it lists every error.
    """
    loader = data.DATASETS[config.loader]
    reader = {"encoder_decoder": encoder_decoder, "classifier": classifier}
    key = cache_key(loader, config, data_root, tokenizer, limit_tokenizer, **reader)
    if (path := find(config, key)) is not None:
        return _read(path)
    with _noted() as notes:
        splits = _load(loader, config, data_root, Encoder(limit_tokenizer or tokenizer))
        if config.template == "chat":
            splits = _as_chats(splits, config)
        if config.evaluate == "validation":
            splits = _scored_on_validation(splits, config)
        if encoder_decoder and not any(row["x"].strip() for row in splits.train):
            raise ConfigError(
                [
                    f"Invalid dataset={config.name} with an encoder-decoder model: no row has a prompt for the encoder "
                    "to read (a column text is learned whole); use rows with a prompt and an answer, or a decoder-only "
                    "model."
                ]
            )
        splits, classes = _as_classes(splits, config) if classifier else (_without_texts(splits), None)
        _warn_of_known_test_rows(splits)
        rows = len(splits.train) + len(splits.validation)
        with progress(f"tokenize {config.name}", rows, least=_BAR_FROM) as advance:
            whole = config.loss_on == "text"
            tokenized = prepare(
                splits,
                tokenizer,
                config.max_length,
                advance,
                encoder_decoder=encoder_decoder,
                whole=whole,
                classes=classes,
            )
    _write(config, key, tokenized, notes)
    return tokenized


def _load(loader: DataSet, config: TextDatasetConfig, data_root: str | None, counter: Encoder) -> data.Splits:
    if getattr(config, "max_tokens", None) is None:
        return loader.load(config, data_root, counter.lengths)
    with progress(f"count tokens of {config.name}", None) as advance:

        def count_tokens(texts: list[str]) -> list[int]:
            lengths = counter.lengths(texts)
            advance(len(texts))
            return lengths

        return loader.load(config, data_root, count_tokens)


def _as_chats(splits: data.Splits, config: TextDatasetConfig) -> data.Splits:
    """The splits with a conversation in each row; those of a loader that has conversations are not changed.

    Raises:
        ConfigError: rows are ranked by likelihood, which chats are not.
    """
    if any("choices" in row for part in splits for row in part[:1]):
        raise ConfigError(
            [
                f"Invalid dataset.template=chat with dataset={config.name}: its answers are ranked by likelihood after "
                "a plain prompt; leave the key out."
            ]
        )
    return data.Splits(*([as_chat(row, config.system) for row in part] for part in splits))


def _as_classes(splits: data.Splits, config: TextDatasetConfig) -> tuple[data.Splits, list[str]]:
    """The splits with what an encoder reads as x, and the names of its classes.

    Raises:
        ConfigError: rows have no classes, or not all the same.
    """
    classes = {tuple(row.get("choices", ())) for part in splits for row in part}
    if len(classes) != 1 or classes == {()}:
        problem = "its rows have no classes" if () in classes else "its rows have different ones"
        raise ConfigError(
            [
                f"Invalid dataset={config.name} with an encoder, which gives a text one of given classes: {problem}; "
                "use a data set of classes such as cola, or dataset=custom with dataset.label, or another model."
            ]
        )

    def read(row: data.Row) -> data.Row:
        return {**row, "x": joined_texts(row["texts"]) if "texts" in row else row["x"], "joined": True}

    return _without_texts(data.Splits(*([read(row) for row in part] for part in splits))), list(*classes)


def _without_texts(splits: data.Splits) -> data.Splits:
    """The splits without the texts that only an encoder reads."""
    return data.Splits(*([{key: row[key] for key in row if key != "texts"} for row in part] for part in splits))


def _scored_on_validation(splits: data.Splits, config: TextDatasetConfig) -> data.Splits:
    """The splits with validation rows in the place of the test rows, whatever the loader gave.

    Raises:
        ConfigError: a validation row is a train row.
    """
    learned = {row_key(row) for row in splits.train}
    scored = splits.validation[: getattr(config, "test_rows", None)]
    if known := sum(row_key(row) in learned for row in scored):
        raise ConfigError(
            [
                f"Invalid dataset.evaluate=validation with dataset={config.name}: {known} of {len(scored)} validation "
                f"rows are train rows; let its loader ({config.loader}) leave them out."
            ]
        )
    return splits._replace(test=scored)


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """Collects the warnings about rows that are logged in the block; they are cached and logged again with the rows."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())
    packages = [logging.getLogger(name) for name in (__package__, "flatlora.inputs")]
    for package in packages:
        package.addHandler(handler)
    try:
        yield notes
    finally:
        for package in packages:
            package.removeHandler(handler)


def cache_key(
    loader: DataSet,
    config: DatasetConfig,
    data_root: str | None,
    tokenizer: PreTrainedTokenizerBase,
    limit_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    encoder_decoder: bool = False,
    classifier: bool = False,
) -> str:
    """SHA-256 of everything that determines the prepared rows.

    Raises:
        ConfigError: a source does not exist.
    """
    parts = {
        "format": FORMAT,
        "loader": [config.loader, loader.version],
        "config": config.model_dump(mode="json"),
        "sources": gather(*(lambda s=source: fingerprint(s, data_root) for source in loader.sources(config))),
        "tokenizers": [used and tokenizer_sha256(used) for used in (tokenizer, limit_tokenizer)],
        "encoder_decoder": encoder_decoder,
        "classifier": classifier,
        "chat_template": tokenizer.chat_template if getattr(config, "template", None) == "chat" else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines a tokenizer's ids."""
    if tokenizer.is_fast:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec = {key: value for key, value in spec.items() if key not in ("padding", "truncation")}
    else:
        spec = tokenizer.get_vocab()
    parts = [type(tokenizer).__name__, spec, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def find(config: DatasetConfig, key: str) -> Path | None:
    """The verified file of prepared rows in $FLATLORA_CACHE/data (~/.cache/flatlora/data); None if there is none."""
    return caches.find(*_place(config, key))


def _place(config: DatasetConfig, key: str) -> tuple[Path, str, str]:
    return cache_folder() / "data", f"{config.name}-{key[:20]}", ".safetensors"


def _read(path: Path) -> Prepared:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for note in json.loads(metadata["notes"]):
        logger.warning("%s", note)
    parts = (
        TokenRows.from_arrays({name: arrays[f"{split}.{name}"] for name in _ARRAYS})
        for split in ("train", "validation")
    )
    classes = json.loads(metadata.get("classes", "null"))
    return Prepared(*parts, json.loads(arrays["test"].tobytes()), metadata.get("chat_template_sha256"), classes)


_ARRAYS = ("ids", "prompt_lengths", "answer_lengths", "gaps", "counts")


def _write(config: DatasetConfig, key: str, rows: Prepared, notes: Sequence[str]) -> None:
    arrays = {
        f"{split}.{name}": array
        for split, part in (("train", rows.train), ("validation", rows.validation))
        for name, array in part.arrays().items()
    }
    arrays["test"] = np.frombuffer(json.dumps(rows.test, ensure_ascii=False).encode(), np.uint8)
    metadata = {"notes": json.dumps(list(notes))}
    if rows.chat_template_sha256 is not None:
        metadata["chat_template_sha256"] = rows.chat_template_sha256
    if rows.classes is not None:
        metadata["classes"] = json.dumps(rows.classes)
    caches.keep(*_place(config, key), save(arrays, metadata=metadata))


def _warn_of_known_test_rows(splits: data.Splits) -> None:
    learned = {row_key(row) for row in splits.train}
    known = sum(row_key(row) in learned for row in splits.test)
    if known:
        logger.warning(
            "%d of %d test rows are also train rows; the data set contains them twice.", known, len(splits.test)
        )
