"""MetaMathQA (Yu et al. 2023): all rows, or those that are derived from GSM8K. Hub: meta-math/MetaMathQA, split train.

Prepared as by the published code: rows whose type contains "GSM"; the response up to "\\nThe answer is:"; prompt and
response together below `max_tokens` tokens; the first 100,000 rows for training and the next 10,000 for validation.
LoRA-Pro's form (`template=alpaca`) keeps the full response. Scored on GSM8K's test split in the same prompt. PEFT's
suite (`protocol=peft_suite`) takes rows of every type with at most `max_characters` characters of query and response.

Most rows rephrase a question of GSM8K's train split, which has dozens of them. So `evaluate=validation` holds out whole
questions, a tenth of them by hash: its validation rows come from these, and no row of them is trained on.

Deviation: tokens are counted with the model's own tokenizer unless `limit_tokenizer` names another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

from data import DATASETS, CountTokens, Row, Splits, gsm8k
from data.instructions import Example, learned_rows
from data.selection import ordered, take
from flatlora.config.settings import MOST_ROWS, MOST_TOKENS, setting
from flatlora.experiment.plugins import DataSet
from flatlora.inputs.rows import Source, gather, read_rows

HUB_ID, CONFIG = "meta-math/MetaMathQA", "default"
_HELD_OUT_SHARE = 10  # one question in ten


class Config(gsm8k.Config):
    train_rows: int | None = setting(100_000, ge=1, le=MOST_ROWS, remedy="null takes all rows")
    validation_rows: int = setting(10_000, ge=0, le=MOST_ROWS, remedy="0 takes none")
    max_tokens: int | None = setting(
        512, ge=8, le=MOST_TOKENS, remedy="512 as published, null keeps rows of every length"
    )
    test_revision: str | None = None  # of GSM8K; `revision` is MetaMathQA's
    response: Literal["by_template", "cut", "full"] = "by_template"  # cut for qa, full for the others
    types: Literal["gsm", "all"] = setting("gsm", identity="changed", remedy="gsm as published, all takes MATH's too")
    max_characters: int | None = setting(
        None, identity="changed", ge=8, le=MOST_TOKENS, remedy="null keeps rows of every length"
    )


def sources(config: Config) -> list[Source]:
    """MetaMathQA, and GSM8K's test split unless validation rows are scored."""
    train = Source(HUB_ID, CONFIG, "train", config.revision)
    if config.evaluate == "validation":
        return [train]
    return [train, Source(gsm8k.HUB_ID, gsm8k.CONFIG, "test", config.test_revision)]


def examples(rows: list[Row], config: Config) -> Iterator[Example]:
    """Examples of the rows that `config` selects, with responses as `config.response` says."""
    full = config.response == "full" or (config.response == "by_template" and config.template != "qa")
    most = config.max_characters or math.inf
    for row in rows:
        query, response = row["query"], row["response"]
        if (config.types == "all" or "GSM" in row["type"]) and len(f"{query} {response}") <= most:
            yield Example(query, response if full else response.split("\nThe answer is:")[0])


def load(config: Config, data_root: str | None, count_tokens: CountTokens) -> Splits:
    train, *tests = sources(config)

    def learned() -> tuple[list[Row], list[Row]]:
        columns = ("type", "query", "response", *(() if tests else ("original_question",)))
        rows = ordered(read_rows(train, columns=columns, data_root=data_root), config.subset)
        if tests:
            return learned_rows(examples(rows, config), config, count_tokens)
        kept = [row for row in rows if not _is_held_out(row["original_question"])]
        held_out = [row for row in rows if _is_held_out(row["original_question"])]
        alone = config.model_copy(update={"validation_rows": 0})
        whole = config.model_copy(update={"validation_rows": 0, "train_rows": None})
        train_rows, _ = learned_rows(examples(kept, config), alone, count_tokens)
        validation, _ = learned_rows(examples(held_out, config), whole, count_tokens)
        wanted = {"name": "dataset.validation_rows", "remedy": "lower it"}
        return train_rows, take(validation, config.validation_rows, **wanted)

    (train_rows, validation), asked = gather(learned, lambda: gsm8k.read_test(tests, config, data_root))
    return Splits(train_rows, validation, asked)


def _is_held_out(question: str) -> bool:
    digest = hashlib.blake2b(question.strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_SHARE == 0


def describe(config: Config) -> str:
    types = "all types" if config.types == "all" else "type contains GSM"
    scored = "questions held out" if config.evaluate == "validation" else gsm8k.HUB_ID
    return f"{HUB_ID} (train, {types}); test: {scored}"


DATASETS.add("meta_math", DataSet(Config=Config, version=1, describe=describe, sources=sources, load=load))
