"""GSM8K and data sets of its format: zero-shot or few-shot, exact match of the final answer.

    python -m eval.gsm8k PATH [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: parser, template (of the
benchmark's own rows; a run's test rows already have one), num_fewshot (of its own rows), max_rows, max_new_tokens,
temperature, top_p, seed, batch_size, rows=FILE.jsonl (rows {"x", "y"}), data_root=DIR, device, out=DIR,
score_only=true. A run is scored on the test rows of its data set; `rows=benchmark` takes GSM8K's own instead, in the
run's template. `num_fewshot=8` puts the first 8 questions of the train split with their answers before each, in the
same template. `parser=strict` reads the number after "####", or else the last one; `parser=math_verify` reads
expressions and LaTeX too, with that package (extra `math`). A score has both. `parser=peft_suite` compares as PEFT's
own suite does (`eval.peft_suite`). temperature, top_p and seed sample the answers; temperature=0 is greedy. References
must be numbers: a fraction, a root or a range is an error. A run's own answers are never overwritten: other settings,
other rows or another device write to a folder of their own beside eval/gsm8k.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval import BENCHMARKS, peft_suite, predictions
from eval.answers import without_draft
from eval.backends import Generator, Sampling
from flatlora.config.sections import ChatSection
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_TOKENS, setting
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.conversations import question
from flatlora.inputs.rows import Source, prompt_text, read_rows
from flatlora.inputs.templates import prompt
from flatlora.utils.errors import ConfigError, SettingError
from flatlora.utils.files import write_json

SCORER_VERSION = 4
HEADLINE = "exact_match"

# A number as people write it: sign, dollar sign, thousands separators, decimals; "42." ends a sentence. A sign directly
# precedes its number and follows no other number, so that "5-3", "10 - 7" and the dash of a list are not negative.
_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\$\s?)?[-−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_LATEX_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))")  # of thousands: 1{,}000
_WORD = r"[^\W\d_]+"
# LaTeX and Markdown around a number, and their replacements; anything else, such as \frac, is not read as a number.
_MARKUP = [
    *[(re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm)\{([^{}]*)\}"), r" \1 ")] * 2,  # the outer ones last
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[()\[\],;!]"), " "),
    (re.compile(r"\\(?:times|cdot)\b|(?<=[\d)]) ?x ?(?=[\d($])"), "×"),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__"), " "),
    (re.compile(r"\s+"), " "),
]
# Text next to a number that makes it part of something else: a sum, a fraction, a power, a root, a range, a time.
_JOINED_BEFORE = re.compile(r"(?:[/^×÷·√+*\\{}]|[\d)] ?[-−:]) ?\$?$")
_JOINED_AFTER = re.compile(
    r" ?(?:[×÷·√+^\\{⁄½¼¾⅐-⅞²³]|(?<= )(?:and )?\d+ ?[/⁄] ?\d+(?![\d/-])|(?:\*\*|[/*−-]) ?[\d($\\]|[:_]\d)"
)
# From the first number of a sum to its "=": "3 + 4 =", "$3 a day * 2 days =".
_SIGN = r"(?:[-−+*/×÷·^]|(?:x(?= [\d($])|(?:of|times|plus|minus|(?:multiplied|divided) by)\b))"
_SUM = re.compile(rf"%?(?:{_WORD})?(?: {_WORD}){{0,2}}[ )]*{_SIGN}[^=]*?(?:=|\bequals\b)")
_ANNOUNCEMENT = re.compile(r"[:=]|\b(?:is|are|equals)\b")  # in "The answer is 18", "Total for 3 days: 42"
_WORDS_FIRST = re.compile(r"[\W_]*[^\W\d_]")
# Marked text that is not a heading: it names the answer, or is a sentence.
_NAMED = re.compile(r"[^:=]*\banswer\b\W*(?:(?:is|are)\b|[:=])\D*\d", re.IGNORECASE)
_SENTENCE = re.compile(r"[^:]*(?:\b(?:is|are|equals)\b[^:]*\d|\d[^:]*\. *$)")
_BARE = re.compile(r"(?:[^:=\d]*\banswer\W*)?$", re.IGNORECASE)  # a mark with nothing, or only "Answer:", after it
_NUMBERED = re.compile(r"\W*(\d{1,2})(?:[.)] +\S|: +[^\W\d_])")  # numbered headings: "1. Add"
_NEXT_QUESTION = re.compile(r"\W*(?:q|question|problem|instruction)\b[^:]{0,12}:", re.IGNORECASE)
_ALONE = re.compile(rf"[ *_$=:(]*{_NUMBER.pattern}[ %]*(?:{_WORD})?(?: {_WORD}){{0,2}}[ *_.!)$]*$")

# What may precede and follow the number of a reference: a word, ":" or "=" before it, and a unit after it.
_LEAD_END = re.compile(r"(?:^|:|(?<![<>!~≠])=|\b([^\W\d_]{2,}))$")
_NO_LEADS = frozenset(
    (
        *("ln", "log", "exp", "sin", "cos", "tan", "sqrt", "root", "minus", "negative", "plus", "times", "over"),
        *("under", "about", "approximately", "approx", "around", "nearly", "almost", "roughly", "least", "most"),
        *("than", "pi", "and", "or", "to", "from", "between", "add"),
    )
)
_LETTER_UNITS = frozenset("mghslL")
_ASIDE = re.compile(r"\([^()\d]*\)")
_NO_UNITS = frozenset(
    (
        *("or", "and", "to", "plus", "minus", "times", "over", "choose", "mod", "modulo", "remainder", "pi", "divided"),
        *("squared", "cubed", "factorial", "below", "above", "less", "more", "least", "most", "out", "point", "than"),
        *("dozen", "hundred", "thousand", "million", "billion", "trillion", "lakh", "crore", "bn", "mn", "mil"),
        *("dozens", "hundreds", "thousands", "millions", "billions", "trillions", "half", "halves", "third", "thirds"),
        *("quarter", "quarters", "fourth", "fourths", "fifth", "fifths", "sixth", "sixths", "eighth", "eighths"),
        *("tenth", "tenths", "hundredth", "hundredths"),
        *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty"),
    )
)
_SENTENCE_END = re.compile(r"(?:(?<=\d)|(?<=[^\W\d_]{3}))[.!?]\s+(?=[A-Z])")  # not after "ft." or "vs."


class Config(ChatSection):
    section_path: ClassVar[str] = "eval.gsm8k"
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null scores every row of the test split")
    max_new_tokens: int = setting(512, ge=1, le=MOST_TOKENS, remedy="512 as published")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")
    parser: Literal["strict", "math_verify", "peft_suite"] = "strict"
    template: Literal["qa", "alpaca", "step_by_step", "none", "chat"] = "qa"
    # 8 as in chain-of-thought papers
    num_fewshot: int = setting(0, ge=0, le=1000, remedy="0 is zero-shot, as published")
    temperature: float = setting(0.0, ge=0, le=100, remedy="0 is greedy, as published")
    top_p: float = setting(1.0, gt=0, le=1, remedy="1 draws from all tokens")
    # Of what a temperature draws; each row has its own.
    seed: int = setting(42, ge=0, le=2**32 - 1, remedy="use a whole number from 0 to 4294967295")

    def rule_errors(self) -> list[SettingError]:
        if self.parser == "math_verify" and not _has_math_verify():
            return [
                *super().rule_errors(),
                SettingError(
                    ("parser",),
                    "Invalid eval.gsm8k.parser=math_verify: the package math-verify is not installed; run pip install "
                    "'math-verify[antlr4_9_3]', or use eval.gsm8k.parser=strict.",
                ),
            ]
        return super().rule_errors()


def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def parse_answer(text: str) -> Decimal | None:
    """Returns the number on the first line that "####" marks as an answer, else the last number; None if there is none.

    Reads 1,000 · -5 · $42.50 · 42. · +7 as people mean them, exactly and at any length. Digits of every script are
    read; exponents are not: 1e400 is 1, as 18kg is 18. A thinking part in <think>…</think> is skipped.

    In a marked line:

    - The first number is the answer. If it begins a sum, "3 + 4 = 7", the answer is the result; if words come first,
      it is the first number after their colon, "=" or "is". A number that is part of something else (1/2, 3^2, 2:30)
      is not read.
    - If the mark is alone on its line, the answer is a number that is alone on the next line.
    - Markdown headings are skipped: words that are followed by more text than a next question, unless they name the
      answer ("#### Answer: 18") or are a sentence; also numbered headings, "#### 1. Add", "#### 2. Multiply".
    - The first line that is not a heading decides, because a base model continues with questions and answers of its
      own; if it has no number, there is no answer.

    lm-eval's flexible-extract takes the last number of the text and compares strings. It differs only in these points:
    marked lines and thinking parts; 42.0 does not equal 42; the dash of "5-3" is a sign; and "1,00" is 100, "A18" is
    18, LaTeX's 1{,}800 is 800, and bare punctuation such as "..." is a number.
    """
    text = _cleaned(text)
    line = _marked_line(text)
    if line is not None:
        return _value(line, _marked_number(line))
    numbers = _NUMBER.findall(text)
    return _to_decimal(numbers[-1]) if numbers else None


def parse_reference(text: str) -> Decimal | None:
    """Returns the number of a reference; None if it has none, several, or one that cannot be read completely.

    If "1/2" were read as 1, 1/3 would count as correct. The number may have words or a sum before it and a unit of at
    most three words after it. Without a mark, the last sentence is the reference.
    """
    text = _cleaned(text)
    line = _marked_line(text)
    if line is None:
        line = _without_markup(_SENTENCE_END.split(text.rstrip().rpartition("\n")[2])[-1])
    number = _marked_number(line) if "=" in line or len(_NUMBER.findall(line)) == 1 else None
    if number is None or text.count("####") > 1:
        return None
    lead = _LEAD_END.search(line[: number.start()].rstrip(" *_$€£¥+([\"'"))
    if lead is None or (lead[1] or "").lower() in _NO_LEADS or not _is_unit(line[number.end() :]):
        return None
    return _value(line, number)


def _cleaned(text: str) -> str:
    """Returns the text without its thinking part, and with "," for LaTeX's separators of thousands."""
    return _LATEX_SEPARATOR.sub(",", without_draft(text))


