"""Results do not depend on the number of processes: of a whole run, and of one that is resumed on another number."""

import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

import run_exp
from flatlora.methods import REGULARIZERS
from flatlora.train import checkpoint, distributed
from flatlora.train.recorder import StepRecorder, TrainingStats
from flatlora.train.trainer import FlatTrainer
from flatlora.utils.errors import ConfigError
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder
from tests.flatlora.fused.test_varlen import with_joined_rows
from tests.flatlora.train.test_distributed import with_fused_layers_alone
from tests.processes import end_well, fork_ranks

# 21 rows are 11 micro-batches: the last step of an epoch has three, the last of one row. Checkpoint 4 is in epoch 2.
SHAPE = ["dataset.train_rows=21", "optim.batch_size=8", "trainer.micro_batch_size=2", "trainer.save_steps=2"]
SHAPE += ["optim.epochs=2", "optim.lr=0.002"]
COPY = ["rho=flat", "rho.sigma=0.1", "rho.mode=copy"]
RECOMPUTE = ["rho=flat", "rho.sigma=0.1", "rho.mode=recompute", "trainer.kernels=off"]
ADALORA = ["peft=adalora", "rho=off", "peft.delta_t=1"]
SAM = ["rho=sam", "rho.sigma=0.05"]
CLIP = ["model=clip_tiny", "dataset=digits"]  # its loss is the mean over micro-batches, not over tokens


@pytest.fixture
def settings(tiny_settings):
    """Results root last; six steps."""
    replaced = tuple(word.partition("=")[0] for word in [*SHAPE, "results_root="])
    (root,) = [word for word in tiny_settings if word.startswith("results_root")]
    return [*(word for word in tiny_settings if not word.startswith(replaced)), *SHAPE, root]


def named(settings, words, name):
    """With a results root of its own, and maybe another model."""
    own = any(word.startswith("model=") for word in words)
    kept = [word for word in settings[:-1] if not own or not word.startswith("model.")]
    return [*words, *kept, f"{settings[-1]}/{name}"]


def train(count, settings):
    if count == 1:
        assert run_exp.main(settings) == 0
    else:
        end_well(*fork_ranks(count, ["trainer=ddp", *settings]))
    return run_folder(settings)


def main_until_step_five(words):
    """`run_exp.main`, killed in step 5 once checkpoint-4 is complete."""
    plain = StepRecorder.on_step_end

    def die(recorder, args, state, control, **kwargs):
        plain(recorder, args, state, control, **kwargs)
        if state.global_step == 5:
            recorder.trainer.writer.wait()
            recorder.trainer.accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)

    StepRecorder.on_step_end = die
    return run_exp.main(words)


def train_until_step_five(count, settings, monkeypatch):
    if count == 1:
        with monkeypatch.context() as patch:
            die_at(5, patch)
            with pytest.raises(Killed):
                run_exp.main(settings)
    else:
        ranks = fork_ranks(count, ["trainer=ddp", *settings], entry=main_until_step_five)
        assert [rank.wait(120) for rank in ranks] == [-signal.SIGKILL] * count, ranks[0].log.read_text()[-3000:]
    (folder,) = Path(settings[-1].partition("=")[2]).glob("*/*/*")
    assert checkpoint.step_of(checkpoint.checkpoints(folder)[-1]) == 4
    return folder


