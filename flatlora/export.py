"""`python -m flatlora.export PATH [base=BASE] ...` prepares a trained model for others, with a model card.

    python -m flatlora.export RUN --merge DIR              the whole model: adapter merged into its base, tokenizer
    python -m flatlora.export RUN --copy DIR               the trained files as they are: an adapter, or a whole model
    python -m flatlora.export RUN --push USER/NAME         the same, to the hub
    python -m flatlora.export RUN --merge DIR --push USER/NAME

PATH is a run, a checkpoint, an adapter or a model folder. base=BASE names the base model of an adapter, if it moved.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from flatlora.config.sections import ModelConfig
from flatlora.inputs.rows import gather
from flatlora.inspect import local_model
from flatlora.models.loading import model_of, saved_processor
from flatlora.models.saved_adapters import check_adapter
from flatlora.models.starts import MOVED
from flatlora.trained.card import model_card
from flatlora.trained.description import is_local
from flatlora.trained.merge import merge, merge_errors, merged_bytes
from flatlora.trained.place import ResolvedModel, base_errors
from flatlora.utils.console import console, quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic, write_folder, write_json
from flatlora.utils.records import read_record

_WEIGHTS = ("adapter_config.json", "adapter_model.*", "pytorch_lora_weights.safetensors", "config.json")
_WEIGHTS += ("generation_config.json", "model*.safetensors", "model.safetensors.index.json")
_PROCESSOR = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja", "*processor_config.json")
_SLACK_BYTES = 64 << 20  # tokenizer, card, and what the file system needs besides


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if writing or pushing failed, 2 for invalid arguments, 130 if interrupted."""
    options = _options(arguments)
    quiet_libraries()
    target = options.merge or options.copy
    try:
        resolved, config = _checked(options)
        with contextlib.ExitStack() as stack:
            folder = Path(target or stack.enter_context(tempfile.TemporaryDirectory(prefix="flatlora-")), "")
            _write(options, resolved, config, folder, name=options.push or folder.name)
            if options.push:
                return _push(options, folder, kept=target is not None)
    except ConfigError as error:
        report_errors(error)
        return 2
    except OSError as error:
        console.print(f"The export failed: {reason_of(error)}.{_missing(target)}", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(f"Interrupted.{_missing(target)}", markup=False, soft_wrap=True)
        return 130
    return 0


def _missing(target: str | None) -> str:
    return "" if target is None or os.path.lexists(target) else f" {target} was not written."


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flatlora.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("base", metavar="base=BASE", nargs="?", type=_base, help="an adapter's base, if it moved")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--merge", metavar="DIR", help="new folder for the merged model")
    form.add_argument("--copy", metavar="DIR", help="new folder for the trained files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of --merge; the base's by default")
    parser.add_argument("--push", metavar="HUB_ID", help="repository on the hub, made if it does not exist")
    parser.add_argument("--private", action="store_true", help="of --push: make a new repository private")
    options = parser.parse_args(arguments)
    if not (options.merge or options.copy or options.push):
        parser.error("nothing to do: give --merge DIR, --copy DIR or --push HUB_ID")
    if options.dtype and not options.merge:
        parser.error(f"--dtype={options.dtype} without --merge: only a merged model is rounded; drop it")
    if options.private and not options.push:
        parser.error("--private without --push: nothing is pushed; drop it")
    return options


def _base(text: str) -> str:
    key, _, value = text.partition("=")
    if key != "base" or not value:
        raise argparse.ArgumentTypeError(f"{text}: an adapter's base model is written base=PATH_OR_HUB_ID")
    return value


def _checked(options: argparse.Namespace) -> tuple[ResolvedModel, ModelConfig]:
    """Returns the model and the config of its backbone, after all checks that need no weights.

    Raises:
        ConfigError: all errors together.
    """

    @functools.cache
    def resolve() -> ResolvedModel:
        return local_model(options.path, options.base)

    @functools.cache
    def configure() -> ModelConfig:
        if options.merge or options.base:  # copying reads no base
            _raise(base_errors(resolve(), options.base))
        return _config(resolve())

    # A step that needs an earlier step repeats it. `gather` reports the errors of all steps together, each only once.
    steps: list[Callable[[], Any]] = [resolve, configure]
    if options.merge:
        steps.append(lambda: _raise(merge_errors(resolve(), configure())))
    else:
        steps.append(lambda: _raise(_copy_errors(resolve(), configure(), options)))
    if target := options.merge or options.copy:
        steps.append(lambda: _check_target(Path(target)))
        steps.append(lambda: _check_space(Path(target), _bytes(options, resolve(), configure())))
    if options.push:
        steps.append(lambda: _check_push(options.push))
    resolved, config, *_ = gather(*steps)
    return resolved, config


def _raise(errors: list[str]) -> None:
    if errors:
        raise ConfigError(errors)


def _config(resolved: ResolvedModel) -> ModelConfig:
    """Returns the backbone's config.

    Raises:
        ConfigError: the adapter is broken, or its base's config.json cannot be read.
    """
    if (Path(resolved.weights) / "adapter_config.json").is_file():
        check_adapter(Path(resolved.weights))
    return resolved.model or model_of(resolved.weights)


def _copy_errors(resolved: ResolvedModel, config: ModelConfig, options: argparse.Namespace) -> list[str]:
    folder, errors = Path(resolved.weights), []
    if (folder / MOVED).is_file():
        errors.append(
            f"Invalid checkpoint {folder}: its adapter fits the backbone less the start of its run, which others do "
            "not have; export the finished run, or use --merge."
        )
    if options.push and (folder / "adapter_config.json").is_file() and is_local(config.hub_id):
        errors.append(
            f"Invalid base model {config.hub_id} with --push={options.push}: it is a folder of this machine, which "
            "nobody else can load; name it with base=HUB_ID, or push the whole model with --merge."
        )
    return errors


def _bytes(options: argparse.Namespace, resolved: ResolvedModel, config: ModelConfig) -> int:
    if options.merge:
        return merged_bytes(config, options.dtype or config.dtype)
    return sum(path.stat().st_size for path in _files(resolved, config))


def _check_target(target: Path) -> None:
    """
    Raises:
        ConfigError: the folder exists or cannot be made.
    """
    if os.path.lexists(target):
        raise ConfigError([f"Invalid folder {target}: it exists, and nothing is overwritten; name a new one."])
    above = _folder_above(target)
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        problem = "cannot be written to" if above.is_dir() else "is a file"
        raise ConfigError([f"Invalid folder {target}: {above} {problem}; name another."])


def _check_space(target: Path, size: int) -> None:
    """
    Raises:
        ConfigError: so many bytes, and a tokenizer, do not fit on the folder's disk.
    """
    needed, free = size + _SLACK_BYTES, shutil.disk_usage(_folder_above(target)).free
    if needed > free:
        raise ConfigError(
            [
                f"Invalid folder {target}: {needed / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free; "
                "free some, or name a folder on another disk."
            ]
        )


def _folder_above(target: Path) -> Path:
    return next(path for path in target.absolute().parents if os.path.lexists(path))


def _check_push(hub_id: str) -> None:
    """
    Raises:
        ConfigError: the id is invalid, or there is no valid token for the hub.
    """
    errors = []
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        errors.append(f"Invalid --push={hub_id}: {reason_of(error)}; it is written USER/NAME.")
    token = get_token()
    if token is None:
        errors.append(
            f"Missing token for --push={hub_id}: the hub needs one that may write; run `hf auth login`, or set "
            "HF_TOKEN to one of https://huggingface.co/settings/tokens."
        )
    if constants.is_offline_mode():
        errors.append(f"Invalid --push={hub_id} with HF_HUB_OFFLINE=1: the hub must be reached; unset the variable.")
    elif token is not None and not errors:
        try:
            HfApi().whoami(token)
        except (HfHubHTTPError, OSError) as error:
            errors.append(
                f"Invalid token for --push={hub_id}: {reason_of(error)}; run `hf auth login`, or check the network."
            )
    _raise(errors)


def _write(
    options: argparse.Namespace, resolved: ResolvedModel, config: ModelConfig, target: Path, *, name: str
) -> None:
    """Writes the model and its card to `target`, whole or not at all."""
    with write_folder(target) as folder:
        rounding = None
        if options.merge:
            rounding = merge(resolved, config, folder, options.dtype or config.dtype)
            console.print(f"merged: {rounding}", markup=False, soft_wrap=True)
        else:
            for path in _files(resolved, config):
                shutil.copyfile(path, folder / path.name)
            _name_base(folder, config)
        write_atomic(folder / "README.md", str(model_card(resolved, config, name, rounding)))
        if (options.merge or options.copy) and os.path.lexists(target):
            raise ConfigError([f"Invalid folder {target}: another process made it meanwhile; name a new one."])
    if options.merge or options.copy:
        console.print(f"written: {target}", markup=False, soft_wrap=True)


def _files(resolved: ResolvedModel, config: ModelConfig) -> Iterator[Path]:
    """Yields the files of a model's weights and processor, without what a resume from a checkpoint needs."""
    folder = Path(resolved.weights)
    processor = saved_processor(config, folder)
    names = {}
    for parent, patterns in ((processor, _PROCESSOR), (folder, _WEIGHTS)):
        names |= {path.name: path for pattern in patterns if parent for path in sorted(parent.glob(pattern))}
    if resolved.run and (resolved.run / "classes.json").is_file():
        names["classes.json"] = resolved.run / "classes.json"
    yield from names.values()


def _name_base(folder: Path, config: ModelConfig) -> None:
    """Names the base in a copied adapter as it was given on the command line."""
    path = folder / "adapter_config.json"
    if path.is_file():
        write_json(path, (read_record(path) or {}) | {"base_model_name_or_path": config.hub_id})


def _push(options: argparse.Namespace, folder: Path, *, kept: bool) -> int:
    """Uploads the folder; returns the exit code."""
    api = HfApi()
    try:
        api.create_repo(options.push, private=options.private or None, exist_ok=True)
        url = api.upload_folder(repo_id=options.push, folder_path=folder, commit_message="Upload from flatlora.export")
    except (HfHubHTTPError, OSError) as error:
        again = f"`hf upload {options.push} {folder}` tries again" if kept else "the same command tries again"
        console.print(f"The upload failed: {reason_of(error)}; {again}.", markup=False, soft_wrap=True)
        return 1
    console.print(f"pushed: {url}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
