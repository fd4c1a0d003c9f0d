"""Your own questions: exact match and token F1 of greedy answers, or of what a regular expression finds in them.

    python -m eval.custom PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: path (a file, or a folder with
test.*; without it a run's own test rows), prompt and answer (templates such as "{question}"; without them the columns
prompt and completion), template (chat: the tokenizer's own, also for a column messages), system, pattern, max_rows,
max_new_tokens, batch_size, rows=FILE.jsonl (rows {"x", "y"}), device, out=DIR, score_only=true.

`pattern` is searched in the answer and in the reference: its first match, or the first group of it, is compared.
Without one an answer is its first non-empty line, or all of it if the reference has several lines. Exact match compares
letter by letter, except for the length of white space; F1 ignores case, punctuation and articles, as SQuAD's own script
does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import regex

from eval import BENCHMARKS
from eval.answers import without_draft
from eval.by_row import ByRow
from flatlora.config.sections import PlainOrChat
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_TOKENS, setting
from flatlora.inputs.own import Columns, own_files, prompts_and_answers
from flatlora.utils.errors import ConfigError, SettingError

_PATTERN_S = 5.0  # of a text; a pattern such as (a+)+b may take years


class Config(PlainOrChat):  # template and system are those of the rows of `path`; a run has its own
    section_path: ClassVar[str] = "eval.custom"
    path: str | None = setting(None, min_length=1, remedy="name a file or folder; null scores the test rows of a run")
    prompt: str | None = setting(None, min_length=1, remedy="a text with {column} in it; null takes the column prompt")
    answer: str | None = setting(None, min_length=1, remedy="a text with {column}; null takes the column completion")
    pattern: str | None = setting(None, min_length=1, remedy="a regular expression; null compares the answer itself")
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every row")
    max_new_tokens: int = setting(256, ge=1, le=MOST_TOKENS, remedy="256 is enough for short answers")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        errors = super().rule_errors()
        if (self.prompt is None) != (self.answer is None):
            errors.append(
                SettingError(
                    ("prompt", "answer"),
                    f"Invalid eval.custom.prompt={self.prompt} with eval.custom.answer={self.answer}: both are needed, "
                    "or neither; set the other one too.",
                )
            )
        elif self.prompt is not None and self.path is None:
            errors.append(
                SettingError(
                    ("prompt", "path"),
                    f"Invalid eval.custom.prompt={self.prompt} without eval.custom.path: test rows have a prompt; set "
                    "eval.custom.path, or leave the key out.",
                )
            )
        if self.pattern is not None:
            try:
                regex.compile(self.pattern)
            except regex.error as error:
                errors.append(
                    SettingError(
                        ("pattern",),
                        f"Invalid eval.custom.pattern={self.pattern}: no regular expression ({error}); correct it.",
                    )
                )
        return errors


def parse_answer(text: str, config: Config, *, whole: bool) -> str:
    """Returns the part of an answer that is compared; "" if there is none.

    Raises:
        ConfigError: the pattern takes too long.
    """
    text = without_draft(text)
    if config.pattern is not None:
        try:
            match = regex.search(config.pattern, text, timeout=_PATTERN_S)
        except TimeoutError as error:
            raise ConfigError(
                [
                    f"Invalid eval.custom.pattern={config.pattern}: it takes more than {_PATTERN_S} s to search "
                    f"{text[:40]!r}…; use one without repetitions inside repetitions, and score again with "
                    "score_only=true."
                ]
            ) from error
        text = "" if match is None else match[1 if match.re.groups else 0] or ""
    elif not whole:
        text = next((line for line in text.splitlines() if line.strip()), "")
    return " ".join(text.split())


def score_row(row: Mapping[str, Any], config: Config) -> dict[str, float]:
    """Returns exact match, token F1, and whether there is no answer."""
    from transformers.data.metrics.squad_metrics import compute_f1

    expected = parse_answer(row["reference"], config, whole=True) or " ".join(row["reference"].split())
    text = parse_answer(row["completion"], config, whole="\n" in row["reference"].strip())
    return {"exact_match": text == expected, "f1": compute_f1(expected, text), "unanswered": not text}


SCORER = ByRow(
    name="custom", version=1, metrics=("exact_match", "f1", "unanswered"), score_row=score_row, scoring=("pattern",)
)


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns the rows of `config.path`.

    Raises:
        ConfigError: there is no path, no such file, or a column is missing.
    """
    if config.path is None:
        raise ConfigError(
            [
                "Missing rows for eval.custom: no test rows; name some with eval.custom.path=FILE (path=FILE for "
                "python -m eval.custom), or hold out some with dataset.test_share=0.1."
            ]
        )
    split = "train" if os.path.isfile(os.path.expanduser(config.path)) else "test"
    source = own_files("eval.custom.path", config.path, split)
    if source is None:
        raise ConfigError(
            [f"Invalid eval.custom.path={config.path}: the folder has no test.jsonl, .csv, .parquet, …; name a file."]
        )
    chat = config.template == "chat"
    columns = Columns("eval.custom", config.prompt, config.answer, chat=chat, system=config.system)
    return prompts_and_answers({"test": source}, columns, data_root)["test"]


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("custom", sys.argv[1:]))


BENCHMARKS.add(
    "custom",
    SCORER.benchmark(Config, __doc__, benchmark_rows=benchmark_rows, own_rows=lambda config: config.path is not None),
)
