"""Several processes over gloo: ZeRO-2 in FP32, one answer for all, what ends when one dies, and preemption."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import run_exp
from flatlora.config.sections import TrainerConfig
from flatlora.fused import acceleration
from flatlora.train import checkpoint, distributed, trainer
from flatlora.train.recorder import StepRecorder
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import choose_precision
from scripts.forked import SERVER
from tests.conftest import adapter_bytes, metrics_rows, run_folder
from tests.processes import ENVIRONMENT, PROJECT, end_well, finish, fork, fork_two, start


def wait_for_step(settings, step, process, *, saved=None):
    """Until metrics.jsonl has that step; with `saved`, until the checkpoint of that step is whole too."""
    deadline, written = time.monotonic() + 120, f"checkpoint-{saved}/{checkpoint.MANIFEST}"
    while time.monotonic() < deadline and process.poll() is None:
        for path in Path(settings[-1].partition("=")[2]).glob("*/*/*/metrics.jsonl"):
            whole = saved is None or (path.parent / written).exists()  # it is written beside the next steps
            if whole and path.read_text().count("\n") >= step:
                return path.parent
        time.sleep(0.02)
    raise AssertionError(f"no step {step} of {settings[-1]}")


def processes_of(folder):
    """Commands of living processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command and "run_exp.py" in command:
            found.append(int(path.parent.name))
    return found


def hurt_a_rank(process, folder, number):
    """Send a signal to one of the processes that train."""
    os.kill(max(pid for pid in processes_of(folder.parents[2]) if pid != process.pid), number)


@pytest.fixture
def settings(tiny_settings):
    """Results root last; BF16 backbone, 20 steps of two rows on each of two processes."""
    kept = [
        word for word in tiny_settings if not word.startswith(("model.dtype", "dataset.train_rows", "results_root"))
    ]
    (root,) = [word for word in tiny_settings if word.startswith("results_root")]
    return [*kept, "model.dtype=bfloat16", "dataset.train_rows=80", "rho=flat", "rho.sigma=0.1", root]


def at(settings, name):
    return [*settings[:-1], f"{settings[-1]}/{name}"]


TWO = ["trainer.gpus=2"]


