"""The figures of the committed study: what they show is what the records say, and they are the same each time."""

from pathlib import Path

import numpy as np
import pytest

from scripts import cells, figures

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    layouts = cells.read_layouts(PROJECT / "results/tables.yaml")
    runs, problems = cells.read_runs(PROJECT / "results/study")
    assert problems == []
    (made,), _ = cells.make({"study": layouts["study"]}, {}, runs)
    return made


def test_the_sweep_shows_the_means_of_the_table(study):
    figure = figures.sigma_sweep(study)
    axis = figure.axes[0]
    (line,) = [one for one in axis.lines if one.get_marker() == "o"]
    assert line.get_xdata().tolist() == [0, 0.01, 0.05, 0.1, 0.15, 0.2]
    assert line.get_ydata()[0] == pytest.approx(study.cells["lora", "cola"].mean)
    assert line.get_ydata()[2] == pytest.approx(study.cells["flat_lora", "cola"].mean)
    assert "5 seeds" in figure.get_suptitle()


def test_curves_are_of_every_seed(study):
    curves = figures.curves_of(study.cells["lora", "cola"].paths)
    assert curves.shape[0] == 5
    assert curves[0, -1, 0] == 804  # three epochs of 268 steps
    assert np.isfinite(curves).all()
    figure = figures.training_curves(study)
    assert [axis.get_title() for axis in figure.axes] == ["CoLA", "SST-2"]
    assert [text.get_text() for text in figure.legends[0].texts][:2] == ["LoRA", "Flat-LoRA (σ = 0.05)"]


def test_they_are_the_same_each_time_and_left_out_without_runs(tmp_path, capsys):
    for name in ("one", "two"):
        assert figures.main(["--results", str(PROJECT / "results/study"), "--out", str(tmp_path / name)]) == 0
    drawn = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert drawn == [f"{name}.{kind}" for name in ("sigma_sweep", "training_curves") for kind in ("pdf", "png")]
    for name in drawn:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert figures.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "three")]) == 0
    assert list((tmp_path / "three").iterdir()) == []
    assert "too few runs" in capsys.readouterr().err
