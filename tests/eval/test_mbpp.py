"""MBPP and HumanEval+: canonical solutions pass, wrong ones fail, in the hub's columns."""

import json
import os
from pathlib import Path

import pytest

from eval import humaneval, humaneval_plus, mbpp, predictions
from eval.backends import Completion
from eval.command import main
from flatlora.inputs.rows import read_jsonl
from flatlora.utils.errors import ConfigError
from tests.conftest import write_split

ALLOWED = {"allow_code_execution": True, "samples": 1, "temperature": 0.0}
FULL = [
    {
        "task_id": 11,
        "text": "Write a python function to remove the first and last letter.",
        "code": "import re\r\ndef inner(s): \r\n    return s[1:-1]",
        "test_list": ['assert inner("hello") == "ell"', 'assert inner("ab") == ""'],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    {
        "task_id": 56,
        "text": "Write a python function to check if a number is even.",
        "code": "def check(n):\n    return n % 2 == 0",
        "test_list": ["assert check(70) == True", "assert check(23) == False"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    {
        "task_id": 367,
        "text": "Write a function to count the nodes of a tree.",
        "code": "class Node:\n    def __init__(self, data):\n        self.data, self.left = data, None\n"
        "def depth(root):\n    return 0 if root is None else 1 + depth(root.left)",
        "test_list": ["assert depth(root) == 2", "assert depth(None) == 0"],
        "test_setup_code": "root = Node(1)\r\nroot.left = Node(2)\r\n",
        "challenge_test_list": [],
    },
]
SANITIZED = [
    {
        "source_file": "x.ipynb",
        "task_id": 12,
        "prompt": "Write a function to find the area of a circle.",
        "code": "import math\ndef area(r):\n    return math.pi * r ** 2",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(area(1), 3.14159, rel_tol=0.001)", "assert area(0) == 0"],
    }
]
WRONG = {11: "def inner(s):\n    return s", 56: "def check(n):\n    return True", 367: "def depth(root):\n    return 2"}


class Speaker:
    """Answers each prompt with what it is given."""

    batch_size = 8

    def __init__(self, answers):
        self.answers = answers

    def describe(self):
        return {"backend": "speaker"}

    def prompt_length(self, prompt):
        return len(prompt)

    def generate(self, prompts, sampling, seeds=None):
        return [Completion(self.answers[prompt], 5, True) for prompt in prompts]


def passes(rows, programs, folder):
    """Whether the tests of each row pass on its program, as a model would write it in a block."""
    config = mbpp.Config(**ALLOWED)
    mbpp.MBPP.check_rows(rows, "here", config)
    answers = {mbpp.ask(row, config)[0]: f"{program}\n```\nDone." for row, program in zip(rows, programs, strict=True)}
    score = mbpp.MBPP.run(Speaker(answers), rows, folder, config)
    assert score["n"] == len(rows)
    outcomes = predictions.appended_rows(folder / "outcomes.jsonl")
    return [row["passed"] for row in outcomes]


@pytest.mark.parametrize("rows", [FULL, SANITIZED], ids=["full", "sanitized"])
def test_canonical_solutions_pass(rows, tmp_path):
    assert passes(rows, [row["code"] for row in rows], tmp_path) == [True] * len(rows)


def test_wrong_programs_fail(tmp_path):
    node = "class Node:\n    def __init__(self, data): pass\n"
    programs = [WRONG[row["task_id"]] for row in FULL]
    rows = [*FULL, FULL[2] | {"task_id": 368, "text": "Count."}]
    assert passes(rows, [*programs, node + programs[2]], tmp_path) == [False] * 4


@pytest.mark.skipif("MBPP" not in os.environ, reason="MBPP=FILE.jsonl, with the columns of full")
def test_all_canonical_solutions_of_a_file_pass(tmp_path):
    rows = read_jsonl(Path(os.environ["MBPP"]))
    assert all(passes(rows, [row["code"] for row in rows], tmp_path))


def test_prompts_have_the_sentence_and_the_tests():
    text, form = mbpp.ask(SANITIZED[0], mbpp.Config(**ALLOWED, template="none"))
    assert form == "instruction"
    assert "find the area of a circle. Answer with" in text
    assert "assert area(0) == 0\n```" in text
    assert text.endswith("```python\n")


def test_rows_are_read_as_the_hub_has_them(tmp_path):
    for subset, rows in (("full", FULL), ("sanitized", SANITIZED)):
        write_split(tmp_path, "google-research-datasets/mbpp", subset, "test", rows)
        read = mbpp.benchmark_rows(str(tmp_path), mbpp.Config(**ALLOWED, subset=subset))
        assert [row["task_id"] for row in read] == [row["task_id"] for row in rows]
        mbpp.MBPP.check_rows(read, "here", mbpp.Config(**ALLOWED))
    with pytest.raises(ConfigError, match=r"humanevalplus/default/test\.jsonl"):
        humaneval_plus.benchmark_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "def other(s):\n    return s"}, "its tests need no function of its solution"),
        ({"code": "def inner(s:"}, "it is not valid Python"),
        ({"test_setup_code": "root = (", "text": "x"}, "it is not valid Python"),
        ({"text": None}, "it has neither prompt and test_imports"),
    ],
)
def test_problems_that_cannot_be_tried_are_named(changes, message):
    row = {key: value for key, value in (FULL[0] | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=f"Invalid problem in here, row 2: {message}"):
        mbpp.MBPP.check_rows([FULL[0], row], "here", mbpp.Config(**ALLOWED))


@pytest.mark.parametrize("name", ["mbpp", "humaneval_plus"])
def test_code_is_not_run_unasked(name, capsys):
    assert main(name, ["some/model"]) == 2
    assert f"Invalid eval.{name} without eval.allow_code_execution=true" in " ".join(capsys.readouterr().err.split())


PLUS = """import numpy as np

def assertion(out, exp, atol):
    assert out == exp, f"out: {out}, exp: {exp}"

def check(candidate):
    inputs = [[[1, 2]], [[]]]
    results = [[1, 1, 2, 2], []]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""  # in EvalPlus's form


def test_humaneval_plus_is_humaneval_with_other_tests(tmp_path):
    row = {
        "task_id": "HumanEval/0",
        "prompt": 'def twice(xs):\n    """Each of xs twice."""\n',
        "canonical_solution": "\n    return [x for x in xs for _ in range(2)]\n\n",
        "test": PLUS,
        "entry_point": "twice",
    }
    write_split(tmp_path, "evalplus/humanevalplus", "default", "test", [row])
    rows = humaneval_plus.benchmark_rows(str(tmp_path))
    config = humaneval_plus.Config(**ALLOWED, prompt="completion")
    for answer, right in ((row["canonical_solution"], 1.0), ("    return xs + xs\n", 0.0)):
        folder = tmp_path / str(right)
        score = humaneval_plus.HUMANEVAL_PLUS.run(Speaker({row["prompt"]: answer}), rows, folder, config)
        assert score["metrics"]["pass@1"] == right
        assert json.loads((folder / "score.json").read_text())["scorer"] == "humaneval_plus/1"
    assert humaneval.HUMANEVAL.name == "humaneval"
