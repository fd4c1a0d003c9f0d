"""MT-Bench (Zheng et al. 2023): 80 questions of two turns, each answer rated from 1 to 10 by a judge model.

    python -m eval.mt_bench PATH judge=NAME judge_url=http://HOST:PORT/v1 folder=DIR [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: judge, judge_url, judge_key (the
environment variable with its key; without it OPENAI_API_KEY is sent only to api.openai.com and OPENAI_BASE_URL),
judge_concurrency, judge_rpm, judge_tokens, judge_tries, judge_timeout, template (alpaca, qa, none, or chat for the
tokenizer's own), greedy, seed, max_new_tokens, max_rows, batch_size, device, backend, out=DIR, score_only=true.

DIR (or data_root/HuggingFaceH4/mt_bench) holds FastChat's own files: question.jsonl, judge_prompts.jsonl and
reference_gpt-4.jsonl. Answers are graded one at a time with the official prompts; math, reasoning and coding are judged
against the reference answers. Temperatures are FastChat's, by category; `greedy=true` sets all to 0. The rating is the
first one after the last "Rating:" of the judge's reply, or else the last one of the reply (deviation: FastChat takes
the first, which may be quoted from the prompt). A judge that gives no rating is asked again; an answer that stays
without a rating, or that the judge's filter refuses, is counted as "unrated" and never as a zero. A score depends on
its judge, so score.json has the judge's name and the day.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval import BENCHMARKS, predictions
from eval.answers import without_draft
from eval.backends import Completion, Generator, Sampling, wire
from eval.backends.openai import Endpoint, OpenAIBackend
from flatlora.config.sections import ChatSection
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_SECONDS, MOST_TOKENS, setting
from flatlora.config.types import Url
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs import conversations
from flatlora.inputs.conversations import Chat
from flatlora.inputs.rows import MOST_BYTES, gather, read_jsonl, typed_columns
from flatlora.inputs.templates import conversation
from flatlora.utils.console import progress
from flatlora.utils.errors import ConfigError, SettingError
from flatlora.utils.files import write_atomic, write_json
from flatlora.utils.plain_files import read_plain

logger = logging.getLogger(__name__)

_JUDGE_KEYS = ("url", "key", "concurrency", "rpm", "tokens", "tries", "timeout")
SCORER_VERSION = 4
HEADLINE = "rating"
ROW_COLUMNS = {"question_id": "int", "category": "text", "turns": "any", "reference": "any"}
FIELDS: predictions.Fields = {
    "index": int,
    "question_id": int,
    "category": str,
    "turns": list,
    "answers": list,
    "tokens": list,
    "finished": list,
}
_WITH_REFERENCE = ("math", "reasoning", "coding")
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # FastChat's; 0 for the others
_PROMPTS = {  # (turn, with a reference) → name in judge_prompts.jsonl
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
_JUDGMENT = {"key", "question_id", "turn", "reply", "rating", "judge", "day"}


class Config(ChatSection):
    section_path: ClassVar[str] = "eval.mt_bench"
    judge: str = setting(min_length=1, remedy="name the judge model, as its endpoint calls it")
    judge_url: Url = setting(min_length=1, remedy="name its OpenAI-compatible endpoint, ending in /v1")
    judge_key: str | None = setting(None, min_length=1, remedy="name the environment variable that holds the key")
    judge_concurrency: int = setting(8, ge=1, le=1024, remedy="how many requests are under way at a time")
    judge_rpm: float | None = setting(None, ge=0.01, le=1e6, remedy="null sets no limit of requests a minute")
    judge_tokens: int = setting(
        2048, ge=1, le=MOST_TOKENS, remedy="2048 as the official judge; a reply cut off has no rating"
    )
    judge_tries: int = setting(3, ge=1, le=100, remedy="how often a judge is asked until it gives a rating")
    judge_timeout: float = setting(300.0, gt=0, le=MOST_SECONDS, remedy="seconds for one request")
    folder: str | None = setting(None, min_length=1, remedy="name the folder with question.jsonl")
    template: Literal["alpaca", "qa", "none", "chat"] = "alpaca"
    greedy: bool = False
    seed: int = setting(42, ge=0, le=2**32 - 1, remedy="use a whole number from 0 to 4294967295")
    max_new_tokens: int = setting(1024, ge=1, le=MOST_TOKENS, remedy="1024 as published")
    max_rows: int | None = setting(None, ge=1, le=MOST_ROWS, remedy="null asks all 80 questions")
    batch_size: int = setting(16, ge=1, le=MOST_BATCH, remedy="lower it when memory runs out")

    def rule_errors(self) -> list[SettingError]:
        names = "eval.mt_bench.judge_url", "eval.mt_bench.judge_key"
        return super().rule_errors() + wire.endpoint_errors(names[0], self.judge_url, names[1], self.judge_key)


# Neither an index, as in x[[0]], nor a link, as in [1](address), is a rating.
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_RATINGS = (
    re.compile(rf"(?:(?<=rating)|(?<=\d\))|(?<![A-Za-z0-9\])]))\[\[{_NUMBER}\]\]", re.IGNORECASE),
    re.compile(rf"(?:(?<=rating)|(?<![A-Za-z0-9\])[]))\[{_NUMBER}\](?![\](])", re.IGNORECASE),
)
_RATING_LABEL = re.compile(r"(?<![\"'`“‘])\brating\b[^\[\]\n:]{0,40}:", re.IGNORECASE)  # in quotes, it is the prompt's


def parse_rating(reply: str) -> float | None:
    """Returns the rating "[[5]]" of a judge's reply, or "[5]" if it has none of those; None if it is not from 1 to 10.

    It is the first rating after the last "Rating:" that is followed by one, else the last rating. A thinking part is
    skipped; if it never ends, the reply has no rating.
    """
    verdict = without_draft(reply).replace("\\[", "[").replace("\\]", "]")  # as Markdown escapes them
    labels = [label.end() for label in _RATING_LABEL.finditer(verdict)]
    for pattern in _RATINGS:
        if ratings := list(pattern.finditer(verdict)):
            last = ratings[-1]
            label = max((end for end in labels if end <= last.start()), default=None)
            chosen = last if label is None else next(rating for rating in ratings if rating.start() >= label)
            rating = float(chosen[1])
            return rating if 1 <= rating <= 10 else None
    return None


def score(rows: Sequence[dict[str, Any]], judgments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the mean rating over all answers, by turn and by category.

    Args:
        rows: {"question_id", "category", "finished", "tokens"} each; the last two are lists with one entry per turn.
        judgments: {"question_id", "turn", "rating"} each; a rating of None counts as "unrated".
    """
    categories = {row["question_id"]: row["category"] for row in rows}

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    rated = [judgment for judgment in judgments if judgment["rating"] is not None]
    metrics: dict[str, Any] = {"n": len(rows), HEADLINE: mean([judgment["rating"] for judgment in rated])}
    for turn in (1, 2):
        metrics[f"turn_{turn}"] = mean([judgment["rating"] for judgment in rated if judgment["turn"] == turn])
    for category in dict.fromkeys(categories.values()):
        metrics[category] = mean(
            [judgment["rating"] for judgment in rated if categories[judgment["question_id"]] == category]
        )
    metrics["unrated"] = len(judgments) - len(rated)
    metrics |= predictions.answer_counts([answer for row in rows for answer in _single_answers(row)])
    return {"scorer": f"mt_bench/{SCORER_VERSION}", "n": len(rows), "metrics": metrics}


