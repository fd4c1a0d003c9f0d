"""MT-Bench (Zheng et al. 2023): 80 questions of two turns, each answer rated from 1 to 10 by a judge model.

    python -m eval.mt_bench PATH judge=NAME judge_url=http://HOST:PORT/v1 folder=DIR [key=value ...]

PATH is a run's folder, a checkpoint, an adapter, a model folder or a hub id. Keys: judge, judge_url, judge_key (the
environment variable with its key; without it OPENAI_API_KEY goes to api.openai.com and OPENAI_BASE_URL alone),
judge_concurrency, judge_rpm, judge_tokens, judge_tries, judge_timeout, template (alpaca, qa, none, or chat for the
tokenizer's own), greedy, seed, max_new_tokens, max_rows, batch_size, device, backend, out=DIR, score_only=true.

DIR (or data_root/HuggingFaceH4/mt_bench) holds FastChat's own files: question.jsonl, judge_prompts.jsonl and
reference_gpt-4.jsonl. Single-answer grading with the official prompts; math, reasoning and coding are judged against
the reference answers. Temperatures are FastChat's, by category; `greedy=true` takes none. A judge's verdict is the
first rating behind the last "Rating:" of its reply, or without that its last one (deviation: FastChat takes the first,
which may be a quotation of its prompt). A reply without a rating is asked for again; what stays without one, or is
refused by the judge's filter, is counted apart and never as a zero. A score means nothing without its judge: its name
and the day stand beside it.
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
from typing import Any, Literal

from eval import BENCHMARKS, predictions
from eval.answers import without_draft
from eval.backends import Completion, Generator, Sampling, wire
from eval.backends.openai import Endpoint, OpenAIBackend
from flatlora.config.settings import MOST_BATCH, MOST_ROWS, MOST_SECONDS, MOST_TOKENS, Section, setting
from flatlora.config.types import Url
from flatlora.experiment.plugins import Benchmark
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


class Config(Section):
    judge: str = setting(min_length=1, remedy="name the model that rates, as its endpoint knows it")
    judge_url: Url = setting(min_length=1, remedy="name its OpenAI-compatible endpoint, ending in /v1")
    judge_key: str | None = setting(None, min_length=1, remedy="name the environment variable that holds the key")
    judge_concurrency: int = setting(8, ge=1, le=1024, remedy="how many requests are under way at a time")
    judge_rpm: float | None = setting(None, ge=0.01, le=1e6, remedy="null sets no limit of requests a minute")
    judge_tokens: int = setting(
        2048, ge=1, le=MOST_TOKENS, remedy="2048 as the official judge; a reply cut off has no rating"
    )
    judge_tries: int = setting(3, ge=1, le=100, remedy="how often a judge is asked that gives no rating")
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
        return wire.endpoint_errors(names[0], self.judge_url, names[1], self.judge_key)


# An index, as in x[[0]], is no rating; nor is a link, as in [1](address).
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_RATINGS = (
    re.compile(rf"(?:(?<=rating)|(?<=\d\))|(?<![A-Za-z0-9\])]))\[\[{_NUMBER}\]\]", re.IGNORECASE),
    re.compile(rf"(?:(?<=rating)|(?<![A-Za-z0-9\])[]))\[{_NUMBER}\](?![\](])", re.IGNORECASE),
)
_ANNOUNCED = re.compile(r"(?<![\"'`“‘])\brating\b[^\[\]\n:]{0,40}:", re.IGNORECASE)  # a quoted one is the format's


def parse_rating(reply: str) -> float | None:
    """The rating "[[5]]" of the verdict, or "[5]" where there is none of those; None if it is not from 1 to 10.

    It is the first one behind the last "Rating:" that has any, or the last of all where none has. The verdict is what
    follows a thinking part; one that does not end has none.
    """
    verdict = without_draft(reply).replace("\\[", "[").replace("\\]", "]")  # as Markdown escapes them
    starts = [announced.end() for announced in _ANNOUNCED.finditer(verdict)]
    for pattern in _RATINGS:
        behind = [found[1] for start in starts if (found := pattern.search(verdict, start))]
        if ratings := behind or pattern.findall(verdict):
            rating = float(ratings[-1])
            return rating if 1 <= rating <= 10 else None
    return None


def score(rows: Sequence[dict[str, Any]], judgments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean rating over all answers, by turn and by category.

    Args:
        rows: {"question_id", "category", "finished", "tokens"} each, the last two lists of one entry a turn.
        judgments: {"question_id", "turn", "rating"}; a rating of None is counted apart.
    """
    categories = {row["question_id"]: row["category"] for row in rows}

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    rated = [one for one in judgments if one["rating"] is not None]
    metrics: dict[str, Any] = {"n": len(rows), HEADLINE: mean([one["rating"] for one in rated])}
    for turn in (1, 2):
        metrics[f"turn_{turn}"] = mean([one["rating"] for one in rated if one["turn"] == turn])
    for category in dict.fromkeys(categories.values()):
        metrics[category] = mean([one["rating"] for one in rated if categories[one["question_id"]] == category])
    metrics["unrated"] = len(judgments) - len(rated)
    metrics |= predictions.answer_counts([answer for row in rows for answer in _single_answers(row)])
    return {"scorer": f"mt_bench/{SCORER_VERSION}", "n": len(rows), "metrics": metrics}


