"""Files of conf/experiment and rows of results/tables.yaml: their settings, and a step of a tiny model with each."""

import json
import math
import re
from pathlib import Path

import pytest

import run_exp
from flatlora.experiment import commandline
from scripts import cells
from tests.conftest import run_folder, write_split

PROJECT = Path(__file__).parents[1]
LAUNCH = "# python run_exp.py "
LAYOUTS = cells.read_layouts(cells.LAYOUTS)
TABLES = [name for name in LAYOUTS if name not in ("flatness", "corruptions")]  # those have rows of others
ROWS = [(name, row) for name in TABLES for row in LAYOUTS[name].rows]
SHORT = ["seed=0", "eval=[]", "wandb.mode=disabled", "wandb.name=run", "trainer=cpu", "trainer.max_steps=1"]
SHORT += ["optim.batch_size=2", "trainer.micro_batch_size=1", "dataset.train_rows=4", "dataset.validation_rows=0"]


def launches() -> list[tuple[str, list[str]]]:
    """(file, overrides) of each launch command that a file gives."""
    found = []
    for path in sorted((PROJECT / "conf/experiment").glob("*.yaml")):
        lines = [line.removeprefix(LAUNCH) for line in path.read_text().splitlines() if line.startswith(LAUNCH)]
        found += [(path.stem, [word for word in line.split() if word not in ("-m", "data_root=DIR")]) for line in lines]
    return found


def test_every_file_gives_its_launch_command():
    assert {name for name, _ in launches()} == {path.stem for path in (PROJECT / "conf/experiment").iterdir()}
    assert {LAYOUTS[name].experiment or name for name in TABLES} <= {name for name, _ in launches()}


@pytest.mark.parametrize(
    ("name", "words"), launches(), ids=lambda value: value if isinstance(value, str) else value[1].partition("=")[0]
)
def test_the_launch_command_composes(name, words):
    words = [word for word in words if not word.startswith("seed=")]  # alike for every seed
    assert words[0] == f"experiment={name}"
    jobs = commandline.expand_sweep(words)
    values = [word.partition("=")[2].split(",") for word in words if "=[" not in word]
    assert len(jobs) == math.prod(map(len, values))
    ends = jobs[:1] + jobs[1:][-1:]  # what lies between differs by an option, which is composed elsewhere
    assert len({experiment.sha256() for experiment in run_exp.experiments_of(ends)}) == len(ends)


# The papers' settings (of tables 2 and 3 results/paper.yaml has them too): model, lr, lr of full fine-tuning, epochs on
# the first column's data set, σ.
SETTINGS = {
    "table1": ("t5base", 5e-4, 1e-4, 1, 0.05),  # MNLI: one epoch
    "table2": ("clip_b32", 5e-4, 1e-4, 10, 0.15),
    "table3": ("llama", 5e-4, 1e-4, 2, 0.05),
    "table4": ("llama13b", 5e-4, 1e-4, 2, 0.05),
    "study": ("smollm", 5e-4, 1e-4, 3, 0.05),
    "ablation": ("smollm", 5e-4, 1e-4, 3, 0.05),
}
# Rows of tables whose name is not that of a peft option, or flat_ and that.
REGULARIZERS = {"lora_sam": "sam", "bi_lora": "bi_lora", "nbar": "nbar"}
REGULARIZERS |= {"linear": "flat_linear", "constant": "flat_constant", "iid": "flat_iid"}
REGULARIZERS |= {"no_fan_in": "flat", "every_10": "flat"}


