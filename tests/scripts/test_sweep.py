"""What sweep.py says of a sweep's runs, and the Slurm file that it prints."""

import fcntl
import json
import subprocess

import pytest

import run_exp
from flatlora.utils.errors import ConfigError
from scripts import sweep
from tests.conftest import run_folder

WORDS = ["model=llama", "dataset=meta_math", "trainer=zero2", "seed=7", "resume=false"]


def test_every_state_is_reported_by_the_runs_own_files(tiny_settings, capsys):
    words = [*tiny_settings, "trainer.max_steps=2", "seed=0,1"]
    assert run_exp.main([*words[:-1], "seed=0"]) == 0
    folder = run_folder(words)
    ((other, experiment),) = [
        (sweep.RunFolder.of(one), one) for one in sweep.experiments(words) if sweep.RunFolder.of(one).path != folder
    ]
    assert sweep.main(["status", "-m", *words]) == 1
    printed = capsys.readouterr().out
    assert "Sweep: 1 of 2 done" in printed
    assert [word in printed for word in ("done", "missing", "100%")] == [True] * 3
    other.path.mkdir()
    for file in ("config.yaml", "metrics.jsonl"):
        (other.path / file).write_bytes((folder / file).read_bytes())
    (other.path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "loss": 1.0}\n')
    assert sweep.state_of(other, experiment) == ("interrupted", 0.5, None, "it was killed: there is no record")
    with open(other.path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name, share, left, _ = sweep.state_of(other, experiment)
        assert (name, share) == ("running", 0.5)
        assert left >= 0
    (other.path / "run.json").write_text(json.dumps({"status": "failed", "error": "no space"}))
    assert sweep.state_of(other, experiment) == ("failed", 0.5, None, "no space")
    for text in ("{\n{}\n", "[1]\n{}\n", '{"loss": 1}\n', "[" * 100_000 + "\n{}\n"):  # which hides no other run
        (other.path / "metrics.jsonl").write_text(text)
        assert sweep.state_of(other, experiment).reason.startswith("a record is broken: ")
    assert sweep.main(["status", *words[:-1], "seed=0"]) == 0


def test_the_slurm_file_names_what_torchrun_needs_and_is_a_script(tmp_path):
    text = sweep.sbatch_file(WORDS, 2, 8, "1:00:00", "gpu")
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
        (["trainer=ddp", "optim.batch_size=24"], 2, "it must be a multiple of 2 nodes × 8 GPUs × micro-batches of"),
    ],
)
def test_overrides_of_no_job_is_rejected(words, nodes, message):
    with pytest.raises(ConfigError, match=message):
        sweep.sbatch_file(words, nodes, 8, "1:00:00", None)
