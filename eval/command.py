"""`python -m eval.NAME PATH [key=value ...]`: score a run's folder, a checkpoint, an adapter or a model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from safetensors import SafetensorError

import eval as benchmarks
from eval import predictions
from eval.backends import Backend, Generator, ImageBackend
from eval.backends.openai import Endpoint, OpenAIBackend
from eval.backends.vllm import VLLMBackend
from eval.kinds import BENCHMARK, KINDS, Command
from eval.target import Target
from flatlora.config.families import trains_on
from flatlora.config.sections import ModelConfig
from flatlora.config.settings import Section, checked_section
from flatlora.experiment.plugins import Benchmark
from flatlora.inputs.rows import gather
from flatlora.models.clip import CLASSES_FILE
from flatlora.models.family import FAMILIES
from flatlora.models.loading import (
    choose_device,
    load_for_inference,
    model_of,
    saved_processor,
)
from flatlora.models.sources import backbone_source
from flatlora.models.starts import MOVED
from flatlora.runs.run_folder import answering
from flatlora.trained.place import (
    YAML_ERRORS,
    ResolvedModel,
    base_errors,
    identify,
    is_hash,
    resolve_model,
    validated_unchanged,
)
from flatlora.utils.console import ProgressBar, console, quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError, nearest, reason_of
from flatlora.utils.files import write_json
from flatlora.utils.names import fitting, is_text
from flatlora.utils.precision import choose_precision, stored_dtype
from flatlora.utils.records import PlainLoader, links_in, read_record

logger = logging.getLogger(__name__)


_SHARED_HELP = """
Keys of every benchmark: rows, data_root, base (path of an adapter's base model, if it moved), device (auto, cpu,
cuda), dtype (auto, float32, bfloat16, float16), out, score_only. Benchmarks that generate text: backend (hf, vllm,
openai). With backend=openai, PATH is the name of a model at the endpoint, and these keys configure the requests:
base_url, base_key (the environment variable with its key; without it OPENAI_API_KEY is sent only to api.openai.com and
OPENAI_BASE_URL), chat, concurrency, requests_per_minute and timeout (seconds per request)."""


def main(benchmark: str, arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 if the evaluation failed, 2 for an invalid command line, 130 if interrupted."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(benchmarks.BENCHMARKS[benchmark].help.strip())
        print(_SHARED_HELP)
        return 0
    quiet_libraries()
    try:
        print_score(benchmark, score_path(benchmark, arguments))
        return 0
    except ConfigError as error:
        report_errors(error)
        return 2
    except torch.OutOfMemoryError as error:
        return _report_failure(error, "A lower batch_size needs less.")
    except FloatingPointError as error:
        return _report_failure(error, "Answers so far are kept.")
    except OSError as error:
        return _report_failure(error, "Once that is fixed, the same command continues with the missing answers.")
    except KeyboardInterrupt:
        console.print("Interrupted: the same command continues with the missing answers.")
        return 130


def _report_failure(error: Exception, remedy: str) -> int:
    console.print(f"The evaluation failed: {reason_of(error)}. {remedy}", markup=False, soft_wrap=True)
    return 1


def score_path(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Generates the answers that are missing and scores all; returns the score.

    Raises:
        ConfigError: all errors of settings, path, device, rows and output folder, before a model is loaded.
    """
    benchmark = benchmarks.BENCHMARKS[name]
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        given = f" before {arguments[0]}" if arguments else ""
        raise ConfigError(
            [
                f"Missing PATH{given}: python -m eval.{name} PATH [key=value ...] scores the model at PATH; --help "
                "shows more."
            ]
        )

    if broken := [
        f"Cannot read {argument!r}: it is not UTF-8; rename the file, or correct the argument."
        for argument in arguments
        if not is_text(argument)
    ]:
        raise ConfigError(broken)
    target, given, argument_errors = _parse_arguments(benchmark, arguments[1:])

    def resolve() -> ResolvedModel:
        served = target is not None and target.backend == "openai"
        base = None if target is None else target.base
        return resolve_model(arguments[0], benchmark=(name, benchmark.Config), served=served, base=base)

    def check_arguments() -> None:
        if argument_errors:
            raise ConfigError(argument_errors)

    def given_target() -> Target:
        if target is None:
            raise ConfigError(argument_errors)
        return target

    def check_base() -> None:
        loads = target is not None and not target.score_only and target.backend != "openai"
        if loads and (errors := base_errors(resolve(), target.base)):
            raise ConfigError(errors)

    def configure() -> Section:
        return _config(benchmark, resolve, given)

    # A step that needs an earlier step repeats it. `gather` reports the errors of all steps together, each only once.
    resolved, _, _, _, config, folder, device, rows = gather(
        resolve,
        check_base,
        lambda: _check_kind(benchmark, given_target(), given, resolve),
        check_arguments,
        configure,
        lambda: _output_folder(arguments[0], given_target(), given, resolve, name),
        lambda: _choose_device(given_target()),
        lambda: _rows(Command(benchmark, given_target(), given, resolve, configure)),
    )
    if target.score_only and not folder.is_dir():  # reported as an error, without creating the folder
        return benchmark.score_file(folder / "predictions.jsonl", config)
    with _in_use(folder, resolved.run):
        if target.score_only:
            return benchmark.score_file(folder / "predictions.jsonl", config)
        return evaluate(name, _backend(resolved, target, device, config.batch_size, benchmark), rows, folder, config)


