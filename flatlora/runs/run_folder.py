"""A run's folder. Tables and figures read these files and nothing else.

results/<project>_<dataset>/<name>/<seed>/
    config.yaml  metrics.jsonl  checkpoint-N/  adapter/  test.jsonl  eval/<benchmark>/  run.json (written last,
    atomically)
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
        """Returns the folder of an experiment."""
        project = f"{experiment.wandb.project}_{experiment.dataset.name}"
        return cls(Path(experiment.results_root) / project / experiment.run_name() / str(experiment.seed))

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def record(self) -> RunRecord | None:
        """The content of run.json; None before the run ended.

        Raises:
            ConfigError: the file is broken.
        """
        remedy = "delete that file and go on with resume=true, or start anew with overwrite=true"
        return RunRecord.read(self.path, remedy)

    @property
    def is_trained(self) -> bool:
        """Whether the folder holds a finished run, so that no training is left to do."""
        record = self.record
        return record is not None and record.is_finished

    def is_finished(self, experiment: Experiment) -> bool:
        """Whether this experiment is finished here, so that resume=true has nothing to do.

        False for a finished run with other settings of benchmarks or test rows, which is scored again, and for one with
        damaged files, which are logged and restored from a checkpoint.

        Raises:
            ConfigError: the folder is in use, holds another run, or holds this run and neither resume nor overwrite is
                set.
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
        # The config in run.json: an interrupted scoring may already have changed config.yaml.
        scored = self.record.experiment or self._saved_config()
        if scoring_of(scored) != scoring_of(experiment.model_dump(mode="json")):
            return False
        if damage := self.damage():
            logger.warning("%s is finished, but %s: made again.", self.path, "; ".join(damage))
        return not damage

    @property
    def is_run(self) -> bool:
        """Whether a run has been started in this folder."""
        return os.path.lexists(self.path / "config.yaml")

    def damage(self) -> list[str]:
        """Returns a phrase for each file of a finished run that is missing or changed since its record was written."""
        record = self.record
        return record.damage(self.path) if record else []

    def open(self, experiment: Experiment) -> None:
        """Locks the folder for this experiment without changing its content (see `begin`); called on rank 0 only.

        Raises:
            ConfigError: the folder is not writable, in use by another process, or holds another run.
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
        """Prepares an opened folder: empties it for overwrite=true, removes leftovers, and writes config.yaml."""
        if experiment.overwrite:
            self._clear()
        if not self.is_trained:  # the record of a run that did not finish
            (self.path / RECORD_FILE).unlink(missing_ok=True)
        for left in self.path.glob(".*-????????"):  # incomplete files of killed processes
            remove(left)
        write_atomic(self.path / "config.yaml", yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))

    def check_writable(self) -> None:
        """Checks that `open` will succeed, and leaves nothing behind.

        Raises:
            ConfigError: the folder is not writable, or in use by another process.
        """
        missing = self._acquire()
        self.close()
        self._remove(missing)

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _in_use_error(self) -> str:
        return f"{self.path} is in use: another process trains this run; wait for it, or give wandb.name or seed."

    @property
    def in_use(self) -> bool:
        """Whether another process has locked the folder."""
        try:
            with open_plain(self.path / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock file, or no permission, which `open` reports
            return False
        return False

    def _validate_no_evaluations(self) -> None:
        """Checks that no evaluation is running: it would mix answers of the old adapter with those of the new one.

        Raises:
            ConfigError: another process writes answers in eval/.
        """
        if busy := [folder for folder in self.path.glob("eval/*") if is_answering(folder)]:
            raise ConfigError(
                [
                    f"{self.path} is being evaluated: another process writes {busy[0]}; wait for it, or give "
                    "wandb.name or seed."
                ]
            )

    def _acquire(self) -> list[Path]:
        """Creates and locks the folder; returns the folders that were created, innermost first."""
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
        """Tries to lock for 0.5 s: a process that only checks `in_use` holds the lock for a moment."""
        deadline = time.monotonic() + 0.5
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _remove(self, created: list[Path]) -> None:
        """Removes folders that `_acquire` created, innermost first, unless they hold other files."""
        for folder in created:
            with contextlib.suppress(OSError):  # was not created, or is not empty
                (folder / ".lock").unlink(missing_ok=True)
                folder.rmdir()

    def _probe_space(self) -> None:
        """Writes and deletes a small file, to fail before training if that is impossible."""
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
    """Whether a process holds the lock of `answering` on a folder."""
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
    """Locks a folder of answers in the block: no other process writes there, and its run cannot be overwritten.

    Args:
        wait: whether to wait for another process that holds the lock.

    Raises:
        ConfigError: another process holds the lock, and `wait` is False.
        OSError: the folder is not writable.
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
            with contextlib.suppress(FileNotFoundError):  # removed with its run, on a file system without locks
                if os.listdir(folder) == [".lock"]:  # no answers were written
                    shutil.rmtree(folder, ignore_errors=True)


def scoring_of(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings in a config.yaml that affect scores but not the trained weights."""
    return {
        "eval": raw["eval"],
        "test_rows": [raw["model"].get("generated_test_rows"), raw["dataset"].get("test_rows")],
    }


def _differences(saved: dict[str, Any], experiment: Experiment) -> list[str]:
    """Returns a phrase for each setting that affects the trained weights and differs from the saved one."""
    identity, settings = dict(_flatten(experiment.identity_of(saved))), dict(_flatten(saved))
    own, own_settings = dict(_flatten(experiment.identity())), dict(_flatten(experiment.model_dump(mode="json")))
    return [
        f"{key} is {settings.get(key)!r} there and {own_settings[key]!r} here"
        for key in {**own, **identity}  # a setting at its default may be in one of them alone
        if key in own_settings
        and identity.get(key) != own.get(key)
        and settings.get(key) != own_settings[key]  # an identity with σ = 0 has no keys of rho
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