def _is_unit(text: str) -> bool:
    """Whether the text after a number does not change its value: "%", "miles/hour", but not "x", "million", "²"."""
    if text[:1].isalpha():
        return False
    unit = _ASIDE.sub(" ", text).strip(" *_$€£¥¢,;)]\"'").removesuffix(".").removeprefix("%").strip(" *_$€£¥¢)]\"'")
    words = [word if word in "²³" else word.rstrip("²³") for word in unit.replace("/", " ").split()]
    return len(words) <= 3 and all(
        word.isalpha() and (len(word) > 1 or word in _LETTER_UNITS) and word.lower() not in _NO_UNITS for word in words
    )


def _marked_line(text: str) -> str | None:
    """Returns the text after the first "####" that is not a heading, without markup; None if there is none."""
    lines, numbered = text.split("\n"), 0
    following: list[str] = []  # the next non-empty line after each line
    for line in reversed(lines):
        following.append(line if line.strip() or not following else following[-1])
    following = [*following[-2::-1], ""]
    for line, after in zip(lines, following, strict=True):
        _, mark, marked = line.partition("####")
        if not mark:
            continue
        marked = _without_markup(marked.lstrip("#").partition("####")[0])
        if _BARE.match(marked):
            if _ALONE.match(below := _without_markup(after)):
                return below
            if not marked.strip():
                return ""
        if (item := _NUMBERED.match(marked)) and int(item[1]) == numbered + 1:
            numbered += 1
        elif not (after.strip() and _WORDS_FIRST.match(marked)) or any(
            (_NEXT_QUESTION.match(after), _NAMED.match(marked), _SENTENCE.match(marked))
        ):
            return marked
    return None


