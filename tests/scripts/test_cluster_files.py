"""The files that start a run on a cluster's nodes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import run_exp
from flatlora.runs.record import RunRecord
from flatlora.runs.run_folder import RunFolder
from flatlora.train import checkpoint
from flatlora.utils.errors import ConfigError
from scripts import cluster_files, sweep
from scripts.cluster_files import ClusterRun, pod_script, sbatch_file

WORDS = ["model=llama", "dataset=meta_math", "trainer=zero2", "seed=7", "resume=false"]


def test_the_slurm_file_names_what_torchrun_needs_and_is_a_script(tmp_path):
    text = sbatch_file(ClusterRun.of(WORDS, 2, 8), "1:00:00", "gpu")
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    for line in (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--time=1:00:00",
        "--partition=gpu",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --signal=TERM@120\n" in text
    for word in ("$SLURM_NNODES", "$SLURM_JOB_NODELIST", "$SLURM_JOB_ID", "--nproc_per_node=8", "$MASTER_ADDR:29500"):
        assert word in text
    assert "run_exp.py model=llama dataset=meta_math trainer=zero2 seed=7 resume=true" in text
    assert "/7/run.json; then" in text


@pytest.mark.parametrize(
    ("words", "nodes", "message"),
    [
        (["seed=0,1", "trainer=ddp"], 1, "they define 2 runs"),
        (["trainer=single"], 1, "torchrun starts the processes"),
        (["trainer=ddp", "trainer.gpus=8", "optim.batch_size=64"], 1, "torchrun starts the processes"),
        (["trainer=ddp", "optim.batch_size=24"], 2, "with 16 processes: they cannot share its"),
    ],
)
def test_overrides_of_no_job_is_rejected(words, nodes, message):
    with pytest.raises(ConfigError, match=message):
        ClusterRun.of(words, nodes, 8)


def test_a_manifest_has_a_pod_for_each_node(capsys):
    words = ["kubernetes", "--nodes", "2", "--gpus", "4", "--image", "somewhere/flatlora", "--claim", "disk", *WORDS]
    assert sweep.main(words) == 0
    service, job = yaml.safe_load_all(capsys.readouterr().out)
    name, spec = job["metadata"]["name"], job["spec"]
    assert service["metadata"]["name"] == name == spec["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["completions"] == spec["parallelism"] == 2
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["Ignore", "Ignore"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == "somewhere/flatlora"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    assert spec["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    *shell, script = container["command"]
    assert shell == ["bash", "-c"]
    assert f"--master_addr={name}-0.{name} --master_port=29500" in script
    assert "/opt/flatlora/run_exp.py model=llama dataset=meta_math trainer=zero2 seed=7 resume=true &" in script
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "start"), [("llama-r8", "llama-r8"), ("8b σ0.05", "run-8b-0-05-"), ("A" * 90, "run-" + "a" * 39 + "-")]
)
def test_a_jobs_name_is_a_label(name, start):
    label = cluster_files._label(name)
    assert label.startswith(start)
    assert len(label) <= 50
    assert cluster_files._label(name + "b") != label


@pytest.mark.slow
@pytest.mark.extra
def test_a_pod_that_is_evicted_goes_on(tiny_settings, tmp_path):
    words = ["trainer=ddp", "trainer.device=cpu", "trainer.save_steps=1", "optim.epochs=40", *tiny_settings]
    run = ClusterRun.of([word for word in words if word != "trainer=cpu"], 1, 2)
    script = pod_script(run, "job", str(Path(run_exp.__file__).resolve())).replace("job-0.job", "localhost")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", script.replace(str(cluster_files.PORT), "29477")]
    pod = subprocess.Popen(command, env=env)
    folder, until = RunFolder.of(run.experiment).path, time.monotonic() + 240
    try:
        while not checkpoint.checkpoints(folder):
            assert pod.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        pod.terminate()
    assert pod.wait(120) == 75
    assert RunRecord.read(folder).status == "interrupted"
    steps = checkpoint.step_of(checkpoint.checkpoints(folder)[-1])
    assert 1 <= steps < 240
    assert subprocess.run(command, env=env, timeout=240, check=False).returncode == 0
    assert RunRecord.read(folder).status == "finished"
    assert RunRecord.read(folder).resumed_from >= steps
