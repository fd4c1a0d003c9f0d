"""scripts/flatness.py on runs of a tiny model: what it writes, what it passes over, what it refuses."""

import json

import pytest
import torch

import run_exp
from flatlora.config.experiment import parse
from flatlora.models.loading import load_backbone
from flatlora.perturb import flatness as measures
from flatlora.utils import precision, records
from scripts import cells, flatness
from tests.conftest import run_folder

QUICK = ["--device", "cpu", "--rows", "4", "--batch-size", "3", "--draws", "2", "--sigmas", "0.1,0.5"]
QUICK += ["--probes", "1", "--points", "3", "--iterations", "2"]


@pytest.fixture
def run(tiny_settings):
    assert run_exp.main([*tiny_settings, "rho=flat", "trainer.max_steps=2"]) == 0
    return run_folder(tiny_settings)


def parts_of(run):
    return json.loads((run / flatness.FILE).read_bytes())["parts"]


def test_every_part_is_measured_once_and_the_tables_read_it(run, tmp_path):
    assert flatness.main([str(run), *QUICK, "--parts", "rise"]) == 0
    first = parts_of(run)
    assert list(first) == ["rise"]
    assert flatness.main([str(run), *QUICK]) == 0
    parts = parts_of(run)
    assert parts["rise"] == first["rise"]  # not measured again, its seconds say
    assert set(parts) == set(flatness.PARTS)
    assert [len(draws) for draws in parts["rise"]["draws"].values()] == [2, 2]
    line, plane = parts["landscape"]["line"], parts["landscape"]["plane"]
    assert line[1] == plane[1][1] == pytest.approx(parts["landscape"]["loss"])
    assert line == pytest.approx([row[1] for row in plane])
    (found,), problems = cells.read_runs(tmp_path / "results")
    assert problems == []
    assert found.metrics["flatness/rise_0.5"] == pytest.approx(sum(parts["rise"]["draws"]["0.5"]) / 2)
    assert found.metrics["flatness/top_eigenvalue"] == parts["hessian"]["top_eigenvalue"]
    assert flatness.main([str(run), *QUICK, "--draws", "3", "--parts", "rise"]) == 0
    assert len(parts_of(run)["rise"]["draws"]["0.1"]) == 3  # other settings are another measure
    assert parts_of(run)["rise"]["draws"]["0.1"][:2] == pytest.approx(
        parts["rise"]["draws"]["0.1"]
    )  # of the same draws


def test_the_merged_model_is_measured_and_not_the_backbone(run, monkeypatch):
    seen = []
    plain = measures.plain_layers

    def watch(model, names):
        seen.append((model, names))
        return plain(model, names)

    monkeypatch.setattr(measures, "plain_layers", watch)
    assert flatness.main([str(run), *QUICK, "--parts", "rise"]) == 0
    ((model, names),) = seen
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert len(names) == 14  # seven linear layers in each of two blocks, and no head
    from safetensors.torch import load_file

    adapter = load_file(run / "adapter/adapter_model.safetensors")
    prefix = f"base_model.model.{names[0]}."
    update = adapter[f"{prefix}lora_B.weight"] @ adapter[f"{prefix}lora_A.weight"]
    config = json.loads((run / "adapter/adapter_config.json").read_bytes())
    base = load_backbone(
        parse(json.loads((run / "run.json").read_bytes())["experiment"], run_exp.SUITE).model,
        torch.device("cpu"),
    )
    change = model.get_submodule(names[0]).weight - base.get_submodule(names[0]).weight
    assert torch.allclose(change, update * config["lora_alpha"] / config["r"], atol=1e-6)


def test_a_cpu_that_holds_bf16_in_fp32_adds_no_rounding(tiny_settings, monkeypatch):
    """Measures refuse weights that count as BF16, which `load_for_inference` makes of them on such a CPU."""
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(False, False, False, False))
    settings = [word for word in tiny_settings if not word.startswith("model.dtype")]
    assert run_exp.main([*settings, "model.dtype=bfloat16", "trainer.max_steps=1"]) == 0
    run = run_folder(settings)
    assert json.loads((run / "run.json").read_bytes())["precision"]["products"] == "float32"
    assert flatness.main([str(run), *QUICK, "--parts", "rise"]) == 0


def test_an_adapter_that_is_not_the_runs_is_rejected_and_an_earlier_one_measured_again(run, capsys):
    from safetensors.torch import load_file, save_file

    assert flatness.main([str(run), *QUICK, "--parts", "rise"]) == 0
    before, path = parts_of(run)["rise"], run / "adapter/adapter_model.safetensors"
    save_file({name: 9 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert flatness.main([str(run), *QUICK, "--parts", "rise"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "adapter_model.safetensors is not what the run wrote" in printed
    record = json.loads((run / "run.json").read_bytes())
    for key in (records.FILES, records.SIGNATURE):  # as a version wrote it that kept no hashes
        del record[key]
    (run / "run.json").write_text(json.dumps(record))
    assert flatness.main([str(run), *QUICK, "--parts", "rise"]) == 0
    after = parts_of(run)["rise"]
    assert after["weights_sha256"] != before["weights_sha256"]
    assert after["loss"] != before["loss"]


def test_a_broken_file_is_measured_again(run, capsys):
    (run / flatness.FILE).write_text("{")
    assert flatness.main([str(run), *QUICK, "--parts", "rise"]) == 0
    assert list(parts_of(run)) == ["rise"]
    assert "is broken" in capsys.readouterr().err


def test_runs_that_cannot_be_measured_are_reported_all_at_once_before_any_is(run, tmp_path, capsys):
    record = json.loads((run / "run.json").read_bytes())
    records.write_signed(run / "run.json", record | {"data_sha256": "of other rows"})
    assert flatness.main([str(run), *QUICK]) == 2
    assert "trained on of other row" in " ".join(capsys.readouterr().err.split())
    records.write_signed(run / "run.json", record | {"status": "interrupted"})
    assert flatness.main([str(run), str(tmp_path), *QUICK]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"Invalid run {run}: it is interrupted; finish it with resume=true" in printed
    assert f"Invalid run {tmp_path}: it has no run.json" in printed
    for words in (
        ["--sigmas", "0.1,-1"],
        ["--sigmas", "0.2,0.2"],
        ["--rows", "0"],
        ["--radius", "nan"],
        ["--parts", "rize"],
        ["--points", "4"],
    ):
        with pytest.raises(SystemExit):
            flatness.main([str(run), *words])
        assert words[1].split(",")[-1] in capsys.readouterr().err
