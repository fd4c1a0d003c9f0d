"""`python -m eval.gsm8k PATH` on a finished run, its checkpoint and its adapter."""

import json
import shutil

import pytest

import run_exp
from eval.command import main
from tests.conftest import run_folder

SETTINGS = ("eval=[gsm8k]", "eval.gsm8k.max_new_tokens=6", "eval.gsm8k.batch_size=4")


@pytest.fixture
def finished(tiny_settings):
    settings = [*(word for word in tiny_settings if word != "eval=[]"), *SETTINGS]
    assert run_exp.main(settings) == 0
    return run_folder(settings)


def test_the_runs_own_answers_are_recognised_and_never_overwritten(finished):
    own = finished / "eval" / "gsm8k"
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert main("gsm8k", [str(finished), "device=cpu"]) == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert main("gsm8k", [str(finished), "device=cpu", "max_rows=2"]) == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert json.loads((finished / "eval/gsm8k-max_rows=2/score.json").read_text())["n"] == 2


def test_checkpoints_have_their_own_folder_and_other_weights_their_own_answers(finished, tmp_path):
    assert main("gsm8k", [str(finished / "checkpoint-6"), "device=cpu"]) == 0
    assert (finished / "eval/gsm8k-checkpoint-6/score.json").is_file()
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    command = [str(tmp_path / "adapter"), "device=cpu", f"rows={finished / 'test.jsonl'}", f"out={tmp_path / 'out'}"]
    base = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base  # a bare adapter finds its backbone by this name
    assert main("gsm8k", [*command, "max_new_tokens=6"]) == 0
    first = (tmp_path / "out/generation.json").read_text()
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert main("gsm8k", [*command, "max_new_tokens=6"]) == 0
    assert (tmp_path / "out/generation.json").read_text() != first
    assert (tmp_path / "out/predictions.stale.jsonl").is_file()


@pytest.mark.parametrize(
    "words", [["/nope"], [], ["results", "rows=/nope.jsonl"], ["x/y/z"], ["/tmp", "max_rowz=3", "batch_size=0"]]
)
def test_bad_commands_exit_with_2(words):
    assert main("gsm8k", words) == 2
