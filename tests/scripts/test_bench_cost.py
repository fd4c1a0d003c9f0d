"""bench.py cost: hours are steps times rates, and what was not measured is named."""

import json
import shutil
from pathlib import Path

import pytest

from scripts import bench_cost, cells

BENCH = Path(__file__).parents[2] / "results/bench"


def experiment_of(*overrides):
    return cells.experiment_of(overrides)


def test_steps_are_those_of_trainer():
    cola = experiment_of("experiment=table1", "dataset=cola")
    assert bench_cost.steps_of(cola) == 10 * 268  # 8,551 rows in batches of 32; the last has fewer
    math = experiment_of("experiment=table3", "dataset=meta_math")
    assert bench_cost.steps_of(math) == 2 * 100_000 // 32
    assert bench_cost.steps_of(experiment_of("experiment=bi_lora", "model=sdxl", "dataset=icons3d")) == 500
    cifar = experiment_of("experiment=table2", "dataset=cifar10", "optim.epochs=0.5")
    assert bench_cost.steps_of(cifar) == 196  # of 391


def test_hours_are_steps_times_rates_and_the_rest_is_named():
    rates = {"t5base": bench_cost.Rates(16, "here", 0.5, {"LoRA": 0.1, "Flat-LoRA": 0.2})}
    runs = {
        str(words): (experiment_of("experiment=table1", "dataset=cola", *words), 3)
        for words in (["peft=pissa"], ["rho=flat"], ["rho=sam"], ["peft=full_ft"], ["peft=dora", "rho=flat"])
    }
    runs["other"] = (experiment_of("experiment=table2", "dataset=cifar10"), 2)
    cost = bench_cost.cost_of(runs, rates)
    assert (cost.runs, cost.measured, cost.steps) == (17, 6, 6 * 2680)
    assert cost.ours_h == pytest.approx(3 * 2680 * 2 * (0.1 + 0.2) / 3600)  # a step of 32 rows is two of 16
    assert cost.stock_h == pytest.approx(3 * 2680 * 2 * (0.5 + 0.5) / 3600)
    assert cost.not_measured == {
        "t5base with LoRA-SAM": 3,
        "t5base with peft=full_ft": 3,
        "t5base with peft=dora rho=flat": 3,
        "clip_b32": 2,
    }


def test_rates_are_medians_of_the_committed_files(tmp_path):
    rates = bench_cost.read_rates(BENCH)
    rows = json.loads((BENCH / "families.json").read_text())["families"]["t5"]["contenders"]
    assert rates["t5base"].stock == pytest.approx(bench_cost._median(rows["stock"]))
    assert rates["t5base"].steps["Flat-LoRA"] == pytest.approx(bench_cost._median(rows["Flat-LoRA copy"]))
    assert {"LoRA", "Flat-LoRA", "LoRA-SAM", "Bi-LoRA"} <= rates["llama"].steps.keys()
    with pytest.raises(bench_cost.ConfigError, match="Missing measurements"):
        bench_cost.read_rates(tmp_path)
    (tmp_path / "families.json").write_text("[]")
    (tmp_path / "sdxl.json").write_text('{"rounds": [{"LoRA": {}}]}')
    with pytest.raises(bench_cost.ConfigError) as raised:
        bench_cost.read_rates(tmp_path)
    assert [
        f"of {name} in" in text
        for name, text in zip(("t5base", "clip_b32", "llama", "sdxl"), raised.value.errors, strict=True)
    ] == [True] * 4


def test_text_rates_are_seconds_of_the_same_tokens(tmp_path):
    text = {"step_s": [2.0, 4.0], "tokens_per_s": [50.0, 25.0]}
    rows = {"stock": {"step_s": [30.0], "tokens_per_s": [10.0]}, "LoRA": text, "Flat-LoRA copy": text}
    report = {"env": {}, "families": {"text": {"model": "", "rows": "", "contenders": rows}}}
    (tmp_path / "families.json").write_text(json.dumps(report))
    rates = bench_cost.read_rates(tmp_path)["llama"]
    assert (rates.stock, rates.steps["LoRA"]) == (10.0, pytest.approx(100 / 37.5))


@pytest.mark.extra
def test_the_command_has_a_row_for_every_published_table(tmp_path, capsys):
    for name in ("families", "gpu", "methods", "sdxl"):
        shutil.copy(BENCH / f"{name}.json", tmp_path)
    assert bench_cost.run(tmp_path) == 0
    tables = json.loads((tmp_path / "cost.json").read_text())["tables"]
    published = cells.read_paper(cells.PAPER)[0]
    assert published.keys() <= tables.keys()
    assert tables["bi_lora_qwen25"]["measured"] == 0
    assert 0 < tables["table1"]["ours_h"] < tables["table1"]["stock_h"]
    assert "qwen25_14b" in capsys.readouterr().out
