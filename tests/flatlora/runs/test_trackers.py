"""Trackers get the rows of metrics.jsonl once each, whatever ends a run, and never end one themselves."""

import contextlib
import errno
import json
import time
import types
from collections import defaultdict

import psutil
import pytest
import wandb
from PIL import Image

import run_exp
from flatlora.runs import trackers
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.trackers import TRACKERS, Wandb, flat, tracking, within
from tests.conftest import Killed, die_at, run_folder


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.fixture
def experiment(tmp_path):
    def make(*settings):
        return run_exp.experiment_of([f"results_root={tmp_path}/results", "wandb.name=run", *settings])

    return make


def test_no_tracker_when_disabled_or_not_the_main_process(experiment, monkeypatch, tmp_path):
    with tracking(experiment("wandb.mode=disabled"), tmp_path, {}) as pages:
        assert pages == []
    monkeypatch.setenv("RANK", "1")
    with tracking(experiment("wandb.mode=offline"), tmp_path, {}) as pages:
        assert pages == []


@pytest.mark.parametrize(("netrc", "has_key"), [("machine api.wandb.ai password x", True), ("machine gitlab", False)])
def test_wandb_is_online_only_for_a_user_with_a_key(netrc, has_key, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert trackers._has_wandb_key() is has_key
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert trackers._has_wandb_key()


@pytest.mark.slow
def test_the_tracker_is_fed_the_rows_of_metrics_jsonl(experiment, tmp_path):
    one = experiment("wandb.mode=offline")
    page = Wandb(one, tmp_path)
    log = MetricsLog(tmp_path / "metrics.jsonl", [page])
    log.append({"step": 1, "loss": 2.8125, "lr": 0.00048828125})
    log.append({"step": 2, "loss": 1.5625})
    Image.new("RGB", (3, 2)).save(tmp_path / "grid.png")
    page.show("text_to_image/pictures", tmp_path / "grid.png")
    page.finish({"gsm8k/exact_match": 0.171875})
    assert [row["loss"] for row in log.rows()] == [2.8125, 1.5625]
    assert wandb.run is None  # closed: the next run of this process has a page of its own
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (shown,) = tmp_path.glob("wandb/offline-run-*/files/media/images/text_to_image/pictures_*.png")
    assert shown.read_bytes() == (tmp_path / "grid.png").read_bytes()
    texts = [text.encode() for text in ("run-42", "2.8125", "0.00048828125", "1.5625", "0.171875", '"lora_r":8')]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(text in file.read_bytes() for text in texts):
        time.sleep(0.1)  # a process of wandb's own writes the file
    assert [text for text in texts if text not in file.read_bytes()] == []


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), wandb.errors.CommError("timed out")])
def test_wandb_never_ends_a_training(experiment, tmp_path, monkeypatch, caplog, broken, error):
    class Page:
        def __init__(self):
            self.summary = {}
            if broken != "init":
                setattr(self, broken, raising(error))

        def log(self, *args, **kwargs): ...

        def finish(self, *args, **kwargs): ...

    monkeypatch.setattr(wandb, "init", raising(error) if broken == "init" else lambda **_: Page())
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    with tracking(experiment("wandb.mode=offline"), tmp_path, {"score": 1.0}) as pages:
        log = MetricsLog(tmp_path / "metrics.jsonl", pages)
        for row in rows:
            log.append(row)
        if broken != "finish":
            pages[0].show("picture", tmp_path / "none.png")
    assert log.rows() == rows
    (reported,) = [
        record.getMessage() for record in caplog.records if record.name == "flatlora.runs.run_folder"
    ]  # once
    assert reported.startswith("W&B ")
    assert f"({error})" in reported
    assert "wandb.mode=offline needs no server" in reported


@pytest.mark.slow
def test_a_service_of_wandb_that_dies_is_named_once(experiment, tmp_path, caplog):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    with tracking(experiment("wandb.mode=offline"), tmp_path, {}) as pages:
        log = MetricsLog(tmp_path / "metrics.jsonl", pages)
        log.append(rows[0])
        children = psutil.Process().children(recursive=True)
        (service,) = [child for child in children if "wandb-core" in " ".join(child.cmdline())]
        service.kill()
        service.wait()
        for row in rows[1:]:
            log.append(row)
            time.sleep(0.2)
    assert log.rows() == rows
    assert len([record for record in caplog.records if record.getMessage().startswith("W&B ")]) == 1
    wandb.teardown()


