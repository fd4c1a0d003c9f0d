"""scripts/damage.py: a sample of its damages finds no error, and an error that is there is found."""

from pathlib import Path

import pytest

from data import cache
from flatlora.utils import records
from flatlora.utils.files import cache_folder
from scripts import damage


@pytest.mark.extra
def test_a_sample_of_damages_has_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "cache_folder", cache_folder)  # which the script chooses by that variable
    monkeypatch.setattr(damage, "CACHED", {"tokens": damage.CACHED["tokens"]})  # the others take a minute
    counts = damage.damage_all(tmp_path, sample=2, seed=3)
    assert counts["damages"] == 6  # 2 of each state
    assert counts["named"] + counts["equal"] == counts["actions"] > 4, capsys.readouterr().out
    assert not any(counts[kind] for kind in damage.ERRORS)


@pytest.mark.extra
def test_a_silent_difference_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "damage", lambda *args, **kwargs: [])  # as before there were hashes
    printed = []
    counts = damage.damage_all(tmp_path, None, 0, "finished adapter/adapter_model.safetensors flip", printed.append)
    assert counts["silent difference"] >= 2  # resume: finished already; eval: another score or the same by chance
    assert "finished adapter/adapter_model.safetensors flip, resume" in printed[0]


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("Invalid run /r: adapter/adapter_model.safe\n  tensors is not what the run wrote.", "named"),
        ("a link in adapter/ of another file", "silent difference"),
        ("adapter/README.md is missing", "silent difference"),
        ("gsm8k: 4 rows, scorer adapter_model.safetensors", "silent difference"),
        ("", "silent difference"),
    ],
)
def test_an_answer_is_good_that_names_the_file_itself(output, kind):
    always = "written to adapter/adapter_model.safetensors"
    wanted, given = damage.Answer(0, always, 1), damage.Answer(0, f"{always}\n{output}", 2)
    assert damage._judge(given, wanted, Path("adapter/adapter_model.safetensors")) == kind


@pytest.mark.extra
def test_no_damage_at_all_has_an_error(capsys):
    assert damage.main(["-j", "2"]) == 0, capsys.readouterr().out