@pytest.mark.slow
@pytest.mark.extra
def test_zero2_keeps_fp32_agrees_with_accumulation_and_resumes_exactly(settings):
    """Invariants 4, 6 and 7 under DeepSpeed. The shorter run checks 4 and 7 alone, in few steps."""
    pytest.importorskip("deepspeed")
    settings = [*settings[:-1], "trainer.max_steps=8", settings[-1]]
    whole, one, killed = at(settings, "whole"), at(settings, "one"), at(settings, "killed")
    zero = ["trainer=zero2", *TWO, "trainer.save_steps=2"]
    ranks = fork_two([*zero, *whole])
    end_well(*ranks)
    assert "built successfully" not in ranks[0].log.read_text()  # DeepSpeed compiles nothing
    end_well(fork(one))
    record = json.loads((run_folder(whole) / "run.json").read_text())
    fp32 = ["float32"]
    backbone = str(choose_precision("auto", "bfloat16", "cpu").held).removeprefix("torch.")
    held = {"backbone": [backbone], "trained": fp32, "masters": fp32, "gradients": fp32}
    history = [{"step": 0, "processes": 2}]
    assert record["distributed"] == {"processes": 2, "zero": 2, "dtypes": held, "history": history}
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    assert len(record["perturbation"]["noise_sha256"]) == 2
    assert len(set(record["perturbation"]["noise_sha256"])) == 1
    states = sorted((run_folder(whole) / "checkpoint-8/global_step8").glob("*optim_states.pt"))
    assert len(states) == 2
    for path in states:
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        moments = [value for group in state["base_optimizer_state"]["state"].values() for value in group.values()]
        assert {t.dtype for t in [*state["single_partition_of_fp32_groups"], *moments]} == {torch.float32}
    rows = metrics_rows(run_folder(whole))
    assert len(rows) == 8
    for left, right in zip(rows, metrics_rows(run_folder(one)), strict=True):
        assert left["sigma"] == right["sigma"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    ranks = fork_two([*zero, *killed])
    folder = wait_for_step(killed, 3, ranks[0], saved=2)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert [rank.wait(60) for rank in ranks] == [-signal.SIGKILL] * 2
    end_well(*fork_two([*zero, "resume=true", *killed]))
    assert json.loads((folder / "run.json").read_text())["resumed_from"] >= 2
    assert adapter_bytes(folder) == adapter_bytes(run_folder(whole))


@pytest.mark.slow
def test_each_rank_may_have_noise_of_its_own_and_moments_may_stay_on_the_host(settings):
    pytest.importorskip("deepspeed")
    end_well(*fork_two(["trainer=zero2_offload", *TWO, "trainer.max_steps=4", "rho.per_rank=true", *settings]))
    record = json.loads((run_folder(settings) / "run.json").read_text())
    assert len(set(record["perturbation"]["noise_sha256"])) == 2
    held = record["distributed"]["dtypes"]
    assert held["trained"] == held["masters"] == held["gradients"] == ["float32"]


def with_fused_layers_alone(words):
    """`run_exp.main` with the micro-steps of a GPU."""
    import run_exp

    trainer.FlatTrainer._on_gpu = property(lambda _: True)
    acceleration.accelerate = lambda model, device: [f"{acceleration.fuse(model)} fused LoRA layers"]
    return run_exp.main(words)


@pytest.mark.slow
def test_zero2_steps_on_gradients_of_one_buffer(settings):
    """As on GPUs: fused layers add their gradients to a buffer past ZeRO's hooks, which is reduced once a step."""
    pytest.importorskip("deepspeed")
    settings = [*settings[:-1], "optim.batch_size=8", "trainer.max_steps=6", "trainer.autocast=none", settings[-1]]
    zero, one = at(settings, "zero"), at(settings, "one")
    end_well(*fork_two(["trainer=zero2", *zero], entry=with_fused_layers_alone))
    end_well(fork(one, with_fused_layers_alone))
    record = json.loads((run_folder(zero) / "run.json").read_text())
    assert record["kernels"][0].endswith("fused LoRA layers")
    assert record["distributed"]["processes"] == 2
    rows = metrics_rows(run_folder(zero))
    assert len(rows) == 6
    for left, right in zip(rows, metrics_rows(run_folder(one)), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.extra
@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on_later(settings):
    settings = [*settings[:-1], "trainer.max_steps=14", settings[-1]]
    whole, hurt = at(settings, "whole"), at(settings, "hurt")
    ddp = ["trainer=ddp", *TWO, "trainer.save_steps=2"]
    end_well(*fork_two([*ddp, *whole]))
    process = start([*ddp, *hurt])
    folder = wait_for_step(hurt, 4, process, saved=2)
    hurt_a_rank(process, folder, signal.SIGKILL)
    begun = time.monotonic()
    code, _ = finish(process, 90)
    assert code != 0
    assert time.monotonic() - begun < 60
    assert processes_of(folder.parents[2]) == []
    assert checkpoint.error_of(checkpoint.checkpoints(folder)[-1]) is None
    end_well(*fork_two([*ddp, "resume=true", *hurt]))
    assert adapter_bytes(folder) == adapter_bytes(run_folder(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [
        pytest.param(signal.SIGTERM, [], id="one"),
        pytest.param(signal.SIGUSR1, ["trainer=ddp", *TWO], id="two", marks=pytest.mark.extra),
    ],
)
def test_a_preempted_run_has_a_checkpoint_of_that_moment(settings, number, words):
    settings = [*words, *settings]
    whole, signaled = at(settings, "whole"), at(settings, "signaled")
    undisturbed = fork_two(whole) if words else [fork(whole)]
    end_well(*undisturbed)
    process = start(signaled) if words else fork(signaled)
    folder = wait_for_step(signaled, 5, process)
    process.send_signal(number)
    code, reported = finish(process) if words else (process.wait(240), process.log.read_text())
    assert code == 75, reported[-2000:]
    assert "the same command with resume=true goes on" in " ".join(reported.split())
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    (newest,) = checkpoint.checkpoints(folder)
    assert checkpoint.step_of(newest) == len(metrics_rows(folder)) >= 5
    again = ["resume=true", *signaled]
    end_well(*(fork_two(again) if words else [fork(again)]))
    assert adapter_bytes(folder) == adapter_bytes(run_folder(whole))
    assert metrics_rows(folder) == metrics_rows(run_folder(whole))


@pytest.mark.slow
def test_nodes_that_differ_stop_with_what_differs(settings, tmp_path):
    words = ["trainer=ddp", "trainer.timeout_s=60", *settings]
    runs = fork_two(words, ["optim.weight_decay=0.1"], ["optim.weight_decay=0.2"])
    assert [run.wait(240) for run in runs] == [2, 2]
    reported = [" ".join(run.log.read_text().split()) for run in runs]
    assert "The processes differ in the configuration:" in reported[0]
    assert "Start every node with the same command and the same checkout" in reported[0]
    assert "The processes differ" not in reported[1]  # once is enough
    assert not (tmp_path / "results").exists()


def test_what_differs_is_reported_by_rank(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)

    def gather(into, mine):
        into[:] = [mine, {"a": "x", "b": "1"}, {"a": "x", "b": "2"}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    distributed.check_agreement({"a": "x"}, "Do so.")
    with pytest.raises(ConfigError) as caught:
        distributed.check_agreement({"a": "x", "b": "2"}, "Do so.")
    assert caught.value.errors == ["The processes differ in b: 2 on rank 0, 2; 1 on rank 1. Do so."]


@pytest.mark.parametrize(("cores", "threads"), [(6, "3"), (1, "1")])
def test_processes_share_the_physical_cores(monkeypatch, cores, threads):
    monkeypatch.setattr(distributed, "physical_cores", lambda: cores)
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: lambda *words: None)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")  # `launch` sets both
    monkeypatch.delenv("OMP_NUM_THREADS")
    experiment = run_exp.experiment_of(["trainer=ddp", "trainer.device=cpu", "trainer.gpus=2"])
    assert distributed.launch(experiment, PROJECT / "run_exp.py", []) == 0
    assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("exit_code", "returned", "said"),
    [
        (
            -signal.SIGABRT,
            1,
            "SIGABRT (NCCL ends it like this if another process has not answered for trainer.timeout_s=",
        ),
        (-signal.SIGKILL, 1, "SIGKILL (the system ends it like this if memory runs out). The others were ended too"),
        (-signal.SIGSEGV, 1, "SIGSEGV. The others were ended too; the same command with resume=true goes on"),
        (2, 2, None),  # it has said why
    ],
)
def test_a_process_that_a_signal_ended_is_named(monkeypatch, capsys, exit_code, returned, said):
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="none")

    def fail(*words):
        raise ChildFailedError("run_exp.py", {1: failure})

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: fail)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    experiment = run_exp.experiment_of(["trainer=ddp", "trainer.device=cpu", "trainer.gpus=2"])
    assert distributed.launch(experiment, PROJECT / "run_exp.py", []) == returned
    reported = capsys.readouterr().err
    assert said is None if not reported else reported.startswith(f"Process 1 of the run was ended by {said}")


