"""`python -m eval.NAME PATH [key=value ...]`: score a run's folder, a checkpoint, an adapter or a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

import eval as benchmarks
from eval.backends.hf import HFBackend
from flatlora.checkpoint import weights_sha256
from flatlora.config import ConfigError, ModelConfig, Section, nearest, setting
from flatlora.console import ProgressBar, console, quiet_libraries, report_faults
from flatlora.models import autocast_dtype, choose_device, load_for_inference
from flatlora.rows import read_jsonl


class Target(Section):
    """Keys of the command line that every benchmark has."""

    rows: str | None = None
    data_root: str | None = None
    device: str = setting("auto", pattern="^(auto|cpu|cuda)$")
    out: str | None = None
    score_only: bool = False


def main(benchmark: str, words: Sequence[str]) -> int:
    """Exit code of the command: 0 scored, 2 a fault of the command line or of what it names."""
    quiet_libraries()
    try:
        print_score(benchmark, score_path(benchmark, words))
        return 0
    except ConfigError as error:
        report_faults(error)
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted: the same command goes on with the answers that are missing.")
        return 130


def score_path(benchmark: str, words: Sequence[str]) -> dict[str, Any]:
    """Generate (or go on generating) and score; returns the score."""
    module = benchmarks.evaluator(benchmark)
    if not words or words[0].startswith("-") or "=" in words[0]:
        raise ConfigError([(module.__doc__ or "").strip()])
    path = Path(words[0])
    weights, run = _locate(words[0])
    saved = yaml.safe_load((run / "config.yaml").read_text()) if run else None
    own = (saved or {}).get("eval", {}).get(benchmark, {})  # what the run itself was scored with
    target, config = _parse_words(module, words[1:], own)
    folder = Path(target.out) if target.out else _output_folder(path, run, benchmark + _label(target, config, own))
    if target.score_only:
        return module.score_file(folder / "predictions.jsonl")
    rows = _rows(module, target, run)
    model_config = ModelConfig.model_validate(saved["model"]) if saved else None
    device = choose_device(target.device)
    model, tokenizer, _ = load_for_inference(weights, model_config, device)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    setting_name = saved["trainer"]["autocast"] if saved else "auto"
    backend = HFBackend(
        model,
        tokenizer,
        batch_size=config.batch_size,
        autocast_dtype=autocast_dtype(setting_name, dtype),
        identity={"weights": weights_sha256(Path(weights)) if Path(weights).is_dir() else weights},
    )
    return evaluate(benchmark, backend, rows, folder, config)


def evaluate(
    benchmark: str, backend: HFBackend, rows: Sequence[dict[str, str]], folder: Path, config: Section
) -> dict[str, Any]:
    """Run one benchmark with a progress bar."""
    bar = ProgressBar(benchmark)
    total = min(len(rows), config.max_rows or len(rows))
    bar.start(total)
    try:
        module = benchmarks.evaluator(benchmark)
        return module.run(backend, rows, folder, config, on_progress=lambda done, _: bar.update(done))
    finally:
        bar.stop()


def print_score(benchmark: str, score: dict[str, Any]) -> None:
    """One small table of a score."""
    table = Table("metric", "value")
    for name, value in score["metrics"].items():
        table.add_row(name, "—" if value is None else f"{value:.4f}")
    console.print(f"{benchmark}: {score['n']} rows, scorer {score['scorer']}", table)


def _label(target: Target, config: Section, own: dict[str, Any]) -> str:
    """Suffix of the output folder for settings other than the run's own, whose answers are never overwritten."""
    changed = [f"{key}={value}" for key, value in config.model_dump().items() if own and own.get(key) != value]
    return "".join(f"-{word}" for word in changed + ([f"rows={Path(target.rows).stem}"] if target.rows else []))


def _parse_words(module: Any, words: Sequence[str], own: dict[str, Any]) -> tuple[Target, Section]:
    known = {**Target.model_fields, **module.Config.model_fields}
    values, faults = dict(own), []
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            faults.append(f"Cannot read {word!r}: a setting is written key=value, such as max_rows=32.")
        elif key not in known:
            near = nearest(key, known)
            faults.append(f"Unknown key {key}: " + (f"did you mean {near}?" if near else f"known: {', '.join(known)}."))
        else:
            values[key] = yaml.safe_load(text)
    sections = []
    for cls in (Target, module.Config):
        mine = {key: value for key, value in values.items() if key in cls.model_fields}
        try:
            sections.append(cls(**mine))
        except ValueError as error:
            faults += [f"Invalid {d['loc'][0]}={d['input']!r}: {d['msg'].lower()}." for d in error.errors()]
    if faults:
        raise ConfigError(faults)
    return sections[0], sections[1]


def _locate(name: str) -> tuple[str, Path | None]:
    """(weights to load, run folder they belong to) of what the user named."""
    path = Path(name)
    if not path.is_dir():
        if path.exists() or name.startswith((".", "/")) or name.count("/") > 1:
            raise ConfigError(
                [f"Invalid path {name}: no such folder; name a run, checkpoint, adapter or model folder."]
            )
        return name, None  # a hub id
    run = next((folder for folder in (path, *path.resolve().parents[:2]) if (folder / "config.yaml").is_file()), None)
    if run != path:
        return name, run
    if (path / "adapter").is_dir():
        return str(path / "adapter"), path
    raise ConfigError(
        [f"Invalid path {name}: this run has no adapter/ yet; finish it, or name one of its checkpoints."]
    )


def _output_folder(path: Path, run: Path | None, benchmark: str) -> Path:
    if run is None:
        return (path / "eval" / benchmark) if path.is_dir() else Path("results") / "eval" / path / benchmark
    inside = path.resolve().relative_to(run.resolve()).parts
    label = benchmark if inside in ((), ("adapter",)) else f"{benchmark}-{'-'.join(inside)}"
    return run / "eval" / label


def _rows(module: Any, target: Target, run: Path | None) -> list[dict[str, str]]:
    if target.rows:
        if not Path(target.rows).is_file():
            raise ConfigError([f"Invalid rows={target.rows}: no such file; name a .jsonl file with x and y."])
        return read_jsonl(Path(target.rows))
    if run and (run / "test.jsonl").is_file():
        return read_jsonl(run / "test.jsonl")
    return module.benchmark_rows(target.data_root)


if __name__ == "__main__":
    sys.exit("Name a benchmark: python -m eval.gsm8k PATH")
