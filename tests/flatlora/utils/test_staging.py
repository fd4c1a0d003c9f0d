"""What is written is whole or not there, has the mode of the umask, and leaves nothing when its maker dies."""

import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

import run_exp
from flatlora.train import checkpoint
from flatlora.utils import files, staging
from tests.processes import die, in_a_child, umask


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_modes_are_those_of_the_umask(tmp_path, mask):
    """safetensors itself writes files that their owner alone can read."""
    with umask(mask):
        with files.write_folder(tmp_path / "run" / "adapter") as fresh:
            save_file({"a": torch.zeros(2)}, fresh / "adapter_model.safetensors")
        files.write_json(tmp_path / "run" / "run.json", {})
        (tmp_path / "run" / "checkpoint-1").mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / "run" / "checkpoint-1" / "model.safetensors")
        checkpoint.write_manifest(tmp_path / "run" / "checkpoint-1", step=1, config_sha256="", data_sha256="")
    found = {(path.is_dir(), path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert found == {(True, 0o777 & ~mask), (False, 0o666 & ~mask)}


def test_all_that_a_run_writes_obeys_the_umask(tiny_settings, tmp_path):
    words = [*tiny_settings, "dataset.validation_rows=4", "optim.best_model=true", "optim.eval_steps=2"]
    with umask(0o002):
        assert run_exp.main([*words, "trainer.max_steps=4", "trainer.save_steps=2", "peft=lora_ga"]) == 0
    found = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "results").rglob("*")}
    assert {path.name: oct(one) for path, one in found.items() if one != (0o775 if path.is_dir() else 0o664)} == {}


def test_the_umask_is_read_without_being_set(monkeypatch):
    with umask(0o027):
        assert staging._umask() == 0o027
        monkeypatch.setattr("pathlib.Path.read_text", lambda path: "")  # no such line: another system
        assert staging._umask() == 0o027
        assert staging._umask() == 0o027


@pytest.mark.parametrize("folder", [True, False])
def test_what_the_dead_left_is_swept_and_what_the_living_make_is_not(tmp_path, folder):
    def half():
        with staging.staging(tmp_path / "a.json", folder=folder):
            die(tmp_path)

    assert os.WTERMSIG(in_a_child(half)) == signal.SIGKILL
    (tmp_path / ".keep-me").write_text("")
    assert len(os.listdir(tmp_path)) == 3
    with staging.staging(tmp_path / "b.json", folder=folder) as living:
        staging.sweep(tmp_path)
        assert set(os.listdir(tmp_path)) == {".keep-me", "half", living.name}
    assert set(os.listdir(tmp_path)) == {".keep-me", "half"}
    staging.sweep(tmp_path / "nowhere")


def test_a_sweep_between_making_and_locking_is_noticed(tmp_path, monkeypatch):
    plain, swept = os.open, []

    def late(path, *flags):
        if not swept:
            swept.append(path)
            path.rmdir()
        return plain(path, *flags)

    monkeypatch.setattr(os, "open", late)
    with staging.staging(tmp_path / "a", folder=True) as fresh:
        assert fresh.is_dir()
        assert fresh != swept[0]


def test_one_process_at_a_time_and_a_warning_for_the_one_that_waits(tmp_path, caplog):
    done = []

    def second():
        with staging.exclusively(tmp_path / "new"):
            done.append("second")

    with staging.exclusively(tmp_path / "new"):
        waiting = threading.Thread(target=second)
        waiting.start()
        while not caplog.messages:
            time.sleep(0.01)
        done.append("first")
    waiting.join()
    assert done == ["first", "second"]
    assert caplog.messages == [f"Waiting for another process that writes to {tmp_path / 'new'}."]
