"""Whole runs of a tiny model through `run_exp.main`: DESIGN's invariants, resume, and the record."""

import gc
import json
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import run_exp
from data.tokens import TokenRows
from flatlora.experiment import run as run_module
from flatlora.fused import acceleration
from flatlora.fused.lora_linear import fuse
from flatlora.train import checkpoint, trainer, training
from flatlora.train.recorder import SaveAtStop, StepRecorder
from flatlora.train.samplers import EpochSampler
from flatlora.train.trainer import FlatTrainer
from tests import conftest
from tests.conftest import adapter_bytes, metrics_rows, run_folder
from tests.processes import end_well, fork, fork_two

PROJECT = Path(__file__).parents[3]


def run(settings, *more) -> Path:
    assert run_exp.main([*settings, *more]) == 0
    return run_folder([*settings, *more])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_folder(settings, name):
    """The same settings with their own results folder."""
    return [f"{word}-{name}" if word.startswith("results_root=") else word for word in settings]


def test_record_is_complete_and_adapter_loads_with_peft(tiny_settings, tiny_model_folder, capsys):
    settings = [word for word in tiny_settings if not word.startswith(("model.dtype", "dataset.validation_rows"))]
    settings += ["rho=flat", "rho.sigma=0.3", "model.dtype=bfloat16", "dataset.validation_rows=4"]
    folder = run(settings)
    assert f"Finished: {folder} (backbone unchanged)" in " ".join(capsys.readouterr().err.split())
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    assert record["config_sha256"] == run_exp.experiment_of(settings).sha256()
    assert record["params"]["trainable"] == sum(
        t.numel() for t in load_file(folder / "adapter/adapter_model.safetensors").values()
    )
    assert record["timing"]["step_s_median"] > 0
    assert record["memory"]["peak_rss_gib"] > 0.1
    assert record["perturbation"]["mode"] == "copy"
    assert {t.dtype for t in load_file(folder / "adapter/adapter_model.safetensors").values()} == {torch.float32}
    rows = metrics_rows(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 7))
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "sigma", "tokens"}
    assert rows[-1]["eval_loss"] == pytest.approx(record["metrics"]["eval_loss"])
    ids = torch.arange(3, 20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    assert not torch.allclose(adapted(ids).logits, plain)
    saved = load_file(folder / "adapter/adapter_model.safetensors")
    for name, tensor in adapted.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, saved[name.replace(".default", "")])
    optimizer = torch.load(folder / "checkpoint-6/optimizer.pt")
    assert {s["exp_avg"].dtype for s in optimizer["state"].values()} == {torch.float32}


def test_same_command_gives_the_same_bytes_and_another_seed_does_not(tiny_settings):
    settings = [*tiny_settings, "rho=flat", "rho.sigma=0.3", "peft.lora_dropout=0.1"]
    first = adapter_bytes(run(in_folder(settings, "a")))
    torch.manual_seed(999)  # what ran before must not matter
    assert adapter_bytes(run(in_folder(settings, "b"))) == first
    assert adapter_bytes(run(in_folder(settings, "c"), "seed=1")) != first
    config = json.loads((run_folder(in_folder(settings, "a")) / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_the_config_decides_what_is_computed_and_not_accelerates(tiny_settings, monkeypatch, capsys):
    """`accelerate launch --mixed_precision bf16 --dynamo_backend eager` sets these variables."""
    plain = run(in_folder(tiny_settings, "plain"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("the model was compiled"))
    capsys.readouterr()
    launched = run(in_folder(tiny_settings, "launched"))
    assert adapter_bytes(launched) == adapter_bytes(plain)
    assert metrics_rows(launched) == metrics_rows(plain)
    reported = " ".join(capsys.readouterr().err.split())
    assert "ACCELERATE_MIXED_PRECISION=bf16 of accelerate launch (or its default_config.yaml) is ignored" in reported
    assert "trainer.autocast=auto and model.dtype=float32 say how this run computes" in reported
    assert "ACCELERATE_DYNAMO_BACKEND=EAGER" in reported


@pytest.mark.extra
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.extra), 2])
def test_rows_that_are_logged_during_the_next_step_are_the_same(tiny_settings, monkeypatch, every):
    kept = [word for word in tiny_settings if not word.startswith("dataset.validation_rows")]
    settings = [*kept, "rho=flat", "rho.sigma=0.3", f"trainer.logging_steps={every}", "dataset.validation_rows=4"]
    settings += ["optim.eval_steps=3", "trainer.save_steps=3"]
    at_once = run(in_folder(settings, "at_once"))
    monkeypatch.setattr(FlatTrainer, "_logs_later", True)
    later, killed = run(in_folder(settings, "later")), in_folder(settings, "killed")
    assert metrics_rows(later) == metrics_rows(at_once)
    with monkeypatch.context() as patch:
        conftest.die_at(5, patch)
        with pytest.raises(conftest.Killed):
            run_exp.main(killed)
    assert [row["step"] for row in metrics_rows(run_folder(killed)) if "loss" in row][-1] <= 4
    resumed = run(killed, "resume=true")
    assert metrics_rows(resumed) == metrics_rows(at_once)
    assert adapter_bytes(resumed) == adapter_bytes(at_once)


