"""Trackers, which receive the rows of metrics.jsonl: Weights & Biases, TensorBoard, trackio and MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from flatlora.config.experiment import Experiment
from flatlora.runs.run_folder import logger
from flatlora.utils.files import write_atomic
from flatlora.utils.masking import masked
from flatlora.utils.plain_files import read_plain
from flatlora.utils.staging import exclusively

_REFUSED_SIGNS = r"[^\w\-. /:]"
_PAGES_FILE = "trackers.json"  # in a run's folder: {tracker: id of the run's page}, by which a resumed run finds it


class Tracker(ABC):
    """A run's page of one tracker, which gets the configuration, the rows of metrics.jsonl and the final metrics.

    Errors of a tracker do not end the training: the first one is logged as a warning, and nothing more is sent.
    """

    name: ClassVar[str]  # in `Experiment.tracker`
    label: ClassVar[str]  # in messages
    remedy: ClassVar[str]  # end of the message about an error

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self._page: Any = None  # the client's object; None if the tracker failed
        self._step = 0  # of the newest row
        self._held: dict[str, tuple[int, float]] = {}  # {metric: step and value of the newest point on the page}
        self._held_to = -1  # last step of all metrics, if no more is known of the page
        with self._named_once("could not be started"):
            self._page = self._start()

    @abstractmethod
    def _start(self) -> Any:
        """Opens the run's page and returns the client's object for it; fills `_held` with what a page has already."""

    @abstractmethod
    def _log(self, numbers: dict[str, float], step: int) -> None:
        """Sends the numbers of a row."""

    @abstractmethod
    def _show(self, name: str, picture: Path) -> None:
        """Sends an image file."""

    @abstractmethod
    def _finish(self, metrics: dict[str, Any], failed: bool) -> None:
        """Sends the final metrics and closes the page."""

    def log(self, row: dict[str, Any]) -> None:
        """Sends a row of metrics.jsonl, without what the page has already of a run that is resumed."""
        step = self._step = row["step"]
        numbers = {
            name: value
            for name, value in row.items()
            if name != "step" and step > self._held.get(name, (self._held_to, 0.0))[0]
        }
        if self._page is not None and numbers:
            with self._named_once("took no more rows"):
                self._log(numbers, step)
                self._held |= {name: (step, value) for name, value in numbers.items()}

    def put_back(self, rows: Iterable[dict[str, Any]]) -> None:
        """Sends the rows up to the checkpoint from which a run goes on, as far as the page lacks them."""
        for row in rows:
            self.log(row)

    def show(self, name: str, picture: Path) -> None:
        """Adds an image file to the run's page."""
        if self._page is not None:
            with self._named_once("took no picture"):
                self._show(name, picture)

    def finish(self, metrics: dict[str, Any], *, failed: bool = False) -> None:
        """Closes the run's page, so that the next run in this process gets its own; `metrics` are the final ones."""
        if self._page is not None:
            with self._named_once("could not be closed"):
                self._finish(metrics, failed)

    @property
    def page_name(self) -> str:
        return f"{self.experiment.run_name()}-{self.experiment.seed}"

    @property
    def config(self) -> dict[str, Any]:
        return self.experiment.model_dump(mode="json")

    def _new_finals(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Returns {"final/<metric>": value} of the final metrics that the page does not show yet.

        MLflow refuses some signs in names, such as the comma of "exact_match,strict-match".
        """
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        finals = {f"final/{re.sub(_REFUSED_SIGNS, '_', name)}": value for name, value in numbers.items()}
        return {name: value for name, value in finals.items() if self._held.get(name, (0, None))[1] != value}

    def _pages(self) -> dict[str, str]:
        try:
            pages = json.loads(read_plain(self.folder / _PAGES_FILE, 1 << 16))
            return {name: page for name, page in pages.items() if isinstance(page, str)}
        except (OSError, ValueError, AttributeError, RecursionError):  # none, or damaged: the run gets a new page
            return {}

    def _remember(self, page: str) -> None:
        write_atomic(self.folder / _PAGES_FILE, json.dumps(self._pages() | {self.name: page}) + "\n")

    @contextlib.contextmanager
    def _named_once(self, what: str) -> Iterator[None]:
        """Logs an error in the block as a warning and disables the tracker; wraps every call of a client.

        Any exception is caught: errors may come from a service process, a server, the network or the disk.
        """
        try:
            yield
        except Exception as error:
            self._page = None
            self._forget(error)
            reason = str(error).strip() or type(error).__name__
            logger.warning(
                "%s %s (%s): the run goes on without it. metrics.jsonl has every row; %s.",
                *(self.label, what, " ".join(reason.split()), self.remedy),
            )

    def _forget(self, error: Exception) -> None:  # noqa: B027 - most clients need nothing
        """Called before a failed tracker is left alone."""


class Wandb(Tracker):
    """Weights & Biases; offline unless the user has an API key."""

    name, label = "wandb", "W&B"
    remedy = "wandb.mode=offline needs no server, wandb.mode=disabled no W&B"

    def _start(self) -> Any:
        import wandb

        mode = self.experiment.wandb.mode
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        with _masked_arguments():
            return wandb.init(
                project=self.experiment.wandb.project,
                name=self.page_name,
                config=self.config,
                dir=str(self.folder),
                mode=mode,
                # A resumed run continues its page.
                id=hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:12],
                resume="allow",
                reinit="create_new",  # not the unclosed page of an earlier run in this process
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._page.log(numbers, step=step)

    def put_back(self, rows: Iterable[dict[str, Any]]) -> None:
        """Sends nothing: W&B's service has these rows, and its server takes each step once, in order."""

    def _show(self, name: str, picture: Path) -> None:
        import wandb

        self._page.log({name: wandb.Image(str(picture))})

    def _finish(self, metrics: dict[str, Any], failed: bool) -> None:
        self._page.summary.update(metrics)
        self._page.finish(exit_code=int(failed))

    def _forget(self, error: Exception) -> None:
        """Shuts down wandb's dead service process, which it would call at exit; the next run starts a new one."""
        if isinstance(error, ConnectionError):
            import wandb

            with contextlib.suppress(Exception):  # fails again, because the service does not answer
                wandb.teardown()


class TensorBoard(Tracker):
    """Event files in the run's folder. A resumed run writes them anew from metrics.jsonl."""

    name, label = "tensorboard", "TensorBoard"
    remedy = "resume=true writes its files anew"

    def _start(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard"
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        # purge_step: a TensorBoard that shows the deleted files forgets them.
        writer = SummaryWriter(str(folder), purge_step=0, flush_secs=10)
        writer.add_text("config", f"```yaml\n{yaml.safe_dump(self.config, sort_keys=False)}```")
        return writer

    def _log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._page.add_scalar(name, value, step)

    def _show(self, name: str, picture: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(picture) as image:
            self._page.add_image(name, np.asarray(image.convert("RGB")), self._step, dataformats="HWC")

    def _finish(self, metrics: dict[str, Any], failed: bool) -> None:
        self._page.add_hparams(flat(self.config), self._new_finals(metrics), run_name=".", global_step=self._step)
        self._page.close()


class Trackio(Tracker):
    """trackio's local database, $TRACKIO_DIR, or the Space or server that its variables name."""

    name, label = "trackio", "trackio"
    remedy = "without TRACKIO_SPACE_ID and TRACKIO_SERVER_URL it needs no network"

    def _start(self) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to show a dashboard
            page = within(_START_S, self._init)
        self._remember(page.id)
        return page

    def _init(self) -> Any:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        project, known = self.experiment.wandb.project, self._pages().get(self.name)

        def init(resume: str) -> Any:
            return trackio.init(
                project=project,
                name=self.page_name,
                config=self.config,
                resume=resume,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

        page = init("allow" if known else "never")
        if known not in (None, page.id):  # the newest page of this name is that of another folder
            page = init("never")
        if known == page.id:
            for row in SQLiteStorage.get_logs(project, run_id=page.id):
                self._held |= {name: (row["step"], value) for name, value in row.items()}
            if not self._held:  # they are kept elsewhere
                self._held_to = page._next_step - 1
        return page

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._page.log(numbers, step=step)

    def _show(self, name: str, picture: Path) -> None:
        import trackio

        self._page.log({name: trackio.Image(str(picture))}, step=self._step)

    def _finish(self, metrics: dict[str, Any], failed: bool) -> None:
        if finals := self._new_finals(metrics):
            self._page.log(finals, step=self._step)
        with contextlib.redirect_stdout(io.StringIO()):
            self._page.finish()


class MLflow(Tracker):
    """The server of $MLFLOW_TRACKING_URI; else a database and artifacts in `mlflow/` under results_root."""

    name, label = "mlflow", "MLflow"
    remedy = "without MLFLOW_TRACKING_URI it needs no server"

    def _start(self) -> Any:
        for variable, value in _MLFLOW_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        import mlflow

        server = os.environ.get("MLFLOW_TRACKING_URI")
        folder = Path(self.experiment.results_root).resolve() / "mlflow"
        with contextlib.nullcontext() if server else exclusively(folder):  # runs of a sweep make the database at once
            client = mlflow.MlflowClient(server or f"sqlite:///{folder / 'mlflow.db'}")
            run = self._known_run(client) or self._new_run(client, None if server else (folder / "artifacts").as_uri())
        self._run_id = run.info.run_id
        self._remember(self._run_id)
        for name, value in run.data.metrics.items():
            last = max(point.step for point in client.get_metric_history(self._run_id, name))
            self._held[name] = (last, value)
        params = [mlflow.entities.Param(name, str(value)) for name, value in flat(self.config).items()]
        missing = [param for param in params if param.key not in run.data.params]  # they cannot be changed
        for first in range(0, len(missing), 100):  # as many as a request may have
            client.log_batch(self._run_id, params=missing[first : first + 100])
        return client

    def _known_run(self, client: Any) -> Any:
        """Returns the run of a page that was remembered, as a running one; None if it is not there."""
        import mlflow

        known = self._pages().get(self.name)
        if known is None:
            return None
        try:
            client.update_run(known, status="RUNNING")
            return client.get_run(known)
        except mlflow.MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None  # it was deleted, or is in another database

    def _new_run(self, client: Any, artifacts: str | None) -> Any:
        project = self.experiment.wandb.project
        found = client.get_experiment_by_name(project)
        group = found.experiment_id if found else client.create_experiment(project, artifact_location=artifacts)
        return client.create_run(group, run_name=self.page_name, tags={"folder": str(self.folder)})

    def _log(self, numbers: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, step) for name, value in numbers.items()]
        self._page.log_batch(self._run_id, metrics=points)

    def _show(self, name: str, picture: Path) -> None:
        self._page.log_artifact(self._run_id, str(picture), name)

    def _finish(self, metrics: dict[str, Any], failed: bool) -> None:
        if finals := self._new_finals(metrics):
            self._log(finals, self._step)
        self._page.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (Wandb, TensorBoard, Trackio, MLflow)}

_START_S = 60
_MLFLOW_DEFAULTS = {  # a server that does not answer ends the tracking in less than a minute; MLflow's own is an hour
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def package_errors(experiment: Experiment) -> list[str]:
    """Returns an error for each tracker whose package is not installed."""
    return [
        f"Invalid tracker=[{','.join(experiment.tracker)}]: the package {name} is not installed; run pip install -e "
        f"'.[{name}]', or leave {name} out."
        for name in dict.fromkeys(experiment.tracker)
        if name != "wandb" and importlib.util.find_spec(name) is None
    ]


@contextlib.contextmanager
def tracking(experiment: Experiment, folder: Path, metrics: dict[str, Any]) -> Iterator[list[Tracker]]:
    """Yields a run's trackers, which get `metrics` at the end; none on processes other than the main one."""
    names = [] if int(os.environ.get("RANK", "0")) else list(dict.fromkeys(experiment.tracker))
    if experiment.wandb.mode == "disabled" and "wandb" in names:
        names.remove("wandb")
    trackers, failed = [TRACKERS[name](experiment, folder) for name in names], True
    try:
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            tracker.finish(metrics, failed=failed)


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, bool | int | float | str]:
    """Returns {"peft.lora_r": 8, …} of nested settings; values other than text and numbers become JSON."""
    items: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            items |= flat(value, f"{path}{key}.")
        else:
            items[f"{path}{key}"] = value if isinstance(value, int | float | str) else json.dumps(value)
    return items


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Calls a function in another thread, which is left alone after a time.

    Raises:
        TimeoutError: it did not return.
        Exception: its own.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = function()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer after {seconds:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """Masks passwords in sys.argv in the block: W&B uploads the command line."""
    plain = sys.argv
    sys.argv = [*map(masked, plain)]
    try:
        yield
    finally:
        sys.argv = plain


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text()
