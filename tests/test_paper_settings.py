"""Each cell of each table of a paper against the papers' settings, typed here by hand."""

import pytest

from flatlora.experiment.commandline import composed_once
from scripts import cells
from tests.test_experiments import REGULARIZERS, named_settings

LAYOUTS = cells.read_layouts(cells.LAYOUTS)
OURS = ("study", "study_tuned", "ablation", "flatness", "peft_suite")  # no paper's, or in test_experiments.py
GLUE = ("mnli", "sst2", "cola", "qnli", "mrpc")
FLAT_EPOCHS = {"mnli": 1, "qnli": 1, "sst2": 10, "cola": 10, "mrpc": 10}
BI_EPOCHS = {"mnli": 3, "sst2": 3, "cola": 10, "qnli": 3, "mrpc": 10, "boolq": 10, "cb": 50, "copa": 50}
BI_EPOCHS |= {"rte": 10, "wic": 10}
# (protocol, model) → lr, lr of full fine-tuning, epochs, batch, micro-batch, tokens
SETTINGS = {
    ("flat_lora", "t5base"): (5e-4, 1e-4, FLAT_EPOCHS, 32, 32, 128),
    ("flat_lora", "clip_b32"): (5e-4, 1e-4, 10, 128, 128, None),
    ("flat_lora", "llama"): (5e-4, 1e-4, 2, 32, 2, 1024),
    ("flat_lora", "llama13b"): (5e-4, 1e-4, 2, 32, 2, 1024),
    ("flat_lora", "sdxl"): (1e-4, None, None, 1, 1, None),  # 500 steps
    ("bi_lora", "t5base"): (5e-4, 1e-4, BI_EPOCHS, 32, 32, 256),
    ("bi_lora", "llama"): (5e-4, 5e-5, 2, 32, 4, 1024),
    ("bi_lora", "llama31_8b"): (3e-4, 5e-5, 3, 128, 4, 256),
    ("bi_lora", "qwen25_14b"): (5e-5, 5e-5, 3, 128, 4, 256),
    ("bi_lora", "sdxl"): (2e-4, None, None, 4, 1, None),  # 500 steps
    ("lora_pro", "t5base"): (1e-4, 1e-4, 1, 32, 32, 128),
    ("lora_pro", "llama"): (2e-5, 2e-5, 1, 32, 1, 1024),
    ("lora_pro", "clip_b16"): (5e-4, 1e-4, 10, 128, 128, None),
    ("lora_ga", "t5base"): (1e-4, None, 1, 32, 32, 128),
    ("lora_ga", "llama"): (1e-5, None, 1, 32, 1, 1024),
}
# Methods with papers of their own, in tables of the Flat-LoRA paper's settings: (model, method) → lr, epochs
OF_METHODS = {
    ("t5base", "lora_ga"): (1e-4, 1),
    ("t5base", "lora_pro"): (1e-4, 1),
    ("llama", "lora_ga"): (1e-5, 1),
    ("llama", "lora_pro"): (2e-5, 1),
    ("llama13b", "lora_ga"): (1e-5, 1),  # as on Llama-2-7B
    ("llama13b", "lora_pro"): (2e-5, 1),
}
SUPERGLUE = ("boolq", "cb", "copa", "rte", "wic")
IMAGES = ("cifar10", "cifar100", "cars", "svhn", "dtd", "eurosat", "gtsrb", "resisc45", "sun397")
PROMPTED = {"meta_math": "gsm8k/exact_match", "codefeedback": "humaneval/pass@1", "wizard_lm": "mt_bench/turn_1"}


def strength_of(rho, protocol, model, dataset):
    """σ of Flat-LoRA, radius of SAM and Bi-LoRA, α of BAR, ρ of the random baselines; 0 without a regularizer."""
    larger = protocol == "bi_lora" and (dataset in SUPERGLUE or model == "qwen25_14b")
    return {
        "off": 0.0,
        "flat": 0.15 if model.startswith("clip") else 0.1 if model == "sdxl" else 0.05,
        "sam": 0.05 if larger else 0.01 if protocol == "bi_lora" else 0.003,
        "sam_full": 0.05,
        "bi_lora": 0.1 if larger else 0.05,
        **dict.fromkeys(("nbar", "obar"), 0.25),
        **dict.fromkeys(("rop", "rwp_full", "rwp_lora"), 0.0316),  # √0.001
        **dict.fromkeys(("esam", "look_sam"), 0.05 if larger else 0.01),  # of SAM
    }[rho]


def metrics_of(protocol, dataset, column):
    if dataset in GLUE + SUPERGLUE:
        return ["glue/matthews" if (protocol, dataset) == ("bi_lora", "cola") else "glue/accuracy"]
    if dataset in IMAGES:
        return ["images/top1", f"corruptions/severity_{column[-1]}"]
    if dataset in PROMPTED:
        return [PROMPTED[dataset], "memory/peak_gpu_gib", "timing/train_s"]
    return [f"instruct_eval/{column}"] if dataset.startswith("alpaca") else [f"text_to_image/{column}"]


@pytest.fixture(scope="module", autouse=True)
def files_read_once():
    with composed_once():
        yield


SAME_ROWS = ("table1_methods", "table2_methods", "table4_methods")  # as table3_methods, by reference


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.extra if name in SAME_ROWS else ()) for name in LAYOUTS if name not in OURS],
)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.extra)], ids=["first", "whole"])
def test_each_cell_composes_and_has_the_settings_of_its_paper(name, whole):
    """The cells of the first row and of the first column (all settings of rows and of columns), or all cells."""
    layout, wrong = LAYOUTS[name], []
    rows = [row for row, value in layout.rows.items() if not value.published_only]
    for number, row in enumerate(rows):
        for column in layout.columns if whole or number == 0 else [next(iter(layout.columns))]:
            found = cells.experiment_of(tuple(cells.cell_overrides(name, layout, row, column)))
            model, dataset, method = found.model.name, found.dataset.name, found.peft.name
            lr, full_lr, epochs, *sizes = SETTINGS[found.protocol, model]
            if name.endswith("_methods") and found.protocol == "flat_lora":
                lr, epochs = OF_METHODS.get((model, method), (lr, epochs))
            epochs = epochs[dataset] if isinstance(epochs, dict) else epochs
            if found.protocol == "flat_lora":
                named, rank, _, _ = named_settings(row)
                assert method == ("lora" if named in REGULARIZERS else "attention" if model == "sdxl" else named), row
                assert found.rho.name == REGULARIZERS.get(named, "flat" if row.startswith("flat_") else "off"), row
                assert method == "full_ft" or model == "sdxl" or found.peft.lora_r == int(rank or 8), row
            strength = strength_of(found.rho.name, found.protocol, model, dataset)
            expected = [full_lr if method == "full_ft" else lr, *sizes, strength]
            optim, length = found.optim, getattr(found.dataset, "max_length", None)
            got = [optim.lr, optim.batch_size, found.trainer.micro_batch_size, length, found.rho.sigma]
            metric = layout.columns[column].metric
            if got != expected or metric not in metrics_of(found.protocol, dataset, column):
                wrong.append((row, column, got, expected, metric))
            if epochs is None:
                assert found.trainer.max_steps == 500, (row, column)
            elif optim.epochs != epochs:
                wrong.append((row, column, optim.epochs, epochs))
    assert wrong == []
