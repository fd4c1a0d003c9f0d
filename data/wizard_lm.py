"""WizardLM's evolved instructions (Xu et al. 2023). Hub: silk-road/Wizard-LM-Chinese-instruct-evol, split train.

Prepared as by the published code: the English columns; outputs without "sorry" and "as an ai", in any case; prompt and
output together below 1,024 tokens; the first 52,000 rows for training and the next 18,000 for validation. There are no
test rows: MT-Bench has its own questions. Deviation: tokens are counted with the model's own tokenizer unless
`limit_tokenizer` names another.
"""

from __future__ import annotations

from collections.abc import Iterator

from data import DATASETS, CountTokens, Row, Splits
from data.instructions import Example, InstructionConfig, learned_rows
from data.selection import ordered
from flatlora.config.settings import MOST_ROWS, MOST_TOKENS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source, read_rows

HUB_ID, CONFIG = "silk-road/Wizard-LM-Chinese-instruct-evol", "default"
_REFUSALS = ("sorry", "as an ai")


class Config(InstructionConfig):
    train_rows: int | None = setting(52_000, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    validation_rows: int = setting(18_000, ge=0, le=MOST_ROWS, remedy="0 takes none")
    max_tokens: int | None = setting(
        1024, ge=8, le=MOST_TOKENS, remedy="1024 as published, null keeps rows of every length"
    )


def sources(config: Config) -> list[Source]:
    return [Source(HUB_ID, CONFIG, "train", config.revision)]


def examples(rows: list[Row]) -> Iterator[Example]:
    """Examples of the rows whose output is not a refusal."""
    for row in rows:
        if not any(word in row["output"].lower() for word in _REFUSALS):
            yield Example(row["instruction"], row["output"])


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    (train,) = sources(config)
    rows = read_rows(train, columns=("instruction", "output"), data_root=data_root)
    return Splits(*learned_rows(examples(ordered(rows, config.subset)), config, count_tokens), [])


def describe(config: Config) -> str:
    return f"{HUB_ID} (train, without refusals)"


DATASETS.add("wizard_lm", DataSet(Config=Config, version=1, describe=describe, sources=sources, load=load))
