"""SQuAD's scores: words as its own script compares them, the best of all accepted answers, and a run."""

import json

import pytest

import run_exp
from eval import squad
from eval.command import main
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, write_split


def row(completion, *answers):
    return {"completion": completion, "answers": list(answers), "finished": True, "tokens": 3}


@pytest.mark.parametrize(
    ("completion", "answers", "exact", "f1"),
    [
        ("The Eiffel tower.", ["Eiffel Tower"], 1, 1.0),
        ("the  eiffel   TOWER!", ["Eiffel Tower"], 1, 1.0),
        ("Eiffel", ["Eiffel Tower"], 0, 2 / 3),
        ("a tall tower", ["the tower", "tall tower"], 1, 1.0),
        ("42 m", ["42", "42 m"], 1, 1.0),
        ("\n\n 42 m \nQ: another?", ["42 m"], 1, 1.0),
        ("42 metres and 3 more words", ["42"], 0, 2 / 7),
        ("no idea", ["42"], 0, 0.0),
        ("", ["42"], 0, 0.0),
        ("42 42", ["42"], 0, 2 / 3),
    ],
)
def test_answers_and_what_they_are_worth(completion, answers, exact, f1):
    metrics = squad.SCORER.score([row(completion, *answers)], squad.Config())["metrics"]
    assert metrics["exact_match"] == exact
    assert metrics["f1"] == pytest.approx(f1)
    assert metrics["unanswered"] == (completion == "")


def test_scores_are_means_and_no_rows_are_no_score():
    metrics = squad.SCORER.score([row("42", "42"), row("x", "42") | {"finished": False}], squad.Config())["metrics"]
    assert metrics == {
        "n": 2,
        "f1": 0.5,
        "exact_match": 0.5,
        "unanswered": 0.0,
        "unfinished": 0.5,
        "mean_tokens": 3.0,
    }
    empty = squad.SCORER.score([], squad.Config())["metrics"]
    assert empty.pop("n") == 0
    assert set(empty.values()) == {None}


@pytest.mark.parametrize("answers", [None, [], "42", [5]])
def test_rows_without_accepted_answers_are_named(answers):
    good = {"x": "q", "y": "42", "answers": ["42"]}
    with pytest.raises(ConfigError, match=r"Invalid row 2 \(and 1 more\) in FILE for squad: .*at least one text"):
        squad.SCORER.check_rows([good, good | {"answers": answers}, {"x": "q", "y": "42"}], "FILE", squad.Config())
    squad.SCORER.check_rows([good], "FILE", squad.Config())


def test_a_run_is_scored_and_scored_again(tiny_settings, tmp_path):
    rows = [
        {"id": "0", "title": "T", "context": f"It is {i} m.", "question": "How high?", "answers": {"text": [f"{i} m"]}}
        for i in range(8)
    ]
    for split in ("train", "validation"):
        write_split(tmp_path, "rajpurkar/squad", "plain_text", split, rows)
    words = [word for word in tiny_settings if word != "eval=[]" and not word.startswith("dataset.train")]
    words += ["dataset=squad", f"data_root={tmp_path}", "dataset.train_rows=8", "trainer.max_steps=1"]
    words += ["eval.squad.max_new_tokens=4"]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    first = json.loads((folder / "eval/squad/score.json").read_text())
    assert first["n"] == 4
    assert json.loads((folder / "run.json").read_text())["metrics"]["squad/f1"] == first["metrics"]["f1"]
    assert main("squad", [str(folder), "score_only=true"]) == 0
    assert main("squad", [str(tmp_path / "results"), f"data_root={tmp_path}"]) == 2
    assert len(squad.benchmark_rows(str(tmp_path), squad.Config())) == 8


def test_broken_answers_of_squad_itself_are_named(tmp_path, capsys):
    good = {"context": "c", "question": "q", "answers": {"text": ["42"], "answer_start": [0]}}
    rows = [good, good | {"answers": {"text": []}}, good | {"answers": None}]
    write_split(tmp_path, "rajpurkar/squad", "plain_text", "validation", rows)
    assert main("squad", ["some/model", f"data_root={tmp_path}"]) == 2
    assert "Invalid row 2 (and 1 more) in the benchmark's own rows for squad: " in capsys.readouterr().err