def assert_same(one, other):
    """Steps and trained weights, to rounding."""
    rows = [metrics_rows(one), metrics_rows(other)]
    assert len(rows[0]) == len(rows[1]) == 6
    for left, right in zip(*rows, strict=True):
        for key in left.keys() - {"epoch", "loss", "grad_norm"}:  # a fraction of an epoch is in micro-batches a process
            assert left[key] == right[key], (left["step"], key)
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5), left["step"]
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4), left["step"]
    trained = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, other)]
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[0].items():
        assert (tensor - trained[1][name]).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "words"),
    [
        pytest.param(2, CLIP, id="2-clip", marks=pytest.mark.extra),
        pytest.param(4, CLIP, id="4-clip", marks=pytest.mark.extra),
        pytest.param(4, COPY, id="4-flat", marks=pytest.mark.extra),
        pytest.param(2, ADALORA, id="2-adalora", marks=pytest.mark.extra),
        pytest.param(2, SAM, id="2-sam", marks=pytest.mark.extra),
        pytest.param(2, [*SAM, *CLIP], id="2-clip-sam", marks=pytest.mark.extra),
        pytest.param(2, ["rho=rop", "rho.sigma=0.1"], id="2-rop", marks=pytest.mark.extra),
        pytest.param(4, [*COPY, "rho.per_rank=true", "rho.resample=micro_batch"], id="4", marks=pytest.mark.extra),
    ],
)
def test_epochs_with_an_unfilled_last_step_are_those_of_one_process(settings, count, words):
    one, several = named(settings, words, "one"), named(settings, words, "several")
    assert_same(train(1, one), train(count, several))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        pytest.param(2, 1, COPY, id="2-1-copy"),
        pytest.param(1, 2, ["peft=lora_pro", *RECOMPUTE], id="1-2-lora_pro-recompute", marks=pytest.mark.extra),
        pytest.param(2, 1, ["peft=lora_pro", "rho=off"], id="2-1-lora_pro", marks=pytest.mark.extra),
        pytest.param(1, 2, COPY, id="1-2-copy", marks=pytest.mark.extra),
        pytest.param(2, 1, RECOMPUTE, id="2-1-recompute", marks=pytest.mark.extra),
        pytest.param(2, 1, ["rho=off"], id="2-1-off", marks=pytest.mark.extra),
        pytest.param(1, 2, ["rho=off"], id="1-2-off", marks=pytest.mark.extra),
        pytest.param(2, 1, ADALORA, id="2-1-adalora", marks=pytest.mark.extra),
        pytest.param(1, 2, ADALORA, id="1-2-adalora", marks=pytest.mark.extra),
        pytest.param(4, 2, [*COPY, "rho.every=3"], id="4-2-window", marks=pytest.mark.extra),
        pytest.param(2, 4, ["peft=lora_ga", "rho=off"], id="2-4-lora_ga", marks=pytest.mark.extra),
        pytest.param(1, 2, CLIP, id="1-2-clip", marks=pytest.mark.extra),
    ],
)
def test_a_killed_run_goes_on_with_another_number_of_processes(settings, monkeypatch, before, after, words):
    whole, killed = named(settings, words, "whole"), named(settings, words, "killed")
    undisturbed = train(1, whole)
    folder = train_until_step_five(before, killed, monkeypatch)
    assert train(after, ["resume=true", *killed]) == folder
    assert_same(undisturbed, folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["resumed_from"] == 4
    assert record["distributed"]["processes"] == after
    assert record["distributed"]["history"] == [{"step": 0, "processes": before}, {"step": 4, "processes": after}]


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_dropout_is_a_function_of_seed_step_and_rank_after_such_a_change(settings, monkeypatch, before, after):
    killed = named(settings, ["peft.lora_dropout=0.5", "rho=off"], "killed")
    folder = train_until_step_five(before, killed, monkeypatch)
    root = Path(killed[-1].partition("=")[2])
    shutil.copytree(root, root.with_name("again"))
    again = [*killed[:-1], f"results_root={root.with_name('again')}"]
    assert adapter_bytes(train(after, ["resume=true", *killed])) == adapter_bytes(train(after, ["resume=true", *again]))
    assert len(metrics_rows(folder)) == 6


def test_generators_of_another_number_are_seeded_by_seed_step_and_rank(tmp_path):
    checkpoint.write_manifest(tmp_path, step=4, config_sha256="c", data_sha256="d", world_size=2)

    def drawn(seed, step, rank):
        arguments = SimpleNamespace(world_size=3, seed=seed, process_index=rank)
        state = SimpleNamespace(global_step=step)
        FlatTrainer._load_rng_state(SimpleNamespace(args=arguments, state=state), str(tmp_path))
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = [drawn(seed, step, rank) for seed, step, rank in itertools.product((0, 1), (4, 5), (0, 1, 2))]
    again = [drawn(seed, step, rank) for seed, step, rank in itertools.product((0, 1), (4, 5), (0, 1, 2))]
    assert first == again
    assert len(set(first)) == 12


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("trainer", ["ddp", "zero2"])
def test_gradients_of_one_buffer_and_zero_have_the_same_last_step(settings, trainer):
    """As on GPUs, where gradients are reduced once a step."""
    pytest.importorskip("deepspeed")
    one, two = (named(settings, [*COPY, "trainer.autocast=none"], name) for name in ("one", "two"))
    end_well(*fork_ranks(2, [f"trainer={trainer}", *two], entry=with_fused_layers_alone))
    assert_same(train(1, one), run_folder(two))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        pytest.param("ddp", COPY, id="ddp-flat"),
        pytest.param("ddp", SAM, id="ddp-sam", marks=pytest.mark.extra),
        pytest.param("fsdp", COPY, id="fsdp-copy", marks=pytest.mark.extra),
        pytest.param("fsdp", RECOMPUTE[:-1], id="fsdp-recompute", marks=pytest.mark.extra),
    ],
)
def test_joined_rows_have_the_same_last_step(settings, trainer, words):
    """It has four rows: the second process repeats rows without labels."""
    own = ["trainer.autocast=none", "trainer.micro_batch_tokens=100", "dataset.train_rows=20"]
    kept = [word for word in settings if not word.startswith("dataset.train_rows")]
    one, two = (named(kept, [*words, *own], name) for name in ("one", "two"))
    end_well(*fork_ranks(2, [f"trainer={trainer}", *two], entry=with_joined_rows))
    assert_same(train(1, one), run_folder(two))
    assert "micro-batches of up to 100 tokens" in json.loads((run_folder(two) / "run.json").read_text())["kernels"]


