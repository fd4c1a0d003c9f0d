"""Command lines that nobody would type: a sample of scripts/fuzz.py, and that it sees what it looks for."""

import json
import os
from pathlib import Path

import pytest

from flatlora.experiment import commandline
from flatlora.runs.run_folder import RunFolder
from scripts import fuzz


@pytest.mark.parametrize("line", fuzz.draw_lines(40, seed=24), ids=range(40))
def test_a_line_of_the_fuzzer_is_shown_or_rejected(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = fuzz.try_line(line)
    assert outcome.is_fine, outcome
    assert outcome.code in (0, 1, 2)


def test_the_same_seed_draws_the_same_lines():
    assert fuzz.draw_lines(30, 1) == fuzz.draw_lines(30, 1)
    assert fuzz.draw_lines(30, 1) != fuzz.draw_lines(30, 2)
    assert ["-m", "rho=off,flat", "seed=0,1,2"] in fuzz.real_lines()


def test_what_it_looks_for_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def misbehave(words):
        (tmp_path / "left.log").write_text("x")
        raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(commandline, "rewrite", misbehave)
        broken = fuzz.try_line(["run_exp", "seed=1"])
    assert "ValueError: a bug" in broken.output
    assert any("left.log" in event for event in broken.wrote)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "of", classmethod(lambda cls, experiment: cls(tmp_path / "evil")))
        assert fuzz.try_line(["run_exp"]).outside == [str(tmp_path / "evil")]
    assert fuzz.report([broken], ["run_exp seed=1"], 3) == 1
    assert "1 tracebacks, 1 hangs over 60 s, 1 writes outside results_root" in capsys.readouterr().out


@pytest.mark.extra
def test_a_batch_continues_behind_a_line_that_hangs(tmp_path, monkeypatch):
    class Stuck:
        """A child that ends within its second line."""

        pid = os.getpid()

        def __init__(self, words, log, entry):
            first, *others = json.loads(Path(words[0]).read_text())
            outcome = {"command": fuzz._shown(first), "code": 0, "seconds": 0.0}
            Path(words[1]).write_text(json.dumps(outcome) + "\n" if others else "")

        def wait(self, seconds):
            return 0

    monkeypatch.setattr(fuzz, "ForkedRun", Stuck)
    ended, hung = fuzz.run_batch([["run_exp", str(i)] for i in range(4)], tmp_path / "b")
    assert len(ended) + len(hung) == 4
    assert hung