@contextlib.contextmanager
def _in_use(folder: Path, run: Path | None) -> Iterator[None]:
    """Locks the folder of answers before the weights are read, so that their run cannot be overwritten meanwhile.

    With out=DIR, a separate folder in the run locks the run itself, unless this user cannot write there.
    """
    own = run / "eval" if run else folder.parent
    with contextlib.ExitStack() as locks:
        locks.enter_context(answering(folder))
        if own.resolve() != folder.parent.resolve() and _can_write(own):
            if not own.exists():
                locks.callback(_remove_empty, own)
            locks.enter_context(answering(own / f"out={_in_short(os.path.abspath(folder))}"))
        yield


def _can_write(folder: Path) -> bool:
    return not folder.is_symlink() and os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty: another process has written answers to it
        folder.rmdir()


def evaluate(
    benchmark: str, backend: Backend | ImageBackend, rows: Sequence[Any], folder: Path, config: Section
) -> dict[str, Any]:
    """Runs one benchmark with a progress bar; adapted.json lists the request parameters that an endpoint rejected."""
    bar, begun = ProgressBar(benchmark), False

    def show(done: int, total: int, _: Any) -> None:
        nonlocal begun
        if not begun:
            bar.start(total, done)
            begun = True
        bar.update(done)

    try:
        score = benchmarks.BENCHMARKS[benchmark].run(backend, rows, folder, config, on_progress=show)
        for problem in predictions.incomplete(score["metrics"]):
            logger.warning("%s: %s.", benchmark, problem)
        if adapted := getattr(backend, "adapted", None):
            write_json(folder / "adapted.json", adapted)
        return score
    finally:
        bar.stop()


def print_score(benchmark: str, score: dict[str, Any]) -> None:
    """Prints the metrics of a score as a table."""
    table = Table("metric", "value")
    for name, value in score["metrics"].items():
        table.add_row(name, "—" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}")
    console.print(f"{benchmark}: {score['n']} rows, scorer {score['scorer']}", table)


def _parse_arguments(benchmark: Benchmark, arguments: Sequence[str]) -> tuple[Target | None, dict[str, Any], list[str]]:
    """Returns (the shared settings, or None if invalid; the benchmark's own settings as given; errors)."""
    fields = {**Target.model_fields, **benchmark.Config.model_fields}
    values, messages = {}, []
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator:
            messages.append(f"Cannot read {argument!r}: a setting is written key=value, such as max_rows=32.")
        elif key not in fields:
            near = nearest(key, fields)
            messages.append(
                f"Unknown key {key}: " + (f"did you mean {near}?" if near else f"known: {', '.join(fields)}.")
            )
        elif fields[key].annotation == str | None:  # out=2024 is a folder, not a number
            values[key] = None if text == "null" else text
        else:
            try:
                values[key] = yaml.load(text, PlainLoader)
            except YAML_ERRORS:
                messages.append(
                    f"Cannot read {argument!r}: its value is not YAML; use a number, true, false, null or text."
                )
    given = {key: value for key, value in values.items() if key not in Target.model_fields}
    target, errors = checked_section("", Target, {key: value for key, value in values.items() if key not in given})
    return (None if errors else target), given, [*messages, *(error.message for error in errors)]


