"""MATH-500: answers in LaTeX against references of its kinds."""

import pytest

from eval import math500
from flatlora.utils.errors import ConfigError
from tests.conftest import write_split

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("reference", "completion", "right"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"So the point is $\boxed{(3, \pi/2)}$.", 1.0),
        (r"\frac{1}{2}", r"We get $\boxed{0.5}$", 1.0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1.0),
        ("[-2,7]", r"The range is $\boxed{[-2, 7]}$.", 1.0),
        ("42", r"<think>\boxed{41}</think>\boxed{42}", 1.0),
        ("42", r"\boxed{41}", 0.0),
        ("[-2,7]", r"\boxed{(-2, 7)}", 0.0),
        ("42", "I do not know.", 0.0),
    ],
)
def test_answers_are_compared_by_value(reference, completion, right):
    scores = math500.score_row({"reference": reference, "completion": completion}, math500.Config())
    assert scores["exact_match"] == right
    assert scores["unparsed"] == float(completion == "I do not know.")


def test_rows_are_read_as_the_hub_has_them(tmp_path):
    rows = [{"problem": "What is 6 times 7?", "answer": "42", "solution": "", "subject": "Algebra", "level": 1}]
    write_split(tmp_path, "HuggingFaceH4/MATH-500", "default", "test", rows)
    (row,) = math500.benchmark_rows(str(tmp_path), math500.Config())
    assert row["y"] == "42"
    assert "What is 6 times 7?" in row["x"]
    assert r"\boxed{}" in row["x"]
    math500.SCORER.check_rows([row], "here", math500.Config())
    with pytest.raises(ConfigError, match="math-verify reads no answer"):
        math500.SCORER.check_rows([row | {"y": ""}], "here", math500.Config())


def test_without_its_package_it_is_an_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reported,) = [error.message for error in math500.Config().rule_errors()]
    assert "run pip install -e '.[math]'" in reported
