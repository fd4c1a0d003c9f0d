"""A tiny run by the settings of PEFT's own suite, and the file that is exported from it, against the suite's form."""

import json
import re
from pathlib import Path

import pytest

import run_exp
from flatlora.runs.record import RunRecord
from flatlora.utils import records
from scripts import export_peft_suite
from tests.conftest import run_folder, write_split

# The suite's form, as its results have it: keys and types; None where a run does not record the value.
METRICS = {"step": int, "train loss": float, "train samples": int}
WINDOW = METRICS | {"valid accuracy": None, "train time": float, "eval time": None, "tokens / sec": float}
WINDOW |= dict.fromkeys(("mem allocated avg", "mem reserved avg", "elapsed time"))
TEST = METRICS | {"test accuracy": float, "train total tokens": int, "forgetting": None}
HUB = {"sha": None, "created_at": None}
FORM = {
    "run_info": {
        "created_at": str,
        "total_time": float,
        "experiment_name": str,
        "peft_branch": str,
        "peft_worktree_is_dirty": bool,
        "train_config": {
            "model_id": str,
            "dtype": str,
            "max_seq_length": int,
            "batch_size": int,
            "batch_size_eval": int,
            "max_steps": int,
            "eval_steps": int,
            "compile": bool,
            "use_gc": bool,
            "query_template": str,
            "seed": int,
            "grad_norm_clip": float,
            "optimizer_type": str,
            "optimizer_kwargs": {"lr": float, "weight_decay": float},
            "lr_scheduler": str,
            "use_amp": bool,
            "autocast_adapter_dtype": bool,
            "generation_kwargs": {"max_length": int, "max_new_tokens": int},
            "attn_implementation": None,
            "init_kv_cache_prefix": None,
        },
        "peft_config": dict,
        "error_msg": str,
    },
    "train_info": {
        "accelerator_memory_reserved_avg": int,
        "accelerator_memory_max": int,
        "accelerator_memory_reserved_99th": int,
        "train_time": float,
        "file_size": int,
        "num_trainable_params": int,
        "num_total_params": int,
        "status": str,
        "metrics": list,
    },
    "meta_info": {
        "model_info": HUB,
        "dataset_info": {"metamath": HUB, "gsm8k": HUB},
        "package_info": {
            f"{package}-{kind}": str if kind == "version" else None
            for package in ("transformers", "peft", "datasets", "torch")
            for kind in ("version", "commit-hash")
        },
        "system_info": {
            **dict.fromkeys(("system", "release", "version", "machine")),
            "processor": str,
            "accelerator": str,
        },
        "pytorch_info": str,
    },
}
PEFT_KEYS = {"peft_type", "task_type", "base_model_name_or_path", "r", "target_modules", "lora_alpha", "lora_dropout"}


def check_form(found, form, path=""):
    """Keys and types; None in the form is a value that a run of ours does not have."""
    assert found.keys() == form.keys(), path
    for key, kind in form.items():
        if isinstance(kind, dict):
            check_form(found[key], kind, f"{path}/{key}")
        elif kind is None:
            assert found[key] is None, f"{path}/{key}"
        else:
            assert type(found[key]) is kind, f"{path}/{key}"


