"""Your own rows: a file, a folder with train.*, validation.* and test.*, or any data set of the hub.

    python -m data custom dataset.path=FILE --show 3

Columns are TRL's prompt and completion, or text, or messages with `dataset.template=chat`; others are named by
`dataset.prompt` and `dataset.answer`, or `dataset.label` for classes (`flatlora.inputs.own`). Without a file of their
own, validation and test rows are shares of the train rows: the last ones, or drawn by `dataset.split_seed`. Rows
without an answer are left out.
"""

from __future__ import annotations

import os
from typing import ClassVar

from data import DATASETS, CountTokens, Row, Splits
from data.selection import fresh_places, ordered, row_key, split_train_validation, take
from flatlora.config.sections import TextDatasetConfig
from flatlora.config.settings import MOST_ROWS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.own import Columns, is_local, own_files, prompts_and_answers
from flatlora.inputs.rows import OwnFiles, Source, gather
from flatlora.utils.errors import ConfigError, SettingError


class Config(TextDatasetConfig):
    validation_key: ClassVar[str] = "validation_share"
    path: str = setting(min_length=1, remedy="name a file, a folder, or OWNER/NAME of the hub")
    prompt: str | None = setting(None, min_length=1, remedy="a text with {column} in it; null takes the column prompt")
    answer: str | None = setting(None, min_length=1, remedy="a text with {column}; null takes the column completion")
    label: str | None = setting(None, min_length=1, remedy="the column of a class, instead of dataset.answer")
    labels: list[str] | None = setting(None, remedy="the words of the classes 0, 1, …; null takes those of the column")
    config: str = setting("default", min_length=1, remedy="the hub's name of a part of a data set, such as main")
    train_split: str = setting("train", min_length=1, remedy="train is usual")
    validation_split: str | None = setting(None, min_length=1, remedy="null takes a folder's file validation, if any")
    test_split: str | None = setting(None, min_length=1, remedy="null takes a folder's file test, if there is one")
    revision: str | None = None
    train_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    test_rows: int | None = setting(None, identity=False, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    # Shares of the train rows, for splits without a file of their own.
    validation_share: float = setting(0.0, ge=0, le=0.9, remedy="0.1 holds out a tenth of the rows, 0 none")
    test_share: float = setting(0.0, ge=0, le=0.9, remedy="0.1 holds out a tenth of the rows, 0 none")
    split_seed: int | None = setting(None, ge=0, lt=2**32, remedy="null holds out the last rows")

    def rule_errors(self) -> list[SettingError]:
        rules = (
            (("prompt",), self.prompt is None and (self.answer or self.label), "dataset.prompt is needed too"),
            (("answer", "label"), self.answer and self.label, "one of dataset.answer and dataset.label is the answer"),
            (("prompt",), self.prompt and not (self.answer or self.label), "dataset.answer or dataset.label is needed"),
            (("labels",), self.labels is not None and not self.label, "dataset.label names the column of the classes"),
            (
                ("labels",),
                self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)),
                "two or more different words are needed",
            ),
            (
                ("label", "template"),
                self.label and self.template == "chat",
                "classes are ranked by likelihood after a plain prompt; generate them with dataset.answer in a chat",
            ),
            (
                ("validation_share", "test_share"),
                self.validation_share + self.test_share >= 1,
                "together they must be below 1, so that rows are left to train on",
            ),
            (
                ("path", "config", "revision"),
                is_local(self.path) and (self.config, self.revision) != ("default", None),
                "only data sets of the hub have parts and revisions, and the path is a file or folder",
            ),
            (
                ("split_seed",),
                self.split_seed is not None and not self.validation_share + self.test_share,
                "it draws the rows of dataset.validation_share and dataset.test_share, and both are 0",
            ),
        )
        return super().rule_errors() + [
            SettingError(
                keys,
                "Invalid " + " with ".join(f"dataset.{key}={getattr(self, key)}" for key in keys) + f": {rule}; see "
                "docs/own-data.md.",
            )
            for keys, broken, rule in rules
            if broken
        ]

    @property
    def columns(self) -> Columns:
        chat = self.template == "chat"
        return Columns("dataset", self.prompt, self.answer, self.label, self.labels, chat, self.system)


def _splits(config: Config) -> dict[str, Source | OwnFiles]:
    """{"train", "validation", "test": source} of the splits that are read."""
    local, splits = is_local(config.path), {}
    is_file = os.path.isfile(os.path.expanduser(config.path))
    for name in ("train", "validation", "test"):
        named = getattr(config, f"{name}_split")
        if name == "test" and config.evaluate == "validation":
            continue
        if not local:
            hub = Source(config.path, config.config, named or "", config.revision, key="dataset.path")
            splits |= {} if named is None else {name: hub}
            continue
        files = own_files("dataset.path", config.path, named or name, ", or OWNER/NAME of the hub")
        if files is None and named is not None:
            problem = (
                f"it is a file, whose rows are its split train; leave dataset.{name}_split out"
                if is_file
                else f"it has no split {named} ({named}.jsonl, .csv, .parquet, …); add that file, or set "
                f"dataset.{name}_split"
            )
            raise ConfigError([f"Invalid dataset.path={config.path}: {problem}."])
        splits |= {name: files} if files else {}
    return splits


def sources(config: Config) -> list[Source | OwnFiles]:
    return list(_splits(config).values())


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    rows = prompts_and_answers(_splits(config), config.columns, data_root)
    train = ordered(rows["train"], "first" if config.split_seed is None else "shuffled", config.split_seed or 0)
    shares = {"validation": config.validation_share, "test": config.test_share}
    counts = {name: round(len(train) * share) for name, share in shares.items()}
    errors = [
        f"Invalid dataset.{name}_share={share}: "
        + (
            f"{config.path} has {name} rows of its own; leave the key out."
            if name in rows
            else f"of {len(train)} rows it is none; raise it, or leave the key out."
        )
        for name, share in shares.items()
        if share and (name in rows or not counts[name])
    ]
    if sum(counts.values()) >= len(train):
        errors.append(
            f"Invalid dataset.validation_share={config.validation_share} and dataset.test_share={config.test_share}: "
            f"of {len(train)} rows none is left to train on; lower them."
        )
    if errors:
        raise ConfigError(errors)
    test = rows.get("test", [])
    if counts["test"]:
        train, test = train[: -counts["test"]], train[-counts["test"] :]
    learned, validation = split_train_validation(train, None, counts["validation"])
    if "validation" in rows:
        validation = _unseen(rows["validation"], learned)
    learned, test = gather(
        lambda: take(learned, config.train_rows, name="dataset.train_rows"),
        lambda: take(test, config.test_rows, name="dataset.test_rows"),
    )
    return Splits(learned, validation, test)


def _unseen(rows: list[Row], train: list[Row]) -> list[Row]:
    return [rows[index] for index in fresh_places([row_key(row) for row in rows], map(row_key, train))]


def describe(config: Config) -> str:
    return f"{config.path} ({', '.join(_splits(config))})"


DATASETS.add("custom", DataSet(Config=Config, version=2, describe=describe, sources=sources, load=load))