@pytest.mark.parametrize(("warmup", "trained"), [("0.03", False), ("0", True)])
def test_a_single_step_of_warm_up_says_that_it_trains_nothing(tiny_settings, capsys, warmup, trained):
    folder = run(tiny_settings, "trainer.max_steps=1", f"optim.warmup_ratio={warmup}")
    reported = " ".join(capsys.readouterr().err.split())
    assert ("The only optimizer step has a learning rate of 0" in reported) != trained
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name) == trained  # 0 at the start


def test_off_is_sigma_zero_is_plain_and_flat_is_not(tiny_settings):
    off = adapter_bytes(run(in_folder(tiny_settings, "off"), "rho=off"))
    assert adapter_bytes(run(in_folder(tiny_settings, "zero"), "rho=flat", "rho.sigma=0")) == off
    assert adapter_bytes(run(in_folder(tiny_settings, "flat"), "rho=flat", "rho.sigma=0.3")) != off


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.extra), "bfloat16"])
def test_copy_equals_recompute_and_checkpointing_changes_nothing(tiny_settings, dtype):
    settings = [*tiny_settings, "rho=flat", "rho.sigma=0.3", f"model.dtype={dtype}"]
    copy = run(in_folder(settings, "copy"), "rho.mode=copy")
    recompute = run(in_folder(settings, "recompute"), "rho.mode=recompute")
    saving = run(in_folder(settings, "saving"), "rho.mode=recompute", "trainer.gradient_checkpointing=true")
    assert adapter_bytes(copy) == adapter_bytes(recompute) == adapter_bytes(saving)
    assert metrics_rows(copy) == metrics_rows(recompute)


class Killed(BaseException):
    """Like SIGKILL: nothing of ours runs after it."""


def killed_and_resumed(settings, monkeypatch) -> Path:
    """Folder of a run that a patch kills and that is resumed without the patch."""
    killed = in_folder(settings, "killed")
    with pytest.raises(Killed):
        run_exp.main(killed)
    monkeypatch.undo()
    assert run_exp.main([*killed, "resume=true"]) == 0
    return run_folder(killed)


RESUME_VARIANTS = {
    "flat": ["rho=flat", "rho.sigma=0.3"],
    "every": ["rho=flat", "rho.sigma=0.3", "rho.every=3"],
    "grouped": ["optim.group_by_length=true", "rho=flat", "rho.sigma=0.3", "rho.resample=micro_batch"],
    "best": ["optim.best_model=true", "optim.eval_steps=2", "dataset.validation_rows=8"],
    "full_ft": ["peft=full_ft"],
    "early": ["optim.early_stopping_patience=6", "optim.eval_steps=1", "dataset.validation_rows=8", "optim.lr=0.3"],
}


