"""Alpaca (Taori et al. 2023), its corrected form, and its answers by GPT-4 (Peng et al. 2023), for InstructEval.

Hub: tatsu-lab/alpaca, yahma/alpaca-cleaned and vicgalle/alpaca-gpt4, split train. The first 90 % of the rows are train
rows and the last 10 % validation rows, unless sizes are given. There are no test rows. Deviations from the published
code, whose two splits overlap: it draws the validation rows at random without a seed, has no preamble before an
instruction with an input, and reads tatsu-lab/alpaca for both names.
"""

from __future__ import annotations

from typing import Literal

from data import DATASETS, CountTokens, Splits
from data.instructions import Example, InstructionConfig, learned_rows
from data.selection import ordered
from flatlora.config.settings import MOST_ROWS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source, read_rows

HUB_IDS = {
    "alpaca": "tatsu-lab/alpaca",
    "alpaca_cleaned": "yahma/alpaca-cleaned",
    "alpaca_gpt4": "vicgalle/alpaca-gpt4",
}
_VALIDATION_SHARE = 10  # one row in ten


class Config(InstructionConfig):
    variant: Literal["alpaca", "alpaca_cleaned", "alpaca_gpt4"] = "alpaca"
    validation_rows: int | None = setting(None, ge=0, le=MOST_ROWS, remedy="null takes a tenth of the rows")


def sources(config: Config) -> list[Source]:
    return [Source(HUB_IDS[config.variant], "default", "train", config.revision)]


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    (train,) = sources(config)
    rows = ordered(read_rows(train, columns=("instruction", "input", "output"), data_root=data_root), config.subset)
    if config.validation_rows is None:
        config = config.model_copy(update={"validation_rows": (config.train_rows or len(rows)) // _VALIDATION_SHARE})
    examples = (Example(row["instruction"], row["output"], row["input"]) for row in rows)
    return Splits(*learned_rows(examples, config, count_tokens), [])


def describe(config: Config) -> str:
    return f"{HUB_IDS[config.variant]} (train)"


DATASETS.add("alpaca", DataSet(Config=Config, version=1, describe=describe, sources=sources, load=load))
