"""Files of conf/experiment and rows of results/tables.yaml: their settings, and a step of a tiny model with each."""

import json
import math
import re
from pathlib import Path

import pytest

import run_exp
from flatlora.experiment import commandline
from flatlora.utils.errors import ConfigError
from scripts import cells
from tests.conftest import run_folder, write_split

PROJECT = Path(__file__).parents[1]
LAUNCH = "# python run_exp.py "
LAYOUTS = cells.read_layouts(cells.LAYOUTS)
TABLES = [name for name in LAYOUTS if name not in ("flatness", "corruptions")]  # those have rows of others
ROWS = [(name, row) for name in TABLES for row, value in LAYOUTS[name].rows.items() if not value.published_only]
SHORT = [
    "protocol=none",
    "seed=0",
    "eval=[]",
    "wandb.mode=disabled",
    "wandb.name=run",
    "trainer=cpu",
    "trainer.max_steps=1",
]
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


# Learning rates of the small model's rows, whose settings are ours; those of papers are in test_paper_settings.py.
LOWER = {"lora_ga": 1e-4, "lora_pro": 1e-4}
# Rows of tables whose name is not that of a peft option, or flat_ and that.
REGULARIZERS = {"lora_sam": "sam", "sam_full": "sam_full", "bi_lora": "bi_lora", "nbar": "nbar"}
REGULARIZERS |= {"linear": "flat_linear", "constant": "flat_constant", "iid": "flat_iid"}
REGULARIZERS |= {"no_fan_in": "flat", "every_10": "flat"}


def named_settings(row: str) -> tuple[str | None, ...]:
    """(method, rank, σ, learning rate) that a row's name has."""
    return re.fullmatch(r"(?:flat_)?(\w+?)(?:_r(\d+)|_(0\.\d+)|_(5e-4))?", row).groups()


@pytest.mark.parametrize("name", ["study", "ablation"])
def test_every_row_of_the_small_model_has_its_setting(name):
    layout = LAYOUTS[name]
    for row in layout.rows:
        found = cells.experiment_of(tuple(cells.cell_overrides(name, layout, row, next(iter(layout.columns)))))
        method, rank, sigma, lr = named_settings(row)
        rho = REGULARIZERS.get(method, "flat" if row.startswith("flat_") else "off")
        assert found.model.name == "smollm", row
        assert found.peft.name == ("lora" if method in REGULARIZERS else method), row
        assert found.rho.name == rho, row
        assert (found.optim.lr, found.optim.epochs) == (float(lr or LOWER.get(method, 5e-4)), 3), row
        assert found.peft.lora_r == int(rank or 8), row
        assert not rho.startswith("flat") or found.rho.sigma == float(sigma or 0.05), row
        assert (found.optim.batch_size, found.trainer.micro_batch_size) == (32, 32)


# Typed from PEFT's suite; cells of papers are in test_paper_settings.py: (table, row, column) → lr, epochs, batch,
# micro-batch, tokens, strength, metric.
OF_SUITE = {
    ("peft_suite", "flat_lora", "gsm8k"): (1e-4, 1, 4, 4, 768, 0.05, "gsm8k/exact_match"),
    ("peft_suite", "lora_sam", "memory"): (1e-4, 1, 4, 4, 768, 0.003, "memory/peak_reserved_gib"),
}


@pytest.mark.parametrize(("cell", "expected"), OF_SUITE.items(), ids=lambda value: "-".join(map(str, value[:3])))
def test_a_cell_has_the_settings_of_pefts_suite(cell, expected):
    name, row, column = cell
    found = cells.experiment_of(tuple(cells.cell_overrides(name, LAYOUTS[name], row, column)))
    optim, length = found.optim, getattr(found.dataset, "max_length", None)
    settings = (optim.lr, optim.epochs, optim.batch_size, found.trainer.micro_batch_size, length, found.rho.sigma)
    assert (*settings, LAYOUTS[name].columns[column].metric) == expected