class FakeMLflow:
    """The calls of mlflow that a tracker makes, of one store."""

    class MlflowException(Exception):
        error_code = "RESOURCE_DOES_NOT_EXIST"

    def __init__(self):
        self.runs, self.groups = {}, {}
        self.entities = types.SimpleNamespace(
            Param=lambda key, value: types.SimpleNamespace(key=key, value=value),
            Metric=lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
        )

    def MlflowClient(self, uri):
        assert uri.startswith("sqlite:////")
        return self

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=self.groups[name]) if name in self.groups else None

    def create_experiment(self, name, artifact_location):
        return self.groups.setdefault(name, str(len(self.groups) + 1))

    def create_run(self, group, run_name, tags):
        key = str(len(self.runs))
        self.runs[key] = types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=key, run_name=run_name, status="RUNNING"),
            data=types.SimpleNamespace(metrics={}, params={}),
            history=defaultdict(list),
        )
        return self.runs[key]

    def get_run(self, key):
        return self.runs[key]

    def update_run(self, key, status):
        if key not in self.runs:
            raise self.MlflowException
        self.runs[key].info.status = status

    set_terminated = update_run

    def get_metric_history(self, key, name):
        return self.runs[key].history[name]

    def log_batch(self, key, metrics=(), params=()):
        data = self.runs[key].data
        assert not {param.key for param in params} & set(data.params)  # MLflow refuses other values
        assert len(params) <= 100
        data.params |= {param.key: param.value for param in params}
        for point in metrics:
            self.runs[key].history[point.key].append(point)
            data.metrics[point.key] = point.value


class FakeTrackio:
    """The calls of trackio that a tracker makes; `logs` has the rows of each page."""

    def __init__(self):
        self.pages = []
        self.sqlite_storage = types.ModuleType("trackio.sqlite_storage")
        self.sqlite_storage.SQLiteStorage = self

    def init(self, *, project, name, config, resume, **others):
        same = [page for page in self.pages if (page.project, page.name) == (project, name)]
        if resume == "never" or not same:
            page = types.SimpleNamespace(project=project, name=name, id=f"id{len(self.pages)}", config=config, rows=[])
            page.log = lambda metrics, step: page.rows.append(metrics | {"step": step, "timestamp": "now"})
            page.finish = lambda: None
            self.pages.append(page)
            return page
        return same[-1]

    def get_logs(self, project, run_id):
        return [row for page in self.pages if page.id == run_id for row in page.rows]


