"""Benchmarks, one file each: generate() → predictions.jsonl, score() → score.json; the file lies between.

An evaluator module has a command line, `python -m eval.NAME PATH [key=value ...]`, and

    Config                                 its config section, with `max_rows` and `batch_size`
    ROW_COLUMNS                            what a row has (`flatlora.inputs.rows.Columns`); empty: rows of its own
    check_rows(rows, source, config, tokenizer=None, classes=None, model=None)
                                           ConfigError for rows that cannot be scored; no model is needed. What is
                                           known of the model by then is its tokenizer, or its classes' names
    check_settings(config, model)          ConfigError for settings that no rows could make good; none by default
    run(backend, rows, folder, config)     answers and scores rows; returns the score, {"scorer", "n", "metrics"}
    score_file(path, config)               scores a finished predictions.jsonl
    benchmark_rows(data_root, config)      the benchmark's own rows, for a model that no run describes; text alone
    row_scores(rows, config, folder)       {row: score} of the rows of a predictions.jsonl
    FIELDS                                 keys of such a row, and their types
    GENERATES                              whether words are asked for, which every backend has; text alone
    SCORING                                settings that decide scores and no answer; none by default
    IS_SHARE, DIGITS                       False where scores are no shares of one, and how many decimals they are then
                                           shown with; True and 2 by default
    OWN_ROWS                               whether a run asks the benchmark's own rows, not its data set's; text alone
    PICTURE                                a file beside the answers that shows them; none by default
    KIND                                   "text", "image" or "captioned": of the data sets that it scores
    HEADLINE, SCORER_VERSION               the metric of tables; raised whenever the same answers score otherwise
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def evaluator(name: str) -> ModuleType:
    """The evaluator module; KeyError lists the known ones."""
    if name not in names():
        raise KeyError(f"Unknown benchmark {name}: known are {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}")


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


_SHARED = (
    "__main__",
    "answers",
    "backends",
    "predictions",
    "command",
    "compare",
    "picture_grid",
    "place",
    "prompts",
    "sandbox",
    "similarity",
)
