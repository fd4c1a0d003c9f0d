"""A search trains each suggestion once, goes on where it was stopped, and takes no score of test rows."""

import json
from pathlib import Path

import pytest

from flatlora.experiment.run import EXIT_INTERRUPTED
from scripts import search
from tests.conftest import metrics_rows

pytest.importorskip("optuna")

SEARCHED = ["optim.lr=tag(log, interval(1e-5, 1e-1))", "peft.lora_r=2,4"]


@pytest.fixture
def words(tiny_settings) -> list[str]:
    replaced = ("optim.lr=", "peft.lora_r=", "dataset.validation_rows=", "wandb.name=")
    kept = [word for word in tiny_settings if not word.startswith(replaced)]
    return ["--objective", "eval_loss", *kept, "dataset.validation_rows=4", "trainer.max_steps=2", *SEARCHED]


def runs(words: list[str]) -> dict[Path, dict]:
    root = next(Path(word.partition("=")[2]) for word in words if word.startswith("results_root="))
    return {path.parent: json.loads(path.read_text()) for path in root.glob("*/*/*/run.json")}


@pytest.mark.slow
def test_trials_are_runs_and_the_same_command_goes_on(words, monkeypatch, capsys):
    assert search.main([*words, "--trials", "2"]) == 0
    first = runs(words)
    assert len(first) == 2
    started = {folder: record["started_at"] for folder, record in first.items()}
    capsys.readouterr()
    assert search.main([*words, "--trials", "3"]) == 0
    shown = capsys.readouterr().out
    records = runs(words)
    assert len(records) == 3
    assert all(records[folder]["started_at"] == moment for folder, moment in started.items())
    losses = sorted(record["metrics"]["eval_loss"] for record in records.values())
    table = shown[shown.index("eval_loss of 3 trials") :]
    assert [line for line in table.splitlines() if f"{losses[0]:.6g}" in line] == [table.splitlines()[4]]
    for folder, record in records.items():
        assert metrics_rows(folder)[-1]["eval_loss"] == record["metrics"]["eval_loss"]
        assert record["experiment"]["peft"]["lora_r"] in (2, 4)
        assert 1e-5 <= record["experiment"]["optim"]["lr"] <= 1e-1
    rates = {record["experiment"]["optim"]["lr"] for record in records.values()}
    assert len(rates) == 3


def objective_by_rate(monkeypatch, code_of=lambda settings: 0):
    """Runs that train nothing: their eval_loss is the distance of the learning rate from 1e-3, in decades."""
    asked = []

    class Folder:
        def __init__(self, experiment):
            import math

            from flatlora.runs.record import RunRecord

            loss = abs(math.log10(experiment.optim.lr / 1e-3))
            self.path, self.record = Path("run"), RunRecord(status="finished", metrics={"eval_loss": loss})

    def run(suite, experiment, settings):
        asked.append(experiment.optim.lr)
        return code_of(len(asked))

    monkeypatch.setattr(search, "run", run)
    monkeypatch.setattr(search.RunFolder, "of", Folder)
    monkeypatch.setattr(search, "_corners", lambda fixed, spaces: [])
    return asked


@pytest.mark.extra
def test_suggestions_approach_the_best_value(words, monkeypatch):
    asked = objective_by_rate(monkeypatch)
    assert search.main([*words, "--trials", "18"]) == 0
    first, last = asked[:8], asked[-8:]
    assert sum(1e-4 < rate < 1e-2 for rate in last) > sum(1e-4 < rate < 1e-2 for rate in first)
    again = objective_by_rate(monkeypatch)
    search.main([*words, "--trials", "12"])  # ten are drawn at random first
    assert again == asked[:12]


def test_a_failed_trial_is_passed_over_and_an_interrupted_one_ends_the_search(words, monkeypatch, capsys):
    codes = {1: 1, 2: 0, 3: EXIT_INTERRUPTED}
    asked = objective_by_rate(monkeypatch, codes.get)
    assert search.main([*words, "--trials", "9"]) == EXIT_INTERRUPTED
    assert len(asked) == 3
    assert "failed" in capsys.readouterr().out
    objective_by_rate(monkeypatch, lambda number: 1)
    assert search.main([*words, "--trials", "2"]) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--trials", "0", "--seed", "-1"], ["Invalid --trials 0", "Invalid --seed -1"]),
        (["optim.lr=glob(*)"], ["Cannot search optim.lr=glob(*)"]),
        (["optim.lr=tag(log, interval(0, 1))", "seed=range(3,1)"], ["Cannot search optim.lr=", "Cannot search seed="]),
        (["optim.lr=interval(-1, 1)"], ["Invalid optim.lr=-1"]),
        (["dataset.validation_rows=0"], ["no row is held out; set dataset.validation_rows"]),
        (["--objective", "gsm8k/f1"], ["it is one of eval_loss; choose one"]),
        (["eval=[gsm8k]", "--objective", "gsm8k/exact_match"], ["set dataset.evaluate=validation"]),
        (["--objective", "loss"], ["it is one of eval_loss"]),
        (["-m"], ["Unknown option -m"]),
    ],
)
def test_errors_are_found_before_the_first_trial(words, changed, message, monkeypatch, capsys):
    monkeypatch.setattr(search, "run", lambda *_: pytest.fail("a trial was started"))
    keys = tuple(f"{word.partition('=')[0]}=" for word in changed if "=" in word)
    assert search.main([*(word for word in words if not word.startswith(keys)), *changed]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert all(part in shown for part in message), shown


def test_nothing_to_search_is_an_error(tiny_settings, capsys):
    assert search.main(["--objective", "eval_loss", *tiny_settings]) == 2
    assert "Nothing to search" in capsys.readouterr().err


def test_a_misspelled_metric_is_named_after_the_first_run(words, monkeypatch, capsys):
    objective_by_rate(monkeypatch)
    words = [*words, "eval=[gsm8k]", "dataset.evaluate=validation", "--objective", "gsm8k/exact"]
    assert search.main([word for word in words if word != "eval=[]"]) == 2
    assert "Unknown --objective gsm8k/exact: known: eval_loss" in " ".join(capsys.readouterr().err.split())
