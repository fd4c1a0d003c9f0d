"""Tables from records of runs: what fills a cell, what is left out and named, and the committed study."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from scipy import stats

import run_exp
from flatlora.utils import records
from flatlora.utils.errors import ConfigError
from scripts import cells, published, table_formats, tables

PROJECT = Path(__file__).parents[2]
COLUMN = cells.Column(title="CoLA", overrides=["dataset=cola"], metric="glue/accuracy", scale=100)


def write_run(results, words, accuracy, folder=None, **changes):
    """A finished run's record, as run_exp writes it, with one metric."""
    experiment = run_exp.experiment_of(words)
    record = {
        "status": "finished",
        "experiment": experiment.model_dump(mode="json"),
        "metrics": {"glue/accuracy": accuracy},
        "timing": {"train_s": 3600.0},
    }
    path = results / (folder or f"{experiment.run_name()}/{experiment.seed}") / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record | changes))
    return path.parent


def made_of(results, name="table1"):
    layouts = cells.read_layouts(cells.LAYOUTS)
    runs, problems = cells.read_runs(results)
    (made,), more = cells.make({name: layouts[name]}, cells.read_paper(cells.PAPER)[0], runs)
    return made, [*problems, *more]


def words(row, seed, *more):
    rank, rho = row.rpartition("_r")[2], "flat" if row.startswith("flat_") else "off"
    return ["experiment=table1", f"peft.lora_r={rank}", f"rho={rho}", "dataset=cola", f"seed={seed}", *more]


def test_runs_fill_the_cell_of_their_setting_and_no_other(tmp_path):
    for seed, accuracy in enumerate((0.83, 0.84, 0.85)):
        write_run(tmp_path, words("lora_r8", seed), accuracy)
    write_run(tmp_path, words("lora_r8", 3, "optim.lr=1e-3"), 0.99)  # another setting
    write_run(tmp_path, words("lora_r8", 4, "trainer.micro_batch_size=16"), 0.99)
    write_run(tmp_path, words("lora_r8", 5, "dataset.test_rows=10"), 0.99)  # other rows are scored
    write_run(tmp_path, words("lora_r8", 6, "eval.glue.metric=published"), 0.99)
    made, problems = made_of(tmp_path)
    cell = made.cells["lora_r8", "cola"]
    assert cell.by_seed == {0: pytest.approx(83), 1: pytest.approx(84), 2: pytest.approx(85)}
    assert (cell.paper, cell.mean, cell.std) == (82.87, pytest.approx(84), pytest.approx(1))
    assert problems == []
    assert {key for key, one in made.cells.items() if one.by_seed} == {("lora_r8", "cola")}
    text = table_formats.markdown(made)
    assert "| LoRA (r = 8), ours | missing | missing | 84.00 ± 1.00 (3) | missing | missing | — |" in text
    assert "| LoRA (r = 8), paper | 86.24 | 94.25 | 82.87 | 93.06 | 88.56 | 88.99 |" in text
    assert "| LoRA (r = 8), difference | — | — | +1.13 | — | — | — |" in text
    assert r"84.00 $\pm$ 1.00 (3)" in table_formats.latex(made)
    (line,) = [
        line
        for line in table_formats.as_csv(made, tmp_path).splitlines()
        if line.startswith("table1,LoRA (r = 8),cola")
    ]
    assert line.split(",")[3:9] == ["84.0000", "1.0000", "3", "0 1 2", "82.87", "1.1300"]
    assert line.count("/run") == 0
    assert len(line.split(",")[10].split()) == 3


def test_what_is_broken_unfinished_or_contradictory_is_named_and_left_out(tmp_path):
    write_run(tmp_path, words("lora_r8", 0), 0.80)
    write_run(tmp_path, words("lora_r8", 0), 0.81, folder="again")
    write_run(tmp_path, words("lora_r8", 1), 0.82)
    write_run(tmp_path, words("lora_r8", 1), 0.82, folder="copied")
    write_run(tmp_path, words("lora_r8", 2), 0.83, status="interrupted")
    torn = write_run(tmp_path, words("lora_r8", 3), 0.84)
    (torn / "run.json").write_text('{"status": "fin')
    unknown = write_run(tmp_path, words("lora_r8", 4), 0.85, experiment={"model": {"nme": "x"}})
    made, problems = made_of(tmp_path)
    assert made.cells["lora_r8", "cola"].by_seed == {1: pytest.approx(82)}
    assert len(problems) == 5
    assert any("seed 1 is in several folders" in one and "copied" in one for one in problems)
    assert any("seed 0 of glue/accuracy" in one and "has 0.8;" in one and "has 0.81," in one for one in problems)
    assert any("is interrupted" in one for one in problems)
    assert any(str(torn) in one for one in problems)
    assert any(str(unknown) in one for one in problems)