def _config(benchmark: Benchmark, resolve: Callable[[], ResolvedModel], given: Mapping[str, Any]) -> Section:
    """Returns the benchmark's settings: those of the run, overridden by those of the command line.

    Raises:
        ConfigError: missing, invalid or incompatible settings, and the errors of resolving the model.
    """
    try:
        run_settings, messages = resolve().scored_with, []
        changed = {key for key, value in given.items() if value != run_settings.get(key)}
        stale = [key for key, owner in benchmark.belongs_to.items() if owner in changed]
        run_settings = {key: value for key, value in run_settings.items() if key not in stale}
    except ConfigError as error:
        run_settings, messages = None, error.errors
    config, errors = checked_section("", benchmark.Config, {**(run_settings or {}), **given})
    # A model that was not resolved may have set them: do not report missing settings.
    messages += [error.message for error in errors if run_settings is not None or error.kind != "missing"]
    typed = given.get("template")
    if not errors and typed is not None and config.template is None:  # a data set's own; only a run passes it on
        messages.append(
            f"Invalid template={typed}: this benchmark asks its texts as they are, or as chats; use template=null or "
            "template=chat."
        )
    if messages or errors:
        raise ConfigError(messages)
    return config


def _served(target: Target) -> str:
    """Suffix of the output folder if the backend or dtype is not the default."""
    changed = [f"dtype={target.dtype}"] if target.dtype != "auto" else []
    changed += [f"backend={target.backend}"] if target.backend != "hf" else []
    return "".join(f"-{argument}" for argument in changed)


def _output_folder(
    name: str, target: Target, given: Mapping[str, Any], resolve: Callable[[], ResolvedModel], benchmark: str
) -> Path:
    if target.out:
        return _writable(Path(target.out))
    resolved, path = resolve(), Path(name)
    own = resolved.run / "eval" / benchmark if resolved.run else None
    module = benchmarks.BENCHMARKS[benchmark]
    benchmark += _label(target, given, resolved.scored_with, module) + _served(target)
    if KINDS[module.kind].of_pictures and target.data_root not in (None, resolved.data_root):  # the images may differ
        benchmark += f"-data_root={_in_short(os.path.abspath(target.data_root))}"
    if target.base and resolved.base and not is_hash(resolved.base):  # a hub commit cannot be compared with it
        benchmark += f"-base={_in_short(target.base)}"
    benchmark += _machine_label(target, resolved, own) if own and target.backend == "hf" else ""
    if resolved.run is None:
        return _writable(
            path / "eval" / fitting(benchmark)
            if path.is_dir()
            else Path("results") / "eval" / _safe(name) / fitting(benchmark)
        )
    inside = path.resolve().relative_to(resolved.run.resolve()).parts
    label = benchmark if inside in ((), ("adapter",)) else f"{benchmark}-{'-'.join(inside)}"
    answers = resolved.run / "eval" / fitting(label)
    if links := [path for path in (answers.parent, answers) if path.is_symlink()] or links_in(answers):
        raise ConfigError(
            [f"Invalid {links[0]}: it is a link, and answers are written there; move it away, or give out=DIR."]
        )
    return _writable(answers)


def _safe(name: str) -> str:
    """Returns a served name or hub id as a relative path without `..`."""
    return "/".join(fitting(part) for part in name.split("/") if part not in ("", ".", "..")) or "model"


