"""Tuned rows of tables: chosen by validation scores, shown by test scores of other seeds; and what n seeds can show."""

import json
import math
import shlex

import numpy as np
import pytest
import yaml
from scipy import integrate, stats

import run_exp
from flatlora.utils.errors import ConfigError
from scripts import cells, figures, report, significance, table_formats, tables, tuning

TUNING = ["dataset.validation_rows=100", "dataset.evaluate=validation"]
RATES = ["1e-4", "5e-4", "2e-3"]


def raw_layout(**changes):
    """A table of two tuned rows and one that is not, as YAML has it."""
    rows = {
        "lora": {"title": "LoRA", "tune": {"optim.lr": RATES}},
        "flat": {"title": "Flat", "overrides": ["rho=flat"], "tune": {"optim.lr": RATES[:2], "rho.sigma": [0.05, 0.1]}},
        "dora": {"title": "DoRA", "overrides": ["peft=dora"]},
    }
    column = {"title": "CoLA", "overrides": ["dataset=cola"], "metric": "glue/accuracy", "scale": 100}
    how = {"seeds": [100, 101], "test_seeds": [0, 1, 2], "overrides": TUNING[:1]}
    layout = {"title": "T", "experiment": "study", "average": False, "rows": rows, "columns": {"cola": column}}
    return layout | {"tuning": how} | changes


@pytest.fixture
def layouts(tmp_path, monkeypatch):
    """Writes the table `t` into a file of layouts that the scripts read; returns its layout."""

    def write(**changes):
        path = tmp_path / "tables.yaml"
        path.write_text(yaml.safe_dump({"t": raw_layout(**changes)}, sort_keys=False))
        monkeypatch.setattr(tables, "LAYOUTS", path)
        monkeypatch.setattr(cells, "LAYOUTS", path)
        return cells.read_layouts(path)["t"]

    return write


def write_run(results, words, accuracy, **changes):
    experiment = run_exp.experiment_of(["experiment=study", "dataset=cola", *words])
    record = {"status": "finished", "experiment": experiment.model_dump(mode="json")}
    record |= {"metrics": {"glue/accuracy": accuracy, "eval_loss": 1 - accuracy}, "timing": {"train_s": 3600.0}}
    path = results / f"{experiment.run_name()}/{experiment.seed}" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | changes))
    return path


def write_tuning(results, scores, *more):
    """Runs of LoRA's grid: {learning rate: scores of seeds 100 and 101}."""
    for rate, accuracies in scores.items():
        for seed, accuracy in zip((100, 101), accuracies, strict=False):
            write_run(results, [f"optim.lr={rate}", *TUNING, f"seed={seed}", *more], accuracy)


def made_of(results, layout):
    runs, problems = cells.read_runs(results)
    (made,), more = cells.make({"t": layout}, {}, runs)
    return made, runs, [*problems, *more]


SCORES = {"1e-4": (0.70, 0.72), "5e-4": (0.80, 0.82), "2e-3": (0.79, 0.80)}


# --- the choice


def test_the_setting_is_chosen_by_validation_scores_and_shown_by_test_scores_of_other_seeds(tmp_path, layouts):
    results = tmp_path / "results"
    layout = layouts()
    write_tuning(results, SCORES)
    for seed, accuracy in enumerate((0.81, 0.82, 0.83)):
        write_run(results, ["optim.lr=5e-4", f"seed={seed}"], accuracy)
        write_run(results, ["optim.lr=2e-3", f"seed={seed}"], 0.99)  # better on test rows, which choose nothing
    write_run(results, ["optim.lr=5e-4", "seed=100"], 0.99)  # a tuning seed
    write_run(results, ["optim.lr=5e-4", "seed=3"], 0.99)  # no seed of the table
    write_run(results, ["optim.lr=5e-4", *TUNING, "seed=0"], 0.99)  # validation score of a test seed
    made, _, problems = made_of(results, layout)
    cell = made.cells["lora", "cola"]
    assert problems == []
    assert [point.mean for point in cell.tuned.points] == pytest.approx([71, 81, 79.5])
    assert cell.tuned.chosen.values == {"optim.lr": "5e-4"}
    assert cell.by_seed == {0: pytest.approx(81), 1: pytest.approx(82), 2: pytest.approx(83)}
    assert made.overrides_of("lora", "cola")[-1] == "optim.lr=5e-4"
    text = table_formats.markdown(made)
    assert "| LoRA | 82.00 ± 1.00 (3) |\n| LoRA, chosen | lr=5e-4 |" in text
    assert "| Flat | missing |\n| Flat, chosen | 0 of 8 tuning runs |" in text
    assert "DoRA, chosen" not in text
    assert "| LoRA | CoLA | **lr=5e-4** | **81** | 2 |" in text
    assert "(dataset.validation_rows=100) over seeds 100, 101. Then trained" in text
    assert "seeds 0 to 2, as all rows here.  " in text
    assert "Tried: optim.lr 1e-4, 5e-4, 2e-3 (LoRA). optim.lr 1e-4, 5e-4; rho.sigma 0.05, 0.1 (Flat)." in text
    header, first, *_ = table_formats.as_csv(made, results).splitlines()
    assert header.endswith(",runs,chosen,validation")
    assert first.endswith(",optim.lr=5e-4,81.0000")


