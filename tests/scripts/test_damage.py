"""scripts/damage.py: a sample of its damages finds no error, and an error that is there is found."""

import pytest

from flatlora.utils import records
from scripts import damage


def test_a_sample_of_damages_has_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    counts = damage.damage_all(tmp_path, sample=4, seed=3)
    assert counts["damages"] == 8
    assert counts["named"] + counts["equal"] == counts["actions"] > 8, capsys.readouterr().out
    assert not any(counts[kind] for kind in damage.ERRORS)


def test_a_silent_difference_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "damage", lambda *args, **kwargs: [])  # as before there were hashes
    told = []
    counts = damage.damage_all(tmp_path, None, 0, "finished adapter/adapter_model.safetensors flip", told.append)
    assert counts["silent difference"] >= 2  # resume: finished already; eval: another score or the same by chance
    assert "finished adapter/adapter_model.safetensors flip, resume" in told[0]


@pytest.mark.extra
def test_no_damage_at_all_has_an_error(capsys):
    assert damage.main([]) == 0, capsys.readouterr().out