def _without_markup(line: str) -> str:
    for pattern, plain in _MARKUP:
        line = pattern.sub(plain, line)
    return line


def _marked_number(line: str) -> re.Match[str] | None:
    """Returns the number that a marked line gives as the answer."""
    number = _NUMBER.search(line)
    if _WORDS_FIRST.match(line) and (word := _ANNOUNCEMENT.search(line)):
        number = _NUMBER.search(line, word.end()) or number
    position, opened = 0, 0
    while number and (total := _SUM.match(line, number.end())):
        opened += line.count("(", position, total.end()) - line.count(")", position, total.end())
        position = total.end()
        if opened or not (result := _NUMBER.search(line, position)):  # in "5 (for 2 + 3 = 5)", 5 does not begin the sum
            break
        number = result
    return number


def _value(line: str, number: re.Match[str] | None) -> Decimal | None:
    return _to_decimal(number[0]) if number and _stands_alone(line, number) else None


def _stands_alone(line: str, number: re.Match[str]) -> bool:
    before = line[: number.start()].lstrip(" *_>#+")  # a list's bullet, emphasis or a sign
    return not (_JOINED_BEFORE.search(before) or _JOINED_AFTER.match(line, number.end()))


def is_right(row: Mapping[str, Any], parser: str) -> bool:
    """Whether a row's completion gives the number of its reference.

    Raises:
        ValueError: the reference's number cannot be read completely, so that the row cannot be scored.
    """
    reference = parse_reference(row["reference"])
    if reference is None:
        end = row["reference"][-60:]
        raise ValueError(f"Row {row.get('index')} has no number that can be read whole in its reference {end!r}.")
    if parser == "strict":
        return parse_answer(row["completion"]) == reference
    if parser == "peft_suite":
        return peft_suite.is_right(row.get("prompt", "") + row["completion"], row["reference"])
    from math_verify import parse, verify

    text = _cleaned(row["completion"]).replace("−", "-")
    line = _marked_line(text)
    return verify(parse(str(reference)), parse(text if line is None else line))


