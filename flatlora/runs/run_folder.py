"""A run's folder and record. Tables and figures read these files and nothing else.

results/<project>_<dataset>/<name>/<seed>/
    config.yaml  metrics.jsonl  checkpoint-N/  adapter/  test.jsonl  eval/<benchmark>/  run.json (atomic, last)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flatlora.config.experiment import Experiment
from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.utils import records
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import no_link, write_atomic
from flatlora.utils.plain_files import open_plain
from flatlora.utils.staging import remove

logger = logging.getLogger(__name__)


class RunFolder:
    """One run's folder, locked for this process until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    @classmethod
    def of(cls, experiment: Experiment) -> RunFolder:
        """The folder that this experiment writes to."""
        project = f"{experiment.wandb.project}_{experiment.dataset.name}"
        return cls(Path(experiment.results_root) / project / experiment.run_name() / str(experiment.seed))

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def record(self) -> RunRecord | None:
        """run.json, None before the run ended.

        Raises:
            ConfigError: the file is broken.
        """
        remedy = "delete that file and go on with resume=true, or start anew with overwrite=true"
        return RunRecord.read(self.path, remedy)

    @property
    def is_trained(self) -> bool:
        """Whether a run has ended here: its training has nothing left to do."""
        record = self.record
        return record is not None and record.is_finished

    def is_finished(self, experiment: Experiment) -> bool:
        """Whether this very experiment has run to its end here, so that resume=true has nothing to do.

        A finished run whose benchmarks or test rows are asked for in another way is not: it is scored again. Neither is
        one whose files were damaged since: they are named, and made again from a checkpoint.

        Raises:
            ConfigError: the folder is in use, holds another run, or this one and neither resume nor overwrite is given.
        """
        if not self.is_run:
            return False
        if self.in_use:
            raise ConfigError([self._in_use_error()])
        if experiment.overwrite:
            return False
        self._validate_run(experiment)
        if not self.is_trained:
            return False
        # run.json's own copy of the config: config.yaml may already be that of a scoring that was killed.
        scored = self.record.experiment or self._saved_config()
        if scoring_of(scored) != scoring_of(experiment.model_dump(mode="json")):
            return False
        if damage := self.damage():
            logger.warning("%s is finished, but %s: made again.", self.path, "; ".join(damage))
        return not damage

    @property
    def is_run(self) -> bool:
        """Whether a run has begun here."""
        return os.path.lexists(self.path / "config.yaml")

    def damage(self) -> list[str]:
        """What became of a finished run's files and answers since its record was written, a phrase each."""
        record = self.record
        return record.damage(self.path) if record else []

    def open(self, experiment: Experiment) -> None:
        """Lock the folder for this experiment; of several ranks, rank 0 does. `begin` is what changes it.

        Raises:
            ConfigError: not writable, in use by another process, or holding another run; nothing has been changed.
        """
        self._acquire()
        try:
            if experiment.overwrite:
                self._validate_no_evaluations()
            elif self.is_run:
                self._validate_run(experiment)
            if not experiment.overwrite and (errors := records.own_paths_errors(self.path)):
                raise ConfigError(errors)
        except BaseException:
            self.close()
            raise

    def begin(self, experiment: Experiment) -> None:
        """Make an opened folder this experiment's: emptied for overwrite=true, with the config in it."""
        if experiment.overwrite:
            self._clear()
        if not self.is_trained:  # what a killed start leaves is no record, and not that of an earlier one
            (self.path / RECORD_FILE).unlink(missing_ok=True)
        for left in self.path.glob(".*-????????"):  # half-written when a process was killed
            remove(left)
        write_atomic(self.path / "config.yaml", yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))

    def check_writable(self) -> None:
        """See that `open` will find the disk ready; leaves nothing behind.

        Raises:
            ConfigError: the folder takes no files, or another process has it.
        """
        missing = self._acquire()
        self.close()
        self._remove(missing)

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _in_use_error(self) -> str:
        return f"{self.path} is in use: another process trains this run; wait for it, or give wandb.name or seed."

    @property
    def in_use(self) -> bool:
        """Whether another process has the folder now."""
        try:
            with open_plain(self.path / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock file, or not ours to read: `open` will tell
            return False
        return False

    def _validate_no_evaluations(self) -> None:
        """What answers for the adapter that stands here must not go on among the answers of another."""
        if busy := [folder for folder in self.path.glob("eval/*") if is_answering(folder)]:
            raise ConfigError(
                [
                    f"{self.path} is being evaluated: another process writes {busy[0]}; wait for it, or give "
                    "wandb.name or seed."
                ]
            )

    def _acquire(self) -> list[Path]:
        """Make and lock the folder; those that were made for it, innermost first."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a", opener=no_link)  # noqa: SIM115 - held until close()
            self._probe_space()
            self._lock_folder()
        except BlockingIOError as error:
            self.close()
            raise ConfigError([self._in_use_error()]) from error
        except OSError as error:
            self.close()
            self._remove(missing)
            remedy = "free some space there" if error.errno == errno.ENOSPC else "make it writable"
            raise ConfigError(
                [
                    f"Cannot write to results_root: {error.strerror or error} ({error.filename or self.path}); "
                    f"{remedy}, or set results_root=DIR to a folder that takes files."
                ]
            ) from error
        return missing

    def _lock_folder(self) -> None:
        """Try for half a second: somebody who only asks `in_use` has the lock for a moment."""
        deadline = time.monotonic() + 0.5
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _remove(self, created: list[Path]) -> None:
        """Leave nothing behind in folders that this call made, innermost first."""
        for folder in created:
            with contextlib.suppress(OSError):  # never made, or it holds something after all
                (folder / ".lock").unlink(missing_ok=True)
                folder.rmdir()

    def _probe_space(self) -> None:
        """Fail before training where a small file cannot be written."""
        probe = self.path / ".probe"
        try:
            with open(probe, "wb", opener=no_link) as file:
                file.write(b"\0" * 65536)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == ".lock":
                continue
            remove(entry)

    def _validate_run(self, experiment: Experiment) -> None:
        differing = _differences(self._saved_config(), experiment)
        if differing:
            raise ConfigError(
                [
                    f"{self.path} holds another experiment by its config.yaml: {', '.join(differing)}; give "
                    "wandb.name, or overwrite=true."
                ]
            )
        if not experiment.resume:
            state = "a finished run" if self.is_trained else "a started run"
            raise ConfigError(
                [
                    f"{self.path} holds {state} of this experiment: resume=true goes on with it, overwrite=true "
                    "deletes it and starts anew."
                ]
            )

    def _saved_config(self) -> dict[str, Any]:
        path = self.path / "config.yaml"
        remedy = "give wandb.name for another folder, or overwrite=true to empty this one"
        saved = records.read_settings(path, remedy)
        try:
            scoring_of(saved), saved["rho"]["method"], saved["rho"]["sigma"], dict(saved["trainer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                [f"Broken file {path}: it is not the config of a run ({type(error).__name__}); {remedy}."]
            ) from error
        return saved


def is_answering(folder: Path) -> bool:
    """Whether a process writes answers there, as `answering` has it."""
    try:
        with open_plain(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def answering(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep a folder of answers for this process: others do not write there, and its run is not overwritten meanwhile.

    Args:
        wait: whether to wait for another process that has it.

    Raises:
        ConfigError: another process has it.
        OSError: the folder takes no files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", opener=no_link) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise ConfigError(
                    [f"{folder} is in use: another process writes its answers there; wait for it, or give out=DIR."]
                ) from error
            logger.warning("Another process writes answers to %s: waiting for it.", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):  # removed with its run, on a disk that has no locks
                if os.listdir(folder) == [".lock"]:  # nothing was answered
                    shutil.rmtree(folder, ignore_errors=True)


def scoring_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.yaml that decides the scores of given weights, and not the weights."""
    return {
        "eval": raw["eval"],
        "test_rows": [raw["model"].get("generated_test_rows"), raw["dataset"].get("test_rows")],
    }


def _differences(saved: dict[str, Any], experiment: Experiment) -> list[str]:
    """`key: saved ≠ wanted` for every key that decides the trained bytes."""
    identity, settings = dict(_flatten(experiment.identity_of(saved))), dict(_flatten(saved))
    return [
        f"{key} is {settings.get(key)!r} there and {value!r} here"
        for key, value in _flatten(experiment.identity())
        if identity.get(key) != value and settings.get(key) != value  # σ = 0 hides the other keys of rho
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