def test_nothing_is_chosen_and_no_test_run_counts_before_all_tuning_runs_are_there(tmp_path, layouts):
    layout = layouts()
    write_tuning(tmp_path, SCORES | {"2e-3": (0.79,)})
    for seed in range(3):
        write_run(tmp_path, ["optim.lr=5e-4", f"seed={seed}"], 0.81)
    cell = made_of(tmp_path, layout)[0].cells["lora", "cola"]
    assert cell.tuned.chosen is None
    assert cell.by_seed == {}
    assert cell.tuned.status == "5 of 6 tuning runs"
    assert [(point.label, seeds) for point, seeds in cell.tuned.missing] == [("lr=2e-3", [101])]


def test_the_first_of_equal_settings_is_chosen_and_an_edge_is_named(tmp_path, layouts):
    layout = layouts()
    write_tuning(tmp_path, {"1e-4": (0.8, 0.8), "5e-4": (0.8, 0.8), "2e-3": (0.7, 0.7)})
    made, *_ = made_of(tmp_path, layout)
    assert made.cells["lora", "cola"].tuned.status == "lr=1e-4 (edge)"
    assert any(note.startswith("(edge): ") for note in table_formats.notes_of(made))


def test_a_setting_that_diverges_is_not_chosen_and_not_missing(tmp_path, layouts):
    layout = layouts()
    write_tuning(tmp_path, SCORES)
    broken = {"status": "failed", "error": "FloatingPointError: The loss of step 3 is nan", "metrics": {}}
    write_run(tmp_path, ["optim.lr=5e-4", *TUNING, "seed=101"], 0.9, **broken)
    made, runs, problems = made_of(tmp_path, layout)
    tuned = made.cells["lora", "cola"].tuned
    assert tuned.missing == []
    assert tuned.chosen.values == {"optim.lr": "2e-3"}
    assert [problem.endswith("is failed.") for problem in problems] == [True]
    assert "| LoRA | CoLA | lr=5e-4 | diverged | 1 |" in table_formats.markdown(made)
    assert cells.unused([made], runs) == []
    assert len(report.groups_of([run for run in runs if not run.diverged], tmp_path)) == 3
    other = {"status": "failed", "error": "OSError: no space left"}
    write_run(tmp_path, ["optim.lr=5e-4", *TUNING, "seed=101"], 0.9, **other)
    assert made_of(tmp_path, layout)[0].cells["lora", "cola"].tuned.status == "5 of 6 tuning runs"


def test_a_column_may_be_tuned_by_the_validation_loss_or_by_another_columns_metric(tmp_path, layouts):
    column = raw_layout()["columns"]["cola"]
    loss = column | {"title": "Loss", "metric": "eval_loss", "scale": 1, "lower": True}
    by_loss, by_other = column | {"tuned_by": "eval_loss"}, loss | {"tuned_by": "glue/accuracy"}
    layout = layouts(columns={"cola": column, "by_loss": by_loss, "by_other": by_other})
    write_tuning(tmp_path, SCORES)
    made, *_ = made_of(tmp_path, layout)
    chosen = {key: made.cells["lora", key].tuned.chosen for key in layout.columns}
    assert {point.values["optim.lr"] for point in chosen.values()} == {"5e-4"}
    assert chosen["by_loss"].mean == pytest.approx(0.19)
    assert chosen["by_other"].mean == pytest.approx(81)
    assert made.cells["lora", "by_loss"].tuned.lower
    assert not made.cells["lora", "by_other"].tuned.lower


