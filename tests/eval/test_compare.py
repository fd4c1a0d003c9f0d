"""Paired differences against what they are defined as, and the command on runs that were scored."""

import itertools
import json
import shutil

import numpy as np
import pytest

import run_exp
from eval import __main__ as command
from eval import command as score
from eval import compare as comparing
from eval import gsm8k, humaneval, images, programs, squad
from eval.compare import compare
from flatlora.inputs.rows import jsonl
from flatlora.utils import records
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder


def scores(values):
    return {("question", place): float(value) for place, value in enumerate(values)}


def test_mcnemar_is_the_binomial_of_the_rows_that_differ():
    a, b = [1] * 30 + [1] * 3 + [0] * 10 + [0] * 7, [1] * 30 + [0] * 3 + [1] * 10 + [0] * 7
    found = compare("gsm8k", scores(a), scores(b))
    assert (found.only_a, found.only_b, found.questions) == (3, 10, 50)
    tails = sum(1 for draw in itertools.product((0, 1), repeat=13) if sum(draw) <= 3) / 2**13
    assert found.p == pytest.approx(2 * tails)
    assert found.difference == pytest.approx(7 / 50)
    assert found.interval[0] < found.difference < found.interval[1]


def test_the_interval_covers_as_often_as_it_says():
    draw, covered = np.random.default_rng(0), 0
    for _ in range(60):
        a = draw.random(200) < 0.5
        b = np.where(draw.random(200) < 0.2, draw.random(200) < 0.8, a)  # truth: 0.2 · (0.8 − 0.5)
        low, high = compare("gsm8k", scores(a), scores(b)).interval
        covered += low <= 0.06 <= high
    assert 51 <= covered <= 60


def test_equal_answers_have_no_difference_and_no_interval():
    found = compare("gsm8k", scores([1, 0, 1]), scores([1, 0, 1]))
    assert (found.difference, found.interval, found.p) == (0.0, None, 1.0)


def test_scores_between_have_no_mcnemar():
    assert compare("squad", scores([0.5, 0.2, 1]), scores([0.5, 0.9, 1])).p is None


def test_questions_of_one_alone_are_left_out_and_counted():
    found = compare("gsm8k", scores([1, 0, 1, 1]), {**scores([1, 1]), ("other", 0): 1.0})
    assert (found.questions, found.left_out, found.a, found.b) == (2, 3, 0.5, 1.0)
    with pytest.raises(ConfigError, match="no question in common"):
        compare("gsm8k", scores([1]), {("other", 0): 1.0})


def test_twice_the_same_comparison_is_the_same():
    draw = np.random.default_rng(1)
    a, b = scores(draw.random(90) < 0.5), scores(draw.random(90) < 0.6)
    assert compare("gsm8k", a, b) == compare("gsm8k", a, b)


@pytest.fixture
def runs(tiny_settings):
    folders = []
    for name in ("one", "two"):
        words = [word.replace("/results", f"/{name}") for word in tiny_settings if word != "eval=[]"]
        assert run_exp.main([*words, "eval.gsm8k.max_new_tokens=2", "trainer.max_steps=1"]) == 0
        folders.append(run_folder(words))
    return folders


def test_two_runs_are_compared(runs, capsys):
    path = runs[1] / "eval/gsm8k/predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        row["completion"] = row["reference"]  # as if it were right
    path.write_text(jsonl(rows))
    capsys.readouterr()
    assert command.main(["compare", *map(str, runs)]) == 2
    assert "it does not match its generation.json" in " ".join(capsys.readouterr().err.split())
    made = json.loads(path.with_name("generation.json").read_text())
    del made[records.ROWS_HASH]  # of a version that kept no hash
    path.with_name("generation.json").write_text(json.dumps(made))
    assert command.main(["compare", *map(str, runs)]) == 0
    reported = capsys.readouterr().out
    assert "gsm8k exact_match" in reported
    assert "+75.00%" in reported
    assert command.main(["compare", *map(str, runs), "gsm8k"]) == 0
    assert command.main(["compare", str(runs[0] / "eval/gsm8k"), str(runs[1])]) == 0