def _label(target: Target, given: Mapping[str, Any], own: Mapping[str, Any], benchmark: Benchmark) -> str:
    """Suffix of the output folder for settings that differ from the run's or the defaults, so that no answers are
    overwritten.

    Settings that only affect scores (`benchmark.scoring`) do not change the folder.
    """
    fields, scoring = benchmark.Config.model_fields, benchmark.scoring
    defaults = {key: spec.get_default(call_default_factory=True) for key, spec in fields.items()} | own
    changed = [key for key in given if key not in scoring and given[key] != defaults[key]]
    values = {key: str(given[key]) for key in changed}
    if target.rows:
        values["rows"] = target.rows if target.rows == BENCHMARK else os.path.abspath(target.rows)
    return "".join(f"-{key}={_in_short(value)}" for key, value in values.items())


def _in_short(value: str) -> str:
    """Returns a value for use in a folder's name: a path becomes its stem and a hash of the absolute path."""
    path = Path(value)
    if path.name == value:
        return value
    return f"{path.stem}-{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:6]}"


def _machine_label(target: Target, resolved: ResolvedModel, own: Path) -> str:
    """Returns a suffix for a device or autocast other than that of the run's own answers, which depend on both.

    score_only=true uses no device, so it means the run's own answers unless device=... is given too.

    Args:
        own: folder of the run's own answers; without a readable generation.json there are none to keep.
    """
    device = target.device
    if device == "auto":
        device = None if target.score_only else choose_device("auto").type
    planned = {
        "device": device,
        "autocast": choose_precision(resolved.autocast, resolved.model.dtype, device or "cpu").label,
    }
    try:
        generation = read_record(own / "generation.json")
    except ConfigError:
        return ""
    if device is None or generation is None:
        return ""
    changed = {key: value for key, value in planned.items() if key in generation and generation[key] != value}
    return "".join(f"-{key}={value.removeprefix('torch.').lower()}" for key, value in changed.items())


def _writable(folder: Path) -> Path:
    nearest_there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if os.path.isdir(nearest_there) and os.access(nearest_there, os.W_OK | os.X_OK):
        return folder
    problem = "cannot be written to" if os.path.isdir(nearest_there) else "is a file"
    raise ConfigError([f"Invalid out={folder}: {nearest_there} {problem}; name another folder with out=DIR."])


def _choose_device(target: Target) -> torch.device | None:
    if target.score_only or target.backend != "hf":
        return None
    if target.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["Invalid device=cuda: torch sees no GPU here; use device=cpu or device=auto."])
    return choose_device(target.device)


def _check_kind(
    benchmark: Benchmark, target: Target, given: Mapping[str, Any], resolve: Callable[[], ResolvedModel]
) -> None:
    """Checks that the model and the backend support the kind of benchmark.

    Raises:
        ConfigError: they do not, such as a text benchmark for a run that classifies images.
    """
    kind = KINDS[benchmark.kind]
    if target.backend != "hf" and (kind.of_pictures or not benchmark.generates):
        needs = "images" if kind.of_pictures else "likelihoods of given answers"
        raise ConfigError(
            [f"Invalid backend={target.backend}: it generates text, and this benchmark needs {needs}; use backend=hf."]
        )
    if target.backend == "openai" and "batch_size" in given:
        raise ConfigError(
            [
                f"Invalid batch_size={given['batch_size']} with backend=openai: each row is a request, and concurrency "
                "sets how many run at a time; drop it."
            ]
        )
    resolved = resolve()
    if resolved.run is None and kind.needs_run:  # without a run, the model's kind is not known yet
        raise ConfigError(
            [f"Invalid path {resolved.weights}: only a run defines the classes of images; name {kind.needs}."]
        )
    if resolved.run is not None and not trains_on(resolved.model.family, benchmark.kind):
        does = KINDS[resolved.model.traits.rows].does
        raise ConfigError([f"Invalid path {resolved.weights}: this run {does}; name {kind.needs}."])
    if resolved.model is not None and resolved.model.traits.classifies and "choices" not in benchmark.row_columns:
        raise ConfigError(
            [
                f"Invalid path {resolved.weights}: this run classifies texts and generates none; name a language "
                "model, or score it with python -m eval.glue."
            ]
        )


