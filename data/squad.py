"""SQuAD 1.1 (Rajpurkar et al. 2016): answers are spans of a paragraph. Hub: rajpurkar/squad, splits train, validation.

Trained on the first answer of each question; the hub's validation split, with all of its accepted answers, is the test
split here. The question is the instruction, and the paragraph is its context. `template=published` is the prompt of
LoRA-GA's code, "answer the question: …\ncontext: …\nresult: ", with all answers of a row, joined. The numbers of rows
are our choice.
"""

from __future__ import annotations

from typing import Literal

from data import DATASETS, CountTokens, Row, Splits
from data.instructions import Example, InstructionConfig, learned_rows
from data.selection import ordered, take
from flatlora.config.settings import MOST_ROWS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source, gather, read_rows
from flatlora.inputs.templates import prompt
from flatlora.utils.errors import ConfigError

HUB_ID, CONFIG = "rajpurkar/squad", "plain_text"


class Config(InstructionConfig):
    validation_rows: int = setting(1000, ge=0, le=MOST_ROWS, remedy="0 takes none")
    test_rows: int | None = setting(None, identity=False, ge=1, le=MOST_ROWS, remedy="null takes all 10,570 rows")
    template: Literal["alpaca", "qa", "published", "chat"] = "alpaca"


def sources(config: Config) -> list[Source]:
    """The train split, and the split of the test rows unless rows of the train split are scored."""
    splits = ("train",) if config.evaluate == "validation" else ("train", "validation")
    return [Source(HUB_ID, CONFIG, split, config.revision) for split in splits]


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    train, *tests = sources(config)

    def learned() -> tuple[list[Row], list[Row]]:
        rows = ordered(_read(train, data_root), config.subset)
        if config.template == "published":
            whole = (Example(_prompt(row, config), ", ".join(row["answers"])) for row in rows)
            train_rows, validation = learned_rows(whole, config, count_tokens, template="none")
        else:
            examples = (Example(row["question"], row["answers"][0], row["context"]) for row in rows)
            train_rows, validation = learned_rows(examples, config, count_tokens)
        if not tests:  # validation rows are scored
            accepted = {_prompt(row, config): row["answers"] for row in rows}
            validation = [row | {"answers": accepted[row["x"]]} for row in validation]
        return train_rows, validation

    def asked() -> list[Row]:
        if not tests:
            return []
        (test,) = tests
        rows = take(_read(test, data_root), config.test_rows, name="dataset.test_rows")
        return [{"x": _prompt(row, config), "y": row["answers"][0], "answers": row["answers"]} for row in rows]

    (train_rows, validation), test_rows = gather(learned, asked)
    return Splits(train_rows, validation, test_rows)


def _prompt(row: Row, config: Config) -> str:
    if config.template == "published":
        return f"answer the question: {row['question']}\ncontext: {row['context']}\nresult: "
    return prompt(config.template, row["question"], row["context"])


def _read(source: Source, data_root: str | None) -> list[Row]:
    """Rows with their accepted answers as a list of texts."""
    columns = {"context": "text", "question": "text", "answers": "any"}
    rows = read_rows(source, columns=columns, data_root=data_root)
    for number, row in enumerate(rows, start=1):
        texts = row["answers"].get("text") if isinstance(row["answers"], dict) else None
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(
                [
                    f'Invalid answers in {source}, row {number}: they must be {{"text": [one answer or more], …}}, '
                    f"not {str(row['answers'])[:40]!r}; fix the row, or leave it out."
                ]
            )
        row["answers"] = list(texts)
    return rows


def describe(config: Config) -> str:
    return f"{HUB_ID} ({', '.join(source.split for source in sources(config))})"


DATASETS.add("squad", DataSet(Config=Config, version=2, describe=describe, sources=sources, load=load))