def test_the_values_of_a_grid_are_the_overrides_of_the_command_line():
    base = run_exp.experiment_of(["experiment=study", "dataset=cola", "rho=flat", "seed=0"])
    for values in tuning.grid({"optim.lr": ["1e-4", 0.001, "2"], "rho.sigma": [0.1], "peft.lora_r": ["4", 8]}):
        words = [f"{key}={value}" for key, value in values.items()]
        composed = run_exp.experiment_of(["experiment=study", "dataset=cola", "rho=flat", "seed=0", *words])
        assert tuning.with_values(base, values) == composed


@pytest.mark.extra
def test_the_grids_of_the_studys_table_are_those_of_its_commands(capsys):
    assert tables.main(["commands", "study_tuned"]) == 0
    layout = cells.read_layouts(cells.LAYOUTS)["study_tuned"]
    cells.check_tuning({"study_tuned": layout})
    assert len(layout.tuning.seeds) == 2
    assert len(layout.tuning.test_seeds) >= 10
    for row, value in layout.rows.items():
        assert len(value.tune["optim.lr"]) >= 5
        overrides = cells.tuning_overrides("study_tuned", layout, row, "cola")
        base = cells.experiment_of(tuple(overrides))
        for values in tuning.grid(value.tune):
            words = [f"{key}={one}" for key, one in values.items()]
            assert tuning.with_values(base, values) == cells.experiment_of((*overrides, *words))


# --- commands and status


