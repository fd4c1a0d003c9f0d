"""What sweep.py says of a sweep's runs."""

import fcntl
import json

import run_exp
from scripts import sweep
from tests.conftest import run_folder


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