def _rows(command: Command) -> Sequence[Any]:
    return [] if command.target.score_only else KINDS[command.benchmark.kind].rows(command)


def _backend(
    resolved: ResolvedModel, target: Target, device: torch.device | None, batch_size: int, benchmark: Benchmark
) -> Backend | ImageBackend | Generator:
    """Returns the backend that generates the answers.

    Raises:
        ConfigError: the backend does not support the model, or is not installed.
    """
    dtype = None if target.dtype == "auto" else target.dtype
    if target.backend == "hf":
        return _load(resolved, device, batch_size, benchmark.kind, dtype)
    if target.backend == "openai":
        endpoint = Endpoint(
            target.base_url,
            resolved.weights,
            target.base_key,
            concurrency=target.concurrency,
            requests_per_minute=target.requests_per_minute,
            timeout_s=target.timeout,
        )
        return OpenAIBackend(endpoint, chat=target.chat)
    folder = Path(resolved.weights)
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if adapter is not None and (folder / MOVED).is_file():
        raise ConfigError(
            [
                f"Invalid backend=vllm for {folder}: this checkpoint needs its run's initial adapter subtracted from "
                "the backbone, which vLLM does not do; score the run's adapter/, or use backend=hf."
            ]
        )
    model = resolved.model or model_of(resolved.weights)
    if model.quantize != "none":
        raise ConfigError(
            [
                f"Invalid backend=vllm for {folder}: its backbone is quantized to 4 bits "
                f"(model.quantize={model.quantize}), and vLLM would load it without that; use backend=hf."
            ]
        )
    with validated_unchanged(folder):
        return VLLMBackend(
            resolved.weights if resolved.model and adapter is None else backbone_source(model),
            adapter,
            tokenizer=saved_processor(model, adapter) if adapter else None,
            revision=model.revision,
            batch_size=batch_size,
            dtype=dtype or _served_dtype(model, resolved.autocast),
            identity=identify(resolved),
        )


def _served_dtype(model: ModelConfig, autocast: str) -> str:
    """Returns the dtype for vLLM, which computes in that of the weights: the model's own, or wider on a CPU."""
    device = choose_device("auto")
    return str(choose_precision(autocast, model.dtype, device).held).removeprefix("torch.")


def _load(
    resolved: ResolvedModel, device: torch.device, batch_size: int, kind: str, dtype: str | None = None
) -> Backend | ImageBackend:
    try:
        classes, holder = None, resolved.run or Path(resolved.weights)  # an exported folder has the run's classes
        if resolved.run or (holder / CLASSES_FILE).is_file():
            classes = FAMILIES[(resolved.model or model_of(resolved.weights)).family].classes_of_run(holder)
        with validated_unchanged(Path(resolved.weights)):
            identity = identify(resolved, classes) | ({"dtype": dtype} if dtype else {})
            model, processor, _ = load_for_inference(
                resolved.weights, resolved.model, device, classes, dtype, resolved.autocast
            )
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        # a truncated file, an invalid config.json, an adapter of another backbone: each library raises its own errors
        raise ConfigError(
            [f"Cannot load {resolved.weights}: {reason_of(error)}; name a complete adapter or model, or copy it again."]
        ) from error
    # A run's autocast follows its model.dtype, also where full fine-tuning made the weights FP32.
    if dtype is None:
        dtype = (
            resolved.model.dtype
            if resolved.model
            else str(stored_dtype(next(model.parameters()))).removeprefix("torch.")
        )
    precision = choose_precision(resolved.autocast, dtype, device)
    console.print(f"precision: {precision}", markup=False, soft_wrap=True)
    return KINDS[kind].backend(
        model,
        processor,
        batch_size=batch_size,
        precision=precision,
        identity=identity,
        **KINDS[kind].backend_settings(resolved, dtype),
    )


if __name__ == "__main__":
    sys.exit("Name a benchmark: python -m eval.gsm8k PATH")