def test_rows_without_a_command_are_the_methods_that_the_suite_does_not_have():
    without = [
        (name, row)
        for name, layout in LAYOUTS.items()
        for row in layout.rows
        if layout.rows[row].published_only and not layout.published_rows  # a file of public results
    ]
    assert without == [("bi_lora_llama31", "wsam"), ("bi_lora_llama31", "s2_sam")]


def test_cells_of_figure_5_have_the_runs_of_tables_1_and_2():
    def setting(name, row, column):
        return cells.setting_of(cells.experiment_of(tuple(cells.cell_overrides(name, LAYOUTS[name], row, column))))

    for row in ("lora_r16", "flat_lora_r16"):
        assert setting("figure5", row, "cifar100") == setting("table2", row, "cifar100")
        assert setting("figure5", row, "mrpc") == setting("table1", row, "mrpc")


def test_the_published_numbers_are_those_of_the_papers():
    papers, problems = cells.read_paper(cells.PAPER)
    assert not problems
    assert not [problem for name, paper in papers.items() for problem in cells._unplaced(name, LAYOUTS[name], paper)]
    assert papers["table3"].values == {"lora": {"gsm8k": 57.47}}  # B's LoRA, of other settings, has 58.21
    assert papers["bi_lora_llama2"].values["lora"]["gsm8k"] == 58.21
    assert papers["bi_lora_llama2"].spreads["lora"]["gsm8k"] == 0.34
    assert papers["bi_lora_qwen25"].values["flat_lora"]["mmlu"] == 79.51
    assert papers["bi_lora_qwen25"].spreads["bi_lora"] == {"mmlu": 0.05, "drop": 0.22, "humaneval": 0.93, "bbh": 0.05}
    counts = {name: sum(map(len, paper.values.values())) for name, paper in papers.items()}
    assert counts == {
        "table1": 30,
        "table2": 24,
        "table3": 1,
        "table4": 0,
        **dict.fromkeys(("table5", "table6", "table7", "figure5"), 0),
        "corruptions": 0,
        "bi_lora_llama2": 36,
        "bi_lora_llama31": 72,
        "bi_lora_qwen25": 44,
        "bi_lora_glue": 20,
        "bi_lora_superglue": 20,
        "bi_lora_methods": 12,
        "bi_lora_nf4": 3,
        "bi_lora_sdxl": 4,
        "peft_suite": 189,  # 63 rows
    }
    assert papers["peft_suite"].values["lora/llama-3.2-3B-rank32"]["gsm8k"] == pytest.approx(47.84, abs=0.005)


def test_a_protocol_without_the_task_names_those_that_it_has():
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of(["protocol=lora_ga", "model=t5base", "dataset=rte"])
    (message,) = caught.value.errors
    assert message == (
        "Invalid protocol=lora_ga with model=t5base dataset=rte: its paper has no such experiment, but model=llama: "
        "meta_math, codefeedback, wizard_lm; model=t5base: mnli, sst2, cola, qnli, mrpc; choose one of these, or leave "
        "protocol out."
    )