def test_the_best_is_bold_only_where_the_difference_is_no_chance(tmp_path):
    for seed, noise in enumerate((0.001, -0.002, 0.0015, 0.0)):
        write_run(tmp_path, words("lora_r8", seed), 0.80 + noise)
        write_run(tmp_path, words("flat_lora_r8", seed), 0.82 - noise)
    made, _ = made_of(tmp_path)
    assert made.best == {"cola": "flat_lora_r8"}
    assert "**81.99 ± 0.15 (4)**" in table_formats.markdown(made)
    write_run(tmp_path, words("lora_r16", 0), 0.81)  # one seed: nothing can be said against it
    made, _ = made_of(tmp_path)
    assert made.best == {}


def test_a_note_says_which_answers_were_cut_or_refused(tmp_path):
    for seed, (cut, refused) in enumerate(((0.25, 0.0), (0.0, 0.0))):
        metrics = {"glue/accuracy": 0.8, "glue/unfinished": cut, "glue/refused": refused, "glue/unrated": 3 * seed}
        write_run(tmp_path, words("lora_r8", seed), 0.8, metrics=metrics)
    write_run(tmp_path, words("flat_lora_r8", 0), 0.8)
    made, _ = made_of(tmp_path)
    said = "LoRA (r = 8), CoLA: 12.5% of the answers cut at max_new_tokens, 1.5 not rated by the judge."
    assert table_formats.notes_of(made)[-1] == f"Incomplete answers, mean over runs: {said}"


def test_paired_differences_are_scipys():
    left, right = {0: 1.0, 1: 2.5, 2: 3.0, 7: 9.0}, {0: 0.5, 1: 2.75, 2: 2.0, 8: 1.0}
    mean, low, high, p, seeds = cells.paired(left, right)
    expected = stats.ttest_rel([1.0, 2.5, 3.0], [0.5, 2.75, 2.0])
    assert (p, seeds) == (pytest.approx(expected.pvalue), 3)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert mean == pytest.approx((0.5 - 0.25 + 1.0) / 3)
    assert cells.paired(left, {0: 1.0, 1: 2.0}) is None


@pytest.mark.parametrize(
    ("change", "expected", "left"),
    [
        (
            lambda raw: raw["tables"]["table1"].update(source="X"),
            "Invalid source of paper.table1: X is none of ",
            0,
        ),
        (lambda raw: raw["tables"]["table1"].pop("source"), "paper.table1.source", None),
        (lambda raw: raw["tables"]["table1"]["values"]["lora_r8"].update(mnli="high"), "lora_r8.mnli='high'", 29),
        (lambda raw: raw["tables"]["table1"]["values"]["lora_r8"].update(mnli=float("nan")), "lora_r8.mnli=nan", 29),
        (lambda raw: raw["tables"]["table1"]["values"].update(lora_r8=[1]), "lora_r8=[1]", 24),
    ],
)
def test_a_published_number_that_is_invalid_or_has_no_source_is_named_and_left_out(tmp_path, change, expected, left):
    raw = yaml.safe_load(cells.PAPER.read_text())
    change(raw)
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(raw))
    shutil.copy(cells.PAPER.with_name("peft_suite.csv"), tmp_path)
    papers, problems = cells.read_paper(tmp_path / "paper.yaml")
    assert [expected in problem for problem in problems] == [True]
    assert "table2" in papers  # the others are made all the same
    found = papers.get("table1")
    assert left == (None if found is None else sum(map(len, found.values.values())))