def _to_decimal(number: str) -> Decimal:
    digits = re.sub(r"[^\d.]", "", number)
    negative = "-" in number or "−" in number
    return Decimal(f"-{digits}" if negative else digits)  # -Decimal(digits) would round to 28 digits


def score(rows: Sequence[dict[str, Any]], parser: str = "strict") -> dict[str, Any]:
    """Returns the exact match; completions without a number count as wrong and are reported as "unparsed".

    Args:
        rows: {"reference", "completion", "finished", "tokens"} each.
        parser: the parser of the exact match; the result of the other is added if its package is installed.

    Raises:
        ValueError: as `is_right`.
    """
    total = len(rows)
    parsers = ["strict", "math_verify"] if _has_math_verify() else ["strict"]
    parsers += [parser] if parser not in parsers else []
    shares = {name: sum(is_right(row, name) for row in rows) / total if total else None for name in parsers}
    versions = {"math_verify": importlib.metadata.version("math-verify")} if "math_verify" in parsers else {}
    unparsed = sum(parse_answer(row["completion"]) is None for row in rows)
    return {
        "scorer": f"gsm8k/{SCORER_VERSION}",
        "n": total,
        "parser": parser,
        "versions": versions,
        "metrics": {
            "n": total,  # repeated, as run.json keeps only the metrics
            HEADLINE: shares[parser],
            **shares,
            "unparsed": unparsed / total if total else None,
            **predictions.answer_counts(rows),
        },
    }


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {row: 1.0 or 0.0}; the same key for two models means the same question."""
    return {(row["prompt"], row["index"]): float(is_right(row, config.parser)) for row in rows}


def check_rows(rows: Sequence[dict[str, str]], source: str, config: Config, **known: Any) -> None:
    """Checks that every reference answer can be scored, before hours of generation.

    Raises:
        ConfigError: an answer's number cannot be parsed, or the rows have no shots; the error names `source`, where
            the rows come from.
    """
    if config.num_fewshot and any(row.get("shots") != config.num_fewshot for row in rows):
        raise ConfigError(
            [
                f"Invalid eval.gsm8k.num_fewshot={config.num_fewshot} with the rows of {source}: shots are put before "
                "GSM8K's own questions; score those with python -m eval.gsm8k PATH rows=benchmark "
                f"num_fewshot={config.num_fewshot}, or leave the key out."
            ]
        )
    broken = [number for number, row in enumerate(rows, start=1) if parse_reference(row["y"]) is None]
    if broken:
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ConfigError(
            [
                f"Invalid answer in {source}, row {broken[0]}{others}: gsm8k scores a final number, and none can be "
                f'read whole in {rows[broken[0] - 1]["y"][-60:]!r}; end it in "#### NUMBER", or leave the row out. A '
                "fraction, a power, a root or a range is no number here."
            ]
        )


def run(
    backend: Generator,
    rows: Sequence[dict[str, str]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Answers `rows` ({"x", "y"}) and scores them; writes predictions.jsonl and score.json, returns the score."""
    asked = rows[: config.max_rows]
    path = predictions.answer_rows(
        backend,
        asked,
        folder,
        Sampling(config.max_new_tokens, config.temperature, config.top_p, stop=_stops(config)),
        seeds=[_seed(config.seed, index) for index in range(len(asked))] if config.temperature else None,
        on_progress=on_progress,
    )
    return score_file(path, config)


