"""Sweeps by Hydra's launchers: workers of joblib, jobs of submitit's local executor, nodes of a Ray cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import metrics_rows

PROJECT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def command(*words):
    return [sys.executable, "run_exp.py", "-m", *words]


def records(root):
    return {path.parent.name: json.loads(path.read_text()) for path in root.glob("*/*/*/run.json")}


@pytest.fixture
def root(tiny_settings):
    return Path(next(word for word in tiny_settings if word.startswith("results_root=")).partition("=")[2])


@pytest.mark.slow
@pytest.mark.extra
def test_twelve_runs_over_two_workers_one_of_which_fails(tiny_settings, root, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    seeds = ",".join(map(str, range(12)))
    words = [f"seed={seeds}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'm'}"]
    settings = [word for word in tiny_settings if word != "wandb.name=run"]
    settings += ["wandb.name=swept", "trainer.max_steps=2"]
    folder = root / "flatlora_word_math/swept"
    (folder / "7/metrics.jsonl").mkdir(parents=True)  # what it is to write to cannot be written to
    first = subprocess.run(command(*words, *settings), cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True)
    assert first.returncode == 1, first.stderr[-2000:]
    found = records(root)
    assert {seed for seed, record in found.items() if record["status"] == "finished"} == set(seeds.split(",")) - {"7"}
    assert found["7"]["status"] == "failed"
    assert "metrics.jsonl" in found["7"]["error"]
    assert "11 of 12 finished" in first.stdout
    status = [sys.executable, "-m", "scripts.sweep", "status", f"seed={seeds}", *settings]
    printed = subprocess.run(status, cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True)
    assert printed.returncode == 1
    assert "11 of 12 done" in printed.stdout
    (failed,) = [line for line in printed.stdout.splitlines() if "failed" in line]
    assert failed.split("│")[2].strip() == "swept/7"
    (folder / "7/metrics.jsonl").rmdir()
    times = {seed: (folder / seed / "run.json").stat().st_mtime_ns for seed in found}
    again = [*command(*words, *settings), "resume=true"]
    second = subprocess.run(again, cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "12 of 12 finished" in second.stdout
    assert {s for s, then in times.items() if (folder / s / "run.json").stat().st_mtime_ns != then} == {"7"}
    assert len(metrics_rows(folder / "7")) == 2


@pytest.mark.slow
@pytest.mark.extra
def test_a_job_of_submitit_is_queued_again_and_goes_on_where_it_was(tiny_settings, root, tmp_path):
    pytest.importorskip("submitit")
    words = ["hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path / 'm'}", "seed=0", "resume=true"]
    settings = [word for word in tiny_settings if not word.startswith("dataset.train_rows")]
    settings += ["dataset.train_rows=400", "trainer.max_steps=40", "trainer.save_steps=100"]
    sweep = subprocess.Popen(
        command(*words, *settings), cwd=PROJECT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(len(metrics_rows(path.parent)) >= 5 for path in logs(root)):
        time.sleep(0.05)
    (job,) = [
        one for one in psutil.Process(sweep.pid).children(recursive=True) if "submitit.core._submit" in words_of(one)
    ]
    job.send_signal(signal.SIGUSR2)  # as Slurm does before the job's time is over
    printed, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0
    assert "1 of 1 finished" in printed
    (record,) = records(root).values()
    assert record["resumed_from"] >= 5
    assert [row["step"] for row in metrics_rows(logs(root)[0].parent)] == list(range(1, 41))


@pytest.fixture
def ray_cluster(monkeypatch):
    """Address of two nodes of one core each, on this machine."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.extra
def test_a_run_on_ray_whose_worker_is_lost_goes_on_and_one_that_fails_is_told(
    ray_cluster, tiny_settings, root, tmp_path
):
    """Needs the extra `ray`, which is not among those of the tests."""
    words = ["hydra/launcher=ray_cluster", f"hydra.launcher.ray.init.address={ray_cluster}", "seed=0,1,2,3"]
    words += [f"hydra.sweep.dir={tmp_path / 'm'}", "resume=true", "trainer.max_steps=40", "trainer.save_steps=2"]
    settings = [word for word in tiny_settings if word != "wandb.name=run"]
    folder = root / "flatlora_word_math/swept"
    (folder / "2/metrics.jsonl").mkdir(parents=True)  # what it is to write to cannot be written to
    environment = ENVIRONMENT | {"RAY_AUTH_MODE": "disabled"}
    sweep = subprocess.Popen(
        command(*words, *settings, "wandb.name=swept"), cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not any(
            path.is_file() and len(metrics_rows(path.parent)) >= 5 for path in logs(root)
        ):
            time.sleep(0.02)
        own = psutil.Process().children(recursive=True)
        workers = [one for one in own if "ray::_run_job" in " ".join(words_of(one))]
        assert len(workers) == 2  # one a node
        for worker in workers:
            worker.kill()
        printed, _ = sweep.communicate(timeout=400)
    finally:
        sweep.kill()
    assert sweep.returncode == 1
    assert "3 of 4 finished" in printed
    found = records(root)
    assert {seed: record["status"] for seed, record in found.items()} == dict.fromkeys("013", "finished")
    assert any((record["resumed_from"] or 0) >= 4 for record in found.values())


def logs(root):
    return list(root.glob("*/*/*/metrics.jsonl"))


def words_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []
