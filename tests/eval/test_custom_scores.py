"""Scores of own questions."""

import pytest

from eval import custom
from flatlora.inputs.conversations import Chat, turns
from flatlora.inputs.rows import jsonl, prompt_of
from flatlora.utils.errors import ConfigError


def scored(completion, reference, **keys):
    row = {"reference": reference, "completion": completion}
    return custom.score_row(row, custom.Config(**keys))


@pytest.mark.parametrize(
    ("completion", "reference", "keys", "exact", "f1"),
    [
        ("\n Paris \nQ: next", "Paris", {}, True, 1.0),
        ("the city Paris", "Paris", {}, False, pytest.approx(2 / 3)),
        ("a\nb", "a\nb", {}, True, 1.0),
        ("so #### 18\n#### 3", "9 + 9\n#### 18", {"pattern": r"#### (\d+)"}, True, 1.0),
        ("18", "#### 18", {"pattern": r"#### (\d+)"}, False, 0.0),
        ("it is B.", "B", {"pattern": "[ABCD]"}, True, 1.0),
        ("1.5", "15", {}, False, 1.0),  # F1 ignores punctuation
    ],
)
def test_answers_are_compared_whole_or_by_a_pattern(completion, reference, keys, exact, f1):
    found = scored(completion, reference, **keys)
    assert (found["exact_match"], found["f1"]) == (exact, f1)


def test_own_rows_come_from_a_file(tmp_path):
    (tmp_path / "q.csv").write_text("q,a\n2+2?,4\n")
    config = custom.Config(path=str(tmp_path / "q.csv"), prompt="{q} ", answer="{a}")
    assert custom.benchmark_rows(None, config) == [{"x": "2+2? ", "y": "4", "joined": True}]
    with pytest.raises(ConfigError, match="Missing rows for"):
        custom.benchmark_rows(None, custom.Config())


def test_own_conversations_are_asked_in_the_tokenizers_template(tmp_path):
    messages = turns(None, "2+2?", "4", "+1?", "5")
    (tmp_path / "q.jsonl").write_text(jsonl([{"messages": messages}]))
    config = custom.Config(path=str(tmp_path / "q.jsonl"), template="chat", system="Add.")
    (row,) = custom.benchmark_rows(None, config)
    assert prompt_of(row) == Chat([*turns("Add."), *messages[:-1]])
    assert row["y"] == "5"
    assert custom.Config(template="alpaca").template is None  # of a run's data set
    with pytest.raises(ConfigError, match=r"set eval.custom.template=chat"):
        custom.benchmark_rows(None, custom.Config(path=str(tmp_path / "q.jsonl")))


def test_wrong_keys_are_reported():
    (error,) = custom.Config(pattern="(").rule_errors()
    assert "no regular expression" in error.message
    assert [error.keys for error in custom.Config(prompt="{a}").rule_errors()] == [("prompt", "answer")]
    assert [error.keys for error in custom.Config(prompt="{a}", answer="b").rule_errors()] == [("prompt", "path")]


def test_a_pattern_that_never_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(custom, "_PATTERN_S", 0.05)
    with pytest.raises(ConfigError, match=r"it takes more than .* s to search 'aaaa"):
        scored("a" * 60, "b", pattern=r"(a|a|b)+(a|aa)+$c")
