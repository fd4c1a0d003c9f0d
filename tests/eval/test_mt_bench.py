"""MT-Bench: what is asked, what a judge's reply is worth, a judge that misbehaves, and a resumed evaluation."""

import json
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import run_exp
from eval import mt_bench, predictions
from eval.backends import Completion
from eval.backends.hf import HFBackend
from eval.command import main
from flatlora.inputs.rows import jsonl
from flatlora.inputs.templates import conversation
from flatlora.utils.errors import ConfigError
from tests.conftest import Killed, run_folder
from tests.loopback import FILTERED, Server, refuse_as_gpt_5

pytest.importorskip("openai")
CATEGORIES = ("writing", "math", "coding", "stem")


@pytest.fixture
def bench(tmp_path):
    """Four questions with FastChat's columns, and prompts with its names and placeholders."""
    folder = tmp_path / "bench"
    folder.mkdir()
    questions = [
        {"question_id": 81 + i, "category": category, "turns": [f"First {i}?", f"Then {{question}} {i}?"]}
        for i, category in enumerate(CATEGORIES)
    ]
    references = [
        {"question_id": 81 + i, "answer_id": "a", "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["R1", "R2"]}]}
        for i in (1, 2)
    ]
    prompts = {
        "single-v1": "Q {question} A {answer}",
        "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {question_2} {ref_answer_2} | {answer_1} {answer_2}",
    }
    (folder / "question.jsonl").write_text(jsonl(questions))
    (folder / "reference_gpt-4.jsonl").write_text(jsonl(references))
    (folder / "judge_prompts.jsonl").write_text(
        jsonl(
            {"name": n, "type": "single", "system_prompt": f"S {n}", "prompt_template": t} for n, t in prompts.items()
        )
    )
    return folder


@pytest.fixture
def judge():
    server = Server(lambda prompt: "Good.\nRating: [[7]]")
    yield server
    server.shutdown()
    server.server_close()


def config(judge, bench, **changes):
    return mt_bench.Config(judge="judge", judge_url=judge.url, folder=str(bench), judge_concurrency=1, **changes)


class Echo:
    """Answers with the number of times it was asked and what its temperature was."""

    batch_size = 2

    def __init__(self):
        self.asked = []

    def describe(self):
        return {"backend": "echo"}

    def prompt_length(self, prompt):
        return len(prompt)

    def generate(self, prompts, sampling, seeds=None):
        self.asked += [(prompt, sampling.temperature, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [Completion(f"said {len(prompt)}", 2, True) for prompt in prompts]


def test_both_turns_are_asked_and_judged(tmp_path, bench, judge):
    backend, settings = Echo(), config(judge, bench)
    rows = mt_bench.benchmark_rows(None, settings)
    mt_bench.check_rows(rows, "here", settings)
    result = mt_bench.run(backend, rows, tmp_path / "out", settings)
    metrics = result["metrics"]
    assert metrics == {
        "n": 4,
        "rating": 7.0,
        "turn_1": 7.0,
        "turn_2": 7.0,
        **dict.fromkeys(CATEGORIES, 7.0),
        "unrated": 0,
        "unfinished": 0.0,
        "mean_tokens": 2.0,
    }
    assert result["judge"] == "judge"
    assert len(result["judged"]) == 1
    assert {prompt.count("### Instruction:") for prompt, *_ in backend.asked} == {1, 2}
    temperatures = {prompt.split("First ")[1][0]: temperature for prompt, temperature, _ in backend.asked}
    assert temperatures == {"0": 0.7, "1": 0.0, "2": 0.0, "3": 0.1}
    assert len({seed for *_, seed in backend.asked}) == 8
    asked = [body["messages"] for _, body, _ in judge.seen]
    assert [messages[0]["content"] for messages in asked[:4]] == [
        "S single-v1",
        "S single-v1-multi-turn",
        "S single-math-v1",
        "S single-math-v1-multi-turn",
    ]
    assert asked[0][1]["content"].startswith("Q First 0? A said ")
    assert "Then {question} 0?" in asked[1][1]["content"]  # braces of a question are left alone
    assert asked[2][1]["content"].startswith("Q First 1? R R1 A said ")
    assert {body["temperature"] for _, body, _ in judge.seen} == {0.0}
    assert (tmp_path / "out/radar.png").stat().st_size > 10_000


def test_a_first_answer_that_grew_leaves_the_second_fewer_tokens(tmp_path, bench, judge, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    settings = config(judge, bench, max_rows=1, max_new_tokens=8, template="qa")
    rows = mt_bench.benchmark_rows(None, settings)
    first = "1 2 3 4 5 6"  # more tokens than the 8 that the model is said to have written
    grown = len(tokenizer(conversation("qa", rows[0]["turns"], [first]))["input_ids"])
    shape = {"vocab_size": len(tokenizer), "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(n_positions=grown + 4, **shape, eos_token_id=None))

    class Grown(HFBackend):
        def generate(self, prompts, sampling, seeds=None):
            if "Then" not in prompts[0]:
                return [Completion(first, 8, False)]
            return super().generate(prompts, sampling, seeds)

        def check_lengths(self, lengths, new_tokens, *, task=None):
            if task is None:  # of the estimate for both turns, which this model passes nearly
                super().check_lengths(lengths, new_tokens)

    result = mt_bench.run(Grown(model, tokenizer, batch_size=2), rows, tmp_path / "out", settings)
    (row,) = predictions.read(tmp_path / "out/predictions.jsonl", mt_bench.FIELDS)
    assert row["tokens"] == [8, 5]  # positions for four, and the last one is not read
    assert row["finished"] == [False, False]
    assert result["metrics"]["unfinished"] == 1.0


def test_refused_answers_are_counted(tmp_path, bench, judge):
    class Refused(Echo):
        def generate(self, prompts, sampling, seeds=None):
            super().generate(prompts, sampling, seeds)
            refused = ["First 1?" in prompt and "Then" in prompt for prompt in prompts]
            return [Completion("", 0, False, "a filter") if no else Completion("yes", 2, True) for no in refused]

    settings = config(judge, bench)
    result = mt_bench.run(Refused(), mt_bench.benchmark_rows(None, settings), tmp_path / "out", settings)
    rows = predictions.read(tmp_path / "out/predictions.jsonl", mt_bench.FIELDS)
    assert [row.get("refusals") for row in rows] == [None, {"1": "a filter"}, None, None]
    assert (result["metrics"]["refused"], result["metrics"]["unfinished"]) == (1 / 8, 0.0)


@pytest.mark.parametrize("template", ["qa", "chat"])
@pytest.mark.parametrize("lacking", [0, 1])
def test_second_turns_that_may_not_fit_are_refused_before_the_first(
    tmp_path, bench, judge, tiny_model_folder, template, lacking
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    settings = config(judge, bench, max_rows=2, max_new_tokens=8, template=template)
    rows = mt_bench.benchmark_rows(None, settings)
    texts = [f"{row['turns'][0]}\n-\n{row['turns'][1]}\n" for row in rows[:2]]
    if template == "qa":
        texts = [conversation("qa", row["turns"], ["-"]) for row in rows[:2]]
    # Both turns, a first answer of 8 tokens, and a second one, whose last token is not read.
    positions = max(len(tokenizer(text)["input_ids"]) for text in texts) + 8 + 7
    shape = {"vocab_size": len(tokenizer), "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(n_positions=positions - lacking, **shape, eos_token_id=None))
    backend = HFBackend(model, tokenizer, batch_size=2)
    if not lacking:
        assert mt_bench.run(backend, rows, tmp_path / "out", settings)["metrics"]["n"] == 2
        return
    with pytest.raises(ConfigError, match="prompts of second turns, with 8 tokens of a first answer"):
        mt_bench.run(backend, rows, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_greedy_takes_no_temperature(tmp_path, bench, judge):
    backend = Echo()
    settings = config(judge, bench, greedy=True, max_rows=1)
    mt_bench.run(backend, mt_bench.benchmark_rows(None, settings), tmp_path, settings)
    assert {temperature for _, temperature, _ in backend.asked} == {0.0}


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[ 7.5 ]] I say", 7.5),
        ("first [[3]] then [[9]]", 9.0),
        ("Rating: [6]", 6.0),
        ("[[10]]", 10.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("Rating: 8/10", None),
        ("[[rating]]", None),
        ("", None),
        ("see [1] and then [[4]]", 4.0),
        ("[[-3]]", None),
        ('The format is "Rating: [[5]]".\nRating: [[9]]', 9.0),
        ("x[[0]] raises an error there. Rating: [[3]]", 3.0),
        ("Rating: [[3]], for x[[0]] raises an error", 3.0),
        ("The list [[0]] is read wrongly. **Rating: [[7]]**", 7.0),
        ("<think>Perhaps [[2]].</think>\nRating: [[8]]", 8.0),
        ("Perhaps [[2]].</think>\nRating: [[8]]", 8.0),
        ("<think>Perhaps [[2]].</think>\nI cannot say.", None),
        ("<think>Perhaps [[2]], but", None),  # cut off
        ("我的评分是[[8]]", 8.0),
        ("Rating: _[[8]]_", 8.0),
        (r"Rating: \[\[8\]\]", 8.0),
        ("Rating: [[7]]. No: Rating: [[12]]", None),
        ("Rating[[7]]", 7.0),
        ("Rating (from 1 to 10)[[7]]", 7.0),
        ("Rating: [[8]]. Note: the code could use np.array(x)[[2]].", 8.0),
        ("x[[2]] is no rating", None),
        ("as in [1](https://x) and a[2], [4]", 4.0),
        ("Rating: [6] (see a[3])", 6.0),
        ("Rating: [[8]] out of [[10]]", 8.0),
        ("Rating: [[8]]/[[10]]", 8.0),
        ("Rating: [[7]] e.g. np.array([[1]])", 7.0),
        ("Rating: [[3]]. The matrix [[5]] was expected", 3.0),
        ("The matrix [[5]] was expected. **Rating**: [[3]] (best [[10]], worst [[1]])", 3.0),
        ("Rating: [[8]] is much. On reflection, my rating: [[6]] of [[10]].", 6.0),
        ('Rating: [[9]] (asked for as "Rating: [[5]]")', 9.0),
        ("Rating: [[9]]. I explain the rating: it was good.", 9.0),
        ("Rating: [[12]] of [[20]], not [[9]]", None),
        ("Rating: [8] of [10]", 8.0),
    ],
)
def test_ratings_are_read(reply, rating):
    assert mt_bench.parse_rating(reply) == rating


@pytest.mark.parametrize("end", ["", "[6]", "Rating: [[7]]"])
def test_a_long_reply_is_read_in_bounded_time(end):
    begun = time.monotonic()
    assert mt_bench.parse_rating("Rating: " * 200_000 + end) == {"": None, "[6]": 6.0}.get(end, 7.0)
    assert time.monotonic() - begun < 5.0


def test_a_judge_without_a_rating_is_asked_again_and_then_counted_apart(tmp_path, bench, judge):
    settings = config(judge, bench, max_rows=1, judge_tries=3)
    rows = mt_bench.benchmark_rows(None, settings)
    judge.script = [{"say": "no rating"}, {"say": "[[4]]"}, *[{"say": "I would rather not"}] * 3]
    result = mt_bench.run(Echo(), rows, tmp_path, settings)
    assert result["metrics"] == {
        "n": 1,
        "rating": 4.0,
        "turn_1": 4.0,
        "turn_2": None,
        "writing": 4.0,
        "unrated": 1,
        "unfinished": 0.0,
        "mean_tokens": 2.0,
    }
    assert [body["temperature"] for _, body, _ in judge.seen] == [0.0, 0.7, 0.0, 0.7, 0.7]
    reported = [json.loads(line) for line in (tmp_path / "judgments.jsonl").read_text().splitlines()]
    assert [(one["rating"], one["tries"]) for one in reported] == [(4.0, 2), (None, 3)]
    again = mt_bench.score_file(tmp_path / "predictions.jsonl", settings)  # only the one without a rating is asked for
    assert len(judge.seen) == 6
    assert again["metrics"]["turn_2"] == 7.0


@pytest.mark.parametrize("act", ["hang", "garbage", "empty", "drop", (429, {"retry-after": "0"}), (500, {}), "null"])
def test_a_judge_that_misbehaves_is_asked_again(tmp_path, bench, judge, act, monkeypatch):
    plain = mt_bench.Endpoint
    monkeypatch.setattr(mt_bench, "Endpoint", lambda *a, **k: plain(*a, **k | {"first_wait_s": 0.01, "timeout_s": 0.5}))
    settings = config(judge, bench, max_rows=1)
    judge.script = [act]
    result = mt_bench.run(Echo(), mt_bench.benchmark_rows(None, settings), tmp_path, settings)
    assert result["metrics"]["rating"] == 7.0
    assert len(judge.seen) == 3


def test_a_judge_that_ends_on_the_way_leaves_what_it_said(tmp_path, bench, judge):
    settings = config(judge, bench)
    rows = mt_bench.benchmark_rows(None, settings)
    judge.script = [{"say": "[[2]]"}] * 3 + [(401, {})]
    with pytest.raises(OSError, match="refuses judge"):
        mt_bench.run(Echo(), rows, tmp_path, settings)
    kept = (tmp_path / "judgments.jsonl").read_text()
    assert kept.count("\n") == len(judge.seen) - 1 >= 3  # what was under way beside it is kept too
    (tmp_path / "judgments.jsonl").write_text(kept + '{"key": "torn')
    backend = Echo()
    result = mt_bench.run(backend, rows, tmp_path, settings)
    assert backend.asked == []
    assert result["metrics"]["rating"] == (3 * 2 + 5 * 7) / 8
    assert len(judge.seen) == 9


def test_killed_and_resumed_is_never_killed(tmp_path, bench, judge):
    settings = config(judge, bench)
    rows = mt_bench.benchmark_rows(None, settings)
    whole = mt_bench.run(Echo(), rows, tmp_path / "whole", settings)

    def die(done, total, newest):
        if newest:
            raise Killed

    with pytest.raises(Killed):
        mt_bench.run(Echo(), rows, tmp_path / "killed", settings, on_progress=die)
    backend = Echo()
    assert mt_bench.run(backend, rows, tmp_path / "killed", settings) == whole
    assert len(backend.asked) == 6  # of eight: the first batch of first turns was whole
    same = [tmp_path / name / "predictions.jsonl" for name in ("whole", "killed")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_killed_between_the_turns_no_first_answer_is_asked_twice(tmp_path, bench, judge):
    settings, calls = config(judge, bench), []
    rows = mt_bench.benchmark_rows(None, settings)

    def die(done, total, newest):
        calls.append(done)
        if calls.count(total) == 1 and done == 0 and len(calls) > 2:
            raise Killed

    first = Echo()
    with pytest.raises(Killed):
        mt_bench.run(first, rows, tmp_path, settings, on_progress=die)
    assert len(first.asked) == 4
    second = Echo()
    mt_bench.run(second, rows, tmp_path, settings)
    assert len(second.asked) == 4
    assert not {prompt for prompt, *_ in first.asked} & {prompt for prompt, *_ in second.asked}


def test_conversations_stand_as_in_training():
    turns, said = ["One?", "Two?"], ["It is 1. "]
    alpaca = conversation("alpaca", turns, said)
    assert alpaca.startswith("Below is an instruction")
    assert alpaca.endswith("### Response:\n It is 1.\n\n### Instruction:\nTwo?\n\n### Response:\n ")
    assert alpaca.count("Below is") == 1
    assert conversation("qa", turns, said) == "Q: One?\nA:  It is 1.\n\nQ: Two?\nA:  "
    assert conversation("qa", turns[:1], []) == "Q: One?\nA:  "


def test_bad_files_are_errors(tmp_path, bench, judge):
    def errors(**changes):
        settings = config(judge, bench).model_copy(update=changes)

        def read():
            mt_bench.check_rows(mt_bench.benchmark_rows(None, settings), "here", settings)

        with pytest.raises(ConfigError) as caught:
            read()
        return caught.value.errors

    assert "Missing folder: MT-Bench's questions" in errors(folder=None)[0]
    assert len(errors(folder=str(tmp_path / "nope"))) == 3
    text = (bench / "judge_prompts.jsonl").read_text()
    (bench / "judge_prompts.jsonl").write_text(text.splitlines()[0] + "\n")
    assert "Missing prompt single-math-v1, single-v1-multi-turn" in errors()[0]
    (bench / "judge_prompts.jsonl").write_text(text)
    (bench / "reference_gpt-4.jsonl").write_text(jsonl([{"question_id": 1, "choices": [{"turns": ["a", "b"]}]}]))
    assert "row 2: math is judged against reference answers" in errors()[0]


def test_a_run_is_judged_at_its_end_and_again(tiny_settings, bench, judge, tmp_path):
    words = [word for word in tiny_settings if word != "eval=[]"]
    words += ["eval=[mt_bench]", "eval.mt_bench.judge=j", f"eval.mt_bench.judge_url={judge.url}", "trainer.max_steps=1"]
    words += [f"eval.mt_bench.folder={bench}", "eval.mt_bench.max_new_tokens=4", "eval.mt_bench.template=qa"]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    assert json.loads((folder / "run.json").read_text())["metrics"]["mt_bench/rating"] == 7.0
    seen = len(judge.seen)
    assert main("mt_bench", [str(folder), "score_only=true"]) == 0
    assert len(judge.seen) == seen
    assert main("mt_bench", ["served", "backend=openai", f"base_url={judge.url}", "judge=j", f"judge_url={judge.url}",
                             f"folder={bench}", "template=chat", f"out={tmp_path / 'out'}"]) == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert rows[0]["answers"] == ["Good.\nRating: [[7]]"] * 2
    assert main("mt_bench", ["served", "backend=openai", f"base_url={judge.url}"]) == 2
    assert Path(folder / "eval/mt_bench/radar.png").is_file()


def test_a_judges_words_are_kept_beside_anothers(tmp_path, bench, judge):
    one = config(judge, bench, max_rows=1)
    rows = mt_bench.benchmark_rows(None, one)
    mt_bench.run(Echo(), rows, tmp_path, one)
    judge.script = [{"say": "[[3]]"}] * 2
    assert (
        mt_bench.score_file(tmp_path / "predictions.jsonl", one.model_copy(update={"judge": "other"}))["metrics"][
            "rating"
        ]
        == 3.0
    )
    seen = len(judge.seen)
    assert mt_bench.score_file(tmp_path / "predictions.jsonl", one)["metrics"]["rating"] == 7.0
    assert len(judge.seen) == seen
    answered = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert set(mt_bench.row_scores(answered, one, tmp_path)) == {
        (81, turn, name) for turn in (1, 2) for name in ("judge", "other")
    }


def test_rows_of_a_file_and_empty_references(tmp_path, bench, judge):
    settings = config(judge, bench)
    rows = [{key: row[key] for key in mt_bench.ROW_COLUMNS} for row in mt_bench.benchmark_rows(None, settings)]
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    words = ["served", "backend=openai", f"base_url={judge.url}", "judge=j", f"judge_url={judge.url}", "greedy=true"]
    assert (
        main("mt_bench", [*words, f"folder={bench}", f"rows={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'o'}"]) == 0
    )
    (bench / "reference_gpt-4.jsonl").write_text(jsonl([{"question_id": 82, "choices": []}]))
    with pytest.raises(ConfigError, match="math is judged against reference answers"):
        mt_bench.check_rows(mt_bench.benchmark_rows(None, settings), "here", settings)


def test_a_question_that_the_judges_filter_refuses_is_unrated_and_the_rest_goes_on(tmp_path, bench, judge, caplog):
    judge.refuse = lambda body: FILTERED if "First 2?" in body["messages"][-1]["content"] else None
    settings = config(judge, bench)
    result = mt_bench.run(Echo(), mt_bench.benchmark_rows(None, settings), tmp_path, settings)
    assert result["metrics"]["unrated"] == 2
    assert result["metrics"]["rating"] == 7.0
    assert result["metrics"]["coding"] is None
    assert [(one["question_id"], one["turn"]) for one in result["refused"]] == [(83, 1), (83, 2)]
    assert "judge does not judge turn 1 of question 83, which is unrated: status 400: The response was" in caplog.text
    assert len(judge.seen) == 8  # a filter is not asked again


def test_a_reasoning_judge_is_sent_what_it_takes_and_the_record_says_so(tmp_path, bench, judge):
    judge.refuse = refuse_as_gpt_5
    settings = config(judge, bench)
    result = mt_bench.run(Echo(), mt_bench.benchmark_rows(None, settings), tmp_path, settings)
    assert result["metrics"]["rating"] == 7.0
    assert result["metrics"]["unrated"] == 0
    assert result["adapted"] == {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
    assert len(judge.seen) == 8 + 3
    again = mt_bench.score_file(tmp_path / "predictions.jsonl", settings)
    assert again == result
    assert len(judge.seen) == 8 + 3


def test_kept_replies_are_read_by_the_parser_of_today(tmp_path, bench, judge):
    settings = config(judge, bench, max_rows=1)
    mt_bench.run(Echo(), mt_bench.benchmark_rows(None, settings), tmp_path, settings)
    path = tmp_path / "judgments.jsonl"
    reported = predictions.appended_rows(path)
    path.write_text(
        predictions.appendable(one | {"reply": "As in [[2]]: Rating: [[9]]", "rating": 2.0} for one in reported)
    )
    assert mt_bench.score_file(tmp_path / "predictions.jsonl", settings)["metrics"]["rating"] == 9.0
    assert len(judge.seen) == 2
    path.write_text(path.read_text().replace("[[9]]", "[[8]]", 1))  # nobody's words: they are asked for again
    mt_bench.score_file(tmp_path / "predictions.jsonl", settings)
    assert len(judge.seen) == 3
