"""FLAN v2 (Longpre et al. 2023), tasks in their own templates. Hub: SirNeural/flan_v2, split train.

Prepared as by LoRA-GA's code: inputs and targets are unchanged (`template=none`), rows below 512 tokens, the first
100,000 for training and the next 10,000 for validation. Other values of `template` use the inputs as instructions.
There are no test rows. Deviations: tokens are counted with the model's own tokenizer, and the whole split is read.
"""

from __future__ import annotations

from typing import Literal

from data import DATASETS, CountTokens, Splits
from data.instructions import Example, InstructionConfig, learned_rows
from data.selection import ordered
from flatlora.config.settings import MOST_ROWS, MOST_TOKENS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source, read_rows

HUB_ID, CONFIG = "SirNeural/flan_v2", "default"


class Config(InstructionConfig):
    train_rows: int | None = setting(100_000, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    validation_rows: int = setting(10_000, ge=0, le=MOST_ROWS, remedy="0 takes none")
    max_tokens: int | None = setting(512, ge=8, le=MOST_TOKENS, remedy="null keeps rows of every length")
    template: Literal["none", "qa", "alpaca", "chat"] = "none"


def sources(config: Config) -> list[Source]:
    return [Source(HUB_ID, CONFIG, "train", config.revision)]


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    (train,) = sources(config)
    rows = ordered(read_rows(train, columns=("inputs", "targets"), data_root=data_root), config.subset)
    return Splits(*learned_rows((Example(row["inputs"], row["targets"]) for row in rows), config, count_tokens), [])


def describe(config: Config) -> str:
    return f"{HUB_ID} (train)"


DATASETS.add("flan_v2", DataSet(Config=Config, version=1, describe=describe, sources=sources, load=load))