def test_more_gpus_than_there_are_are_refused_before_a_process_is_started(settings):
    words = [word for word in settings if word != "trainer.device=cpu"]
    asked = fork(["trainer=ddp", "trainer.gpus=3", *words])
    assert asked.wait(240) == 2
    assert "Invalid trainer.gpus=3: this machine has 0" in " ".join(asked.log.read_text().split())


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize(
    "starter",
    [
        [
            "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
        ],
        ["deepspeed", "--num_gpus", "2"],
    ],
    ids=lambda words: words[0],
)
def test_other_starters_start_zero2_as_torchrun_does(settings, starter):
    pytest.importorskip("deepspeed")
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    words = [*starter, "run_exp.py", "trainer=zero2", "trainer.max_steps=2", *settings]
    subprocess.run(words, cwd=PROJECT, env=ENVIRONMENT | {"PATH": path}, check=True, timeout=240)
    record = json.loads((run_folder(settings) / "run.json").read_text())
    assert (record["status"], record["distributed"]["processes"], record["distributed"]["zero"]) == ("finished", 2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer=zero2", "peft=lora_pro"], "Invalid trainer=zero2 with peft=lora_pro: this method reads the whole"),
        (["trainer=zero2", "rho=sam"], "Invalid trainer=zero2 with rho=sam: this method reads the whole"),
        (["trainer=zero2", "optim.optimizer=adamw_8bit"], "Invalid optim.optimizer=adamw_8bit with trainer=zero2"),
        (["trainer=ddp", "trainer.offload=true"], "Invalid trainer.offload=true with trainer=ddp: ZeRO's optimizer"),
        (["trainer=single", "trainer.gpus=2"], "Invalid trainer.gpus=2 with trainer=single: it runs one process"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    import run_exp

    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of(settings)
    assert any(reported.startswith(message) for reported in caught.value.errors), caught.value.errors


def test_zero_gets_neither_bf16_nor_fp16():
    machine = TrainerConfig(name="zero2_offload", zero=2, offload=True)
    found = distributed.deepspeed_settings(machine)
    assert found["bf16"] == found["fp16"] == {"enabled": "auto"}  # TrainingArguments.bf16 is off: it becomes false
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert distributed.deepspeed_settings(TrainerConfig(name="ddp")) is None


def claim_twice(folder, reported, leave):
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,5,7"
    claimed = [distributed.claim_gpu(3, folder) for _ in range(2)]
    reported.put((*claimed, os.environ["CUDA_VISIBLE_DEVICES"]))
    leave.wait()


def test_workers_claim_a_gpu_each(tmp_path):
    reported, leave = SERVER.Queue(), SERVER.Event()
    workers = [SERVER.Process(target=claim_twice, args=(tmp_path, reported, leave)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = sorted((reported.get(timeout=60) for _ in workers), key=str)
    leave.set()
    for worker in workers:
        worker.join()
    assert [first for first, _, _ in found] == [0, 1, 2, None]
    assert [second for _, second, _ in found] == [None] * 4  # one is enough
    assert [visible for _, _, visible in found] == ["4", "5", "7", "4,5,7"]
    assert distributed.claim_gpu(1) is None


def test_a_lock_in_a_folder_of_all_users_may_be_anothers(tmp_path, monkeypatch):
    """A file without permission to write is locked all the same; a link, and a file that is closed, are passed over."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(distributed, "_claimed", claimed := [])
    (tmp_path / "flatlora-gpu-0.lock").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "flatlora-gpu-1.lock").touch(0o444)
    (tmp_path / "flatlora-gpu-2.lock").touch(0o444)
    plain = os.open

    def opened(path, flags, *mode):
        if str(path).endswith("1.lock") or (
            str(path).endswith("2.lock") and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    assert distributed.claim_gpu(4, tmp_path) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert not (tmp_path / "elsewhere").exists()
    os.close(claimed.pop())


NCCL = "[0] is setting up NCCL communicator and retrieving ncclUniqueId: Connection closed by peer\nException raised"


@pytest.mark.parametrize(
    ("error", "processes", "lost"),
    [
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Connection reset by peer. Look."),
            2,
            "Connection reset by peer",
        ),
        (RuntimeError("Gloo failed with [/x/gloo/a.h:1] no error"), 2, "Gloo failed with no error"),
        (torch.distributed.DistBackendError(NCCL), 2, NCCL.partition("\n")[0]),
        (torch.distributed.DistBackendError("NCCL error: invalid usage\nDuplicate GPU detected"), 2, None),
        (RuntimeError("DataLoader timed out after 5 seconds"), 2, None),
        (FileNotFoundError("/data/gloo/train.jsonl"), 2, None),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Connection reset by peer"), 1, None),
    ],
)
def test_errors_of_lost_connections_alone_are_named_so(monkeypatch, error, processes, lost):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    named = distributed.named_loss(error)
    if lost is None:
        assert named is error
    else:
        assert f"rank 0 lost another process of the run ({lost}): it ended" in str(named)
        assert named.__cause__ is error


def test_a_process_that_is_lost_before_the_run_begins_is_named(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for error, named in (
        (RuntimeError("[/x/gloo/a.cc:1] Connection closed by peer"), True),
        (RuntimeError("other"), False),
    ):

        def fail(*words, error=error):
            raise error

        monkeypatch.setattr("flatlora.experiment.launch.run", fail)
        with contextlib.nullcontext() if named else pytest.raises(RuntimeError, match="other"):
            assert run_exp.main(["trainer=ddp", "trainer.device=cpu"]) == 1
        assert ("rank 0 lost another process of the run (Connection closed" in capsys.readouterr().err) == named


def lose_rank_one(words):
    """`run_exp.main`, in which rank 1 is killed in step 3, or stops there for longer than trainer.timeout_s."""
    plain, hangs = StepRecorder.on_step_begin, "trainer.timeout_s=10" in words

    def leave(recorder, args, state, control, **kwargs):
        plain(recorder, args, state, control, **kwargs)
        if state.global_step == 2 and distributed.rank() == 1:
            if hangs:
                time.sleep(25)
            os.kill(os.getpid(), signal.SIGKILL)

    StepRecorder.on_step_begin = leave
    return run_exp.main(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer_name", "timeout_s", "reason"),
    [
        pytest.param("ddp", 60, "(Read error|Connection)", id="killed"),
        pytest.param("ddp", 10, "Timed out waiting 10000ms", id="hangs", marks=pytest.mark.extra),
        pytest.param("fsdp", 60, "(Read error|Connection)", id="killed-fsdp", marks=pytest.mark.extra),
    ],
)
def test_the_other_node_says_that_a_process_is_lost(settings, trainer_name, timeout_s, reason):
    """No launcher ends it before, as none does on another node."""
    kept = [word for word in settings[:-1] if not word.startswith("model.dtype")]
    words = [f"trainer={trainer_name}", f"trainer.timeout_s={timeout_s}", "model.dtype=float32", *kept, settings[-1]]
    ranks = fork_two(words, entry=lose_rank_one)
    assert [rank.wait(120) for rank in ranks] == [1, -signal.SIGKILL]
    reported = " ".join(ranks[0].log.read_text().split())
    assert re.search(
        rf"The run failed: rank 0 lost another process of the run \({reason}[^)]*\): it ended, hangs", reported
    )
    assert "start all processes again with resume=true" in reported
    assert "Traceback" not in reported
    assert json.loads((run_folder(settings) / "run.json").read_text())["error"].startswith(
        "ConnectionError: rank 0 lost"
    )


@pytest.mark.slow
@pytest.mark.extra
def test_a_rank_that_hangs_ends_the_run_in_the_stated_time(settings):
    hung = at(settings, "hung")
    process = start(["trainer=ddp", *TWO, "trainer.timeout_s=10", *hung])
    folder = wait_for_step(hung, 3, process)
    hurt_a_rank(process, folder, signal.SIGSTOP)
    begun = time.monotonic()
    code, _ = finish(process, 120)
    assert code != 0
    assert time.monotonic() - begun < 75  # the time to notice, and 30 s until what does not listen is killed
    assert processes_of(folder.parents[2]) == []


@pytest.mark.parametrize(
    ("variables", "settings", "reported"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, [], "Invalid ACCELERATE_USE_FSDP=true: .* asks for FSDP.*use trainer=ddp"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, [], "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "1"}, [], "asks for a parallelism config"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "trainer.zero=0 for none; use trainer=zero2"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["trainer.zero=2"], "with trainer.zero=2: .* another stage"),
    ],
)
def test_what_accelerate_launch_sets_up_against_the_config_is_refused(monkeypatch, variables, settings, reported):
    experiment = run_exp.experiment_of(settings)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=reported):
        distributed.check_launch(experiment)
    for name in variables:
        monkeypatch.setenv(name, "false" if "STAGE" not in name else "2")
    distributed.check_launch(experiment)


def test_the_cpu_of_accelerate_launch_and_the_gpu_of_the_config_contradict(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"trainer.device=auto with ACCELERATE_USE_CPU=true.*use trainer.device"):
        distributed.check_launch(run_exp.experiment_of([]))
    distributed.check_launch(run_exp.experiment_of(["trainer=cpu"]))


def test_the_lock_of_a_killed_build_is_taken_away_and_that_of_a_running_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("old", 3600), ("new", 5)):
        lock = tmp_path / "py" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    distributed._free_stale_builds()
    assert [path.parent.name for path in tmp_path.glob("**/lock")] == ["new"]
