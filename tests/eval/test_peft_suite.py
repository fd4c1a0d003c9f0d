"""How PEFT's own suite reads answers, and where it differs from the strict reading; answers that are drawn."""

import pytest

from eval import gsm8k, peft_suite
from eval.backends import Completion
from flatlora.inputs.rows import read_jsonl

ANSWERS = [
    ("3 * 14 = 42\n#### 42", "42"),
    ("So it is 42.\nThe answer is: 42", "42"),
    ("The answer is 42.", "42"),
    ("The answer is: $42.", "42"),
    ("The answer is: 50%", "50"),
    ("The answer is: 18\n\nQuestion: and 5?", "18"),
    ("The answer is: 18\nThe answer is: 19", "19"),  # the last one counts
    ("The answer is: 1,000", "1,000"),
    ("The answer is: 18 apples", "18 apples"),
    ("The final answer is: 7", "7"),
    ("The answer is: 3\n#### 4", "3"),  # MetaMathQA's mark comes first in the list
    ("The answer is:", None),
    ("It is 42.", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_an_answer_is_the_rest_of_the_line_behind_the_last_mark(text, answer):
    assert peft_suite.answer_of(text) == answer


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("42", 42.0),
        ("-0.5", -0.5),
        ("1 / 4", 0.25),
        ("1e3", 1000.0),
        ("1/0", None),
        ("1/2/3", None),
        ("sNaN", None),
        ("1,000", None),
        ("x", None),
        ("", None),
        ("1e999999999999999999999", None),
    ],
)
def test_decimals_and_fractions_are_numbers(answer, number):
    assert peft_suite.number_in(answer) == number


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The answer is: 0.5", "#### 1/2", True),
        ("The answer is: 18.0", "#### 18", True),
        ("The answer is: 1,000", "#### 1,000", True),
        ("The answer is: 1000", "#### 1,000", False),
        ("The answer is: 18 apples", "#### 18", False),
        ("The answer is: NaN", "#### NaN", False),
        ("18", "#### 18", False),
    ],
)
def test_numbers_are_compared_as_numbers_and_the_rest_as_text(text, reference, right):
    assert peft_suite.is_right(text, reference) is right


def test_a_reference_without_an_answer_is_an_error():
    with pytest.raises(ValueError, match="No answer is announced in the reference '18'"):
        peft_suite.is_right("The answer is: 18", "18")


class Drawn:
    """Answers with the seed that it was given."""

    batch_size = 2

    def describe(self):
        return {"backend": "drawn"}

    def prompt_length(self, prompt):
        return len(prompt)

    def generate(self, prompts, sampling, seeds=None):
        self.sampling = sampling
        return [
            Completion(f"{seed} so the answer: The answer is: 18 apples", 1, True) for seed in seeds or [None, None]
        ]


def test_the_parser_of_the_suite_is_the_headline_and_the_strict_one_stands_beside_it(tmp_path):
    rows = [{"x": "Question: n? Think step by step.\nAnswer:", "y": "#### 18"}] * 2
    backend = Drawn()
    config = gsm8k.Config(parser="peft_suite", temperature=0.6, top_p=0.9)
    result = gsm8k.run(backend, rows, tmp_path, config)
    assert (backend.sampling.temperature, backend.sampling.top_p) == (0.6, 0.9)
    assert result["parser"] == "peft_suite"
    assert result["metrics"]["exact_match"] == result["metrics"]["peft_suite"] == 0
    assert result["metrics"]["strict"] == 1
    found = read_jsonl(tmp_path / "predictions.jsonl")
    assert [row["prompt"] for row in found] == [rows[0]["x"]] * 2  # no blank follows this template
    seeds = [row["seed"] for row in found]
    assert len(set(seeds)) == 2
    assert [row["completion"].split()[0] for row in found] == list(map(str, seeds))
    gsm8k.run(backend, rows, tmp_path / "again", config)
    assert read_jsonl(tmp_path / "again/predictions.jsonl") == found
    gsm8k.run(backend, rows, tmp_path / "greedy", gsm8k.Config())
    assert "seed" not in read_jsonl(tmp_path / "greedy/predictions.jsonl")[0]
