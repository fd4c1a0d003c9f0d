"""A run's folder: whole files or none, one writer, one experiment, a metrics log that survives a torn line."""

import errno
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import run_exp
from flatlora.config.experiment import parse
from flatlora.runs import environment, run_folder
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.run_folder import RunFolder
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_atomic, write_folder, write_json

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomic(path, "σ = 0.05\n")
    write_atomic(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [NO_SPACE, READ_ONLY, KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, call, error):
    path = tmp_path / "run.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, call, raising(error))
    with pytest.raises(type(error)):
        write_atomic(path, "new" * 10_000)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_process_that_dies_in_a_write_leaves_the_old_content(tmp_path, call):
    path = tmp_path / "run.json"
    write_atomic(path, "old")
    child = os.fork()
    if child == 0:
        setattr(os, call, lambda *args: os._exit(9))
        try:
            write_atomic(path, "new")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_text() == "old"


def test_write_json_is_read_back(tmp_path):
    value = {"σ": 0.05, "n": None, "list": [1, 2.5]}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


@pytest.fixture
def experiment(tmp_path):
    def make(*settings):
        return run_exp.experiment_of([f"results_root={tmp_path}/results", "wandb.name=run", *settings])

    return make


def claim(folder: RunFolder, experiment) -> None:
    folder.open(experiment)
    folder.begin(experiment)


def refusal(folder: RunFolder, experiment) -> str:
    with pytest.raises(ConfigError) as caught:
        folder.open(experiment)
    (message,) = caught.value.errors
    return message


def test_the_folder_has_its_published_place(experiment, tmp_path):
    folder = RunFolder.of(experiment("wandb.project=P", "seed=7"))
    assert folder.path == tmp_path / "results" / "P_word_math" / "run" / "7"
    assert not folder.path.exists()
    assert folder.record is None


def test_config_yaml_holds_every_key_and_composes_to_the_same_run(experiment):
    one = experiment("rho=flat", "peft.lora_r=4")
    folder = RunFolder.of(one)
    claim(folder, one)
    folder.close()
    saved = run_folder.yaml.safe_load((folder.path / "config.yaml").read_text())
    assert parse(saved, run_exp.SUITE) == one


@pytest.mark.parametrize("settings", [[], ["resume=true"], ["overwrite=true"]])
def test_a_folder_in_use_is_refused_and_untouched(experiment, settings):
    first = RunFolder.of(experiment())
    claim(first, experiment())
    (first.path / "keep.txt").write_text("kept")
    other = experiment(*settings)
    assert "in use: another process trains this run" in refusal(RunFolder.of(other), other)
    assert (first.path / "keep.txt").read_text() == "kept"
    first.close()
    second = RunFolder.of(other)
    if settings:
        second.open(other)
        second.close()
    else:
        assert "a started run of this experiment" in refusal(second, other)


def test_the_lock_goes_with_its_process(experiment):
    folder = RunFolder.of(experiment())
    folder.path.mkdir(parents=True)
    script = f"import fcntl, time; f = open({str(folder.path / '.lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
    script += "print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        assert "in use" in refusal(folder, experiment())
    finally:
        holder.kill()
        holder.communicate()
    claim(folder, experiment())
    folder.close()


def test_another_experiment_is_refused_by_the_keys_that_differ(experiment):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    folder.close()
    before = (folder.path / "config.yaml").read_bytes()
    message = refusal(
        folder, experiment("optim.lr=1e-4", "peft.lora_r=4", "resume=true", "wandb.mode=offline", "eval=[]")
    )
    assert "optim.lr is 0.001 there and 0.0001 here" in message
    assert "peft.lora_r is 8 there and 4 here" in message
    assert message.count(" there and ") == 2
    assert "overwrite=true" in message
    assert (folder.path / "config.yaml").read_bytes() == before


def test_another_family_has_its_current_name_in_the_refusal(experiment):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    folder.close()
    message = refusal(folder, run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"]))
    assert "model.family is 'causal_lm' there and 'text_to_image' here" in message


def test_a_refused_folder_is_not_kept_locked(experiment):
    first, second = RunFolder.of(experiment()), RunFolder.of(experiment())
    claim(first, experiment())
    first.close()
    refusal(first, experiment("optim.lr=1e-4"))
    second.open(experiment("resume=true"))  # BlockingIOError, so an error, where the lock were still held
    assert second._lock is not None
    second.close()


@pytest.mark.parametrize(
    ("there", "here", "same"),
    [
        (["rho=flat", "rho.sigma=0"], ["rho=flat", "rho.sigma=0"], True),
        (["rho=flat", "rho.sigma=0"], ["rho=off"], True),
        (["rho=off"], ["rho=flat", "rho.sigma=0"], True),
        (["rho=flat"], ["rho=flat"], True),
        (["rho=flat"], ["rho=off"], False),
        (["rho=off"], ["rho=flat"], False),
        (["rho=flat", "rho.sigma=0"], ["rho=flat"], False),
        (["rho=flat"], ["rho=flat", "rho.sigma=0"], False),
    ],
)
def test_sigma_zero_and_rho_off_are_one_run(experiment, there, here, same):
    folder = RunFolder.of(experiment())
    claim(folder, experiment(*there))
    folder.close()
    if same:
        folder.open(experiment(*here, "resume=true"))
        folder.close()
    else:
        assert re.search(r"rho\.(sigma|method) is \S+ there and \S+ here", refusal(folder, experiment(*here)))


def test_finished_runs(experiment):
    one, again = experiment(), experiment("resume=true")
    folder = RunFolder.of(one)
    assert not folder.is_finished(one)
    claim(folder, one)
    folder.close()
    assert not folder.is_finished(again)
    write_json(folder.path / "run.json", {"status": "interrupted"})
    assert not folder.is_finished(again)
    write_json(folder.path / "run.json", {"status": "finished"})
    assert folder.is_finished(again)
    assert not folder.is_finished(experiment("overwrite=true"))
    for rescored in ("eval=[]", "eval.gsm8k.max_rows=3", "dataset.test_rows=7", "model.generated_test_rows=null"):
        assert not folder.is_finished(experiment("resume=true", rescored))
    with pytest.raises(ConfigError, match="a finished run of this experiment: resume=true"):
        folder.is_finished(one)
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.001 there"):
        folder.is_finished(experiment("resume=true", "optim.lr=1e-4"))


def test_a_folder_in_use_says_so_before_anything_else(experiment):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    for settings in ([], ["resume=true"], ["overwrite=true"], ["optim.lr=1e-4"]):
        with pytest.raises(ConfigError, match="in use: another process trains this run"):
            RunFolder.of(experiment()).is_finished(experiment(*settings))
    folder.close()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", ""),
        ("config.yaml", "a: [1"),
        ("config.yaml", "model: {name: x}\n"),
        ("config.yaml", "- 1\n"),
        ("config.yaml", "[" * 2_000),
        ("run.json", ""),
        ("run.json", '{"status": "fin'),
        ("run.json", "[1]"),
        ("run.json", "[" * 100_000),
        ("run.json", '{"status": "finished", "record_sha256": "of something else"}'),
    ],
)
def test_a_broken_file_of_a_run_is_named_and_kept(experiment, name, text):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    folder.close()
    (folder.path / name).write_text(text)
    for settings in ([], ["resume=true"]):
        with pytest.raises(ConfigError, match=re.escape(str(folder.path / name)) + ".*overwrite=true"):
            folder.is_finished(experiment(*settings))
    assert (folder.path / name).read_text() == text
    assert not folder.is_finished(experiment("overwrite=true"))


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_folder_in_the_place_of_a_record_is_named(experiment, name):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    folder.close()
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).mkdir()
    with pytest.raises(ConfigError, match=re.escape(str(folder.path / name)) + ": Is a directory"):
        folder.is_finished(experiment("resume=true"))


