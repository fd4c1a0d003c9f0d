"""The scripts' own logic on a tiny model: tables made from records, drift measured, kills survived."""

import argparse
import json

import pytest
import torch
from rich.console import Console

from flatlora.runs.record import BackboneHashes, RunRecord
from flatlora.utils import precision
from flatlora.utils.errors import ConfigError
from scripts import bench, demo, kill_resume
from scripts.arguments import positive
from tests.conftest import tiny_lora


def text_of(table) -> str:
    console = Console(width=140, record=True)
    console.print(table)
    return console.export_text()


def test_demo_table_shows_what_the_records_say():
    record = RunRecord(
        status="finished",
        backbone_sha256={"before": "a", "after": "a"},
        metrics={"gsm8k/exact_match": 0.615, "train_loss": 0.1234},
        timing={"step_s_median": 2.5},
        memory={"peak_rss_gib": 3.25},
    )
    drifted = record.model_copy(update={"backbone_sha256": BackboneHashes(before="a", after="b")})
    text = text_of(
        demo.comparison({"LoRA": record, "Flat-LoRA": drifted}, {"n": 200, "metrics": {"exact_match": 0.03}})
    )
    lora, flat = (next(line for line in text.splitlines() if f" {name} " in line) for name in ("LoRA", "Flat-LoRA"))
    assert all(word in lora for word in ("61.5 %", "0.123", "2.50 s", "3.25 GiB", "yes"))
    assert "NO" in flat
    assert "3.0 %" in text
    assert "200" in text


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ConfigError(["Invalid x=1: it must be 2; write x=2."]), 2, "Invalid x=1"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_demo_reports_an_error_before_its_first_step(monkeypatch, tmp_path, capsys, error, code, expected):
    def fail():
        raise error

    monkeypatch.chdir(tmp_path)  # which main() changes
    monkeypatch.setattr(demo, "measured_steps", fail)
    assert demo.main() == code
    output = "".join(capsys.readouterr())
    assert expected in output
    assert "Traceback" not in output


def test_a_measured_step_finds_its_buffers_allocated():
    model = tiny_lora(torch.bfloat16)
    perturbation = bench.new_perturbation(model, "copy", seed=3)
    buffers = [copy.data_ptr() for copy in perturbation._copies]
    assert buffers
    perturbation.begin(1)
    assert [copy.data_ptr() for copy in perturbation._copies] == buffers
    perturbation.close()


def test_drift_is_zero_but_in_place(tmp_path):
    model = tiny_lora(torch.bfloat16)
    curves = bench.drift_curves(model, 40)
    for mode in ("copy", "recompute"):
        assert all(point["relative_norm"] == point["changed_share"] == 0 for point in curves[mode])
    assert curves["inplace"][-1]["changed_share"] > 0.1
    assert curves["inplace"][-1]["relative_norm"] > 1e-3
    assert text_of(bench.drift_table(curves, 40)).count("0 exactly") == 4
    bench.plot_drift(curves, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5000


def test_each_kind_of_cpu_has_its_own_files_that_say_what_was_hidden(tmp_path, monkeypatch):
    for name in bench.INSTRUCTION_LIMITS:
        monkeypatch.delenv(name, raising=False)
    drift = {mode: [{"step": 0, "relative_norm": 0.0, "changed_share": 0.0}] for mode in bench.MODES}
    slow = precision.CPUFeatures(False, False, False, False)
    fast = slow._replace(avx512_bf16=True, onednn_bf16=True)
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    for features, set_ in ((fast, {}), (slow, limits)):
        for name, value in set_.items():
            monkeypatch.setenv(name, value)
        chosen = precision.choose_precision("auto", "bfloat16", "cpu", features)
        report, _ = bench.write_results(tmp_path, chosen, {"model": "m"}, drift)
        assert json.loads(report.read_text()) == {"model": "m", "instruction_limits": set_}
    names = ["cpu.json", "cpu_drift.png", "cpu_fp32.json", "cpu_fp32_drift.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_step_times_take_every_contender_and_each_reads_its_own_weights(monkeypatch):
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    model, peft = tiny_lora(torch.bfloat16).train(), tiny_lora(torch.bfloat16).train()
    read, taken = {}, []

    def loss():
        with torch.no_grad():
            return model(**batch).loss.item()

    def spy(contender, batch, optimizer, perturbation, number):
        taken.append(contender)
        plain = loss()
        if perturbation:
            perturbation.begin(number)
        read.setdefault(perturbation.mode if perturbation else "lora", set()).add(loss() != plain)
        if perturbation:
            perturbation.end()

    monkeypatch.setattr(bench, "optimizer_step", spy)
    monkeypatch.setattr(bench, "SIGMA", 0.5)
    seconds = bench.step_times(peft, model, batch, rounds=3)
    contenders = ("peft", "kernels_off", "lora", *bench.MODES)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(contenders, 3)
    assert (taken.count(peft), taken.count(model)) == (8, 16)
    assert read == {"lora": {False}, "copy": {True}, "recompute": {True}, "inplace": {True}}
    seconds = {"peft": [2.0, 3.0, 8.0], "lora": [1.0, 2.0, 4.0], "copy": [1.1, 2.4, 4.0]}
    text = text_of(bench.step_table(seconds, tokens=1200))
    assert "500" in text  # tokens/s of the copy
    assert "0.550" in text  # median of the copy's ratios to PEFT: 0.55, 0.8, 0.5
    assert "1.100" in text  # median of the ratios 1.1, 1.2, 1.0
    assert "2.400 s" in text


@pytest.mark.parametrize("text", ["0", "-1", "1000001", "9" * 5000, "1.5", "²", ""])
def test_counts_of_scripts_have_bounds(text):
    assert (positive("1"), positive("1000000")) == (1, 1_000_000)
    with pytest.raises(argparse.ArgumentTypeError, match=r"it must be a whole number from 1 to 1,000,000"):
        positive(text)


@pytest.mark.extra
@pytest.mark.slow
def test_two_kills_leave_no_trace(tiny_model_folder, capsys):
    settings = [f"model.hub_id={tiny_model_folder}", "model.embedded=null", "trainer.device=cpu"]
    code = kill_resume.main(["--kills", "2", "--seed", "1", *settings])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "kills: 2" in output
    assert "adapter bytes:  equal" in output
    assert "metrics.jsonl:  equal (14 and 14 rows)" in output