def _stops(config: Config) -> tuple[str, ...]:
    """Returns the beginning of a next question, with which a model continues after shots."""
    beginning = prompt(config.template, "QUESTION").partition("QUESTION")[0]
    return (f"\n\n{beginning.rstrip()}",) if config.num_fewshot and config.template != "chat" else ()


def _seed(seed: int, index: int) -> int:
    """The seed of one row's answer, which depends on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:6], "little")


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Scores a predictions file and writes score.json beside it.

    Raises:
        ConfigError: the file is missing or broken.
    """
    rows = predictions.read(path)
    try:
        result = score(rows, config.parser) | {"num_fewshot": config.num_fewshot}
    except ValueError as error:
        raise ConfigError([f"Broken file {path}: {error} Fix the data set's row, and generate again."]) from error
    write_json(path.with_name("score.json"), result)
    return result


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, str]]:
    """Returns GSM8K's 1,319 test questions, for models without a run; with shots, each has their number too.

    The shots of a chat are its earlier turns.

    Raises:
        ConfigError: a split cannot be read, or the train split has fewer rows than shots.
    """

    def split(name: str) -> list[dict[str, Any]]:
        return read_rows(Source("openai/gsm8k", "main", name), columns=("question", "answer"), data_root=data_root)

    train = split("train")[: config.num_fewshot] if config.num_fewshot else []
    if len(train) < config.num_fewshot:
        raise ConfigError(
            [f"Invalid num_fewshot={config.num_fewshot}: GSM8K's train split has {len(train)} rows here; use fewer."]
        )
    more = {"shots": len(train)} if train else {}
    if config.template == "chat":
        pairs = [(row["question"], row["answer"]) for row in train]
        return [
            question("chat", config.system, row["question"], row["answer"], shots=pairs) | more for row in split("test")
        ]
    shots = "".join(
        f"{prompt_text({'x': prompt(config.template, row['question'])})}{row['answer']}\n\n" for row in train
    )
    return [
        {"x": shots + prompt(config.template, row["question"]), "y": row["answer"], **more} for row in split("test")
    ]


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("gsm8k", sys.argv[1:]))


BENCHMARKS.add(
    "gsm8k",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text",
        generates=True,
        scoring=("parser",),
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        fields=predictions.GENERATED,
        row_columns={"x": "text", "y": "text"},
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
        benchmark_rows=benchmark_rows,
    ),
)