def printed(capsys, results):
    """The lines of the commands of the table `t`, and the words of each command."""
    capsys.readouterr()
    assert tables.main(["commands", "t", "--results", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, [shlex.split(line) for line in lines if not line.startswith("#")]


def test_commands_are_first_the_tuning_runs_and_then_the_test_runs(tmp_path, layouts, capsys):
    layouts()
    results = tmp_path / "results"
    results.mkdir()
    start = ["python", "run_exp.py", "-m", "experiment=study"]
    held_out = ["dataset=cola", *TUNING]
    lines, commands = printed(capsys, results)
    assert lines[0] == "# t, LoRA, CoLA: 0 of 6 tuning runs, then 3 test runs"
    assert commands == [
        [*start, *held_out, "optim.lr=1e-4,5e-4,2e-3", "seed=100,101"],
        [*start, "rho=flat", *held_out, "optim.lr=1e-4,5e-4", "rho.sigma=0.05,0.1", "seed=100,101"],
        [*start, "peft=dora", "dataset=cola", "seed=0,1,2"],
    ]
    write_tuning(results, {"1e-4": (0.7, 0.7), "5e-4": (0.8,)})
    lines, commands = printed(capsys, results)
    assert lines[0] == "# t, LoRA, CoLA: 3 of 6 tuning runs, then 3 test runs"
    assert commands[:2] == [
        [*start[:2], "experiment=study", *held_out, "optim.lr=5e-4", "seed=101"],
        [*start, *held_out, "optim.lr=2e-3", "seed=100,101"],
    ]
    write_tuning(results, SCORES)
    write_run(results, ["optim.lr=5e-4", "seed=1"], 0.8)
    lines, commands = printed(capsys, results)
    assert lines[0] == "# t, LoRA, CoLA: chosen lr=5e-4; 2 test runs are missing"
    assert commands[0] == [*start, "dataset=cola", "optim.lr=5e-4", "seed=0,2"]
    for seed in (0, 2):
        write_run(results, ["optim.lr=5e-4", f"seed={seed}"], 0.8)
    lines, commands = printed(capsys, results)
    assert lines[0] == "# t, LoRA, CoLA: chosen lr=5e-4; complete"
    assert commands[0][3:5] == ["experiment=study", "rho=flat"]
    assert tables.main(["commands", "t", "--results", str(tmp_path / "none")]) == 2


@pytest.mark.extra
def test_the_printed_commands_tune_and_test_a_tiny_model(tmp_path, layouts, capsys, tiny_settings):
    results = tmp_path / "results"
    results.mkdir()
    tiny = [word for word in tiny_settings if not word.startswith(("eval=", "wandb.name=", "optim.lr="))]
    tiny += ["dataset=word_math", "eval.gsm8k.max_new_tokens=2", "trainer.max_steps=2"]
    column = {"title": "Math", "overrides": tiny, "metric": "gsm8k/exact_match", "scale": 100, "tuned_by": "eval_loss"}
    how = {"seeds": [7], "test_seeds": [1, 2], "overrides": ["dataset.validation_rows=4"]}
    rows = {"lora": {"title": "LoRA", "tune": {"optim.lr": ["1e-6", "1e-2"]}}}
    layout = layouts(rows=rows, columns={"math": column}, tuning=how)
    for runs in (2, 4):
        _, (command,) = printed(capsys, results)
        assert run_exp.main(command[2:]) == 0
        assert len(list(results.rglob("run.json"))) == runs
    lines, commands = printed(capsys, results)
    assert (lines, commands) == (["# t, LoRA, Math: chosen lr=1e-2 (edge); complete"], [])
    made, _, problems = made_of(results, layout)
    assert problems == []
    assert sorted(made.cells["lora", "math"].by_seed) == [1, 2]
    scored = {path.parent.name: path.read_text() for path in results.rglob("test.jsonl")}
    assert scored["1"] == scored["2"] != scored["7"]


def test_a_grid_with_holes_is_one_command_a_setting():
    points = [tuning.Point(values, {}, [], []) for values in tuning.grid({"a.b": [1, 2], "c.d": ["x", "y"]})]
    assert tuning.sweeps([(point, [7]) for point in points]) == [(["a.b=1,2", "c.d=x,y"], [7])]
    assert tuning.sweeps([(point, [7]) for point in points[1:]]) == [
        (["a.b=1", "c.d=y"], [7]),
        (["a.b=2", "c.d=x"], [7]),
        (["a.b=2", "c.d=y"], [7]),
    ]


def test_status_counts_tuning_and_test_runs_and_their_hours(tmp_path, layouts, capsys):
    layouts()
    write_tuning(tmp_path, SCORES)
    write_run(tmp_path, ["optim.lr=5e-4", "seed=1"], 0.8)
    assert tables.main(["status", "t", "--results", str(tmp_path)]) == 0
    shown = [[part.strip() for part in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {row[1]: row[3:] for row in shown if row and row[0] == "t"}
    assert rows["LoRA, tuning"] == ["6", "0", "—"]
    assert rows["LoRA"] == ["1", "2", "2.00"]
    assert rows["Flat, tuning"] == ["0", "8", "8.00"]
    assert rows["Flat"] == ["0", "3", "3.00"]
    assert rows["DoRA"] == ["0", "3", "?"]


# --- what is refused before anything runs


def with_row(**row):
    return {"rows": raw_layout()["rows"] | {"lora": {"title": "LoRA"} | row}}


def with_tuning(**changes):
    return {"tuning": raw_layout()["tuning"] | changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (with_tuning(test_seeds=[99, 100, 101]), "seeds 100, 101 are tuning seeds too"),
        (with_tuning(seeds=[]), "Invalid tuning.seeds=[]: one or more different whole numbers"),
        (with_tuning(seeds=[7, 7]), "Invalid tuning.seeds=[7, 7]"),
        (with_tuning(test_seeds=[-1]), "Invalid tuning.test_seeds=[-1]"),
        (with_tuning(test_seeds=[2**32]), "Invalid tuning.test_seeds=[4294967296]"),
        (with_tuning(seed=[1]), "Unknown key tables.t.tuning.seed: write {seeds: [100, 101], test_seeds:"),
        ({"tuning": {"seeds": [1]}}, "Missing tables.t.tuning.test_seeds: write {seeds:"),
        (
            with_row(tun={"optim.lr": RATES}),
            "Unknown key tables.t.rows.lora.tun: did you mean tables.t.rows.lora.tune?",
        ),
        ({"tuning": None}, "Missing tuning: rows lora, flat are tuned"),
        ({"rows": {"dora": {"title": "DoRA"}}}, "Invalid tuning: no row is tuned"),
        (with_row(tune={"optim.lr": ["1e-4"]}), "Invalid tune of row lora: optim.lr=['1e-4']; at least two"),
        (with_row(tune={"optim.lr": ["1e-4", 0.0001]}), "at least two different values are needed"),
        (with_row(tune={"optim.lr": RATES}, overrides=["optim.lr=1"]), "optim.lr is set by an override too"),
        (with_row(tune={"optim.lr": RATES}, published_only=True), "it is published_only, so nothing is run"),
        (with_row(tune={"optim.lr": 5}), "Invalid tables.t.rows.lora.tune={'optim.lr': 5}"),
    ],
)
def test_a_layout_that_cannot_be_tuned_is_an_error(layouts, changes, expected):
    with pytest.raises(ConfigError) as caught:
        layouts(**changes)
    assert any(expected in message for message in caught.value.errors), caught.value.errors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            with_tuning(overrides=[]),
            "row lora, column cola: Invalid dataset.evaluate=validation with dataset.validation_",
        ),
        (with_row(tune={"optim.lrr": [1, 2]}), "Unknown key optim.lrr: did you mean optim.lr?"),
        (with_row(tune={"lr": [1, 2]}), "Unknown key lr: a tuned key is one setting, such as optim.lr"),
        (with_row(tune={"optim.lr.x": [1, 2]}), "Unknown key optim.lr.x: a tuned key is one setting"),
        (with_row(tune={"optim.lr": ["1e-4", "-1"]}), "Invalid optim.lr=-1: it must be > 0"),
        (with_row(tune={"optim.lr": ["1e-4", "fast"]}), "Invalid optim.lr='fast': it must be a number"),
        (with_row(tune={"rho.sigma": [0.1, 0.2]}), "Invalid rho.sigma=0.1 with rho=off"),
        (with_row(tune={"trainer.save_steps": [10, 20]}), "some of its values are the same setting"),
        (
            {"columns": {"cola": raw_layout()["columns"]["cola"] | {"tuned_by": "gsm8k/exact_match"}}},
            "Invalid tuned_by=gsm8k/exact_match: tuning runs have no such validation score",
        ),
    ],
)
def test_tuning_runs_that_cannot_run_are_named_before_any_does(layouts, capsys, tmp_path, changes, expected):
    layout = layouts(**changes)
    with pytest.raises(ConfigError) as caught:
        cells.check_tuning({"t": layout})
    assert any(expected in message for message in caught.value.errors), caught.value.errors
    for action in (["commands"], ["status"], []):
        assert tables.main([*action, "t", "--results", str(tmp_path)]) == 2
    assert "python run_exp.py" not in capsys.readouterr().out


