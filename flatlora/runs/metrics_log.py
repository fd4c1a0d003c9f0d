"""metrics.jsonl, and Weights & Biases, which receives the same rows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flatlora.config.experiment import Experiment
from flatlora.runs.run_folder import logger
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import fsync_folder, no_link, write_atomic
from flatlora.utils.masking import masked
from flatlora.utils.plain_files import read_plain

_MOST_BYTES = 1 << 30


class MetricsLog:
    """metrics.jsonl: append-only, one object per logged step, flushed immediately; also sent to W&B.

    Each checkpoint contains the rows up to its step, see `flatlora.train.recorder.rows_of`.
    """

    def __init__(self, path: Path, tracker: Tracker | None = None) -> None:
        self.path, self.tracker = path, tracker

    def rewind(self, step: int, kept: Sequence[str] | None = None) -> None:
        """Removes rows after `step`, which a resumed run writes again, and an incomplete last line.

        Args:
            kept: the checkpoint's lines up to `step`, which replace those of the file; None if it has none.
        """
        lines, text = [], ""
        try:
            text = self._text()
        except OSError:
            if kept is None:
                raise
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # incomplete row
                if json.loads(line)["step"] <= step:
                    lines.append(line)
        wanted = lines if kept is None else list(kept)
        if wanted != lines:
            logger.warning(
                "%s had %d of the %d rows up to step %d, or others: put back from the checkpoint.",
                *(self.path, len(set(lines) & set(wanted)), len(wanted), step),
            )
        if wanted or os.path.lexists(self.path):
            write_atomic(self.path, "".join(line + "\n" for line in wanted))

    def _text(self) -> str:
        try:
            return read_plain(self.path, _MOST_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise OSError(f"cannot read {self.path}: {reason_of(error)}") from error

    def flush(self) -> None:
        """Flushes all rows to disk."""
        with contextlib.suppress(FileNotFoundError):  # no row yet
            fsync_folder(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row with the key "step"."""
        with open(self.path, "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker:
            self.tracker.log(row)

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows, without an incomplete last one, which a killed or a still running process may leave.

        Raises:
            ConfigError: another row is broken.
            OSError: the file cannot be read.
        """
        lines, rows = self._text().splitlines(), []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("an object is needed")
                rows.append(row)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise ConfigError(
                        [f"Broken row in {self.path}, line {number}: {error}; resume=true puts a run's rows back."]
                    ) from error
        return rows


class Tracker:
    """Sends the rows of metrics.jsonl to Weights & Biases; offline unless the user has an API key.

    Errors of W&B do not end the training: the first one is logged as a warning, and nothing more is sent.
    """

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self._run: Any = None
        with self._named_once("could not be started"):
            self._run = self._start(experiment, folder)

    @staticmethod
    def _start(experiment: Experiment, folder: Path) -> Any:
        import wandb

        mode = experiment.wandb.mode
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        with _masked_arguments():
            return wandb.init(
                project=experiment.wandb.project,
                name=f"{experiment.run_name()}-{experiment.seed}",
                config=experiment.model_dump(mode="json"),
                dir=str(folder),
                mode=mode,
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12],  # a resumed run continues its page
                resume="allow",
                reinit="create_new",  # not the unclosed page of an earlier run in this process
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )

    @contextlib.contextmanager
    def _named_once(self, what: str) -> Iterator[None]:
        """Logs an error in the block as a warning and disables the tracker; wraps every call of W&B.

        Any exception is caught: errors may come from W&B's service process, its server, the network or the disk.
        """
        try:
            yield
        except Exception as error:
            self._run = None
            if isinstance(error, ConnectionError):
                _forget_dead_service()
            reason = str(error).strip() or type(error).__name__
            logger.warning(
                "W&B %s (%s): the run goes on without it. metrics.jsonl has every row; wandb.mode=offline needs no "
                "server, wandb.mode=disabled no W&B.",
                what,
                " ".join(reason.split()),
            )

    def log(self, row: dict[str, Any]) -> None:
        """Sends a row of metrics.jsonl."""
        if self._run is not None:
            with self._named_once("took no more rows"):
                self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def show(self, name: str, picture: Path) -> None:
        """Adds an image file to the run's page."""
        if self._run is not None:
            with self._named_once("took no picture"):
                import wandb

                self._run.log({name: wandb.Image(str(picture))})

    def finish(self, metrics: dict[str, Any], *, failed: bool = False) -> None:
        """Closes the run's page, so that the next run in this process gets its own; its summary is `metrics`."""
        if self._run is not None:
            with self._named_once("could not be closed"):
                self._run.summary.update(metrics)
                self._run.finish(exit_code=int(failed))


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """Masks passwords in sys.argv in the block: W&B uploads the command line."""
    plain = sys.argv
    sys.argv = [*map(masked, plain)]
    try:
        yield
    finally:
        sys.argv = plain


def _forget_dead_service() -> None:
    """Shuts down wandb's dead service process, which it would call at exit; the next run starts a new one."""
    import wandb

    with contextlib.suppress(Exception):  # fails again, because the service does not answer
        wandb.teardown()


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text()


@contextlib.contextmanager
def tracking(experiment: Experiment, folder: Path, metrics: dict[str, Any]) -> Iterator[Tracker | None]:
    """Yields a run's tracker, with `metrics` as its final summary; None if wandb.mode=disabled or not on rank 0."""
    if experiment.wandb.mode == "disabled" or int(os.environ.get("RANK", "0")):
        yield None
        return
    tracker, failed = Tracker(experiment, folder), True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(metrics, failed=failed)