@pytest.mark.parametrize(("rows", "count"), itertools.product((1, 3, 16, 21, 22), (2, 3, 4)))
def test_processes_share_the_micro_batches_of_one_and_repeat_whole_ones(rows, count):
    """What `FlatTrainer.get_train_dataloader` relies on in accelerate."""
    one = BatchSampler(range(rows), 2, drop_last=False)
    shards = [BatchSamplerShard(one, count, rank) for rank in range(count)]
    for shard in shards:
        shard.batch_size = None
    shared = list(zip(*shards, strict=True))
    surplus = -len(one) % count
    flat = [batch for batches in shared for batch in batches]
    assert flat[: len(flat) - surplus] == list(one)
    assert all(batch in list(one) for batch in flat[len(flat) - surplus :])
    assert {len(shard) for shard in shards} == {len(shared)}


@pytest.mark.parametrize(
    ("words", "tied"),
    [
        ([], None),
        (["rho.per_rank=true", "rho.resample=micro_batch"], None),
        (["rho.per_rank=true"], "rho.per_rank=true with rho.resample=step draws"),
        (["rho.resample=micro_batch"], "rho.per_rank=false with rho.resample=micro_batch draws"),
    ],
)
def test_noise_whose_draws_depend_on_the_number_of_processes_ties_a_run_to_it(words, tied):
    rho = run_exp.experiment_of(["rho=flat", *words]).rho
    reason = REGULARIZERS[rho.method].tied_to_processes(rho)
    assert reason is None if tied is None else reason.startswith(tied)


def test_a_run_with_such_noise_is_not_resumed_on_another_number(settings, monkeypatch, capsys):
    words = ["rho=flat", "rho.sigma=0.1", "rho.resample=micro_batch", *settings]
    folder = train_until_step_five(1, words, monkeypatch) / "checkpoint-4"
    written = json.loads((folder / checkpoint.MANIFEST).read_text())
    kept = {key: written[key] for key in ("step", "config_sha256", "data_sha256", "base")}
    checkpoint.write_manifest(folder, **kept, world_size=2)
    capsys.readouterr()
    assert run_exp.main(["resume=true", *words]) == 2
    reported = " ".join("".join(capsys.readouterr()).split())
    assert "was written by 2 processes and there are 1 now, but rho.per_rank=false with rho.resample=micro" in reported
    assert "start as many as before, or say overwrite=true" in reported
    assert checkpoint.error_of(folder) is None


def test_a_checkpoint_without_a_history_was_written_by_one_number_of_processes(tmp_path):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    TrainingStats(train_s=3.0).write(folder)
    checkpoint.write_manifest(folder, step=4, config_sha256="c", data_sha256="d", world_size=2)
    assert TrainingStats.read(folder).processes == [{"step": 0, "processes": 2}]
    assert TrainingStats.read(None).processes == []


@pytest.mark.parametrize(
    ("words", "count", "fitting"),
    [
        (
            ["optim.batch_size=24", "trainer.micro_batch_size=2"],
            5,
            "its 12 micro-batches of 2 evenly; start another number",
        ),
        (["optim.batch_size=24", "trainer.micro_batch_size=2"], 8, "(1, 2, 3, 4, 6, 12)"),
        (["optim.batch_size=720720", "trainer.micro_batch_size=1"], 17, "(a divisor of 720720)"),
    ],
)
def test_a_number_that_does_not_divide_the_batch_is_refused_with_those_that_do(monkeypatch, words, count, fitting):
    experiment = run_exp.experiment_of(["trainer=ddp", "trainer.device=cpu", f"trainer.gpus={count}", *words])
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for check in (distributed.check_launch, lambda asked: distributed.launch(asked, Path("run_exp.py"), [])):
        with pytest.raises(ConfigError) as caught:
            check(experiment)
        (error,) = caught.value.errors
        assert f"with {count} processes: they cannot share" in error
        assert fitting in error