SAME_ROWS = ("table2_methods", "table3_methods", "table4_methods")  # in results/tables.yaml by reference


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.extra if name in SAME_ROWS else ())
        for name in TABLES
        if (LAYOUTS[name].experiment or name) in SETTINGS
    ],
)
def test_every_row_has_the_setting_of_its_paper(name):
    layout = LAYOUTS[name]
    model, lr, full_lr, epochs, sigma = SETTINGS[layout.experiment or name]
    for row in layout.rows:
        found = cells.experiment_of(tuple(cells.cell_overrides(name, layout, row, next(iter(layout.columns)))))
        method, rank, own_sigma, own_lr = re.fullmatch(r"(?:flat_)?(\w+?)(?:_r(\d+)|_(0\.\d+)|_(5e-4))?", row).groups()
        rho = REGULARIZERS.get(method, "flat" if row.startswith("flat_") else "off")
        lower = method in ("lora_ga", "lora_pro") and model in ("t5base", "smollm")
        expected_lr = full_lr if method == "full_ft" else float(own_lr or (1e-4 if lower else lr))
        assert found.model.name == model, row
        assert found.peft.name == ("lora" if method in REGULARIZERS else method), row
        assert found.rho.name == rho, row
        assert (found.optim.lr, found.optim.epochs) == (expected_lr, epochs), row
        assert method == "full_ft" or found.peft.lora_r == int(rank or 8), row
        assert not rho.startswith("flat") or found.rho.sigma == float(own_sigma or sigma), row
    assert model != "smollm" or (found.optim.batch_size, found.trainer.micro_batch_size) == (32, 32)


def test_rows_of_one_change_have_it():
    def found(row):
        return cells.experiment_of(tuple(cells.cell_overrides("ablation", LAYOUTS["ablation"], row, "cola"))).rho

    assert [found(row).fan_in for row in ("flat_lora", "no_fan_in")] == [True, False]
    assert [found(row).every for row in ("flat_lora", "every_10")] == [1, 10]


@pytest.fixture(scope="session")
def cola(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        rows = [{"sentence": f"The {split} sentence {n} ends.", "label": n % 2, "idx": n} for n in range(6)]
        write_split(root, "nyu-mll/glue", "cola", split, rows)
    return root


@pytest.fixture
def tiny_words(request, tiny_model_folder, tiny_t5_folder, cola):
    """{model family: words that put a tiny model and a small data set in its place}."""
    local = ["model.embedded=null", "model.dtype=float32"]
    return {
        "seq2seq": [f"model.hub_id={tiny_t5_folder}", *local, "dataset=cola", f"data_root={cola}"],
        "clip": ["model=clip_tiny", "dataset=digits", "dataset.test_rows=4"],
        "sdxl": ["model=sdxl_tiny", "dataset=shapes"],
        "causal_lm": [f"model.hub_id={tiny_model_folder}", *local, "dataset=word_math", "dataset.test_rows=2"],
    }


def with_extras() -> list:
    """One row of each method and regularizer trains for a kind of model, a method's own row beside its flat one and
    rows that differ in a number in `make test-all`."""
    params, seen = [pytest.param("cost", None, id="cost")], set()
    kinds = {"table1": "seq2seq", "table1_methods": "seq2seq", "table2": "clip", "table2_methods": "clip"}
    for name, row in ROWS:
        layout = LAYOUTS[name]
        flat_twin = f"flat_{row}" in layout.rows or (row == "lora" and "flat_lora" in layout.rows)
        others = [
            one for one in layout.rows[row].overrides if one.startswith(("peft=", "rho=", "rho.fan", "rho.every"))
        ]
        setting = kinds.get(name, "sdxl" if name == "sdxl" else "causal_lm"), *others
        is_extra = flat_twin or setting in seen
        seen.add(setting)
        params.append(pytest.param(name, row, marks=pytest.mark.extra if is_extra else (), id=f"{name}-{row}"))
    return params


@pytest.mark.parametrize(("name", "row"), with_extras())
def test_a_tiny_model_of_the_family_trains_one_step(name, row, tiny_words, tmp_path):
    layout = LAYOUTS.get(name)
    first = cells.cell_overrides(name, layout, row, next(iter(layout.columns))) if layout else [f"experiment={name}"]
    asked = run_exp.experiment_of(first)
    kept = [word for word in first if re.split("[.=]", word)[0] not in ("dataset", "seed", "eval", "trainer")]
    settings = [*kept, *tiny_words[asked.model.family], *SHORT, f"results_root={tmp_path}"]
    assert run_exp.main(settings) == 0
    record = json.loads((run_folder(settings) / "run.json").read_bytes())
    done = record["experiment"]
    assert record["status"] == "finished"
    assert record["metrics"]["train_loss"] > 0
    assert done["peft"]["name"] == asked.peft.name
    assert done["rho"]["name"] == asked.rho.name
    hashes = record["backbone_sha256"]
    assert hashes["before"] == hashes["after"]
