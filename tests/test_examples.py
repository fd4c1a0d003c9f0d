"""The examples run, learn, and leave the backbone as it was."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
IN_TRL = [f"callback_in_{method}_trainer" for method in ("sft", "dpo", "grpo")]
TRAINING = ["callback_in_trainer", "hand_written_loop", "lora_pro_alone", *IN_TRL]


def load(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", TRAINING)
def test_it_learns(name, capsys, monkeypatch):
    if name in IN_TRL:
        pytest.importorskip("trl")
        monkeypatch.syspath_prepend(EXAMPLES)  # they import tiny_model, as a script does from its own folder
    result = load(name)["main"]()
    measure, sign = ("reward", 1) if "grpo" in name else ("loss", -1)
    assert sign * (result["last"] - result["first"]) > 0.3  # of a loss: nats, and some learn no more in 20 steps
    assert result["unchanged"]
    assert f"{measure} {result['first']:.3f}" in capsys.readouterr().out


def test_records_are_read(capsys):
    rows = load("read_run_records")["main"](EXAMPLES.parent / "results/study")
    assert len(rows) > 10
    assert {row[5] for row in rows} == {"unchanged"}
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_no_example_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*TRAINING, "read_run_records", "tiny_model"}