@pytest.mark.extra
def test_answers_of_any_folder_are_compared(runs, tmp_path, capsys):
    """As out=DIR names it; what they are answers to stands in their score."""
    out = tmp_path / "mine"
    assert score.main("gsm8k", [str(runs[1]), "device=cpu", f"out={out}"]) == 0
    capsys.readouterr()
    for pair in ((runs[0], out), (out, runs[1] / "eval/gsm8k")):
        assert command.main(["compare", *map(str, pair)]) == 0
        assert "gsm8k exact_match" in capsys.readouterr().out
    other = tmp_path / "squad-of-a-user"  # a benchmark's name that is not its own
    shutil.copytree(out, other)
    assert command.main(["compare", str(out), str(other)]) == 0
    (other / "score.json").unlink()
    (out / "score.json").unlink()
    capsys.readouterr()
    assert command.main(["compare", str(out), str(runs[1])]) == 2
    assert (
        f"Invalid path {out}: it holds answers, but neither its score.json nor its name says" in capsys.readouterr().err
    )


def test_what_cannot_be_compared_is_reported(runs, tmp_path, capsys):
    def reported(*words):
        capsys.readouterr()
        assert command.main(list(map(str, words))) == 2
        return capsys.readouterr().err

    assert "Unknown command compar: " in reported("compar", *runs)
    assert "Missing RUN_A and RUN_B: name two runs, as in python -m eval compare RUN_A RUN_B" in reported("compare")
    assert "Missing RUN_B: name two runs" in reported("compare", runs[0])
    both = reported("compare", "/nope", tmp_path)
    assert "Invalid path /nope: no such folder" in both
    assert f"No answers in {tmp_path}" in both
    assert f"No answers to squad in {runs[0]}" in reported("compare", *runs, "squad")
    path = runs[1] / "eval/gsm8k/score.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parser": "math_verify"}))
    assert "was scored by parser=strict and" in reported("compare", *runs)
    (runs[1] / "eval/gsm8k").rename(runs[1] / "eval/gsm8k-max_rows=2")
    assert "eval/gsm8k-max_rows=2; name one of those" in reported("compare", *runs)
    (runs[1] / "eval/gsm8k-max_rows=2").rename(runs[1] / "eval/gsm8k")
    path.unlink()
    (runs[1] / "eval/gsm8k/predictions.jsonl").write_text("{")
    assert "Broken row" in reported("compare", *runs)
    assert command.main([]) == 0
    capsys.readouterr()
    assert command.main(["compare", "--help"]) == 0
    assert "bootstrap confidence interval" in capsys.readouterr().out


def test_rows_of_every_kind_have_scores(tmp_path):
    row = {"index": 0, "prompt": "p", "reference": "#### 5", "completion": "5", "tokens": 1, "finished": True}
    assert gsm8k.row_scores([row], gsm8k.Config(), tmp_path) == {("p", 0): 1.0}
    answered = [row | {"answers": ["5 m"]}]
    assert squad.SCORER.row_scores(answered, squad.Config(), tmp_path) == {("p", 0): pytest.approx(2 / 3)}
    task = {"code": "def f():\n", "test": "", "entry_point": "f", "form": "completion"}
    rows = [{"index": i, "task_id": f"T/{i // 2}", "completion": f"    return {i}", **task} for i in range(4)]
    keys = [programs._program_sha256(humaneval.task(row)) for row in rows]
    (tmp_path / "outcomes.jsonl").write_text(jsonl({"program": key, "passed": key != keys[3]} for key in keys))
    assert humaneval.row_scores(rows, humaneval.Config(), tmp_path) == {"T/0": 1.0, "T/1": 0.5}
    rows[0]["completion"] = "    return 5"  # another program: what was found of the old one says nothing of it
    with pytest.raises(ConfigError, match="lacks outcomes"):
        humaneval.row_scores(rows, humaneval.Config(), tmp_path)


def test_other_pictures_and_other_judges_are_no_common_questions(tmp_path):
    rows = [{"index": i, "label": 0, "prediction": 0} for i in range(3)]
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generation.json").write_text(json.dumps({"images_sha256": name}))
        found.append(images.row_scores(rows, images.Config(), tmp_path / name))
    with pytest.raises(ConfigError, match="no question in common"):
        compare("images", *found)


def test_ratings_are_no_shares(capsys):
    comparing.print_comparisons("a", "b", [compare("mt_bench", {"q": 7.5, "r": 3.0}, {"q": 9.0, "r": 3.0})])
    reported = capsys.readouterr().out
    assert "+0.75" in reported
    assert "%" not in reported.replace("95%", "")