@pytest.fixture
def fakes(monkeypatch):
    mlflow, trackio = FakeMLflow(), FakeTrackio()
    monkeypatch.setitem(trackers.sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(trackers.sys.modules, "mlflow.entities", mlflow.entities)
    monkeypatch.setitem(trackers.sys.modules, "trackio", trackio)
    monkeypatch.setitem(trackers.sys.modules, "trackio.sqlite_storage", trackio.sqlite_storage)
    for variable in ("MLFLOW_TRACKING_URI", *trackers._MLFLOW_DEFAULTS):
        monkeypatch.delenv(variable, raising=False)
    return types.SimpleNamespace(mlflow=mlflow, trackio=trackio)


ROWS = [{"step": step, "epoch": step / 4, "loss": 1 / step, "tokens_per_s": 10.0 * step} for step in range(1, 7)]
EVALUATION = {"step": 4, "epoch": 1.0, "eval_loss": 0.5}


def interrupted_and_resumed(one, folder):
    """Five steps, the checkpoint at 2; the rest with other speeds, and a row that the killed run had not sent."""
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(Killed), tracking(one, folder, {}) as pages:
        log = MetricsLog(folder / "metrics.jsonl", pages)
        log.rewind(0, [])
        for row in [*ROWS[:4], EVALUATION, ROWS[4]]:
            log.append(row)
        raise Killed
    for _ in range(2):  # the second only scores
        with tracking(one, folder, metrics := {}) as pages:
            log = MetricsLog(folder / "metrics.jsonl", pages)
            log.rewind(2, [json.dumps(row) for row in ROWS[:2]])
            for row in [*ROWS[2:4], EVALUATION, *ROWS[4:]]:
                log.append(row)
            metrics |= {"train_loss": 0.25, "glue/f1,none": 0.5, "best": None}


def expected():
    """{metric: [(step, value)]} of a page."""
    points = defaultdict(list)
    for row in [*ROWS[:4], EVALUATION, *ROWS[4:]]:
        for key in row.keys() - {"step"}:
            if row is not EVALUATION or key != "epoch":  # which the row of that step has
                points[key].append((row["step"], row[key]))
    finals = {"final/train_loss": [(6, 0.25)], "final/glue/f1_none": [(6, 0.5)]}
    return dict(points) | finals


def points_of(rows):
    points = defaultdict(list)
    for row in rows:
        for key in row.keys() - {"step", "timestamp"}:
            points[key].append((row["step"], row[key]))
    return dict(points)


def test_a_resumed_run_goes_on_in_its_page_of_mlflow(experiment, fakes, tmp_path):
    one, store = experiment("tracker=[mlflow]", "wandb.mode=disabled"), fakes.mlflow
    interrupted_and_resumed(one, tmp_path / "run")
    (run,) = store.runs.values()
    found = {key: [(point.step, point.value) for point in points] for key, points in run.history.items()}
    assert found == expected()
    assert (run.info.run_name, run.info.status) == ("run-42", "FINISHED")
    assert run.data.params["peft.lora_r"] == "8"
    assert (tmp_path / "results" / "mlflow").is_dir()
    (tmp_path / "run" / "trackers.json").unlink()  # as overwrite=true does
    with contextlib.suppress(Killed), tracking(one, tmp_path / "run", {}) as pages:
        pages[0].log(ROWS[0])
        raise Killed
    assert [run.info.status for run in store.runs.values()] == ["FINISHED", "FAILED"]
    assert list(store.groups) == ["flatlora"]
    store.runs.clear()  # deleted by its user
    with tracking(one, tmp_path / "run", {}) as pages:
        pages[0].log(ROWS[0])
    assert [run.data.metrics["loss"] for run in store.runs.values()] == [1.0]


def test_a_resumed_run_goes_on_in_its_page_of_trackio(experiment, fakes, tmp_path):
    one, store = experiment("tracker=[trackio]", "wandb.mode=disabled"), fakes.trackio
    interrupted_and_resumed(one, tmp_path / "run")
    (page,) = store.pages
    assert points_of(page.rows) == expected()
    assert (page.project, page.name, page.config["peft"]["lora_r"]) == ("flatlora", "run-42", 8)
    with tracking(one, tmp_path, {}) as pages:  # another folder, the same name
        pages[0].log(ROWS[0])
    interrupted_and_resumed(one, tmp_path / "run")
    assert [len(page.rows) for page in store.pages[1:]] == [1, len(page.rows)]


def test_a_trackio_page_that_is_kept_elsewhere_gets_later_steps_alone(experiment, fakes, tmp_path):
    (tmp_path / "trackers.json").write_text('{"trackio": "id0"}')
    page = fakes.trackio.init(project="flatlora", name="run-42", config={}, resume="never")
    page._next_step = 3
    with tracking(experiment("tracker=[trackio]"), tmp_path, {}) as pages:
        for row in ROWS[:4]:
            pages[0].log(row)
    assert [row["step"] for row in page.rows] == [3, 4]


def events(folder):
    """{metric: [(step, value)]}, and the texts, of all event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), purge_orphaned_data=False, size_guidance={"scalars": 0}).Reload()
    scalars = {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
    return scalars, reader


def test_a_resumed_run_has_each_row_once_in_its_event_files(experiment, tmp_path):
    pytest.importorskip("tensorboard")
    interrupted_and_resumed(experiment("tracker=[tensorboard]", "wandb.mode=disabled"), tmp_path)
    Image.new("RGB", (3, 2), "red").save(tmp_path / "grid.png")
    scalars, reader = events(tmp_path / "tensorboard")
    assert scalars.keys() == expected().keys()
    for name, points in expected().items():
        assert [step for step, _ in scalars[name]] == [step for step, _ in points]
        assert [value for _, value in scalars[name]] == pytest.approx([value for _, value in points])
    text = reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "lora_r: 8" in text
    assert "_hparams_/session_start_info" in reader.summary_metadata


def test_event_files_have_pictures(experiment, tmp_path):
    pytest.importorskip("tensorboard")
    Image.new("RGB", (3, 2), "red").save(tmp_path / "grid.png")
    with tracking(experiment("tracker=[tensorboard]"), tmp_path, {}) as (page,):
        page.log(ROWS[0])
        page.show("text_to_image/pictures", tmp_path / "grid.png")
    (image,) = events(tmp_path / "tensorboard")[1].Images("text_to_image/pictures")
    assert (image.width, image.height, image.step) == (3, 2, 1)


@pytest.mark.extra
@pytest.mark.slow
def test_a_killed_run_shows_its_rows_in_tensorboard(tiny_settings, monkeypatch):
    pytest.importorskip("tensorboard")
    settings = [*tiny_settings, "tracker=[tensorboard]", "trainer.max_steps=5", "trainer.save_steps=2", "seed=3"]
    with monkeypatch.context() as patch:
        die_at(3, patch)
        with pytest.raises(Killed):
            run_exp.main(settings)
    assert run_exp.main([*settings, "resume=true"]) == 0
    folder = run_folder(settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scalars, _ = events(folder / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4, 5]
    assert [value for _, value in scalars["loss"]] == pytest.approx([row["loss"] for row in rows])
    record = json.loads((folder / "run.json").read_text())
    assert scalars["final/train_loss"] == [(5, pytest.approx(record["metrics"]["train_loss"]))]


@pytest.mark.extra
@pytest.mark.slow
def test_mlflow_itself_has_each_row_once(experiment, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    interrupted_and_resumed(experiment("tracker=[mlflow]", "wandb.mode=disabled"), tmp_path / "run")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path.resolve()}/results/mlflow/mlflow.db")
    group = client.get_experiment_by_name("flatlora")
    (run,) = client.search_runs([group.experiment_id])
    names = run.data.metrics
    found = {name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)] for name in names}
    assert {name: sorted(points) for name, points in found.items()} == expected()
    assert (run.info.run_name, run.info.status, run.data.params["peft.lora_r"]) == ("run-42", "FINISHED", "8")
    Image.new("RGB", (3, 2)).save(tmp_path / "grid.png")
    with tracking(experiment("tracker=[mlflow]"), tmp_path / "run", {}) as (page,):
        page.show("text_to_image/pictures", tmp_path / "grid.png")
    assert list((tmp_path / "results" / "mlflow").glob("artifacts/**/pictures/grid.png"))


@pytest.mark.extra
@pytest.mark.slow
def test_trackio_itself_has_each_row_once(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    assert tmp_path / "trackio" == sqlite_storage.TRACKIO_DIR
    interrupted_and_resumed(experiment("tracker=[trackio]", "wandb.mode=disabled"), tmp_path / "run")
    storage = sqlite_storage.SQLiteStorage
    assert storage.get_runs("flatlora") == ["run-42"]
    assert points_of(storage.get_logs("flatlora", "run-42")) == expected()
    assert storage.get_run_config("flatlora", "run-42")["peft"]["lora_r"] == 8


@pytest.mark.parametrize("broken", ["_start", "_log", "_show", "_finish"])
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_is_named_once_and_left_alone(experiment, tmp_path, monkeypatch, caplog, name, broken):
    calls = []
    for method in ("_start", "_log", "_show", "_finish"):
        for tracker in TRACKERS.values():
            monkeypatch.setattr(tracker, method, lambda self, *_, m=method: calls.append((self.name, m)) or object())
    monkeypatch.setattr(TRACKERS[name], broken, raising(OSError(errno.ENOSPC, "No space left on device")))
    with tracking(experiment(f"tracker=[{','.join(TRACKERS)}]"), tmp_path, {"score": 1.0}) as pages:
        log = MetricsLog(tmp_path / "metrics.jsonl", pages)
        for row in ROWS[:3]:
            log.append(row)
        for page in pages:
            page.show("picture", tmp_path / "none.png")
    assert log.rows() == ROWS[:3]
    (reported,) = [r.getMessage() for r in caplog.records if r.name == "flatlora.runs.run_folder"]
    assert reported.startswith(f"{TRACKERS[name].label} ")
    assert "No space left on device" in reported
    assert "metrics.jsonl has every row" in reported
    for other in TRACKERS.keys() - {name}:
        assert [m for tracker, m in calls if tracker == other] == ["_start", *["_log"] * 3, "_show", "_finish"]


def test_a_tracker_without_its_package_is_an_error_before_weights_are_loaded(tiny_settings, monkeypatch, capsys):
    plain = trackers.importlib.util.find_spec
    missing = ("tensorboard", "trackio", "mlflow")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda n, *a: None if n in missing else plain(n, *a))
    monkeypatch.setattr("flatlora.models.loading.load_backbone", raising(AssertionError))
    assert run_exp.main([*tiny_settings, "tracker=[wandb,tensorboard,trackio,mlflow]"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    for name in missing:
        assert f"the package {name} is not installed; run pip install -e '.[{name}]', or leave {name} out" in shown


def test_a_client_that_does_not_answer_is_left_alone():
    with pytest.raises(TimeoutError, match="no answer after"):
        within(0.05, lambda: time.sleep(1))
    with pytest.raises(KeyError):
        within(5, raising(KeyError("x")))
    assert within(5, lambda: 3) == 3


def test_settings_are_flat_for_trackers():
    nested = {"seed": 7, "peft": {"lora_r": 8, "target_modules": ["q"], "x": None}, "eval": {"gsm8k": {"n": 1.5}}}
    assert flat(nested) == {
        "seed": 7,
        "peft.lora_r": 8,
        "peft.target_modules": '["q"]',
        "peft.x": "null",
        "eval.gsm8k.n": 1.5,
    }
