"""A benchmark that is defined by the score of one answer: its means, its errors, and the settings that it records."""

import json

import pytest

from eval import BENCHMARKS
from eval.by_row import ByRow
from eval.command import main
from eval.compare import main as compare
from flatlora.config.settings import Section, setting
from flatlora.utils.errors import ConfigError


class Config(Section):
    max_rows: int | None = setting(None, ge=1, le=100, remedy="null scores all")
    max_new_tokens: int = setting(4, ge=1, le=100, remedy="4 is enough")
    batch_size: int = setting(2, ge=1, le=100, remedy="2 is enough")
    least: int = setting(2, ge=0, le=100, remedy="2 is short")


LENGTH = ByRow(
    name="length",
    version=3,
    metrics=("long", "characters"),
    score_row=lambda row, config: {
        "long": float(len(row["completion"]) >= config.least),
        "characters": len(row["completion"]),
    },
    columns={"topic": str},
    row_problem=lambda row: None if row["topic"] else "its topic is empty",
    scoring=("least",),
)


def answers(*completions):
    shared = {"prompt": "p", "reference": "r", "topic": "t", "tokens": 3, "finished": True}
    return [{**shared, "index": index, "completion": text} for index, text in enumerate(completions)]


def test_a_score_is_the_mean_of_the_rows():
    score = LENGTH.score(answers("a", "bc", "defg"), Config())
    assert score["scorer"] == "length/3"
    assert score["least"] == 2
    assert score["metrics"]["long"] == pytest.approx(2 / 3)
    assert score["metrics"]["characters"] == pytest.approx(7 / 3)
    assert LENGTH.score([], Config())["metrics"]["long"] is None
    assert LENGTH.row_scores(answers("a", "bc"), Config(least=1), None) == {("p", 0): 1.0, ("p", 1): 1.0}


def test_rows_that_cannot_be_scored_are_counted_and_the_first_is_named():
    rows = [{"topic": topic} for topic in ("a", "", "")]
    with pytest.raises(ConfigError, match=r"Invalid row 2 \(and 1 more\) in FILE for length: its topic is empty; use"):
        LENGTH.check_rows(rows, "FILE", Config())
    LENGTH.check_rows(rows[:1], "FILE", Config())


def test_answers_of_two_runs_are_compared_by_the_settings_that_scored_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BENCHMARKS._items, "length", LENGTH.benchmark(Config, "help"))
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, least in zip(folders, (2, 4), strict=True):
        folder.mkdir()
        lines = [json.dumps(row) + "\n" for row in answers("a", "bc", "defg")]
        (folder / "predictions.jsonl").write_text("".join(lines))
        LENGTH.score_file(folder / "predictions.jsonl", Config(least=least))
    with pytest.raises(ConfigError, match=r"scored by least=2 and .* by least=4; score one again"):
        compare([*map(str, folders)])
    LENGTH.score_file(folders[0] / "predictions.jsonl", Config(least=4))
    compare([*map(str, folders)])
    assert "length long" in capsys.readouterr().out


def test_a_model_without_a_run_needs_rows(monkeypatch, capsys):
    monkeypatch.setitem(BENCHMARKS._items, "length", LENGTH.benchmark(Config, "help"))
    assert main("length", ["some/model", "device=cpu"]) == 2
    assert 'name them with rows=FILE.jsonl ({"x", "y", "topic"}; a run' in capsys.readouterr().err
