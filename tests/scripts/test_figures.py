"""The figures of the committed records: what they show is what the records say, and they are the same each time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import run_exp
from scripts import cells, figures

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tables():
    return figures.tables_of(PROJECT / "results/study")


@pytest.mark.extra
def test_the_sweep_of_sigma_shows_the_means_of_the_table(tables):
    study = tables["study"]
    figure = figures.sigma_sweep(study)
    axis = figure.axes[0]
    (line,) = [one for one in axis.lines if one.get_marker() == "o"]
    assert line.get_xdata().tolist() == [0, 0.01, 0.05, 0.1, 0.15, 0.2]
    assert line.get_ydata()[0] == pytest.approx(study.cells["lora", "cola"].mean)
    assert line.get_ydata()[2] == pytest.approx(study.cells["flat_lora", "cola"].mean)
    assert "5–10 seeds" in figure.get_suptitle()


@pytest.mark.extra
def test_the_sweep_of_ranks_has_a_line_a_method(tables):
    (axis,) = figures.rank_sweep(tables["ablation"]).axes
    plain, flat = [one for one in axis.lines if one.get_marker() == "o"]
    ranks = pytest.approx([2, 8, 16, 32], rel=0.021)  # the lines are set aside by 2 per cent
    assert plain.get_xdata().tolist() == ranks
    assert flat.get_xdata().tolist() == ranks
    assert plain.get_ydata()[1] == pytest.approx(tables["study"].cells["lora", "cola"].mean)
    assert flat.get_ydata()[2] == pytest.approx(tables["ablation"].cells["flat_lora_r16", "cola"].mean)
    rows = tables["ablation"].layout.rows
    assert figures.rank_of(rows["lora"], ["rho=off"]) == 8
    assert figures.rank_of(rows["flat_lora"], []) == 8
    assert figures.rank_of(rows["iid"], []) is None


@pytest.mark.extra
def test_curves_are_of_every_seed(tables):
    study = tables["study"]
    curves = figures.curves_of(study.cells["lora", "cola"].paths)
    assert curves.shape[0] == 10
    assert curves[0, -1, 0] == 804  # three epochs of 268 steps
    assert np.isfinite(curves).all()
    figure = figures.training_curves(study)
    assert [axis.get_title() for axis in figure.axes] == ["CoLA", "SST-2", "GSM8K"]
    assert [text.get_text() for text in figure.legends[0].texts][:2] == ["LoRA", "Flat-LoRA (σ = 0.05)"]


@pytest.mark.extra
def test_a_broken_curve_costs_its_seed_and_is_named(tables, tmp_path, capsys):
    paths = []
    for seed, path in enumerate(tables["study"].cells["lora", "cola"].paths[:6]):
        paths.append(tmp_path / str(seed))
        shutil.copytree(path, paths[-1])
    (paths[0] / "metrics.jsonl").write_text('{"step": 1,\n{}\n')
    (paths[1] / "metrics.jsonl").unlink()
    (paths[2] / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    rows = (paths[3] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (paths[3] / "metrics.jsonl").write_text("".join(rows[:20]))
    assert figures.curves_of(paths).shape[0] == 2
    printed = capsys.readouterr().err
    assert [printed.count(f"the curve of {path}") for path in paths] == [1, 1, 1, 1, 0, 0]


@pytest.mark.extra
def test_sharpness_is_the_mean_over_seeds_with_students_interval(tables):
    flatness = tables["flatness"]
    (axis,) = figures.sharpness(flatness).axes
    line = [one for one in axis.lines if one.get_marker() == "o"][1]
    rises = list(flatness.cells["flat_lora", "rise05"].by_seed.values())
    assert line.get_ydata()[1] == pytest.approx(np.mean(rises))
    low, _ = stats.t.interval(0.95, len(rises) - 1, np.mean(rises), stats.sem(rises))
    seeds = [{"0.05": [rise]} for rise in rises]
    assert figures.mean_and_interval(seeds, "0.05") == pytest.approx((np.mean(rises), np.mean(rises) - low))


@pytest.mark.extra
def test_the_landscape_is_of_one_seed_of_every_row_and_stacks_for_narrow_screens(tables):
    figure = figures.landscape(tables["flatness"])
    first, *planes = figure.axes
    path = tables["flatness"].cells["lora", "rise05"].paths[0]
    record = json.loads((path / "flatness.json").read_bytes())["parts"]["landscape"]
    assert first.lines[0].get_ydata().tolist() == record["line"]
    assert len(planes) == len(first.lines) == 3
    token = figures.STACKED.set(True)
    try:
        stacked = figures.landscape(tables["flatness"])
    finally:
        figures.STACKED.reset(token)
    assert stacked.get_figheight() > 2 * stacked.get_figwidth() > 2 * 4
    assert figure.get_figwidth() > 2 * figure.get_figheight()


@pytest.mark.extra
def test_severity_is_drawn_of_runs_that_have_it(tmp_path):
    assert figures.severity(figures.tables_of(PROJECT / "results/study")["corruptions"]) is None
    for seed in (0, 1):
        experiment = run_exp.experiment_of(["experiment=table2", "peft.lora_r=8", "dataset=cifar100", f"seed={seed}"])
        metrics = {"images/top1": 0.9} | {f"corruptions/severity_{level}": 0.9 - 0.1 * level for level in range(1, 6)}
        record = {"status": "finished", "experiment": experiment.model_dump(mode="json"), "metrics": metrics}
        path = tmp_path / experiment.run_name() / str(seed) / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record | {"timing": {"train_s": 1.0}}))
    (axis,) = figures.severity(figures.tables_of(tmp_path)["corruptions"]).axes
    (line,) = [one for one in axis.lines if one.get_marker() == "o"]
    assert line.get_ydata().tolist() == pytest.approx([90, 80, 70, 60, 50, 40])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["clean", "1", "2", "3", "4", "5"]


def test_the_pareto_front_has_what_no_cheaper_row_equals():
    points = {"a": (2.0, 5.0), "b": (1.0, 3.0), "c": (2.0, 4.0), "d": (3.0, 5.0), "e": (1.0, 2.0), "f": (4.0, 6.0)}
    assert figures.pareto_front(points) == ["b", "a", "f"]
    assert figures.pareto_front({}) == []


@pytest.mark.extra
def test_our_rows_stand_among_the_public_ones_of_pefts_suite(tmp_path):
    for seed, memory in enumerate((18.0, 19.0)):
        experiment = run_exp.experiment_of(["experiment=peft_suite", "rho=flat", f"seed={seed}"])
        record = {"status": "finished", "experiment": experiment.model_dump(mode="json")}
        record |= {"metrics": {"gsm8k/exact_match": 0.52}, "memory": {"peak_reserved_gib": memory}}
        path = tmp_path / experiment.run_name() / str(seed) / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record | {"timing": {"train_s": 1.0, "score_s": 1.0}}))
    for folder in (PROJECT / "results/study", tmp_path):
        suite = figures.tables_of(folder)["peft_suite"]
        figure = figures.peft_suite(suite)
        public = figure.axes[0].lines[0]
        assert len(public.get_xdata()) == 63
        named = [text.get_text() for text in figure.legends[0].texts]
        assert {"lora/rank32", "lily/rank140-mlp-a2-b2-s8.0"} <= set(named)
        figures.plt.close(figure)
    assert "Flat-LoRA (r = 32), ours" in named
    assert "miss/default" not in named  # ours has less memory and more right
    assert figures.places_of(suite, "mean") == {"Flat-LoRA (r = 32)": (18.5, pytest.approx(52))}
    assert figures.peft_suite(suite._replace(cells=dict.fromkeys(suite.cells, cells.Cell({}, [], None)))) is None


def test_cost_shows_the_records_medians():
    time, memory = figures.cost(PROJECT / "results").axes
    record = json.loads((PROJECT / "results/bench/gpu.json").read_bytes())["steps"]
    bars = {container.get_label(): container.patches[0].get_height() for container in time.containers}
    assert bars["Flat-LoRA copy"] == pytest.approx(np.median(record["2x1024x16"]["Flat-LoRA copy"]["step_s"]))
    assert memory.containers[0].patches[1].get_height() == record["8x1024x4"]["PEFT"]["peak_gib"]


def write_pictures(results, row, seed, color, score):
    """A finished run of SDXL's table with one picture, as run_exp and the evaluation write it."""
    rho = "flat" if row == "flat_lora" else "off"
    experiment = run_exp.experiment_of(["experiment=sdxl", f"rho={rho}", f"seed={seed}"])
    folder = results / experiment.run_name() / str(seed)
    place = folder / "eval/text_to_image"
    (place / "images").mkdir(parents=True)
    Image.new("RGB", (16, 16), color).save(place / "images/0000.png")
    asked = {"index": 0, "prompt": "a 3d icon", "seed": 0, "file": "images/0000.png", "image_text": score}
    (place / "predictions.jsonl").write_text(json.dumps(asked) + "\n")
    metrics = {f"text_to_image/{key}": score for key in ("image_text", "text_text", "image_image")}
    record = {"status": "finished", "experiment": experiment.model_dump(mode="json"), "metrics": metrics}
    (folder / "run.json").write_text(json.dumps(record | {"timing": {"train_s": 1.0}}))


