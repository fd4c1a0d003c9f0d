"""metrics.jsonl, and Weights & Biases fed with its rows."""

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
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import fsync_folder, no_link, write_atomic
from flatlora.utils.masking import masked
from flatlora.utils.plain_files import open_plain


class MetricsLog:
    """metrics.jsonl: append-only, one object a logged step, flushed at once; mirrored to W&B.

    Each checkpoint keeps the rows up to its step, see `flatlora.train.recorder.rows_of`.
    """

    def __init__(self, path: Path, tracker: Tracker | None = None) -> None:
        self.path, self.tracker = path, tracker

    def rewind(self, step: int, kept: Sequence[str] | None = None) -> None:
        """Forget rows after `step`, which a resumed run will write again; a torn last line goes too.

        Args:
            kept: the lines up to `step` as the checkpoint has them, which replace others; None where it has none.
        """
        found = []
        for line in self._text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # torn: not a whole row
                if json.loads(line)["step"] <= step:
                    found.append(line)
        wanted = found if kept is None else list(kept)
        if wanted != found:
            logger.warning(
                "%s had %d of the %d rows up to step %d, or others: put back from the checkpoint.",
                *(self.path, len(set(found) & set(wanted)), len(wanted), step),
            )
        if wanted or os.path.lexists(self.path):
            write_atomic(self.path, "".join(line + "\n" for line in wanted))

    def _text(self) -> str:
        try:
            with open_plain(self.path) as file:
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def flush(self) -> None:
        """Wait until all rows are on the disk."""
        with contextlib.suppress(FileNotFoundError):  # no row yet
            fsync_folder(self.path)

    def append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker:
            self.tracker.log(row)

    def rows(self) -> list[dict[str, Any]]:
        """All rows but a torn last one, which a kill leaves or a running process is writing.

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
    """Weights & Biases, fed with the rows of metrics.jsonl. Offline unless the user has a key.

    No error of W&B ends a training: the first one is named, and nothing more is sent.
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
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12],  # a resumed run goes on in its page
                resume="allow",
                reinit="create_new",  # never the page of an earlier run of this process that could not be closed
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )

    @contextlib.contextmanager
    def _named_once(self, what: str) -> Iterator[None]:
        """Around every use of W&B, whose errors are of its service, its server, the network and the disk."""
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
        if self._run is not None:
            with self._named_once("took no more rows"):
                self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def show(self, name: str, picture: Path) -> None:
        """Put an image file on the page."""
        if self._run is not None:
            with self._named_once("took no picture"):
                import wandb

                self._run.log({name: wandb.Image(str(picture))})

    def finish(self, metrics: dict[str, Any], *, failed: bool = False) -> None:
        """Close the page, or the next run of this process would write on it."""
        if self._run is not None:
            with self._named_once("could not be closed"):
                self._run.summary.update(metrics)
                self._run.finish(exit_code=int(failed))


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """The command line without passwords, which W&B copies to its page."""
    plain = sys.argv
    sys.argv = [*map(masked, plain)]
    try:
        yield
    finally:
        sys.argv = plain


def _forget_dead_service() -> None:
    """Let wandb drop its service, which it would ask once more as the interpreter ends; the next run starts another."""
    import wandb

    with contextlib.suppress(Exception):  # it says again that nobody answers
        wandb.teardown()


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text()


@contextlib.contextmanager
def tracking(experiment: Experiment, folder: Path, metrics: dict[str, Any]) -> Iterator[Tracker | None]:
    """W&B for the time of a run, on the main process, unless wandb.mode=disabled; its summary is `metrics` then."""
    if experiment.wandb.mode == "disabled" or int(os.environ.get("RANK", "0")):
        yield None
        return
    tracker, failed = Tracker(experiment, folder), True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(metrics, failed=failed)