def test_two_rows_may_have_the_same_setting(layouts):
    rows = raw_layout()["rows"]
    cells.check_tuning({"t": layouts(rows={"lora": rows["lora"], "again": rows["lora"] | {"title": "Again"}})})


# --- the figure


@pytest.mark.extra
def test_the_curves_show_the_best_of_the_other_values_and_ring_the_chosen(tmp_path, layouts):
    layout = layouts()
    assert figures.tuning_curves([made_of(tmp_path / "none", layout)[0]]) is None
    write_tuning(tmp_path, SCORES)
    scores = iter((0.70, 0.75, 0.80, 0.78))
    for values in tuning.grid(layout.rows["flat"].tune):
        words, accuracy = [f"{key}={value}" for key, value in values.items()], next(scores)
        for seed in (100, 101):
            write_run(tmp_path, ["rho=flat", *words, *TUNING, f"seed={seed}"], accuracy)
    made, *_ = made_of(tmp_path, layout)
    (axis,) = figures.tuning_curves([made]).axes
    lora, ring, flat, _ = axis.lines
    assert np.array(lora.get_xydata()).tolist() == pytest.approx(np.array([[1e-4, 71], [5e-4, 81], [2e-3, 79.5]]))
    assert np.array(ring.get_xydata()).tolist() == pytest.approx(np.array([[5e-4, 81]]))
    assert np.array(flat.get_xydata()).tolist() == pytest.approx(np.array([[1e-4, 75], [5e-4, 80]]))
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("optim.lr", "validation, CoLA")


