"""run.json, the record of a run: the schema that every reader and writer of the file uses.

The record contains a hash of itself and of all files in the run's folder that are read later.
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
SCHEMA_VERSION = 1  # incremented when the meaning of a key changes; not for new optional keys


class _Group(BaseModel):
    """Base class of the record and its groups: typed; unknown keys, from other versions, are kept."""

    model_config = ConfigDict(extra="allow", strict=True, validate_assignment=True)


class Hardware(_Group):
    """The machine of the main process."""

    cpu: str
    cores: int  # available to the process
    threads: int  # of torch
    gpus: list[str]  # their names
    memory_gib: float  # of the whole machine
    world_size: int  # processes


class Environment(_Group):
    versions: dict[str, str]  # of Python and of the packages that matter
    hardware: Hardware


class BackboneHashes(_Group):
    """Hashes of the frozen weights; None for runs that train all weights."""

    before: str | None = None  # after the adapter's initialization, which may change W
    after: str | None = None

    @property
    def unchanged(self) -> bool:
        return self.before == self.after


class InitialAdapterRecord(_Group):
    """The saved adapter that a run started from, `peft.init_from`."""

    source: str  # the setting's value
    sha256: str  # of its weight files
    commit: str | None = None  # on the hub; None for a folder


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
    step_s_median: float | None = None  # seconds per optimizer step, over the newest 1000
    tokens_per_s: float | None = None  # median over the rows of metrics.jsonl; text only
    images_per_s: float | None = None  # the same, images only
    perturb_s: float | None = None  # seconds in the regularizer
    score_s: float | None = None  # seconds of all benchmarks, of the process that ended the run
    total_s: float | None = None  # seconds from the start of that process's run to its record


class ProcessCount(_Group):
    step: int  # number of optimizer steps before
    processes: int


class Distributed(_Group):
    processes: int  # of those that ended the run
    zero: int  # stage of ZeRO; 0 without it
    dtypes: dict[str, list[str]] | None = None  # of what ZeRO holds
    history: list[ProcessCount] | None = None  # of the training: how it began, and each change of the number


class Memory(_Group):
    """Peak memory of the main process in GiB; None without such a device."""

    peak_gpu_gib: float | None = None  # allocated by torch
    peak_rss_gib: float | None = None  # resident set
    peak_reserved_gib: float | None = None  # reserved by torch on the GPU
    reserved_mean_gib: float | None = None  # the same after each optimizer step, over the newest 1000
    reserved_p99_gib: float | None = None  # and its 99th percentile


class RunRecord(_Group):
    """run.json. Groups and hashes are None if the run ended before they were computed.

    Keys missing from records of earlier versions get their defaults.
    """

    schema_version: int = Field(SCHEMA_VERSION, ge=1)
    status: Literal["finished", "failed", "interrupted"]
    error: str | None = None  # error message of a failed run
    experiment: dict[str, Any] = Field(default_factory=dict)  # the configuration, as in config.yaml
    seed: int | None = None
    config_sha256: str | None = None
    data_sha256: str | None = None  # of the training rows
    chat_template_sha256: str | None = None  # of the template that they are written in; None: they are no chats
    base: str | None = None  # identity of the backbone, see `flatlora.models.loading.backbone_state`
    init_from: InitialAdapterRecord | None = None
    git_sha: str | None = None  # commit of the suite, with "-dirty" for a changed tree
    started_at: str | None = None  # UTC, ISO 8601; of the process that ended the run
    env: Environment | None = None
    backbone_sha256: BackboneHashes = Field(default_factory=BackboneHashes)
    adapter_sha256: str | None = None  # of the trained parameters in memory
    tensor_hash: str = "stream"  # definition of these two, see `flatlora.models.hashes`; earlier versions recorded none
    weights_sha256: str | None = None  # of the files of adapter/
    params: Parameters | None = None
    precision: Precision | None = None
    kernels: list[str] = Field(default_factory=list)  # fused kernels that were used
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
        """Reads the record in a run's folder; None if there is none.

        Args:
            remedy: end of the message about a broken file.

        Raises:
            ConfigError: the file cannot be read, does not match its own hash or the schema, or is from a newer version.
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
            wrong = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg'].lower()}" for detail in error.errors()]
            problem = f"it is not what a run wrote ({', '.join(wrong[:3])})"
            raise ConfigError([f"Broken record {path}: {problem}; {remedy}."]) from error

    def write(self, run: Path) -> None:
        """Writes run.json with its own hash, atomically."""
        records.write_signed(run / RECORD_FILE, self.model_dump())

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def metrics_of(self, benchmark: str) -> dict[str, Any]:
        """Returns the metrics of one benchmark, without the prefix "<benchmark>/"."""
        prefix = f"{benchmark}/"
        return {name.removeprefix(prefix): value for name, value in self.metrics.items() if name.startswith(prefix)}

    def file_damage(
        self, run: Path, wanted: Callable[[str], bool] = lambda name: True, largest_bytes: int | None = None
    ) -> list[str]:
        """Returns a phrase for each missing or changed file of the run's folder; arguments as in `records.damage`."""
        return records.damage(run, self.files, wanted=wanted, largest_bytes=largest_bytes)

    def settings_damage(self, run: Path) -> list[str]:
        """Returns a phrase that says how config.yaml differs from this record's configuration; empty if it does not."""
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
        """Returns a phrase for each missing or changed file of a finished run; empty for records without hashes.

        Args:
            largest_bytes: of files larger than this only the size is compared; None hashes all files.
            scores: whether score.json is compared with the metrics in this record.
        """
        if self.files is None:
            return []
        problems = [*self.file_damage(run, largest_bytes=largest_bytes), *self.settings_damage(run)]
        for name in self.experiment.get("eval") or ():
            problems += records.answers_damage(run / "eval" / name, self.metrics_of(name) if scores else None)
        return problems
