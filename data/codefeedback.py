"""CodeFeedback-Filtered-Instruction (Zheng et al. 2024). Hub: m-a-p/CodeFeedback-Filtered-Instruction, split train.

Prepared as by the published code: answers with a fenced block, cut after the first block, which has the code;
prompt and answer together below 1,024 tokens; the first 100,000 rows for training and the next 10,000 for validation.
There are no test rows. Deviations: tokens are counted with the model's own tokenizer unless `limit_tokenizer` names
another, and a block that does not end is left open, where the published code closes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from data import DATASETS, CountTokens, Row, Splits
from data.instructions import Example, InstructionConfig, learned_rows
from data.selection import ordered
from flatlora.config.settings import MOST_ROWS, MOST_TOKENS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source, read_rows

HUB_ID, CONFIG = "m-a-p/CodeFeedback-Filtered-Instruction", "default"
FENCE = "```"


class Config(InstructionConfig):
    train_rows: int | None = setting(100_000, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    validation_rows: int = setting(10_000, ge=0, le=MOST_ROWS, remedy="0 takes none")
    max_tokens: int | None = setting(
        1024, ge=8, le=MOST_TOKENS, remedy="1024 as published, null keeps rows of every length"
    )
    response: Literal["cut", "full"] = "cut"  # cut: up to the end of the first fenced block


def sources(config: Config) -> list[Source]:
    return [Source(HUB_ID, CONFIG, "train", config.revision)]


def examples(rows: list[Row], config: Config) -> Iterator[Example]:
    """Examples of the rows whose answer has code, with answers as `config.response` selects."""
    for row in rows:
        if FENCE in row["answer"]:
            yield Example(row["query"], row["answer"] if config.response == "full" else first_block(row["answer"]))


def first_block(answer: str) -> str:
    """The answer up to the end of its first fenced block; all of it if the block does not end."""
    parts = answer.split(FENCE, 2)
    return FENCE.join(parts[:2]) + FENCE if len(parts) == 3 else answer


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    (train,) = sources(config)
    rows = read_rows(train, columns=("query", "answer"), data_root=data_root)
    return Splits(*learned_rows(examples(ordered(rows, config.subset), config), config, count_tokens), [])


def describe(config: Config) -> str:
    return f"{HUB_ID} (train, answers with code)"


DATASETS.add("codefeedback", DataSet(Config=Config, version=1, describe=describe, sources=sources, load=load))
