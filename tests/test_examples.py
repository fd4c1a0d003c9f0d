"""The examples run, learn, and leave the backbone as it was."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = ["callback_in_trainer", "hand_written_loop", "lora_pro_alone", "callback_in_sft_trainer"]


def load(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", TRAINING)
def test_it_learns(name, capsys):
    if "sft" in name:
        pytest.importorskip("trl")
    result = load(name)["main"]()
    assert result["last"] < result["first"] - 0.3  # nats; a frozen random backbone learns no more in 20 steps
    assert result["unchanged"]
    assert f"loss {result['first']:.3f}" in capsys.readouterr().out


def test_records_are_read(capsys):
    rows = load("read_run_records")["main"](EXAMPLES.parent / "results/study")
    assert len(rows) > 10
    assert {row[5] for row in rows} == {"unchanged"}
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_no_example_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*TRAINING, "read_run_records"}