def _single_answers(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row's answers as one row per turn, for `predictions.answer_counts`."""
    refusals = row.get("refusals", {})
    return [
        {"finished": finished, "tokens": tokens, **({"refusal": refusals[str(turn)]} if str(turn) in refusals else {})}
        for turn, (finished, tokens) in enumerate(zip(row["finished"], row["tokens"], strict=True))
    ]


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """Returns {(question, turn, judge): rating} from judgments.jsonl for these answers, without unrated ones."""
    prompts, judgments = _saved_prompts(folder), _read_judgments(folder / "judgments.jsonl")
    answers = {
        _key(judge, row["question_id"], turn, *judge_request(row, turn, prompts)[:2]): (row["question_id"], turn, judge)
        for judge in {judgment["judge"] for judgment in judgments}
        for row in rows
        for turn in (1, 2)
    }
    rated = [judgment for judgment in judgments if judgment["key"] in answers and judgment["rating"] is not None]
    return {answers[judgment["key"]]: float(judgment["rating"]) for judgment in rated}


def _read_judgments(path: Path) -> list[dict[str, Any]]:
    """Returns the judgments of a file, with ratings parsed again: an older version may have parsed them differently."""
    judgments = [judgment for judgment in predictions.appended_rows(path) if judgment.keys() >= _JUDGMENT]
    return [judgment | {"rating": parse_rating(judgment["reply"])} for judgment in judgments]


def _key(judge: str, question: int, turn: int, system: str, text: str) -> str:
    """Returns the key of a judgment: a hash of the judge and the exact request."""
    return hashlib.sha256(json.dumps([judge, question, turn, system, text]).encode()).hexdigest()


def _saved_prompts(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "judge_prompts.json"
    try:
        return json.loads(read_plain(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"Broken file {path}: {error}; generate again (leave out score_only=true)."]) from error


def check_rows(rows: Sequence[dict[str, Any]], source: str, config: Config, **known: Any) -> None:
    """Checks that every question has two turns, and a reference answer if its category needs one.

    Raises:
        ConfigError: a question lacks a turn or its reference.
    """
    for number, row in enumerate(rows, start=1):
        problem = None
        if not _two_texts(row["turns"]):
            problem = "two turns are needed"
        elif row["category"] in _WITH_REFERENCE and not _two_texts(row["reference"]):
            problem = f"{row['category']} is judged against reference answers, and it has none"
        if problem:
            raise ConfigError([f"Invalid question in {source}, row {number}: {problem}; fix it, or leave it out."])


def _two_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def run(
    backend: Generator,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    config: Config,
    *,
    on_progress: predictions.OnProgress | None = None,
) -> dict[str, Any]:
    """Answers both turns, judges and scores them: predictions.jsonl, judgments.jsonl, score.json and radar.png.

    Raises:
        ConfigError: two turns and their answers may be longer than the model's context.
    """
    rows = rows[: config.max_rows]
    prompts = judge_prompts(Path(config.folder or rows[0].get("folder") or "."))
    _check_lengths(backend, rows, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "judge_prompts.json", prompts)  # so that score_only=true needs no other file

    questions = [{key: row[key] for key in ("question_id", "category", "turns", "reference")} for row in rows]
    answered: list[dict[str, Any]] = [{"answers": [], "tokens": [], "finished": []} for _ in rows]
    for turn, turn_folder in enumerate((folder / "first_turn", folder)):
        path = predictions.collect(
            questions
            if turn == 0
            else [{**row, "first": first["answers"][0]} for row, first in zip(questions, answered, strict=True)],
            partial(_next_answers, backend, rows, answered, config),
            turn_folder,
            fields=FIELDS,
            lengths=predictions.prompt_lengths(backend, [row["turns"][turn] for row in rows]),
            batch_size=backend.batch_size,
            each=getattr(backend, "each", None),
            settings={
                **backend.describe(),
                "template": config.template,
                **({} if config.system is None else {"system": config.system}),
                "greedy": config.greedy,
                "seed": config.seed,
                "max_new_tokens": config.max_new_tokens,
            },
            on_progress=on_progress,
        )
        answered = predictions.read(path, FIELDS)
    return score_file(path, config)


def _check_lengths(backend: Any, rows: Sequence[dict[str, Any]], config: Config) -> None:
    """Checks before the first turn that the second turn fits the model's context after the longest first answer."""
    if not hasattr(backend, "check_lengths"):
        return
    lengths = [backend.prompt_length(_prompt(config, row["turns"], ["-"])) for row in rows]
    task = f"second turns, with {config.max_new_tokens} tokens of a first answer"
    backend.check_lengths([length + config.max_new_tokens for length in lengths], config.max_new_tokens, task=task)


def _next_answers(
    backend: Generator,
    rows: Sequence[dict[str, Any]],
    answered: Sequence[dict[str, Any]],
    config: Config,
    batch: list[int],
) -> list[dict[str, Any]]:
    """Returns the next answer of each row of a batch, appended to those in `answered`."""
    before = [answered[i] for i in batch]
    completions = _answers(backend, [rows[i] for i in batch], [earlier["answers"] for earlier in before], config)
    return [
        {
            "answers": [*row["answers"], completion.text],
            "tokens": [*row["tokens"], completion.tokens],
            "finished": [*row["finished"], completion.finished],
            **_refusals(row, completion),
        }
        for row, completion in zip(before, completions, strict=True)
    ]


def _refusals(row: Mapping[str, Any], completion: Completion) -> dict[str, dict[str, str]]:
    """Returns {"refusals": {turn, counted from 0: why an endpoint did not answer}} if there are any, else {}."""
    refusals = dict(row.get("refusals", {}))
    if completion.refusal:
        refusals[str(len(row["answers"]))] = completion.refusal
    return {"refusals": refusals} if refusals else {}


def _answers(
    backend: Any, rows: Sequence[dict[str, Any]], answers: Sequence[list[str]], config: Config
) -> list[Completion]:
    """Returns the next answer of each conversation; rows with the same temperature are generated together.

    Tokenized as part of a prompt, a first answer can have more tokens than when it was generated. If it leaves too few
    of a model's learned positions, the second answer gets fewer tokens than `max_new_tokens`.

    Args:
        answers: the earlier answers of each row.
    """
    completions: dict[int, Completion] = {}
    temperatures = [0.0 if config.greedy else _TEMPERATURES.get(row["category"], 0.0) for row in rows]
    for temperature in dict.fromkeys(temperatures):
        indices = [index for index, other in enumerate(temperatures) if other == temperature]
        stop = () if config.template == "chat" else ("\n### Instruction:", "\nQ: ")
        seeds = [_seed(config.seed, rows[index]["question_id"], len(answers[index])) for index in indices]
        prompts = [_prompt(config, rows[i]["turns"][: len(answers[i]) + 1], answers[i]) for i in indices]
        lengths = list(map(backend.prompt_length, prompts))
        available = backend.tokens_left(lengths) if hasattr(backend, "tokens_left") else None
        most = config.max_new_tokens if available is None or available < 1 else min(available, config.max_new_tokens)
        batch = backend.generate(prompts, Sampling(most, temperature, stop=stop), seeds)
        completions |= dict(zip(indices, batch, strict=True))
    return [completions[index] for index in range(len(rows))]


def _prompt(config: Config, turns: Sequence[str], answers: Sequence[str]) -> str | Chat:
    """Returns the prompt for the last of several turns, after the earlier ones and their answers."""
    if config.template != "chat":
        return conversation(config.template, turns, answers)
    earlier = [text for pair in zip(turns[:-1], answers, strict=True) for text in pair]
    return Chat(conversations.turns(config.system, *earlier, turns[-1]))


def _seed(seed: int, question: int, turn: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{question}/{turn}".encode()).digest()[:6], "little")


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Judges and scores the answers of a finished predictions.jsonl; existing judgments are kept.

    Raises:
        ConfigError: the file, or the judge's prompts beside it, are missing or broken.
        EndpointError: the judge cannot be reached or used; the judgments so far are kept.
    """
    rows = predictions.read(path, FIELDS)
    prompts = _saved_prompts(path.parent)
    judgments = _judge(rows, prompts, config, path.with_name("judgments.jsonl"))
    result = score(rows, judgments)
    result["judge"] = config.judge
    result["judged"] = sorted({judgment["day"] for judgment in judgments})
    if adapted := [judgment["adapted"] for judgment in judgments if "adapted" in judgment]:
        result["adapted"] = adapted[-1]
    if refused := [judgment for judgment in judgments if "refusal" in judgment]:
        result["refused"] = [{key: judgment[key] for key in ("question_id", "turn", "refusal")} for judgment in refused]
    write_json(path.with_name("score.json"), result)
    plot_categories({config.judge: result["metrics"]}, rows, path.with_name("radar.png"))
    return result


def _judge(
    rows: Sequence[dict[str, Any]], prompts: Mapping[str, Any], config: Config, path: Path
) -> list[dict[str, Any]]:
    """Returns the judgments of both turns of each row: from `path` if it has them, else by asking the judge."""
    requests = {}
    for row in rows:
        for turn in (1, 2):
            system, text, name = judge_request(row, turn, prompts)
            answer = {"question_id": row["question_id"], "turn": turn}
            requests[_key(config.judge, *answer.values(), system, text)] = {
                **answer,
                "prompt": name,
                "system": system,
                "text": text,
            }
    saved = _read_judgments(path)
    judged = {judgment["key"]: judgment for judgment in saved if judgment["key"] in requests}
    remaining = [key for key in requests if key not in judged or judged[key]["rating"] is None]
    endpoint = Endpoint(
        config.judge_url,
        config.judge,
        config.judge_key,
        concurrency=config.judge_concurrency,
        requests_per_minute=config.judge_rpm,
        timeout_s=config.judge_timeout,
    )
    judge = OpenAIBackend(endpoint)
    write_atomic(path, predictions.appendable(saved))  # drop an incomplete last line before appending
    with (
        progress(f"judge ({config.judge})", len(remaining), least=1) as advance,
        open(path, "a", encoding="utf-8") as file,
    ):
        for key, judgment in judge.each(lambda key: _ask_judge(judge, requests[key], config), remaining):
            judged[key] = {**judgment, "key": key}
            file.write(predictions.appendable([judged[key]]))
            file.flush()
            advance(1)
    judgments = [judged[key] for key in requests]
    # Other judgments, such as those of another judge, are kept: they cost money.
    of_others = [judgment for judgment in saved if judgment["key"] not in requests]
    write_atomic(path, predictions.appendable([*of_others, *judgments]))
    return judgments


def _ask_judge(judge: OpenAIBackend, request: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Returns the judgment of one answer; asks up to `judge_tries` times until a reply has a rating.

    Its "adapted" has the parameters that the judge's model does not take, and its "refusal" why there is no reply.
    """
    messages = [{"role": "system", "content": request["system"]}, {"role": "user", "content": request["text"]}]
    for attempt in range(1, config.judge_tries + 1):
        # The first try is greedy, as in FastChat; later ones are not, as a greedy judge would repeat its reply.
        sampling = Sampling(config.judge_tokens, 0.0 if attempt == 1 else 0.7)
        reply = judge.chat([Chat(messages)], sampling, [attempt])[0]
        rating = parse_rating(reply.text)
        if rating is not None or reply.refusal:
            break
    if reply.refusal:
        about = f"turn {request['turn']} of question {request['question_id']}"
        logger.warning("%s does not judge %s, which is unrated: %s.", config.judge, about, reply.refusal)
    return {
        **{name: request[name] for name in ("question_id", "turn", "prompt")},
        "reply": reply.text,
        "rating": rating,
        **({"refusal": reply.refusal} if reply.refusal else {}),
        **({"adapted": dict(judge.adapted)} if judge.adapted else {}),
        "judge": config.judge,
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tries": attempt,
    }


def judge_request(row: Mapping[str, Any], turn: int, prompts: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns (system prompt, request, the official prompt's name) for one turn of an answered question."""
    reference = row.get("reference") if row["category"] in _WITH_REFERENCE else None
    name = _PROMPTS[turn, reference is not None]
    values = {
        "question": row["turns"][0],
        "answer": row["answers"][0],
        "question_1": row["turns"][0],
        "answer_1": row["answers"][0],
        "question_2": row["turns"][1],
        "answer_2": row["answers"][1],
        **({"ref_answer_1": reference[0], "ref_answer_2": reference[1]} if reference else {}),
    }
    # Not by str.format: answers and references can contain braces.
    text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), prompts[name]["prompt_template"])
    return prompts[name]["system_prompt"], text, name


def judge_prompts(folder: Path) -> dict[str, dict[str, str]]:
    """Returns {name: {"system_prompt", "prompt_template"}} of the official prompts for single answers.

    Raises:
        ConfigError: the file or one of the four is missing.
    """
    path = folder / "judge_prompts.jsonl"
    columns = {"name": "text", "system_prompt": "text", "prompt_template": "text"}
    rows = {row["name"]: row for row in typed_columns(read_jsonl(path), columns, str(path))}
    missing = [name for name in _PROMPTS.values() if name not in rows]
    if missing:
        raise ConfigError([f"Missing prompt {', '.join(missing)} in {path}; fetch FastChat's file again."])
    return {name: {key: rows[name][key] for key in list(columns)[1:]} for name in _PROMPTS.values()}


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """Returns the questions, with their reference answers.

    Raises:
        ConfigError: files are missing or broken; all errors together.
    """
    if config.folder is None and data_root is None:
        raise ConfigError(
            [
                "Missing folder: MT-Bench's questions are on no hub in FastChat's format; put its question.jsonl, "
                "judge_prompts.jsonl and reference_gpt-4.jsonl in one folder, and name it: folder=DIR "
                "(eval.mt_bench.folder=DIR)."
            ]
        )
    folder = Path(config.folder) if config.folder else Path(str(data_root)) / "HuggingFaceH4" / "mt_bench"
    questions, references, _ = gather(
        lambda: _read(folder / "question.jsonl", {"question_id": "int", "category": "text", "turns": "any"}),
        lambda: _read(folder / "reference_gpt-4.jsonl", {"question_id": "int", "choices": "any"}),
        lambda: judge_prompts(folder),
    )
    answers = {row["question_id"]: _reference(row) for row in references}
    return [{**row, "reference": answers.get(row["question_id"]), "folder": str(folder)} for row in questions]


def _reference(row: Mapping[str, Any]) -> list[str] | None:
    """Returns the turns of a reference answer, None if it has none; `check_rows` reports those that are needed."""
    choices = row["choices"]
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("turns") if isinstance(first, dict) else None


def _read(path: Path, columns: dict[str, Any]) -> list[dict[str, Any]]:
    return typed_columns(read_jsonl(path), columns, str(path))


def plot_categories(metrics: Mapping[str, Mapping[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a radar chart of the mean rating in each category to `path`, with one line per entry of `metrics`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    categories = list(dict.fromkeys(row["category"] for row in rows))
    angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
    figure, axes = plt.subplots(figsize=(6, 6), subplot_kw={"projection": "polar"})
    for label, ratings in metrics.items():
        values = [ratings[category] if ratings[category] is not None else np.nan for category in categories]
        axes.plot([*angles, angles[0]], [*values, values[0]], marker="o", label=f"judged by {label}")
        if not np.isnan(values).any():
            axes.fill([*angles, angles[0]], [*values, values[0]], alpha=0.15)
    axes.set_xticks(angles, categories)
    axes.set_ylim(0, 10)
    axes.set_yticks(range(2, 11, 2))
    axes.set_rlabel_position(180 / max(1, len(categories)))
    axes.tick_params(axis="x", pad=12)
    axes.set_title("MT-Bench, mean rating by category", pad=24)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    from eval.command import main

    sys.exit(main("mt_bench", sys.argv[1:]))


BENCHMARKS.add(
    "mt_bench",
    Benchmark(
        Config=Config,
        help=__doc__,
        kind="text",
        generates=True,
        own_rows=lambda config: True,
        belongs_to={"judge_key": "judge_url", "system": "template"},
        scoring=("folder", "judge", *(f"judge_{name}" for name in _JUDGE_KEYS)),
        scorer_version=SCORER_VERSION,
        headline=HEADLINE,
        is_share=False,
        row_columns=ROW_COLUMNS,
        fields=FIELDS,
        check_rows=check_rows,
        run=run,
        score_file=score_file,
        row_scores=row_scores,
        benchmark_rows=benchmark_rows,
    ),
)