# flat, every and full_ft are like pairs of methods in tests/flatlora/methods/test_pairs.py, and early is like best.
@pytest.mark.parametrize(
    ("killed_at", "variant"),
    [
        pytest.param(step, name, marks=() if step == 7 and name in ("best", "grouped") else pytest.mark.extra)
        for step in (4, 7)
        for name in RESUME_VARIANTS
    ],
)
def test_killed_and_resumed_is_never_killed(tiny_settings, variant, killed_at, monkeypatch):
    """18 rows in batches of 4: epochs of 5 steps, the last one short; checkpoints every 2 steps."""
    settings = [w for w in tiny_settings if not w.startswith(("dataset.", "peft.lora_r"))]
    settings += ["dataset.train_rows=18", "dataset.validation_rows=0", "dataset.test_rows=4", "trainer.save_steps=2"]
    settings += [*RESUME_VARIANTS[variant], "optim.epochs=2"]
    if variant != "full_ft":
        settings = ["peft.lora_dropout=0.2", "peft.lora_r=4", *settings]
    whole = run(in_folder(settings, "whole"))

    step = StepRecorder.on_step_end

    def die(self, args, state, control, **kwargs):
        step(self, args, state, control, **kwargs)
        if state.global_step == killed_at:
            raise Killed  # like SIGKILL, nothing of ours runs after it

    monkeypatch.setattr(StepRecorder, "on_step_end", die)
    settings = in_folder(settings, "killed")
    with pytest.raises(Killed):
        run_exp.main(settings)
    monkeypatch.undo()
    folder = run_folder(settings)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "torn')
    assert run_exp.main(settings) == 2  # without resume=true nothing is touched
    assert run_exp.main([*settings, "resume=true"]) == 0
    name = "model.safetensors" if variant == "full_ft" else "adapter_model.safetensors"
    assert (folder / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert metrics_rows(folder) == metrics_rows(whole)
    expected = (killed_at - 1) // 2 * 2 or None  # the kill comes before the save of its own step
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == expected


@pytest.mark.extra
@pytest.mark.parametrize("max_steps", [pytest.param(4, marks=pytest.mark.extra), 6])
def test_killed_after_the_last_step_trains_no_step_more(tiny_settings, max_steps, monkeypatch):
    """In the middle of an epoch (4 of 6 steps) and at its end."""
    settings = [*tiny_settings, f"trainer.max_steps={max_steps}", "trainer.save_steps=2", "rho=flat", "rho.sigma=0.3"]
    whole = run(in_folder(settings, "whole"))
    monkeypatch.setattr(training, "check_invariants", lambda *_: (_ for _ in ()).throw(Killed))
    killed = killed_and_resumed(settings, monkeypatch)
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert metrics_rows(killed) == metrics_rows(whole)


@pytest.mark.extra
def test_killed_in_the_evaluation_at_an_epochs_end(tiny_settings, monkeypatch):
    settings = [*tiny_settings, "optim.epochs=3", "trainer.save_steps=3", "optim.best_model=true"]
    settings = [*(w for w in settings if "validation_rows" not in w), "dataset.validation_rows=4"]
    whole = run(in_folder(settings, "whole"))
    evaluate = FlatTrainer.evaluate

    def die(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise Killed
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(FlatTrainer, "evaluate", die)
    killed = killed_and_resumed(settings, monkeypatch)
    assert metrics_rows(killed) == metrics_rows(whole)
    assert [row["step"] for row in metrics_rows(whole) if "eval_loss" in row] == [6, 12, 18]
    assert adapter_bytes(killed) == adapter_bytes(whole)


@pytest.mark.extra
def test_killed_while_scoring_after_early_stopping(tiny_settings, monkeypatch):
    settings = [w for w in tiny_settings if not w.startswith(("optim.lr", "dataset.validation_rows"))]
    settings += ["optim.epochs=8", "optim.early_stopping_patience=1", "optim.lr=0.5", "dataset.validation_rows=4"]
    whole = run(in_folder(settings, "whole"))
    assert metrics_rows(whole)[-1]["step"] < 48

    def die(*args):
        raise Killed

    monkeypatch.setattr(run_module, "score", die)
    killed = killed_and_resumed(settings, monkeypatch)
    assert metrics_rows(killed) == metrics_rows(whole)
    assert adapter_bytes(killed) == adapter_bytes(whole)
    losses = [json.loads((f / "run.json").read_text())["metrics"]["eval_loss"] for f in (whole, killed)]
    assert losses[0] == losses[1]


def test_an_inplace_run_cannot_be_resumed(tiny_settings):
    settings = [*tiny_settings, "rho=flat", "rho.mode=inplace"]
    run(settings)
    assert run_exp.main([*settings, "resume=true"]) == 2


@pytest.mark.extra
def test_a_foreign_checkpoint_is_refused_and_nothing_is_changed(tiny_settings, capsys):
    other = run(in_folder(tiny_settings, "other"), "seed=1")
    folder = run(tiny_settings)
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoint-6")
    shutil.copytree(other / "checkpoint-6", folder / "checkpoint-6")
    shutil.copytree(other / "checkpoint-6", folder / "checkpoint-9")
    (folder / "checkpoint-9" / "optimizer.pt").write_bytes(b"torn")  # above the whole one: would be removed
    before = contents(folder)
    assert run_exp.main([*tiny_settings, "resume=true", "wandb.mode=offline"]) == 2
    assert "checkpoint of another experiment" in " ".join(capsys.readouterr().err.split())
    assert contents(folder) == before


def test_a_finished_run_is_scored_anew_without_a_step(tiny_settings, monkeypatch):
    folder = run(tiny_settings)
    adapter, first = adapter_bytes(folder), json.loads((folder / "run.json").read_text())
    monkeypatch.setattr(FlatTrainer, "training_step", lambda *_: pytest.fail("trained a step more"))
    scored = [word for word in tiny_settings if word != "eval=[]"] + ["eval.gsm8k.max_new_tokens=4", "resume=true"]
    assert run_exp.main(scored) == 0
    record = json.loads((folder / "run.json").read_text())
    assert adapter_bytes(folder) == adapter
    assert record["metrics"]["gsm8k/exact_match"] is not None
    for key in ("step_s_median", "tokens_per_s", "perturb_s"):
        assert record["timing"][key] == first["timing"][key]  # of the training, not of this process
    assert run_exp.main(scored) == 0
    monkeypatch.setattr(run_module, "score", lambda *_: (_ for _ in ()).throw(Killed))
    again = [*scored, "eval.gsm8k.max_new_tokens=5"]
    with pytest.raises(Killed):
        run_exp.main(again)
    monkeypatch.setattr(run_module, "score", lambda *_: {"gsm8k/exact_match": 0.125})
    assert run_exp.main(again) == 0  # a scoring that was killed is not done
    assert json.loads((folder / "run.json").read_text())["metrics"]["gsm8k/exact_match"] == 0.125
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    before = contents(folder)
    assert run_exp.main([*scored, "eval.gsm8k.max_new_tokens=6"]) == 2
    assert contents(folder) == before


def test_buffered_micro_steps_are_the_plain_ones_from_the_first_to_the_last(tiny_settings, monkeypatch):
    """As on a GPU: noise is read from the first step, before and after the model was evaluated."""
    settings = [word for word in tiny_settings if not word.startswith("dataset.validation_rows")]
    settings += [
        "dataset.validation_rows=4",
        "optim.eval_steps=2",
        "rho=flat",
        "rho.sigma=0.5",
        "trainer.autocast=none",
    ]
    assert run_exp.main([*settings, "wandb.name=plain"]) == 0
    monkeypatch.setattr(FlatTrainer, "_on_gpu", property(lambda trainer: True))
    monkeypatch.setattr(acceleration, "accelerate", lambda model, device: [str(fuse(model))])
    assert run_exp.main([*settings, "wandb.name=buffered"]) == 0
    (root,) = [word.partition("=")[2] for word in settings if word.startswith("results_root=")]
    plain, buffered = (metrics_rows(next(Path(root).glob(f"*/{name}/*/"))) for name in ("plain", "buffered"))
    assert len(plain) == 6 + 3
    for left, right in zip(plain, buffered, strict=True):
        for key in left.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert left[key] == pytest.approx(right[key], rel=2e-5)


def test_a_resumed_runs_record_has_the_time_of_all_processes(tiny_settings, monkeypatch):
    settings = [*tiny_settings, "trainer.save_steps=2", "rho=flat", "rho.sigma=0.3", "rho.mode=recompute"]
    monkeypatch.setattr(training, "check_invariants", lambda *_: (_ for _ in ()).throw(Killed))
    folder = killed_and_resumed(settings, monkeypatch)
    effort = json.loads((folder / "checkpoint-6/effort.json").read_text())
    record = json.loads((folder / "run.json").read_text())
    assert len(effort["step_s"]) == 6
    assert record["timing"]["train_s"] == pytest.approx(effort["train_s"], abs=1e-3)
    assert record["timing"]["train_s"] >= sum(effort["step_s"])
    assert record["timing"]["perturb_s"] == pytest.approx(effort["perturb_s"], abs=1e-3)
    assert record["perturbation"] == {"mode": "recompute", "layers": 14, "drift": None, "noise_sha256": None}


@pytest.mark.parametrize("method", ["lora", pytest.param("full_ft", marks=pytest.mark.extra)])
def test_training_goes_on_while_a_checkpoint_is_written(tiny_settings, monkeypatch, method):
    """And what is written is of the step at which it was saved."""
    settings = [*tiny_settings, "trainer.save_steps=2", "trainer.save_total_limit=3", f"peft={method}"]
    settings = [word for word in settings if method == "lora" or not word.startswith("peft.lora_r")]
    whole = run(in_folder(settings, "whole"))
    further, write, step = threading.Event(), torch.save, FlatTrainer.training_step

    def wait_and_write(value, path, *args, **kwargs):
        if Path(path).parent.name == "checkpoint-2" and Path(path).name == "optimizer.pt":
            assert further.wait(60)
        return write(value, path, *args, **kwargs)

    def go_on(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:  # a step has changed weights and moments since
            further.set()
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(torch, "save", wait_and_write)
    monkeypatch.setattr(FlatTrainer, "training_step", go_on)
    folder = run(in_folder(settings, "waiting"))
    weights = "model.safetensors" if method == "full_ft" else "adapter_model.safetensors"
    for name in (weights, "optimizer.pt"):
        assert (folder / "checkpoint-2" / name).read_bytes() == (whole / "checkpoint-2" / name).read_bytes()
    assert checkpoint.error_of(folder / "checkpoint-2") is None


@pytest.mark.parametrize(
    "part",
    [
        pytest.param("safetensors.torch.save_file", marks=pytest.mark.extra),
        "torch.save",
        pytest.param("flatlora.train.checkpoint.write_manifest", marks=pytest.mark.extra),
    ],
)
def test_a_disk_that_fills_up_in_mid_save(tiny_settings, monkeypatch, capsys, part):
    settings = [*tiny_settings, "trainer.save_steps=2"]
    whole = run(in_folder(settings, "whole"))
    module, _, name = part.rpartition(".")
    owner = pytest.importorskip(module) if not module.startswith("flatlora") else checkpoint
    write = getattr(owner, name)

    def fail(*args, **kwargs):
        if (run_folder(settings) / "checkpoint-4").exists():
            monkeypatch.setattr("flatlora.utils.files.disk_is_full", lambda folder: True)
            raise RuntimeError("file write failed")
        return write(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    if part.startswith("safetensors"):
        monkeypatch.setattr("peft.peft_model.safe_save_file", fail)
    settings = in_folder(settings, "full")
    assert run_exp.main(settings) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "no space left" in error
    assert "Traceback" not in error
    folder = run_folder(settings)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]  # the half-written one is gone
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert run_exp.main([*settings, "resume=true"]) == 0
    assert adapter_bytes(folder) == adapter_bytes(whole)


def test_a_model_without_weights_is_refused_before_a_folder_is_made(tiny_settings, tiny_model_folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = [w for w in tiny_settings if not w.startswith("model.hub_id")] + [f"model.hub_id={bare}"]
    assert run_exp.main([*settings, "model.attn=flash_attention_2"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds no weights" in error
    assert "flash-attn is not usable here" in error
    assert not (tmp_path / "results").exists()


def test_resume_on_other_data_is_refused(tiny_settings, tmp_path, capsys):
    settings = [word for word in tiny_settings if not word.startswith("dataset.")]
    settings += ["dataset=gsm8k", "dataset.validation_rows=0", f"data_root={tmp_path}"]
    folder = tmp_path / "openai/gsm8k/main"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(32)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = run(settings)
    (finished / "run.json").unlink()
    text = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(text.replace("31 + 1?", "1 + 31?"))
    assert run_exp.main([*settings, "resume=true"]) == 2
    assert "other training data" in " ".join(capsys.readouterr().err.split())


def test_a_touched_backbone_fails_the_run(tiny_settings, monkeypatch):
    step = FlatTrainer.training_step

    def touch(self, model, *args, **kwargs):
        next(p for p in model.parameters() if not p.requires_grad).data.add_(1e-3)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(FlatTrainer, "training_step", touch)
    assert run_exp.main(tiny_settings) == 1
    assert "backbone changed" in json.loads((run_folder(tiny_settings) / "run.json").read_text())["error"]


def test_a_broken_newest_checkpoint_is_passed_over(tiny_settings):
    settings = [*tiny_settings, "trainer.save_steps=2"]
    folder = run(settings)
    expected = adapter_bytes(folder)
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "adapter")
    (folder / "checkpoint-6/optimizer.pt").write_bytes(b"torn")
    assert run_exp.main([*settings, "resume=true"]) == 0
    assert adapter_bytes(folder) == expected
    assert json.loads((folder / "run.json").read_text())["resumed_from"] == 4


def test_only_the_newest_checkpoints_are_kept(tiny_settings):
    folder = run(tiny_settings, "trainer.save_steps=1", "trainer.save_total_limit=2")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_finished_run_is_not_run_again(tiny_settings, capsys):
    folder = run(tiny_settings)
    stamp = (folder / "run.json").stat().st_mtime_ns
    assert run_exp.main([*tiny_settings, "resume=true"]) == 0
    assert (folder / "run.json").stat().st_mtime_ns == stamp
    assert "finished already" in capsys.readouterr().err


def test_another_experiment_in_the_folder_is_refused(tiny_settings, capsys):
    folder = run(tiny_settings)
    before = contents(folder)
    assert run_exp.main([*tiny_settings, "resume=true", "optim.lr=0.5"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "optim.lr is 0.01 there and 0.5 here" in error
    assert contents(folder) == before


@pytest.mark.parametrize("logged", [[], ["trainer.logging_steps=100"]])
def test_a_run_that_ends_in_nan_does_not_count_as_finished(tiny_settings, monkeypatch, logged):
    def poison(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(float("nan"))

    monkeypatch.setattr(SaveAtStop, "on_step_end", poison, raising=False)
    settings = [w for w in tiny_settings if "validation_rows" not in w] + ["dataset.validation_rows=4", *logged]
    assert run_exp.main([*settings, "optim.early_stopping_patience=9"]) == 1
    record = json.loads((run_folder(settings) / "run.json").read_text())
    assert record["status"] == "failed"
    assert "diverged" in record["error"]


@pytest.mark.extra
def test_a_run_goes_on_with_the_weights_that_it_began_with(
    tiny_settings, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    """Other weights in the folder are refused before anything is changed, and put back the run ends as undisturbed."""
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    settings = [*tiny_settings, f"model.hub_id={base}", "trainer.save_steps=2"]
    whole = run(in_folder(settings, "whole"))
    killed = in_folder(settings, "killed")
    conftest.die_at(3, monkeypatch)
    with pytest.raises(conftest.Killed):
        run_exp.main(killed)
    monkeypatch.undo()
    weights = (base / "model.safetensors").read_bytes()
    other = load_file(base / "model.safetensors")
    save_file({name: -tensor for name, tensor in other.items()}, base / "model.safetensors", {"format": "pt"})
    before = contents(run_folder(killed))
    assert run_exp.main([*killed, "resume=true"]) == run_module.EXIT_CONFIG
    assert "was trained on other weights of the backbone" in " ".join(capsys.readouterr().err.split())
    assert contents(run_folder(killed)) == before
    (base / "model.safetensors").write_bytes(weights)
    settings = json.loads((base / "config.json").read_bytes())
    changed = settings | {"rope_parameters": {**settings["rope_parameters"], "rope_theta": 500.0}}
    (base / "config.json").write_text(json.dumps(changed))
    assert run_exp.main([*killed, "resume=true"]) == run_module.EXIT_CONFIG
    assert "was trained on other settings of the backbone" in " ".join(capsys.readouterr().err.split())
    assert contents(run_folder(killed)) == before
    (base / "config.json").write_text(json.dumps(settings | {"transformers_version": "5.0.0", "_name_or_path": "x"}))
    assert adapter_bytes(run(killed, "resume=true")) == adapter_bytes(whole)


def test_a_folder_that_the_user_names_is_trained_with_the_default_model(tiny_settings, tiny_model_folder):
    folder = run([word for word in tiny_settings if not word.startswith("model.embedded")])
    record = json.loads((folder / "run.json").read_text())
    assert record["experiment"]["model"]["embedded"] is None
    weights = load_file(tiny_model_folder / "model.safetensors").values()
    trained = sum(tensor.numel() for tensor in load_file(folder / "adapter/adapter_model.safetensors").values())
    assert record["params"] == {"trainable": trained, "total": trained + sum(tensor.numel() for tensor in weights)}


@pytest.mark.extra
def test_saving_and_logging_may_change_on_resume(tiny_settings, monkeypatch):
    settings = [*tiny_settings, "trainer.save_steps=3", "trainer.logging_steps=1"]
    end = StepRecorder.on_step_end

    def die(self, args, state, control, **kwargs):
        end(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise Killed

    monkeypatch.setattr(StepRecorder, "on_step_end", die)
    with pytest.raises(Killed):
        run_exp.main(settings)
    monkeypatch.undo()
    folder = run(settings, "resume=true", "trainer.save_steps=6", "trainer.logging_steps=2")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert [row["step"] for row in metrics_rows(folder)] == [1, 2, 3, 4, 6]


@pytest.mark.extra
def test_the_best_of_a_time_after_the_checkpoint_is_forgotten(tiny_settings, monkeypatch):
    settings = [w for w in tiny_settings if "validation_rows" not in w]
    settings += ["dataset.validation_rows=8", "optim.eval_steps=1", "trainer.save_steps=2", "optim.best_model=true"]
    whole = run(in_folder(settings, "whole"))
    steps = [best["step"] for best in json.loads((whole / "best/best.json").read_text())]
    monkeypatch.setattr(trainer, "mark_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
    killed = killed_and_resumed(settings, monkeypatch)  # before any checkpoint, after two evaluations
    assert [best["step"] for best in json.loads((killed / "best/best.json").read_text())] == steps
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert {path.name for path in (killed / "best").glob("*.safetensors")} == {f"step-{n}.safetensors" for n in steps}


def test_a_sequence_to_sequence_model_averages_over_micro_batches(tiny_model_folder, tiny_settings, tmp_path):
    """One batch of 4 rows and two micro-batches of 2 give one gradient where all answers are of one length."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0)
    config.decoder_start_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    folder = tmp_path / "openai/gsm8k/main"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"Add {i} and {i}.", "answer": f"#### {i % 8 + 1}"} for i in range(16)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [w for w in tiny_settings if not w.startswith(("model.hub", "dataset.", "trainer.micro"))]
    settings = [*kept, f"model.hub_id={tmp_path / 't5'}", "model.family=seq2seq", "dataset=gsm8k"]
    settings += [
        "dataset.validation_rows=0",
        "model.generated_test_rows=null",
        f"data_root={tmp_path}",
        "rho=flat",
        "rho.sigma=0.3",
    ]
    whole = metrics_rows(run(in_folder(settings, "one"), "trainer.micro_batch_size=4"))
    parts = metrics_rows(run(in_folder(settings, "two"), "trainer.micro_batch_size=2"))
    assert len(whole) == 4
    for left, right in zip(whole, parts, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("later", [False, True])
def test_a_diverging_run_fails_with_its_reason(tiny_settings, monkeypatch, capsys, later):
    monkeypatch.setattr(FlatTrainer, "_logs_later", later)
    assert run_exp.main([*tiny_settings, "optim.lr=1000", "optim.weight_decay=1000", "optim.max_grad_norm=0"]) == 1
    record = json.loads((run_folder(tiny_settings) / "run.json").read_text())
    assert record["status"] == "failed"
    assert "diverged" in record["error"]
    assert record["perturbation"] is record["resumed_from"] is record["timing"] is None
    assert "Traceback" not in capsys.readouterr().err


def test_early_stopping_stops_and_best_model_is_kept(tiny_settings):
    settings = [w for w in tiny_settings if not w.startswith(("dataset.validation_rows", "optim.lr"))]
    settings += ["dataset.validation_rows=8", "optim.lr=0.5", "optim.epochs=10", "optim.eval_steps=1"]
    folder = run(settings, "optim.early_stopping_patience=2", "optim.best_model=true")
    losses = [row["eval_loss"] for row in metrics_rows(folder) if "eval_loss" in row]
    record = json.loads((folder / "run.json").read_text())
    assert len(losses) < 60
    assert losses.index(min(losses)) == len(losses) - 3  # two evaluations without a gain
    assert record["metrics"]["best_step"] == losses.index(min(losses)) + 1
    assert record["metrics"]["eval_loss"] == min(losses)
    best = load_file(folder / "best" / f"step-{record['metrics']['best_step']}.safetensors")
    saved = load_file(folder / "adapter/adapter_model.safetensors")
    assert {name.replace(".default", ""): t.sum() for name, t in best.items()} == {n: t.sum() for n, t in saved.items()}


def test_interrupt_is_recorded(tiny_settings, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlatTrainer, "training_step", interrupt)
    assert run_exp.main(tiny_settings) == 130
    assert json.loads((run_folder(tiny_settings) / "run.json").read_text())["status"] == "interrupted"


def test_the_record_of_an_interrupted_run_does_not_wait_for_the_hash_of_large_files(tiny_settings, monkeypatch):
    """A cluster waits for half a minute; the hash of 140 GB takes longer."""
    interrupted = threading.Event()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.loading, "backbone_state", lambda config: f"sha256:{interrupted.wait(5)}")
    monkeypatch.setattr(FlatTrainer, "training_step", interrupt)
    try:
        assert run_exp.main(tiny_settings) == 130
    finally:
        interrupted.set()
    record = json.loads((run_folder(tiny_settings) / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["base"] is None


def test_sweep_runs_every_job_in_its_own_folder(tiny_settings):
    sweep = fork(["-m", *tiny_settings, "++rho=0,0.3", "++seed=0,1"])
    end_well(sweep)
    reported = sweep.log.read_text()
    assert "++rho=0,0.3 → rho=flat rho.sigma=0,0.3" in reported
    assert "wandb.name=run → wandb.name=run-${rho.sigma}" in reported
    root = next(word.partition("=")[2] for word in tiny_settings if word.startswith("results_root="))
    assert {path.name for path in Path(root).glob("*_word_math/*")} == {"run-0", "run-0.3"}
    runs = [json.loads(path.read_text()) for path in Path(root).glob("*/*/*/run.json")]
    assert sorted((r["experiment"]["rho"]["sigma"], r["seed"]) for r in runs) == [(0, 0), (0, 1), (0.3, 0), (0.3, 1)]
    assert len({r["adapter_sha256"] for r in runs}) == 4


def test_a_job_that_fails_does_not_end_the_sweep(tiny_settings):
    sweep = fork(["-m", *tiny_settings, "optim.lr=1000,1e-6", "optim.weight_decay=1000", "optim.max_grad_norm=0"])
    assert sweep.wait(240) == 1
    reported = sweep.log.read_text()
    assert "Traceback" not in reported
    assert "Sweep: 1 of 2 finished" in reported
    rows = [line.split() for line in reported.splitlines() if "│ f" in line]
    assert [row[1] for row in rows] == ["failed", "finished"]
    assert rows[1][-2] == "unchanged"


def test_a_sweep_into_a_folder_that_takes_no_files_is_refused_before_it_starts(tiny_settings, tmp_path, capsys):
    (tmp_path / "results").write_text("a file, where the folder would be")
    before = contents(tmp_path)
    assert run_exp.main(["-m", *tiny_settings, "seed=0,1"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "1 error: nothing was loaded or written." in error
    assert f"Cannot write to results_root: Not a directory ({tmp_path / 'results'}" in error
    assert "set results_root=DIR" in error
    assert "Traceback" not in error
    assert contents(tmp_path) == before


def test_a_sweep_is_refused_as_a_whole_when_one_folder_is_taken(tiny_settings, capsys, tmp_path):
    folder = run(tiny_settings, "wandb.name=run-1", "seed=1")
    before = contents(tmp_path / "results")
    sweep = ["-m", *tiny_settings, "wandb.name=run-1", "seed=0,1"]
    assert run_exp.main(sweep) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{folder} holds a finished run" in error
    assert "Traceback" not in error
    assert contents(tmp_path / "results") == before


@pytest.mark.slow
def test_two_processes_agree_with_accumulation(tiny_settings):
    """Invariant 7: shared noise, 2 processes × 1 micro-batch against 1 process × 2, over gloo."""
    settings = [*tiny_settings, "rho=flat", "rho.sigma=0.3", "dataset.train_rows=32"]
    one = metrics_rows(run(in_folder(settings, "one")))
    two_settings = in_folder(settings, "two")
    end_well(*fork_two([*two_settings, "trainer=ddp"]))
    two = metrics_rows(run_folder(two_settings))
    assert len(one) == len(two) == 8
    for left, right in zip(one, two, strict=True):
        assert left["sigma"] == right["sigma"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("group", [1, 4])
def test_sampler_is_a_permutation_and_a_pure_function(group):
    lengths = [(7 * i) % 23 for i in range(50)]
    sampler = EpochSampler(lengths, seed=3, group=group)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    if group > 1:
        sampler.set_epoch(0)
        spread = [
            max(lengths[i] for i in first[j : j + 4]) - min(lengths[i] for i in first[j : j + 4])
            for j in range(0, 48, 4)
        ]
        assert max(spread) <= 3


def test_rows_know_their_lengths():
    rows = TokenRows.of([[1, 2], [3]], [[4], [5, 6, 7]])
    assert rows.lengths == [3, 4]


def test_a_trainer_is_freed_before_its_model_is_scored(tiny_settings, monkeypatch):
    """Its optimizer's state can be larger than the adapter by far, and scoring needs the memory."""
    trainers, save = [], run_module._save
    build = FlatTrainer.__init__

    def remembered(self, *args, **kwargs):
        trainers.append(weakref.ref(self))
        build(self, *args, **kwargs)

    def freed(*args):
        gc.collect()
        assert [trainer() for trainer in trainers] == [None]
        save(*args)

    monkeypatch.setattr(FlatTrainer, "__init__", remembered)
    monkeypatch.setattr(run_module, "_save", freed)
    run(tiny_settings, "trainer.max_steps=2")
