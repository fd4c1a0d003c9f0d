"""Each script in examples/ runs as it stands and does what it is for."""

import csv
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flatlora import FlatLoraCallback, LoRAPro

PROJECT = Path(__file__).parents[1]
EXAMPLES = sorted((PROJECT / "examples").glob("*.py"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example with arguments; returns its global names."""

    def run(name: str, *arguments: str) -> dict:
        path = str(PROJECT / "examples" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return runpy.run_path(path, run_name="__main__")

    return run


def saved_adapter(names: dict) -> dict:
    return load_file(Path(names["folder"]) / "adapter" / "adapter_model.safetensors")


def test_every_example_is_short_and_tested():
    tests = Path(__file__).read_text()
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert f'run("{path.stem}"' in tests, path.name


def test_callback_in_a_trainer(run, capsys):
    names = run("callback_in_trainer")
    assert names["losses"][-1] < names["losses"][0] - 0.5
    assert names["unchanged"] is True
    callbacks = names["trainer"].callback_handler.callbacks
    (flat,) = (callback for callback in callbacks if isinstance(callback, FlatLoraCallback))
    assert flat.perturbation.seconds > 0  # there was noise
    trained = dict(names["model"].named_parameters())
    saved = saved_adapter(names)
    assert len(saved) == 2 * 14
    for name, tensor in saved.items():
        assert tensor.equal(trained[name.replace(".weight", ".default.weight")].detach())
    assert "backbone unchanged: True" in capsys.readouterr().out


def test_callback_in_sft_trainer(run):
    pytest.importorskip("trl")
    names = run("callback_in_sft_trainer")
    assert names["losses"][-1] < names["losses"][0] - 0.5
    assert any(tensor.any() for name, tensor in saved_adapter(names).items() if "lora_B" in name)
    assert names["tokenizer"].decode(names["tokenizer"]("Is it flat?")["input_ids"]) == "Is it flat?"


def test_hand_written_loop(run, capsys):
    names = run("hand_written_loop")
    assert names["losses"][-1] < names["losses"][0] - 0.5
    assert names["unchanged"] is True
    assert not names["perturbation"].perturbed
    assert "step 10  sigma 0.0250" in capsys.readouterr().out  # half of σ, half way up the cosine ramp


def test_lora_pro_alone(run):
    names = run("lora_pro_alone")
    assert names["losses"][-1] < names["losses"][0] - 0.5
    assert isinstance(names["optimizer"], LoRAPro)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # of the layers that have a pair
    steps = 4 * 14
    assert names["moments"] == 2 * 2 * weights + steps


def test_read_run_records(run, capsys):
    names = run("read_run_records")
    printed = capsys.readouterr().out
    with open(PROJECT / "results/tables/ablation.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["column"] == "cola" and row["runs"]]
    assert rows
    for row in rows:
        name = row["runs"].split()[0].split("/")[-2]
        values = names["scores"][name]
        assert 100 * sum(values) / len(values) == pytest.approx(float(row["mean"]), abs=1e-3)
        assert f"{float(row['mean']) / 100:.4f}" in printed
    assert "in 804 steps" in printed


@pytest.mark.extra
@pytest.mark.parametrize("name", ["callback_in_trainer", "hand_written_loop", "callback_in_sft_trainer"])
def test_a_model_of_a_folder(run, name, tiny_model_folder):
    names = run(name, str(tiny_model_folder))
    assert names["losses"][-1] < names["losses"][0]
