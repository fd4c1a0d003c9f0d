"""`python -m data NAME`: what a user sees before training, and what is refused."""

import re

import pytest

from data.__main__ import main
from tests.conftest import write_split


@pytest.fixture
def root(tmp_path):
    rows = [{"sentence": f"Sentence {i}.", "label": i % 2, "idx": i} for i in range(30)]
    write_split(tmp_path, "nyu-mll/glue", "cola", "train", rows)
    write_split(tmp_path, "nyu-mll/glue", "cola", "validation", rows[:6])
    return tmp_path


def shown(capsys, *words):
    assert main(words) == 0
    return capsys.readouterr().out


def test_rows_masks_lengths_and_fingerprints_are_shown(root, capsys):
    out = shown(capsys, "cola", "--show", "2", f"data_root={root}")
    assert "train row 2" in out
    assert "train row 3" not in out
    assert "⟦class│ify" in out
    learned = out.partition("⟧")[2]
    assert learned.startswith("un│accept")  # label 0; what has a loss begins behind the bracket
    assert re.search(r"train +│ +30 │", out)
    assert "longest" in out
    assert "█" in out
    assert out.count("sha256") == 1
    assert "nyu-mll/glue (cola, validation): " in out


@pytest.mark.extra
def test_the_same_words_show_the_same_fingerprints_and_other_limits_others(root, capsys):
    words = ("cola", "--show=0", f"data_root={root}")
    assert shown(capsys, *words) == shown(capsys, *words)
    one, other = shown(capsys, *words), shown(capsys, *words, "dataset.max_length=20")
    for head in ("cache ", "rows  "):
        lines = [next(line for line in out.splitlines() if line.startswith(head)) for out in (one, other)]
        assert lines[0] != lines[1]


def test_images_are_shown_with_classes_and_prompts(capsys):
    out = shown(capsys, "digits", "--show", "2")
    assert 'a photo of the handwritten number "1".' in out
    assert "10 classes" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "python -m data NAME"),
        (["colla"], "Unknown option dataset=colla: did you mean dataset=cola?"),
        (["cola", "--show", "x"], "Invalid --show x: it must be a whole number of rows"),
        (["cola", "sst2"], "Invalid names cola sst2: name one data set"),
        (["cola", "dataset.trian_rows=3"], "Unknown key dataset.trian_rows: did you mean dataset.train_rows?"),
        (["cola", "dataset.mismatched=true"], "only MNLI has a second validation split"),
        (["cola", "data_root=/nope"], "Invalid data_root=/nope: it does not exist"),
        (["word_math", "model.hub_id=./nowhere"], "Cannot load model.hub_id=./nowhere: there is no such folder."),
        (["word_math", "dataset.loader=nope"], "Unknown loader nope: known are "),
    ],
)
def test_errors_are_reported(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err