def test_a_point_without_all_seeds_is_not_drawn(tmp_path, layouts):
    write_tuning(tmp_path, SCORES)
    values = next(iter(tuning.grid(layouts().rows["flat"].tune)))
    write_run(tmp_path, ["rho=flat", *(f"{key}={value}" for key, value in values.items()), *TUNING, "seed=100"], 0.9)
    made, *_ = made_of(tmp_path, layouts())
    curves = {title: points for title, points, _ in figures.lines_of_tuning(made, "cola")}
    titles = [row.title for row in made.layout.rows.values() if row.tune]
    assert [len(curves[title]) for title in titles] == [3, 0]


def test_columns_that_are_chosen_by_one_score_show_it_once(tmp_path, layouts):
    columns = raw_layout()["columns"]
    twin = columns["cola"] | {"title": "Matthews", "metric": "glue/matthews", "tuned_by": "glue/accuracy"}
    write_tuning(tmp_path, SCORES)
    made, *_ = made_of(tmp_path, layouts(columns={"cola": columns["cola"], "matthews": twin}))
    assert made.tuned_columns == ["cola"]
    assert len({tuple(line[2:]) for line in table_formats._validation_scores(made)}) == 3
    assert len(table_formats._validation_scores(made)) == 3


# --- what n seeds can show


def test_holms_correction_is_its_formula():
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5]
    ordered = sorted(p_values)
    expected = {
        p: min(1, max((len(p_values) - j) * ordered[j] for j in range(rank + 1))) for rank, p in enumerate(ordered)
    }
    assert significance.holm(p_values) == pytest.approx([expected[p] for p in p_values])
    assert significance.holm(p_values) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])  # by hand
    assert significance.holm([0.2, 0.2]) == pytest.approx([0.4, 0.4])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


def power_by_integral(ratio, count):
    """P(|(Z + ratio √n) / √(V / f)| > t) for a standard normal Z and V of a χ² distribution with f = n − 1."""
    freedom, shift = count - 1, ratio * math.sqrt(count)
    critical = stats.t.ppf(0.975, freedom)

    def given(v):
        bound = critical * math.sqrt(v / freedom)
        return stats.chi2.pdf(v, freedom) * (stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift))

    return integrate.quad(given, 0, stats.chi2.ppf(1 - 1e-12, freedom), limit=200)[0]


@pytest.mark.parametrize("count", [3, 5, 10, 20])
def test_the_detectable_difference_is_found_with_eighty_per_cent(count):
    std = 2.5
    difference = significance.smallest_detectable(std, count)
    assert power_by_integral(difference / std, count) == pytest.approx(0.8, abs=1e-5)
    assert significance.power(difference, std, count) == pytest.approx(0.8, abs=1e-6)
    assert significance.power(0.0, std, count) == pytest.approx(0.05)


def test_comparisons_have_the_corrected_p_and_the_detectable_difference(layouts):
    layout = layouts(rows={row: {"title": row} for row in ("lora", "flat", "dora")}, tuning=None)
    by_seed = {
        "lora": {0: 80.0, 1: 81.0, 2: 80.5, 3: 79.0},
        "flat": {0: 81.0, 1: 82.5, 2: 81.0, 3: 80.5},
        "dora": {0: 80.5, 1: 80.0, 2: 81.5, 3: 79.5},
    }
    content = {(row, "cola"): cells.Cell(values, [], None) for row, values in by_seed.items()}
    made = cells.TableData("t", layout, None, content, {})
    tests = [stats.ttest_rel(list(by_seed[row].values()), list(by_seed["lora"].values())) for row in ("flat", "dora")]
    found = table_formats.comparisons_of(made)
    assert [one.p for one in found] == pytest.approx([test.pvalue for test in tests])
    stds = [np.std(np.subtract(list(by_seed[row].values()), list(by_seed["lora"].values())), ddof=1) for row in by_seed]
    detectable = [significance.smallest_detectable(std, 4) for std in stds[1:]]
    assert [one.detectable for one in found] == pytest.approx(detectable)
    flat, dora = table_formats.comparisons(made)
    assert flat[4:] == [f"{tests[0].pvalue:.3f}", f"{2 * tests[0].pvalue:.3f}", f"{detectable[0]:.2f}", "4"]
    assert dora[5] == f"{tests[1].pvalue:.3f}"
    notes = table_formats.notes_of(made)
    assert "p (Holm): Holm's correction over the 2 paired comparisons of this table." in notes
    assert notes[-1].endswith(f"CoLA {min(detectable):.2f} to {max(detectable):.2f}.")