def test_images_are_side_by_side_and_their_scores_in_the_table(tmp_path):
    for row, seed, color in (("lora", 0, "red"), ("lora", 1, "red"), ("flat_lora", 1, "blue")):
        write_pictures(tmp_path, row, seed, color, 0.25 + seed / 100)
    sdxl = figures.tables_of(tmp_path)["sdxl"]
    assert sdxl.cells["lora", "image_text"].mean == pytest.approx(0.255)
    assert sdxl.cells["flat_lora", "text_text"].by_seed == {1: pytest.approx(0.26)}
    figure = figures.pictures(sdxl)  # of seed 1, the smallest that both have
    assert [axis.get_title() for axis in figure.axes] == ["LoRA, seed 0", "Flat-LoRA, seed 0"]
    assert [axis.images[0].get_array()[0, 0].tolist() for axis in figure.axes] == [[255, 0, 0], [0, 0, 255]]
    assert figures.pictures(figures.tables_of(PROJECT / "results/study")["sdxl"]) is None


@pytest.fixture
def results(tmp_path):
    """The committed records alone: a developer's results/ may hold others."""
    for name in ("study", "bench"):
        shutil.copytree(PROJECT / "results" / name, tmp_path / "results" / name)
    return tmp_path / "results"


@pytest.mark.extra
def test_the_committed_figures_are_those_of_the_committed_records(results, tmp_path, capsys):
    """PNG by PNG where this matplotlib made them, and twice the same bytes anywhere."""
    for name in ("one", "two"):
        assert figures.main(["--results", str(results), "--out", str(tmp_path / name)]) == 0
    drawn = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert drawn == sorted(
        f"{name}.{kind}" for name in figures.FIGURES if name not in ("severity", "pictures") for kind in ("pdf", "png")
    )
    for name in drawn:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert (PROJECT / "results/tables" / name).is_file()
    capsys.readouterr()
    (tmp_path / "none/bench").mkdir(parents=True)
    (tmp_path / "none/bench/gpu.json").write_text("{}")
    assert figures.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path / "three")]) == 0
    assert {path.stem for path in (tmp_path / "three").iterdir()} == {"peft_suite"}  # of public results
    printed = capsys.readouterr().err
    assert printed.count("too few runs") == len(figures.FIGURES) - 2
    assert "left out: cost, because a record is broken (KeyError: 'steps')" in printed.replace("\n", " ")
    (tmp_path / "file").write_text("")
    assert figures.main(["--results", str(tmp_path / "nowhere"), "--out", str(tmp_path / "file")]) == 2
    assert "2 errors" in capsys.readouterr().err
    assert figures.main(["sigma_swep"]) == 2
