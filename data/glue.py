"""GLUE and SuperGLUE (Wang et al. 2019) as text to text. Hub: nyu-mll/glue and aps/super_glue, one config per task.

    classify the sentiment of the text: {sentence}\nresult:  → negative, positive

GLUE's prompts are the published ones. RTE, STS-B and SuperGLUE's BoolQ, CB, COPA and WiC have no published prompt, so
theirs are ours; STS-B's answer is the score rounded to the nearest multiple of 0.2, as for T5. RTE is the same data set
in SuperGLUE. The hub's validation split is the test split here, because GLUE's test split has no labels; the
`validation_rows` follow the train rows, and `evaluate=validation` scores these. Train rows with an empty sentence are
left out; test rows with one are kept, so that a score is that of the whole split.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from data import DATASETS, CountTokens, Row, Splits
from data.selection import ordered, split_train_validation, take
from flatlora.config.sections import TextDatasetConfig
from flatlora.config.settings import MOST_ROWS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Columns, Source, gather, read_rows
from flatlora.utils.errors import ConfigError, SettingError

logger = logging.getLogger(__name__)

HUB_ID, SUPER_HUB_ID = "nyu-mll/glue", "aps/super_glue"
TaskName = Literal["mnli", "sst2", "cola", "qnli", "mrpc", "qqp", "rte", "stsb", "boolq", "cb", "copa", "wic"]


class Task(NamedTuple):
    """The prompt and the answers of a task."""

    request: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]  # the words for label 0, 1, …; for STS-B the scores
    hub_id: str = HUB_ID


_SIMILARITY = "classify the semantic similarity of the text: "
_FIFTHS = tuple(f"{k / 5:.1f}" for k in range(26))
TASKS: dict[str, Task] = {
    "mnli": Task(_SIMILARITY, ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "sst2": Task("classify the sentiment of the text: ", ("sentence",), ("negative", "positive")),
    "cola": Task("classify the grammaticality of the text: ", ("sentence",), ("unacceptable", "acceptable")),
    "qnli": Task(
        "classify the semantic similarity of the question and the sentence: ",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
    ),
    "mrpc": Task(_SIMILARITY, ("sentence1", "sentence2"), ("different", "equivalent")),
    "qqp": Task(_SIMILARITY, ("question1", "question2"), ("different", "duplicate")),
    "rte": Task(_SIMILARITY, ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "stsb": Task("rate the semantic similarity of the text: ", ("sentence1", "sentence2"), _FIFTHS),
    "boolq": Task("answer the question about the passage: ", ("passage", "question"), ("false", "true"), SUPER_HUB_ID),
    "cb": Task(_SIMILARITY, ("premise", "hypothesis"), ("entailment", "contradiction", "neutral"), SUPER_HUB_ID),
    "copa": Task(
        "choose the cause or effect of the premise: ",
        ("premise", "question", "choice1", "choice2"),
        ("first", "second"),
        SUPER_HUB_ID,
    ),
    "wic": Task(
        "compare the meaning of the word in both sentences: ",
        ("word", "sentence1", "sentence2"),
        ("different", "same"),
        SUPER_HUB_ID,
    ),
}


class Config(TextDatasetConfig):
    task: TaskName
    train_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    validation_rows: int = setting(0, ge=0, le=MOST_ROWS, remedy="0 takes none")
    test_rows: int | None = setting(None, identity=False, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    subset: Literal["first", "shuffled"] = "first"
    revision: str | None = None
    mismatched: bool = False  # use MNLI's validation split of other genres

    def rule_errors(self) -> list[SettingError]:
        if self.mismatched and self.task != "mnli":
            return [
                *super().rule_errors(),
                SettingError(
                    ("mismatched", "task"),
                    f"Invalid dataset.mismatched=true with dataset.task={self.task}: only MNLI has a second "
                    "validation split; leave it out.",
                ),
            ]
        return super().rule_errors()


def sources(config: Config) -> list[Source]:
    """The train split, and the split of the test rows unless validation rows are scored."""
    test = "validation"
    if config.task == "mnli":
        test += "_mismatched" if config.mismatched else "_matched"
    splits = ("train",) if config.evaluate == "validation" else ("train", test)
    return [Source(TASKS[config.task].hub_id, config.task, split, config.revision) for split in splits]


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    train, *tests = sources(config)

    def learned() -> tuple[list[Row], list[Row]]:
        rows = list(formatted(_read(train, config.task, data_root), config.task, str(train)))
        whole = [row for row in rows if not row.pop("empty")]  # with choices, as validation rows may be scored
        if len(whole) < len(rows):
            logger.warning("%d train rows have an empty sentence and are left out.", len(rows) - len(whole))
        # Compared by prompt: a prompt with two labels must not be in both splits either.
        train_rows, validation = split_train_validation(
            ordered(whole, config.subset), config.train_rows, config.validation_rows, same=lambda row: row["x"]
        )
        return train_rows, validation

    def asked() -> list[Row]:
        if not tests:
            return []
        (test,) = tests
        rows = take(_read(test, config.task, data_root), config.test_rows, name="dataset.test_rows")
        rows = list(formatted(rows, config.task, str(test)))
        if empty := sum(row.pop("empty") for row in rows):
            logger.warning("%d test rows have an empty sentence; they are scored as well.", empty)
        return rows

    (train_rows, validation), test_rows = gather(learned, asked)
    return Splits(train_rows, validation, test_rows)


def formatted(rows: Sequence[Row], name: TaskName, source: str) -> Iterator[Row]:
    """Yields rows with prompt "x", answer "y" and all possible answers "choices"; for STS-B also the score, "value".

    "texts" are the sentences alone, for an encoder. "empty" is True if one of them is empty.

    Raises:
        ConfigError: a label does not belong to the task.
    """
    task = TASKS[name]
    outside = [number for number, row in enumerate(rows, start=1) if not _has_label(row["label"], name)]
    if outside:
        known = "0.0 to 5.0" if name == "stsb" else ", ".join(f"{i} ({word})" for i, word in enumerate(task.labels))
        raise ConfigError(
            [
                f"Invalid label in {source}, row {outside[0]} (and {len(outside) - 1} more): "
                f"{rows[outside[0] - 1]['label']} is none of {known}; GLUE's test split has no labels (-1), use its "
                "train and validation splits."
            ]
        )
    for row in rows:
        texts = [row[column] for column in task.columns]
        prompt = {"x": "{}{}\nresult: ".format(task.request, "\n".join(texts)), "choices": list(task.labels)}
        prompt |= {"texts": texts, "empty": any(not text.strip() for text in texts)}
        if name == "stsb":
            yield {**prompt, "y": f"{round(row['label'] * 5) / 5:.1f}", "value": float(row["label"])}
        else:
            yield {**prompt, "y": task.labels[row["label"]]}


def _has_label(label: float, name: TaskName) -> bool:
    return 0 <= label <= 5 if name == "stsb" else 0 <= label < len(TASKS[name].labels)


def _read(source: Source, name: TaskName, data_root: str | None) -> list[Row]:
    columns: Columns = dict.fromkeys(TASKS[name].columns, "text")
    return read_rows(source, columns={**columns, "label": "number" if name == "stsb" else "int"}, data_root=data_root)


def describe(config: Config) -> str:
    return f"{TASKS[config.task].hub_id} ({config.task}; {', '.join(source.split for source in sources(config))})"


DATASETS.add("glue", DataSet(Config=Config, version=2, describe=describe, sources=sources, load=load))