def _single_answers(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's answers as rows of their own, for `predictions.answer_counts`."""
    refusals = row.get("refusals", {})
    return [
        {"finished": finished, "tokens": tokens, **({"refusal": refusals[str(turn)]} if str(turn) in refusals else {})}
        for turn, (finished, tokens) in enumerate(zip(row["finished"], row["tokens"], strict=True))
    ]


def row_scores(rows: Sequence[dict[str, Any]], config: Config, folder: Path) -> dict[Any, float]:
    """{(question, turn, judge): rating}, as judgments.jsonl has them of these answers; unrated ones are left out."""
    prompts, judgments = _kept_prompts(folder), _told(folder / "judgments.jsonl")
    wanted = {
        _key(judge, row["question_id"], turn, *judge_request(row, turn, prompts)[:2]): (row["question_id"], turn, judge)
        for judge in {judgment["judge"] for judgment in judgments}
        for row in rows
        for turn in (1, 2)
    }
    rated = [judgment for judgment in judgments if judgment["key"] in wanted and judgment["rating"] is not None]
    return {wanted[judgment["key"]]: float(judgment["rating"]) for judgment in rated}


def _told(path: Path) -> list[dict[str, Any]]:
    """Returns the judgments of a file, with ratings parsed again: an older version may have parsed them differently."""
    judgments = [judgment for judgment in predictions.appended_rows(path) if judgment.keys() >= _JUDGMENT]
    return [judgment | {"rating": parse_rating(judgment["reply"])} for judgment in judgments]


def _key(judge: str, question: int, turn: int, system: str, text: str) -> str:
    """What a judgment is about: this judge, and this very request."""
    return hashlib.sha256(json.dumps([judge, question, turn, system, text]).encode()).hexdigest()


def _kept_prompts(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "judge_prompts.json"
    try:
        return json.loads(read_plain(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"Broken file {path}: {error}; generate anew (leave out score_only=true)."]) from error


def check_rows(rows: Sequence[dict[str, Any]], source: str, config: Config, **known: Any) -> None:
    """Checks that every question has two turns, and a reference if its category is judged by one.

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
            raise ConfigError([f"Invalid question in {source}, row {number}: {problem}; mend it, or leave it out."])


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
    """Answer both turns, have them judged, score: predictions.jsonl, judgments.jsonl, score.json and radar.png.

    Raises:
        ConfigError: two turns and their answers may be longer than the model's positions.
    """
    rows = rows[: config.max_rows]
    prompts = judge_prompts(Path(config.folder or rows[0].get("folder") or "."))
    _check_lengths(backend, rows, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "judge_prompts.json", prompts)  # a later scoring needs no other file

    asked = [{key: row[key] for key in ("question_id", "category", "turns", "reference")} for row in rows]
    told: list[dict[str, Any]] = [{"answers": [], "tokens": [], "finished": []} for _ in rows]
    for turn, place in enumerate((folder / "first_turn", folder)):
        path = predictions.collect(
            asked if turn == 0 else [{**row, "first": one["answers"][0]} for row, one in zip(asked, told, strict=True)],
            partial(_next_answers, backend, rows, told, config),
            place,
            fields=FIELDS,
            lengths=predictions.prompt_lengths(backend, [row["turns"][turn] for row in rows]),
            batch_size=backend.batch_size,
            each=getattr(backend, "each", None),
            settings={
                **backend.describe(),
                "template": config.template,
                "greedy": config.greedy,
                "seed": config.seed,
                "max_new_tokens": config.max_new_tokens,
            },
            on_progress=on_progress,
        )
        told = predictions.read(path, FIELDS)
    return score_file(path, config)


def _check_lengths(backend: Any, rows: Sequence[dict[str, Any]], config: Config) -> None:
    """Checks before the first turn that the second one fits the model's context after the longest first answer."""
    if not hasattr(backend, "check_lengths"):
        return
    if config.template == "chat":
        lengths = [backend.chat_length(_messages(row["turns"], ["-"])) for row in rows]
    else:
        lengths = [backend.prompt_length(conversation(config.template, row["turns"], ["-"])) for row in rows]
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
    completions = _answers(backend, [rows[i] for i in batch], [row["answers"] for row in before], config)
    return [
        {
            "answers": [*known["answers"], completion.text],
            "tokens": [*known["tokens"], completion.tokens],
            "finished": [*known["finished"], completion.finished],
            **_refusals(known, completion),
        }
        for known, completion in zip(before, completions, strict=True)
    ]


def _refusals(known: Mapping[str, Any], completion: Completion) -> dict[str, dict[str, str]]:
    """{"refusals": {turn, counted from 0: why an endpoint did not answer it}} if there are any."""
    refusals = dict(known.get("refusals", {}))
    if completion.refusal:
        refusals[str(len(known["answers"]))] = completion.refusal
    return {"refusals": refusals} if refusals else {}


def _answers(
    backend: Any, rows: Sequence[dict[str, Any]], said: Sequence[list[str]], config: Config
) -> list[Completion]:
    """Returns the next answer of each conversation; rows with the same temperature are generated together.

    A first answer can have more tokens as part of a prompt than it was generated with. If it leaves too few of a
    model's learned positions, the second answer gets fewer tokens than `max_new_tokens`.
    """
    completions: dict[int, Completion] = {}
    temperatures = [0.0 if config.greedy else _TEMPERATURES.get(row["category"], 0.0) for row in rows]
    for temperature in dict.fromkeys(temperatures):
        places = [place for place, one in enumerate(temperatures) if one == temperature]
        stop = () if config.template == "chat" else ("\n### Instruction:", "\nQ: ")
        seeds = [_seed(config.seed, rows[place]["question_id"], len(said[place])) for place in places]
        turns = [(rows[place]["turns"][: len(said[place]) + 1], said[place]) for place in places]
        if config.template == "chat":
            ask, length_of = backend.chat, getattr(backend, "chat_length", len)
            prompts: list[Any] = [_messages(*one) for one in turns]
        else:
            ask, length_of = backend.generate, backend.prompt_length
            prompts = [conversation(config.template, *one) for one in turns]
        left = backend.tokens_left(list(map(length_of, prompts))) if hasattr(backend, "tokens_left") else None
        most = config.max_new_tokens if left is None or left < 1 else min(left, config.max_new_tokens)
        answered = ask(prompts, Sampling(most, temperature, stop=stop), seeds)
        completions |= dict(zip(places, answered, strict=True))
    return [completions[place] for place in range(len(rows))]


def _messages(turns: Sequence[str], said: Sequence[str]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(said, turns[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return messages


def _seed(seed: int, question: int, turn: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{question}/{turn}".encode()).digest()[:6], "little")


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """Have the answers of a finished predictions.jsonl judged, and score them. Answers that have a judgment keep it.

    Raises:
        ConfigError: the file, or the judge's prompts beside it, are not there or broken.
        EndpointError: the judge cannot be asked; what it has said is kept.
    """
    rows = predictions.read(path, FIELDS)
    prompts = _kept_prompts(path.parent)
    judgments = _judge(rows, prompts, config, path.with_name("judgments.jsonl"))
    result = score(rows, judgments)
    result["judge"] = config.judge
    result["judged"] = sorted({one["day"] for one in judgments})
    if adapted := [one["adapted"] for one in judgments if "adapted" in one]:
        result["adapted"] = adapted[-1]
    if refused := [one for one in judgments if "refusal" in one]:
        result["refused"] = [{key: one[key] for key in ("question_id", "turn", "refusal")} for one in refused]
    write_json(path.with_name("score.json"), result)
    plot_categories({config.judge: result["metrics"]}, rows, path.with_name("radar.png"))
    return result


def _judge(
    rows: Sequence[dict[str, Any]], prompts: Mapping[str, Any], config: Config, path: Path
) -> list[dict[str, Any]]:
    """Judgments of both turns of each row: what `path` has, and what the judge says of the others."""
    wanted = {}
    for row in rows:
        for turn in (1, 2):
            system, text, name = judge_request(row, turn, prompts)
            about = {"question_id": row["question_id"], "turn": turn}
            wanted[_key(config.judge, *about.values(), system, text)] = {
                **about,
                "prompt": name,
                "system": system,
                "text": text,
            }
    told = _told(path)
    known = {one["key"]: one for one in told if one["key"] in wanted}
    left = [key for key in wanted if key not in known or known[key]["rating"] is None]
    endpoint = Endpoint(
        config.judge_url,
        config.judge,
        config.judge_key,
        concurrency=config.judge_concurrency,
        requests_per_minute=config.judge_rpm,
        timeout_s=config.judge_timeout,
    )
    judge = OpenAIBackend(endpoint)
    write_atomic(path, predictions.appendable(told))  # drop an incomplete last line before appending
    with progress(f"judge ({config.judge})", len(left), least=1) as advance, open(path, "a", encoding="utf-8") as file:
        for key, judgment in judge.each(lambda key: _ask_judge(judge, wanted[key], config), left):
            known[key] = {**judgment, "key": key}
            file.write(predictions.appendable([known[key]]))
            file.flush()
            advance(1)
    found = [known[key] for key in wanted]
    others = [one for one in told if one["key"] not in wanted]  # of another judge: keep them, as they were paid for
    write_atomic(path, predictions.appendable([*others, *found]))
    return found


def _ask_judge(judge: OpenAIBackend, request: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What the judge says of one answer; a reply without a rating is asked for again, up to `judge_tries` times.

    "adapted" is what the judge's model was not sent, or by another name; "refusal" is why it says nothing.
    """
    messages = [{"role": "system", "content": request["system"]}, {"role": "user", "content": request["text"]}]
    for attempt in range(1, config.judge_tries + 1):
        # The first try is greedy, as the official one is; asked again, a greedy judge would say the same.
        sampling = Sampling(config.judge_tokens, 0.0 if attempt == 1 else 0.7)
        reply = judge.chat([messages], sampling, [attempt])[0]
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
    """(system prompt, request, the official prompt's name) for one turn of an answered question."""
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
    # By hand, not str.format: an answer may hold braces of its own, and so may a reference.
    text = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), prompts[name]["prompt_template"])
    return prompts[name]["system_prompt"], text, name


def judge_prompts(folder: Path) -> dict[str, dict[str, str]]:
    """{name: {"system_prompt", "prompt_template"}} of the official prompts for single answers.

    Raises:
        ConfigError: the file or one of the four is missing.
    """
    path = folder / "judge_prompts.jsonl"
    columns = {"name": "text", "system_prompt": "text", "prompt_template": "text"}
    found = {row["name"]: row for row in typed_columns(read_jsonl(path), columns, str(path))}
    missing = [name for name in _PROMPTS.values() if name not in found]
    if missing:
        raise ConfigError([f"Missing prompt {', '.join(missing)} in {path}; fetch FastChat's file again."])
    return {name: {key: found[name][key] for key in list(columns)[1:]} for name in _PROMPTS.values()}


def benchmark_rows(data_root: str | None, config: Config) -> list[dict[str, Any]]:
    """The questions, with their reference answers.

    Raises:
        ConfigError: files are missing or broken; every error at once.
    """
    if config.folder is None and data_root is None:
        raise ConfigError(
            [
                "Missing folder: MT-Bench's questions are on no hub as FastChat has them; put its question.jsonl, "
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
    """The turns of a reference answer; `check_rows` says where one is needed and is none."""
    choices = row["choices"]
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("turns") if isinstance(first, dict) else None


def _read(path: Path, columns: dict[str, Any]) -> list[dict[str, Any]]:
    return typed_columns(read_jsonl(path), columns, str(path))


def plot_categories(metrics: Mapping[str, Mapping[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A radar of the mean rating in each category, one line for each entry of `metrics`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    categories = list(dict.fromkeys(row["category"] for row in rows))
    angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
    figure, axes = plt.subplots(figsize=(6, 6), subplot_kw={"projection": "polar"})
    for label, found in metrics.items():
        values = [found[category] if found[category] is not None else np.nan for category in categories]
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
        own_rows=True,
        belongs_to={"judge_key": "judge_url"},
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