def test_what_a_killed_write_left_is_removed(experiment):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    (folder.path / ".adapter-ab12cd_8").mkdir()
    (folder.path / ".run.json-ab12cd_8").write_text("half")
    folder.close()
    claim(folder, experiment("resume=true"))
    assert names(folder.path) == [".lock", "config.yaml"]


def test_write_folder_is_whole_or_nothing(tmp_path):
    target = tmp_path / "adapter"
    for content in ("one", "two"):
        with write_folder(target) as staging:
            (staging / "weights").write_text(content)
        assert (target / "weights").read_text() == content

    def fail_half_way():
        with write_folder(target) as staging:
            (staging / "weights").write_text("half")
            raise NO_SPACE

    with pytest.raises(OSError, match="No space"):
        fail_half_way()
    assert (target / "weights").read_text() == "two"
    assert names(tmp_path) == ["adapter"]


def test_overwrite_leaves_nothing_of_the_old_run(experiment, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("not the run's")
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    (folder.path / "checkpoint-3").mkdir()
    (folder.path / "checkpoint-3" / "weights").write_text("w")
    (folder.path / "metrics.jsonl").write_text("{}")
    (folder.path / "link").symlink_to(outside)
    folder.close()
    claim(folder, experiment("overwrite=true", "optim.lr=1e-4"))
    folder.close()
    assert names(folder.path) == [".lock", "config.yaml"]
    assert (outside / "mine.txt").exists()


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ("os.fsync", NO_SPACE, "No space left on device"),
        ("pathlib.Path.mkdir", READ_ONLY, "Read-only file system"),
        ("pathlib.Path.mkdir", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_a_folder_that_takes_no_files_is_an_error_with_the_way_out(
    experiment, monkeypatch, tmp_path, target, error, words
):
    monkeypatch.setattr(target, raising(error))
    message = refusal(RunFolder.of(experiment()), experiment())
    assert words in message
    assert "set results_root=DIR" in message
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    RunFolder.of(experiment()).open(experiment())


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step"', "{", '{"step": 5, "loss": 1.0}'])
def test_rewind_forgets_later_rows_and_a_torn_last_line(tmp_path, torn):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(3)
    assert log.rows() == []
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]
    for row in rows:
        log.append(row)
    log.append({"step": 3, "eval_loss": 0.25})
    with open(log.path, "a") as file:
        file.write(torn)
    log.rewind(3)
    assert log.rows() == [*rows[:3], {"step": 3, "eval_loss": 0.25}]
    log.append({"step": 4, "loss": float("nan")})
    assert len(log.rows()) == 5
    log.rewind(0)
    assert log.path.read_text() == ""


@pytest.mark.parametrize("damage", ["", None, '{"step": 1, "loss": 9.0}\n', "[" * 100_000, 200 << 30])
def test_rows_are_put_back_from_the_checkpoint_and_named(tmp_path, caplog, damage):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    rows = [{"step": step, "loss": 1 / step, "nan": float("nan")} for step in (1, 2, 3, 4)]
    for row in rows:
        log.append(row)
    kept = [json.dumps(row) for row in rows[:3]]
    log.rewind(3, kept)
    assert caplog.text == ""
    whole = log.path.read_text()
    if damage is None:
        log.path.unlink()
    elif isinstance(damage, int):  # bytes that are not there
        os.truncate(log.path, damage)
        with pytest.raises(OSError, match=r"cannot read .*metrics.jsonl: it has 204,800 MiB"):
            log.rows()
        with pytest.raises(OSError, match=r"cannot read .*metrics.jsonl: it has 204,800 MiB"):
            log.rewind(3)
    else:
        log.path.write_text(damage)
    log.rewind(3, kept)
    assert log.path.read_text() == whole
    assert "metrics.jsonl had 0 of the 3 rows up to step 3" in caplog.text


def test_a_run_writes_through_no_link(experiment, tmp_path):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    folder.close()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (folder.path / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: it is a link, and the run writes a file of its own there"):
        folder.open(experiment("resume=true"))
    with pytest.raises(OSError, match="symbolic links"):
        MetricsLog(folder.path / "metrics.jsonl").append({"step": 1})
    assert outside.read_text() == "mine"
    claim(folder, experiment("overwrite=true"))
    folder.close()
    assert names(folder.path) == [".lock", "config.yaml"]
    assert outside.read_text() == "mine"


def test_a_run_is_not_overwritten_while_it_is_evaluated(experiment):
    folder = RunFolder.of(experiment())
    claim(folder, experiment())
    folder.close()
    answers = folder.path / "eval" / "gsm8k-max_rows=2"
    anew, further = experiment("overwrite=true"), experiment("resume=true")
    with run_folder.answering(answers):
        assert f"is being evaluated: another process writes {answers}" in refusal(folder, anew)
        with (
            pytest.raises(ConfigError, match="in use: another process writes its answers there"),
            run_folder.answering(answers),
        ):
            pass
        folder.open(further)  # a checkpoint may be scored while the run goes on
        folder.close()
    assert not answers.exists()  # nothing was answered
    claim(folder, anew)
    folder.close()


def test_environment_names_versions_and_hardware():
    found = environment.environment()
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert set(found["versions"]) > {"python", "transformers", "peft", "numpy"}
    assert found["hardware"]["memory_gib"] > 0
    assert found["hardware"]["cores"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_git_sha(monkeypatch):
    found = environment.git_sha()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)
    monkeypatch.setattr(subprocess, "run", raising(FileNotFoundError("git")))
    assert environment.git_sha() is None


def test_peak_memory_is_plausible():
    environment.reset_peak_memory()
    assert 0.01 < environment.peak_memory_gib()["peak_rss_gib"] < 1000


def test_asking_whether_a_folder_is_in_use_keeps_no_run_from_starting(experiment, tmp_path):
    one = experiment(f"results_root={tmp_path}")
    first = RunFolder.of(one)
    first.open(one)
    first.close()
    stop, seen = threading.Event(), []

    def ask():
        while not stop.is_set():
            seen.append(RunFolder.of(one).in_use)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            first.open(one)
            first.close()
    finally:
        stop.set()
        asking.join()
    assert seen