@pytest.mark.parametrize("text", ["", "[1]", "tables: {}", "sources: [S4]\ntables: {}", "a: b: c", "[" * 2_000])
def test_a_file_of_published_numbers_that_is_invalid_is_an_error(tmp_path, text):
    (tmp_path / "paper.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"paper\.yaml"):
        cells.read_paper(tmp_path / "paper.yaml")


def test_a_published_number_of_no_cell_is_named_and_left_out():
    layout = cells.Layout(rows={"lora_r8": cells.Row(title="LoRA")}, columns={"cola": COLUMN})
    paper = cells.Published(title="t", setting="s", source="S4", values={"lora_r9": {"cola": 1.0}})
    (made,), problems = cells.make({"table1": layout}, {"table1": paper}, [])
    assert made.cells["lora_r8", "cola"].paper is None
    assert "lora_r9, cola is not a cell" in problems[0]


def test_one_run_in_two_folders_is_counted_once_and_named(tmp_path):
    folder = write_run(tmp_path, words("lora_r8", 0), 0.8)
    shutil.copytree(folder, folder.with_name("0copy"))
    made, problems = made_of(tmp_path)
    assert made.cells["lora_r8", "cola"].by_seed == {0: pytest.approx(80)}
    assert len(problems) == 1
    assert "seed 0 is in several folders with equal numbers" in problems[0]
    runs, _ = cells.read_runs(tmp_path)
    assert cells.unused([made], runs) == []
    other = write_run(tmp_path, words("lora_r8", 0, "optim.lr=1e-3"), 0.8)
    assert cells.unused([made], cells.read_runs(tmp_path)[0]) == [
        f"1 runs have settings that belong to no cell of these tables: {other}"
    ]


def test_differences_that_are_equal_but_for_rounding_are_no_evidence():
    ours, others = ({seed: 100 * (n + d) / 1043 for seed, n in enumerate((840, 835, 851))} for d in (9, 0))
    assert cells.paired(ours, others) is None


@pytest.fixture
def results(tmp_path):
    """The committed runs alone: a developer's results/ may hold others."""
    shutil.copytree(PROJECT / "results/study", tmp_path / "results/study")
    return tmp_path / "results"


@pytest.mark.extra
def test_the_committed_tables_are_those_of_the_committed_runs(results, capsys):
    assert tables.main(["--results", str(results)]) == 0
    made = {path.name for path in (results / "tables").iterdir()}
    assert made == {f"{t}.{s}" for t in cells.read_layouts(cells.LAYOUTS) for s in ("md", "tex", "csv")}
    for name in sorted(made):
        assert (results / "tables" / name).read_bytes() == (PROJECT / "results/tables" / name).read_bytes(), name
    status = ["status", "study", "--results", str(results), "--seeds", "3"]
    assert tables.main(status) == 0
    assert capsys.readouterr().out.endswith(" hours of training for cells with similar runs.\n")
    for folder in results.glob("study/flatlora_gsm8k/smollm-lora_*"):  # of two LoRA-GA rows and LoRA-Pro
        shutil.rmtree(folder)
    assert tables.main(status) == 0
    assert " 9 runs have no similar run" in capsys.readouterr().out
    assert tables.main(["tabel1"]) == 2
    assert tables.main(["--results", str(results / "none")]) == 2


def test_commands_are_those_of_the_cells_for_a_shell(capsys):
    assert tables.main(["commands", "table4", "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [shlex.split(line) for line in lines if not line.startswith("#")]
    made = cells.TableData("table4", cells.read_layouts(cells.LAYOUTS)["table4"], None, {}, {})
    begin = ["python", "run_exp.py", "-m"]
    rows = made.layout.rows
    assert printed == [[*begin, *made.overrides_of(row, "mmlu"), "seed=0,1"] for row in rows]  # the four columns' runs
    assert lines[:4] == [f"# table4, Full FT, {title}" for title in ("MMLU", "DROP", "HEval", "BBH")]
    assert printed[3][3:6] == ["experiment=table4", "rho=flat", "dataset=alpaca"]
    assert tables.main(["commands", "sdxl", "--seeds", "1", "--results", "none"]) == 0  # no run is read
    assert (
        capsys.readouterr().out.splitlines()[-1] == "python run_exp.py experiment=sdxl rho=flat dataset=icons3d seed=0"
    )
    assert tables.main(["commands", "tabel4"]) == 2


def test_commands_have_what_the_metrics_of_a_table_need(capsys):
    assert tables.main(["commands", "corruptions"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) == 4
    assert all("eval=[images,corruptions]" in line and "eval.corruptions.folder=DIR" in line for line in lines)
    assert tables.main(["commands", "flatness"]) == 0
    assert "python -m scripts.flatness RUNS --parts hessian --rows 256" in capsys.readouterr().out


def test_a_table_and_its_columns_name_their_seeds(tmp_path, capsys):
    """B runs CB and COPA with 20 seeds, RTE with 5 and the rest with 3; --seeds replaces them all."""

    def seeds_of(*arguments):
        assert tables.main(["commands", "bi_lora_superglue", *arguments]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if " rho=bi_lora " in line]
        overrides = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return {each["dataset"]: len(each["seed"].split(",")) for each in overrides}

    assert seeds_of() == {"boolq": 3, "cb": 20, "copa": 20, "rte": 5, "wic": 3}
    assert set(seeds_of("--seeds", "2").values()) == {2}
    assert tables.main(["status", "bi_lora_superglue", "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Cells, by the seeds of their tables" in shown
    assert f"{4 * (3 + 20 + 20 + 5 + 3)} runs have no similar run" in shown
    made, _ = made_of(tmp_path, "bi_lora_superglue")
    assert "Seeds per cell in the paper: 3 (CB 20, COPA 20, RTE 5)." in table_formats.notes_of(made)
    made, _ = made_of(tmp_path, "table1")
    assert table_formats.notes_of(made)[-1] == "Seeds per cell in the paper: 3."
    made, _ = made_of(tmp_path, "study")  # no paper's
    assert not [note for note in table_formats.notes_of(made) if note.startswith("Seeds")]
    assert made.layout.seeds_of("cola") == 3


def test_time_and_memory_are_shown_with_the_machines_that_they_are_of(tmp_path):
    gpus = {"lora": ["NVIDIA H200"] * 2, "flat_lora": ["NVIDIA GeForce RTX 4090"]}
    layout = cells.read_layouts(cells.LAYOUTS)["table7"]
    for row, seed, minutes, memory in (("lora", 0, 60, 20.5), ("flat_lora", 0, 71, 20.6), ("flat_lora", 1, 73, None)):
        hardware = {"cpu": "c", "cores": 1, "threads": 1, "gpus": gpus[row], "memory_gib": 1.0, "world_size": 1}
        own = [*cells.cell_overrides("table7", layout, row, "memory"), f"seed={seed}"]
        changes = {"timing": {"train_s": 60.0 * minutes}, "memory": {"peak_gpu_gib": memory, "peak_rss_gib": 1.0}}
        write_run(tmp_path, own, 0.0, metrics={}, env={"versions": {}, "hardware": hardware}, **changes)
    made, problems = made_of(tmp_path, "table7")
    assert problems == []
    assert {key: cell.by_seed for key, cell in made.cells.items()} == {
        ("lora", "memory"): {0: 20.5},
        ("lora", "minutes"): {0: pytest.approx(60)},
        ("flat_lora", "memory"): {0: 20.6},
        ("flat_lora", "minutes"): {0: pytest.approx(71), 1: pytest.approx(73)},
    }
    note = "Time and memory of ours: 2 × NVIDIA H200 (LoRA); NVIDIA GeForce RTX 4090 (Flat-LoRA)."
    assert note in table_formats.notes_of(made)
    assert "| Flat-LoRA, ours | 20.60 (1) | 72.0 ± 1.4 (2) |" in table_formats.markdown(made)


def test_columns_that_show_the_same_runs_get_the_most_seeds_of_them():
    columns = {key: COLUMN.model_copy(update={"seeds": seeds}) for key, seeds in (("a", 2), ("b", 5), ("c", None))}
    layout = cells.Layout(rows={"lora": cells.Row(title="LoRA")}, columns=columns, experiment="table1")
    *titles, command = tables.commands({"one": layout})
    assert titles == ["# one, LoRA, CoLA"] * 3
    assert command == "python run_exp.py -m experiment=table1 dataset=cola seed=0,1,2,3,4"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seeds": 0}, r"Invalid tables\.one\.seeds=0: it must be ≥ 1; the paper's number"),
        ({"seeds": "many"}, r"Invalid tables\.one\.seeds='?many"),
        ({"columns": {"cola": {"seeds": 2.5}}}, r"Invalid tables\.one\.columns\.cola\.seeds=2.5: .*take the table's"),
    ],
)
def test_a_number_of_seeds_that_is_none_is_refused(tmp_path, change, expected):
    column = {"title": "CoLA", "overrides": ["dataset=cola"], "metric": "glue/accuracy", "scale": 100}
    raw = {"rows": {"lora": {"title": "LoRA"}}, "columns": {"cola": column}} | change
    raw["columns"]["cola"] = column | raw["columns"]["cola"]
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump({"one": raw}))
    with pytest.raises(ConfigError, match=expected):
        cells.read_layouts(tmp_path / "tables.yaml")


@pytest.mark.extra  # the experiments' own launch commands compose in tests/test_experiments.py
def test_every_row_and_column_composes_and_every_column_asks_the_benchmark_of_its_metric(tmp_path):
    layouts = cells.read_layouts(cells.LAYOUTS)
    for name, layout in layouts.items():
        made = cells.TableData(name, layout, None, {}, {})
        first, column = next(iter(layout.rows)), next(iter(layout.columns))
        for row in layout.rows:
            cells.experiment_of(tuple(made.overrides_of(row, column)))
        for key, one in layout.columns.items():
            asked = cells.experiment_of(tuple(made.overrides_of(first, key))).eval
            benchmark = one.metric.partition("/")[0]
            besides = ("flatness", "corruptions", *cells.MEASURED)  # asked by the user, or in every record
            assert benchmark in asked or benchmark in besides
        assert set(layout.against) | set(layout.against.values()) <= set(layout.rows)
    made = cells.TableData("table4", layouts["table4"], None, {}, {})
    command = [*made.overrides_of("lora", "mmlu"), "seed=0", "eval.instruct_eval.batch_size=2"]
    metrics = {"instruct_eval/mmlu": 0.5, "instruct_eval/bbh": None}
    write_run(tmp_path, command, 0.0, metrics=metrics)
    made, problems = made_of(tmp_path, "table4")
    assert {key[1] for key, cell in made.cells.items() if cell.by_seed} == {"mmlu"}
    assert problems == []


def test_records_that_hold_no_numbers_are_left_out(tmp_path):
    for seed, changes in enumerate(
        (
            {"metrics": {"glue/accuracy": float("nan")}},
            {"metrics": {"glue/accuracy": True}},
            {"metrics": {"glue/accuracy": 10**400}},
            {"metrics": [1]},
            {"timing": {}},
        )
    ):
        write_run(tmp_path, words("lora_r8", seed), 0.8, **changes)
    made, problems = made_of(tmp_path)
    assert len(problems) == 5
    assert not made.cells["lora_r8", "cola"].by_seed


def test_no_broken_record_hides_another_run(tmp_path):
    """Whatever stands in its place, a pipe that nobody writes to among them."""
    write_run(tmp_path, words("lora_r8", 0), 0.8)
    things = [
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("nothing"),
        lambda path: os.mkfifo(path),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"status": "finished", "experiment": ' + '{"a":' * 500 + "1" + "}" * 501),
        lambda path: path.write_bytes(b"\xff"),
    ]
    for seed, make in enumerate(things, start=1):
        path = write_run(tmp_path, words("lora_r8", seed), 0.8) / "run.json"
        path.unlink()
        make(path)
    made, problems = made_of(tmp_path)
    assert made.cells["lora_r8", "cola"].by_seed == {0: pytest.approx(80)}
    assert len(problems) == len(things)


def test_a_changed_number_of_a_signed_record_is_left_out_and_damaged_files_are_named(tmp_path):
    for seed in (0, 1, 2):
        folder = write_run(tmp_path, words("lora_r8", seed), 0.5)
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        record = json.loads((folder / "run.json").read_text()) | {"files": records.hash_files(folder)}
        records.write_signed(folder / "run.json", record)
    one, two, _ = sorted(tmp_path.rglob("run.json"))
    one.write_text(one.read_text().replace("0.5", "0.9", 1))
    two.with_name("metrics.jsonl").write_text("")
    made, problems = made_of(tmp_path)
    assert sorted(made.cells["lora_r8", "cola"].by_seed) == [1, 2]  # a table is of what was signed
    assert len(problems) == 2
    assert "it was changed after it was written" in problems[0]
    assert "metrics.jsonl is not what the run wrote" in problems[1]


def measured(adapter, rises, **how):
    """A flatness.json as scripts/flatness.py writes it, with one part."""
    part = {"how": {"rows": 512, "draws": 16, "seed": 0, "streams": 7} | how, "draws": {"0.05": rises}}
    return json.dumps({"adapter_sha256": adapter, "parts": {"rise": part}})


def test_flatness_fills_cells_if_it_is_of_the_runs_adapter_and_measured_as_the_table_says(tmp_path):
    for seed, changes in enumerate(({}, {}, {}, {"rows": 8}, {})):
        for row, offset in (("lora", 0.02), ("flat_lora", 0.01)):
            rho = "flat" if row == "flat_lora" else "off"
            own = ["experiment=study", f"rho={rho}", "dataset=cola", f"seed={seed}"]
            folder = write_run(tmp_path, own, 0.8, adapter_sha256=f"{row}{seed}")
            rises = [offset, offset + 0.001 * (seed + 1) * (2 if row == "lora" else 1)]
            (folder / "flatness.json").write_text(measured(f"{row}{seed}" if seed < 4 else "other", rises, **changes))
    made, problems = made_of(tmp_path, "flatness")
    cell = made.cells["lora", "rise05"]
    assert list(cell.by_seed) == [0, 1, 2]  # not the one of 8 rows, not the one of another adapter
    assert cell.by_seed[1] == pytest.approx(0.022)
    assert made.best == {"rise05": "flat_lora"}  # less is better
    assert len(problems) == 2
    assert all("another adapter" in problem for problem in problems)
    assert "| LoRA | 0.0220 ± 0.0010 (3) | missing |" in table_formats.markdown(made)


def test_a_rise_under_the_noise_of_the_training_itself_fills_no_cell(tmp_path):
    """Before flatness had streams of its own, a measure of the run's own seed drew the ε that its training saw."""
    for seed in (0, 5):
        folder = write_run(tmp_path, ["experiment=study", "dataset=cola", f"seed={seed}"], 0.8, adapter_sha256="a")
        found = json.loads(measured("a", [0.02, 0.03]))
        del found["parts"]["rise"]["how"]["streams"]
        (folder / "flatness.json").write_text(json.dumps(found))
    made, (problem,) = made_of(tmp_path, "flatness")
    assert list(made.cells["lora", "rise05"].by_seed) == [5]
    assert "measured with the noise that the training of seed 0 saw; measure again" in problem


def test_a_broken_flatness_file_costs_its_numbers_alone(tmp_path):
    rise = {"how": {}, "draws": {"0.05": [0.1]}}
    plane = {"how": {}, "at": [0, 1], "line": [1, 2], "plane": [[1, 2], [1, 2]]}
    broken = [
        {"rise": rise | {"draws": {"0.05": []}}},
        {"rise": rise | {"how": [1]}},
        {"rise": rise | {"draws": {"abc": [0.1]}}},
        {"rise": rise | {"draws": {"0.05": [10**400]}}},
        {"hessian": {"how": {}}},
        {"landscape": plane | {"plane": [[1, 2]]}},
        {"landscape": plane | {"line": "x"}},
    ]
    texts = ["{", "[]", *(json.dumps({"adapter_sha256": "a", "parts": parts}) for parts in broken)]
    for seed, text in enumerate(texts):
        own = ["experiment=study", "dataset=cola", f"seed={seed}"]
        (write_run(tmp_path, own, 0.8, adapter_sha256="a") / "flatness.json").write_text(text)
    made, problems = made_of(tmp_path, "study")
    assert len(made.cells["lora", "cola"].by_seed) == len(texts) == len(problems)
    assert all("its other numbers count" in problem for problem in problems)


def test_public_results_of_a_file_are_rows_below_ours(tmp_path):
    metrics = {"gsm8k/exact_match": 0.5}
    for seed in (0, 1):
        times, memory = {"train_s": 600.0 + 60 * seed, "score_s": 120.0}, {"peak_reserved_gib": 20.5 + seed}
        own = ["experiment=peft_suite", "rho=flat", f"seed={seed}"]
        write_run(tmp_path, own, 0.0, metrics=metrics, timing=times, memory=memory)
    write_run(tmp_path, ["experiment=peft_suite", "rho=flat", "seed=2"], 0.0, metrics=metrics, timing={"train_s": 1.0})
    fewer = ["experiment=peft_suite", "rho=flat", "seed=3", "eval.gsm8k.max_rows=9"]  # and so less time
    write_run(tmp_path, fewer, 0.0, metrics=metrics, timing=times, memory=memory)
    made, problems = made_of(tmp_path, "peft_suite")
    assert problems == []
    row = {key: made.cells["flat_lora", key].by_seed for key in made.layout.columns}
    assert row["gsm8k"] == {0: 50, 1: 50, 2: 50}
    assert row["memory"] == {0: 20.5, 1: 21.5}  # none of the run on a CPU
    assert row["minutes"] == {0: pytest.approx(12), 1: pytest.approx(13)}
    public = [key for key, value in made.layout.rows.items() if value.published_only]
    assert (len(public), public[0]) == (63, "lily/llama-3.2-3B-rank140-mlp-a2-b2-s8.0")
    best = [made.cells["lora/llama-3.2-3B-rank32", key].paper for key in made.layout.columns]
    assert best == [pytest.approx(value, abs=0.005) for value in (47.84, 20.76, 15.70)]
    text = table_formats.markdown(made)
    assert "| Flat-LoRA (r = 32), ours | 50.00 ± 0.00 (3) | 21.00 ± 0.71 (2) | 12.5 ± 0.7 (2) |" in text
    assert "| lora/rank32, paper | 47.84 | 20.76 | 15.70 |" in text
    assert text.count(", ours |") == 11
    assert "commands" not in text
    assert all("lily" not in command for command in tables.commands({"peft_suite": made.layout}, 1))


@pytest.mark.parametrize(
    "text",
    ["", "experiment,a\n", "name,a\nx,1\n", "experiment,a\nx,1\nx,2\n", "experiment,a\nx\n", "experiment,a\nx,1,2\n"],
)
def test_a_file_of_public_results_that_is_invalid_is_an_error(tmp_path, text):
    (tmp_path / "public.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"public\.csv"):
        published.read_published(tmp_path / "public.csv")
    with pytest.raises(ConfigError, match=r"Cannot read .*none\.csv"):
        published.read_published(tmp_path / "none.csv")


def test_a_file_of_public_results_that_is_missing_costs_its_table_alone(tmp_path):
    shutil.copy(cells.PAPER, tmp_path)
    papers, (problem,) = cells.read_paper(tmp_path / "paper.yaml")
    assert problem.startswith(f"Cannot read {tmp_path / 'peft_suite.csv'}")
    assert "peft_suite" not in papers
    assert papers["table1"].values


def test_a_public_result_that_is_no_number_is_named_and_left_out(tmp_path):
    (tmp_path / "public.csv").write_text("experiment,a\nx,1.5\ny,much\nz,nan\n")
    columns = {"one": {"of": "a", "times": 100}, "two": {"of": "b"}}
    numbers, problems = published.numbers_of("t", {"file": "public.csv", "columns": columns}, tmp_path)
    assert numbers == {"x": {"one": 150.0}}
    assert len(problems) == 5
    assert problems[0] == "Invalid paper.t.x.two=None: it must be a number; fix it."
    with pytest.raises(ConfigError, match=r"did you mean paper\.t\.values\.columns\.one\.times"):
        published.numbers_of("t", {"file": "public.csv", "columns": {"one": {"of": "a", "tims": 100}}}, tmp_path)


def test_a_column_without_a_data_set_is_an_error(tmp_path):
    column = {"title": "A", "overrides": [], "metric": "m", "scale": 1}
    raw = {"t": {"rows": {"lora": {"title": "LoRA"}}, "columns": {"a": column}}}
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match="add dataset=NAME"):
        cells.read_layouts(tmp_path / "tables.yaml")
