"""FLAN v2 (Longpre et al. 2023), tasks as their own templates put them. Hub: SirNeural/flan_v2, split train.

The published repositories name it and give no preparation: sizes as MetaMathQA's, rows below 1,024 tokens. The rows'
own templates are the prompt (`template=none`), or are put into one of ours as an instruction. It has no test rows.
"""

from __future__ import annotations

from typing import Literal

from data import CountTokens, Splits
from data.instructions import Example, InstructionConfig, learned_rows
from data.selection import ordered
from flatlora.config import setting
from flatlora.rows import Source, read_rows

VERSION = 1
HUB_ID, CONFIG = "SirNeural/flan_v2", "default"


class Config(InstructionConfig):
    train_rows: int | None = setting(100_000, ge=1, remedy="null takes all rows")
    validation_rows: int = setting(10_000, ge=0)
    max_tokens: int | None = setting(1024, ge=8, remedy="null keeps rows of every length")
    template: Literal["none", "qa", "alpaca"] = "none"


def sources(config: Config) -> list[Source]:
    return [Source(HUB_ID, CONFIG, "train", config.revision)]


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    (train,) = sources(config)
    rows = ordered(read_rows(train, columns=("inputs", "targets"), data_root=data_root), config.subset)
    return Splits(*learned_rows((Example(row["inputs"], row["targets"]) for row in rows), config, count_tokens), [])


def describe(config: Config) -> str:
    return f"{HUB_ID} (train)"