def test_the_protocol_of_pefts_suite_has_its_settings():
    """Typed from default_training_params.json and utils.py of the suite."""
    words = ["protocol=peft_suite", "model=llama32_3b", "dataset=meta_math", "rho=flat"]
    found = run_exp.experiment_of(words)
    assert (found.protocol, found.seed, found.model.hub_id) == ("peft_suite", 0, "meta-llama/Llama-3.2-3B")
    assert (found.model.dtype, found.trainer.autocast) == ("bfloat16", "none")
    optim = found.optim
    assert (optim.lr, optim.weight_decay, optim.warmup_ratio, optim.lr_schedule) == (1e-4, 0.1, 0.1, "cosine")
    assert (optim.max_grad_norm, optim.batch_size, found.trainer.max_steps) == (1.0, 4, 5000)
    rows = found.dataset
    assert (rows.train_rows, rows.validation_rows, rows.subset) == (5000 * 4, 0, "first")
    assert (rows.types, rows.max_characters, rows.max_tokens, rows.max_length) == ("all", 1300, None, 768)
    assert (rows.template, rows.loss_on) == ("step_by_step", "text")
    peft = found.peft
    assert (peft.lora_r, peft.lora_alpha, peft.lora_dropout, peft.target_modules) == (32, 64, 0, "qv")
    asked = found.eval["gsm8k"]
    assert (asked.max_new_tokens, asked.batch_size, asked.max_rows, asked.parser) == (300, 50, None, "peft_suite")
    assert (asked.template, asked.temperature, asked.top_p) == ("step_by_step", 0.6, 0.9)
    assert run_exp.experiment_of([*words, "seed=3"]).seed == 3
    assert run_exp.experiment_of([*words, "eval=[]"]).eval == {}
    assert run_exp.experiment_of([*words, "peft=rslora", "peft.lora_r=64"]).peft.lora_r == 64
    full = ["protocol=peft_suite", "model=llama32_3b", "dataset=meta_math", "peft=full_ft"]
    assert run_exp.experiment_of(full).optim.lr == 1e-5


def test_a_loss_on_the_prompt_is_of_decoders():
    with pytest.raises(ConfigError, match=r"Invalid dataset\.loss_on=text with model=t5base"):
        run_exp.experiment_of(["model=t5base", "dataset=gsm8k", "dataset.loss_on=text"])


def test_a_protocol_is_no_part_of_the_trained_bytes():
    plain, named = (
        run_exp.experiment_of(["model=llama", "dataset=meta_math", *words]) for words in ([], ["protocol=flat_lora"])
    )
    assert named.protocol == "flat_lora"
    assert plain.sha256() == named.sha256()


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
        "text_to_image": ["model=sdxl_tiny", "dataset=shapes"],
        "causal_lm": [f"model.hub_id={tiny_model_folder}", *local, "dataset=word_math", "dataset.test_rows=2"],
    }


def with_extras() -> list:
    """One row of each regularizer trains for a kind of model; tests/flatlora/methods/test_pairs.py has the methods, and
    `make test-all` all rows."""
    params, seen = [pytest.param("cost", None, id="cost")], set()
    kinds = {"table1": "seq2seq", "table1_methods": "seq2seq", "table2": "clip", "table2_methods": "clip"}
    kinds |= dict.fromkeys(("table5", "table6", "figure5"), "seq2seq")
    kinds |= {"bi_lora_glue": "seq2seq", "bi_lora_superglue": "seq2seq", "bi_lora_methods": "seq2seq"}
    kinds |= {"lora_pro_glue": "seq2seq", "lora_ga_glue": "seq2seq", "lora_pro_clip": "clip"}
    kinds |= {"sdxl": "text_to_image", "bi_lora_sdxl": "text_to_image"}
    for name, row in ROWS:
        layout = LAYOUTS[name]
        flat_twin = f"flat_{row}" in layout.rows or (row == "lora" and "flat_lora" in layout.rows)
        setting = kinds.get(name, "causal_lm"), *(one for one in layout.rows[row].overrides if one.startswith("rho="))
        is_extra = flat_twin or setting in seen or name == "table2_methods"  # tests/data/test_images.py trains these
        seen.add(setting)
        params.append(pytest.param(name, row, marks=pytest.mark.extra if is_extra else (), id=f"{name}-{row}"))
    return params


@pytest.mark.parametrize(("name", "row"), with_extras())
def test_a_tiny_model_of_the_family_trains_one_step(name, row, tiny_words, tmp_path):
    layout = LAYOUTS.get(name)
    first = cells.cell_overrides(name, layout, row, next(iter(layout.columns))) if layout else [f"experiment={name}"]
    asked = run_exp.experiment_of(first)
    kept = [word for word in first if re.split("[.=]", word)[0] not in ("dataset", "seed", "eval", "trainer")]
    # The tiny models are narrower, and one step is no epoch.
    kept = [word for word in kept if word not in ("peft.lora_r=64", "peft.lora_r=32", "optim.epochs=1")]
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
