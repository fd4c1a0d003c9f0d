"""Runs whose files were damaged since: named and made again from a checkpoint, or refused, and never believed."""

import json
import os
import shutil
from pathlib import Path

import pytest

import run_exp
from flatlora.train.trainer import FlatTrainer
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder


def run(settings: list[str]) -> Path:
    assert run_exp.main(settings) == 0
    return run_folder(settings)


def in_folder(settings: list[str], name: str) -> list[str]:
    """The same settings with their own results folder."""
    return [f"{word}-{name}" if word.startswith("results_root=") else word for word in settings]


def output_of(capsys) -> str:
    """What was written to stderr, without the white space that depends on the width of the console."""
    return "".join(capsys.readouterr().err.split())


def flip(path: Path) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def killed_at(step, settings, monkeypatch) -> None:
    """A run that ends with `Killed` after so many steps."""
    with monkeypatch.context() as patch:
        die_at(step, patch)
        with pytest.raises(Killed):
            run_exp.main(settings)


@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.extra)])
def test_rows_that_were_lost_are_put_back_from_the_checkpoint(tiny_settings, monkeypatch, killed, capsys):
    """While it was interrupted, and when it is only scored again."""
    settings = [*tiny_settings, "trainer.save_steps=2"]
    whole = run(in_folder(settings, "whole"))
    wanted = json.loads((whole / "run.json").read_text())["metrics"]
    settings = in_folder(settings, "torn")
    if killed:
        killed_at(5, settings, monkeypatch)
    else:
        run(settings)
    folder = run_folder(settings)
    (folder / "metrics.jsonl").write_text("")
    if not killed:
        settings = [*settings, "dataset.test_rows=3"]
    assert run_exp.main([*settings, "resume=true"]) == 0
    assert metrics_rows(folder) == metrics_rows(whole)
    assert json.loads((folder / "run.json").read_text())["metrics"] == wanted
    assert "metrics.jsonlhad0ofthe" in output_of(capsys)


@pytest.mark.parametrize("end", ["resumed", pytest.param("finished", marks=pytest.mark.extra)])
def test_a_damaged_best_is_made_again_or_refused(tiny_settings, monkeypatch, end, capsys):
    """A flipped byte in best/, which no checkpoint holds."""
    settings = [w for w in tiny_settings if "validation_rows" not in w]
    settings += ["dataset.validation_rows=4", "optim.best_model=true", "optim.eval_steps=2", "trainer.save_steps=2"]
    settings += ["optim.lr=0.3"]
    whole = run(in_folder(settings, "whole"))
    settings = in_folder(settings, "hurt")
    if end == "resumed":
        killed_at(5, settings, monkeypatch)
    else:
        run(settings)
        shutil.rmtree(run_folder(settings) / "adapter")
    folder = run_folder(settings)
    for path in (folder / "best").glob("*.safetensors"):
        flip(path)
    code = run_exp.main([*settings, "resume=true"])
    printed = output_of(capsys)
    assert "ofitstimeisnotwhatwaswritten" in printed
    if end == "finished":  # every checkpoint that is kept is of a time after that best
        assert code == 2
        assert "itscheckpointsaredamaged,soresume=truewouldtrainitanew" in printed
        return
    assert code == 0
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert metrics_rows(folder) == metrics_rows(whole)


@pytest.mark.parametrize("damage", ["a flipped bit", "another scale", "no mark"])
def test_a_start_that_was_damaged_is_refused(tiny_settings, monkeypatch, capsys, damage):
    settings = [*tiny_settings, "peft=pissa", "peft.lora_r=4", "trainer.save_steps=2"]
    killed_at(5, settings, monkeypatch)
    folder = run_folder(settings)
    if damage == "a flipped bit":
        flip(folder / "start/adapter_model.safetensors")
    elif damage == "another scale":
        path = folder / "start/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 17}))
    else:  # without which later checkpoints would be taken for adapters of the whole backbone
        (folder / "start/moved.json").unlink()
    assert run_exp.main([*settings, "resume=true"]) == 2
    problem = {"a flipped bit": "adapter_model.safetensorsisanother", "no mark": "moved.jsonismissing"}
    problem |= {"another scale": "adapter_config.jsonisanother"}
    assert f"isnotin{folder / 'start'}({problem[damage]})" in output_of(capsys)


DAMAGES = {
    "a flipped adapter": (
        lambda run: flip(run / "adapter/adapter_model.safetensors"),
        "safetensors is not what",
    ),
    "half an adapter": (lambda run: os.truncate(run / "adapter/adapter_model.safetensors", 99), "is not what the run"),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "adapter/adapter_model.safetensors is missing"),
    "no answers": (lambda run: shutil.rmtree(run / "eval"), "eval/gsm8k is missing"),
    "a flipped answer": (
        lambda run: flip(run / "eval/gsm8k/predictions.jsonl"),
        "predictions.jsonl does not match its",
    ),
    "half a record": (
        lambda run: os.truncate(run / "eval/gsm8k/generation.json", 99),
        "gsm8k/generation.json is broken",
    ),
    "another score": (lambda run: other_score(run / "eval/gsm8k/score.json"), "differs from the metrics in run.json"),
    "flipped rows": (lambda run: flip(run / "metrics.jsonl"), "metrics.jsonl is not what the run wrote"),
    "flipped questions": (lambda run: flip(run / "test.jsonl"), "test.jsonl is not what the run wrote"),
    "another config": (
        lambda run: other_config(run / "config.yaml"),
        "not what the run wrote (in eval)",
    ),
}


def other_score(path):
    score = json.loads(path.read_text())
    path.write_text(json.dumps(score | {"metrics": score["metrics"] | {"exact_match": 0.99}}))


def other_config(path):
    path.write_text(path.read_text().replace("max_new_tokens: 4", "max_new_tokens: 5"))


@pytest.mark.extra
def test_damage_to_a_finished_run_is_named_and_made_again(tiny_settings, monkeypatch, tmp_path, capsys):
    settings = [*(word for word in tiny_settings if word != "eval=[]"), "eval=[gsm8k]", "eval.gsm8k.max_new_tokens=4"]
    made = run(settings)
    wanted = {path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.is_file()}

    def step(*args, **kwargs):
        raise AssertionError("a step of training")

    monkeypatch.setattr(FlatTrainer, "training_step", step)
    for damage, (hurt, message) in DAMAGES.items():
        hurt(made)
        capsys.readouterr()
        assert run_exp.main([*settings, "resume=true"]) == 0, damage
        assert "".join(message.split()) in output_of(capsys), damage
        for name, content in wanted.items():
            if name.name not in ("run.json", "config.yaml"):  # whose times, and resume=true, are others
                assert (made / name).read_bytes() == content, (damage, name)
        assert run_exp.main([*settings, "resume=true"]) == 0
        assert "isfinishedalready" in output_of(capsys), damage
    for path in made.glob("checkpoint-*"):
        path.rename(tmp_path / path.name)
    flip(made / "adapter/adapter_model.safetensors")
    capsys.readouterr()
    assert run_exp.main([*settings, "resume=true"]) == 2
    error = output_of(capsys)
    assert "adapter_model.safetensorsisnotwhattherunwrote)anditscheckpointsaregone" in error
    assert "sayoverwrite=true" in error