@pytest.fixture
def run(tiny_model_folder, tmp_path):
    """A finished run of two steps, whose record says that it was on a GPU."""
    rows = [
        {
            "type": "GSM_SV",
            "query": f"{n} + 1?",
            "original_question": "q",
            "response": f"It is {n + 1}.\nThe answer is: {n + 1}",
        }
        for n in range(9)
    ]
    write_split(tmp_path / "data", "meta-math/MetaMathQA", "default", "train", rows)
    asked = [{"question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(3)]
    write_split(tmp_path / "data", "openai/gsm8k", "main", "test", asked)
    words = [
        "protocol=peft_suite",
        "model=llama32_3b",
        "dataset=meta_math",
        "rho=flat",
        f"data_root={tmp_path / 'data'}",
    ]
    words += [f"model.hub_id={tiny_model_folder}", "model.dtype=float32", f"results_root={tmp_path / 'results'}"]
    words += ["trainer=cpu", "trainer.max_steps=2", "dataset.train_rows=8", "peft.lora_r=4", "wandb.mode=disabled"]
    assert run_exp.main([*words, "eval.gsm8k.max_new_tokens=4"]) == 0
    folder = run_folder(words)
    record = RunRecord.read(folder)
    assert record.timing.total_s > record.timing.train_s + record.timing.score_s > record.timing.train_s
    for key, value in (("peak_reserved_gib", 20.5), ("reserved_mean_gib", 13.25), ("reserved_p99_gib", 19.0)):
        setattr(record.memory, key, value)
    record.env.hardware.gpus = ["NVIDIA L40S"]
    record.write(folder)
    return folder


def printed(capsys) -> str:
    return re.sub(r"\s+", "", capsys.readouterr().err)


def test_a_run_is_exported_in_the_suites_form(run, tmp_path, capsys):
    asked = [json.loads(line) for line in (run / "eval/gsm8k/predictions.jsonl").read_text().splitlines()]
    assert asked[0]["prompt"] == "Question: 0 + 2? Think step by step.\nAnswer:"
    assert export_peft_suite.main([str(run), "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    other = Path(RunRecord.read(run).experiment["model"]["hub_id"]).name  # no Llama-3.2-3B, so it is not named so
    assert path.name == f"lora--{other}-rank4-flat0.05.json"
    found = json.loads(path.read_text())
    regularizer = found["run_info"].pop("regularizer")
    assert (regularizer["name"], regularizer["sigma"]) == ("flat", 0.05)
    packages = found["meta_info"]["package_info"]
    assert packages.pop("bitsandbytes-version") == RunRecord.read(run).env.versions.get("bitsandbytes")
    assert packages.pop("bitsandbytes-commit-hash") is None
    check_form(found, FORM)
    record = RunRecord.read(run)
    info = found["train_info"]
    assert info["status"] == "success"
    assert (info["accelerator_memory_max"], info["accelerator_memory_reserved_avg"]) == (20.5 * 2**30, 13.25 * 2**30)
    assert info["train_time"] == record.timing.train_s + record.timing.score_s
    assert info["file_size"] == (run / "adapter/adapter_model.safetensors").stat().st_size
    assert (info["num_trainable_params"], info["num_total_params"]) == (record.params.trainable, record.params.total)
    window, test = info["metrics"]
    check_form(window, WINDOW)
    check_form(test, TEST)
    assert (test["step"], test["train samples"], test["test accuracy"]) == (2, 8, record.metrics["gsm8k/exact_match"])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert test["train loss"] == pytest.approx(sum(row["loss"] for row in logged) / 2)
    assert test["train total tokens"] == sum(row["tokens"] for row in logged)
    settings = found["run_info"]["train_config"]
    assert settings["query_template"] == "Question: {query} Think step by step.\nAnswer:"
    assert (settings["seed"], settings["use_amp"], settings["max_steps"]) == (0, False, 2)
    peft = found["run_info"]["peft_config"]
    assert peft.keys() >= PEFT_KEYS
    assert (peft["peft_type"], peft["r"], sorted(peft["target_modules"])) == ("LORA", 4, ["q_proj", "v_proj"])
    assert export_peft_suite.main([str(run), str(run), "--out", str(tmp_path / "twice")]) == 2
    assert "anearlierRUNiswrittento" in printed(capsys)
    assert not (tmp_path / "twice").exists()


def test_a_run_that_cannot_be_exported_is_named_and_nothing_is_written(run, tmp_path, capsys):
    out, record = tmp_path / "out", json.loads((run / "run.json").read_bytes())

    def refusal(**changes) -> str:
        records.write_signed(run / "run.json", record | changes)
        assert export_peft_suite.main([str(run), "--out", str(out)]) == 2
        return printed(capsys)

    assert "itisinterrupted;finishitwithresume=true" in refusal(status="interrupted")
    assert "itsprotocolisNone" in refusal(experiment=record["experiment"] | {"protocol": None})
    assert "itsrecordhasnomemory.peak_reserved_gib" in refusal(memory=record["memory"] | {"peak_reserved_gib": None})
    assert "itsrecordhasnometrics.gsm8k/exact_match" in refusal(metrics={})
    assert "itsrecordhasnostarted_at" in refusal(started_at=None)
    records.write_signed(run / "run.json", record)
    (run / "metrics.jsonl").write_text("")
    assert "itisdamaged(metrics.jsonlisnotwhattherunwrote)" in refusal()
    (run / "run.json").write_text("{")
    assert export_peft_suite.main([str(run)]) == 2
    (run / "run.json").unlink()
    assert export_peft_suite.main([str(run)]) == 2
    assert "ithasnorun.json;namethefolderofafinishedrun" in printed(capsys)
    assert not out.exists()
