"""run.json, the record of a run: its schema, which every reader and writer of the file uses.

The record contains a hash of itself and of every file of its folder that is read later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flatlora.utils import records
from flatlora.utils.errors import ConfigError

RECORD_FILE = "run.json"
SCHEMA_VERSION = 1  # raised whenever a key changes its meaning; a new key that may be missing needs no new version


class _Group(BaseModel):
    """Base class of the record and its groups: typed; keys of other versions are kept."""

    model_config = ConfigDict(extra="allow", strict=True, validate_assignment=True)


class Hardware(_Group):
    """The machine of the main process."""

    cpu: str
    cores: int  # that the process may use
    threads: int  # of torch
    gpus: list[str]  # their names
    memory_gib: float  # of the whole machine
    world_size: int  # processes


class Environment(_Group):
    versions: dict[str, str]  # of Python and of the packages that matter
    hardware: Hardware


class BackboneHashes(_Group):
    """SHA-256 of the frozen weights; None for runs that train all weights."""

    before: str | None = None  # after the method's own initialization, which may move part of W into the adapter
    after: str | None = None

    @property
    def unchanged(self) -> bool:
        return self.before == self.after


class Parameters(_Group):
    """Numbers of parameters; tied ones are counted once."""

    trainable: int
    total: int


class Precision(_Group):
    """Names of dtypes, such as "bfloat16"."""

    stored: str  # of the backbone's files
    products: str
    autocast: str | None
    reason: str


class Timing(_Group):
    """Times of the whole training, including processes that the run was resumed from."""

    train_s: float | None = None  # seconds
    step_s_median: float | None = None  # seconds of an optimizer step, of the newest 1000
    tokens_per_s: float | None = None  # median over the rows of metrics.jsonl; of text
    images_per_s: float | None = None  # the same, of images
    perturb_s: float | None = None  # seconds in the regularizer


class Distributed(_Group):
    processes: int
    zero: int  # stage of ZeRO; 0 without it
    dtypes: dict[str, list[str]] | None = None  # of what ZeRO holds


class Memory(_Group):
    """Peaks of the main process in GiB; None where there is no such device."""

    peak_gpu_gib: float | None = None  # allocated by torch
    peak_rss_gib: float | None = None  # resident set


class RunRecord(_Group):
    """run.json. Groups are None, and hashes too, for a run that ended before they were known.

    Records of earlier versions lack keys, which have their defaults then.
    """

    schema_version: int = Field(SCHEMA_VERSION, ge=1)
    status: Literal["finished", "failed", "interrupted"]
    error: str | None = None  # message of what ended a failed run
    experiment: dict[str, Any] = Field(default_factory=dict)  # the configuration, as in config.yaml
    seed: int | None = None
    config_sha256: str | None = None
    data_sha256: str | None = None  # of the training rows
    base: str | None = None  # identity of the backbone, see `flatlora.models.loading.backbone_state`
    git_sha: str | None = None  # commit of the suite, with "-dirty" for a changed tree
    env: Environment | None = None
    backbone_sha256: BackboneHashes = Field(default_factory=BackboneHashes)
    adapter_sha256: str | None = None  # of the trained parameters in memory
    weights_sha256: str | None = None  # of the files of adapter/
    params: Parameters | None = None
    precision: Precision | None = None
    kernels: list[str] = Field(default_factory=list)  # the fast paths that were used
    metrics: dict[str, Any] = Field(default_factory=dict)  # numbers or None; "<benchmark>/<metric>" for scores
    timing: Timing | None = None
    perturbation: dict[str, Any] | None = None  # what the regularizer records
    resumed_from: int | None = None  # step of the checkpoint
    distributed: Distributed | None = None
    memory: Memory | None = None
    files: dict[str, dict[str, Any]] | None = None  # {path in the run's folder: {"sha256", "bytes"}}
    record_sha256: str | None = None  # of all other keys

    @classmethod
    def read(cls, run: Path, remedy: str = "restore it from a copy") -> RunRecord | None:
        """The record in a run's folder; None if there is none.

        Args:
            remedy: end of the message about a broken file.

        Raises:
            ConfigError: it cannot be read, does not match its own hash or the schema, or is of a newer version.
        """
        path = run / RECORD_FILE
        raw = records.read_record(path, remedy)
        if raw is None:
            return None
        version = raw.setdefault("schema_version", SCHEMA_VERSION)  # earlier versions wrote none
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ConfigError(
                [
                    f"Invalid schema_version={version} in {path}: this version of the suite reads records up to "
                    f"{SCHEMA_VERSION}; use the version that wrote it, or a newer one."
                ]
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors()]
            problem = f"it is not what a run wrote ({', '.join(wrong[:3])})"
            raise ConfigError([f"Broken record {path}: {problem}; {remedy}."]) from error

    def write(self, run: Path) -> None:
        """Write run.json with its own hash, atomically."""
        records.write_signed(run / RECORD_FILE, self.model_dump())

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def metrics_of(self, benchmark: str) -> dict[str, Any]:
        """The metrics of one benchmark."""
        prefix = f"{benchmark}/"
        return {name.removeprefix(prefix): value for name, value in self.metrics.items() if name.startswith(prefix)}

    def file_damage(
        self, run: Path, wanted: Callable[[str], bool] = lambda name: True, largest_bytes: int | None = None
    ) -> list[str]:
        """What became of files of the run's folder, a phrase each; arguments as for `records.damage`."""
        return records.damage(run, self.files, wanted=wanted, largest_bytes=largest_bytes)

    def settings_damage(self, run: Path) -> list[str]:
        """How config.yaml differs from the configuration here: a phrase, or an empty list."""
        if self.record_sha256 is None or not self.experiment:
            return []
        try:
            saved = records.read_settings(run / "config.yaml", "")
        except ConfigError:
            return ["config.yaml is missing" if not os.path.lexists(run / "config.yaml") else "config.yaml is broken"]
        if not isinstance(saved, dict):
            return ["config.yaml is broken"]
        keys = [
            key for key in {**self.experiment, **saved} if not records.same(saved.get(key), self.experiment.get(key))
        ]
        return [f"config.yaml is not what the run wrote (in {', '.join(keys)})"] if keys else []

    def damage(self, run: Path, *, largest_bytes: int | None = None, scores: bool = True) -> list[str]:
        """What became of a finished run's files and answers, a phrase each; none for records without hashes.

        Args:
            largest_bytes: only the size of larger files is compared; None hashes all files.
            scores: whether score.json is compared with the metrics here.
        """
        if self.files is None:
            return []
        problems = [*self.file_damage(run, largest_bytes=largest_bytes), *self.settings_damage(run)]
        for name in self.experiment.get("eval") or ():
            problems += records.answers_damage(run / "eval" / name, self.metrics_of(name) if scores else None)
        return problems
