"""Reads and checks all inputs of a run before any weight is loaded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora import methods
from flatlora.config.experiment import Experiment, keys_of_validation
from flatlora.experiment.suite import Suite
from flatlora.inputs.chats import template_errors
from flatlora.inputs.rows import fingerprint, gather, warn_of_unread_root
from flatlora.methods.adapters.lora import find_targets
from flatlora.models import fit, loading
from flatlora.models.initial_adapters import add_whole_layers, fit_errors
from flatlora.runs import trackers
from flatlora.train import distributed, training
from flatlora.trained.initial import InitialAdapter, find_initial
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import choose_precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run besides weights."""

    device: torch.device
    processor: training.Processor  # a tokenizer, an image processor, or none
    rows: Any  # with `train`, `validation`, `test` and `sha256`
    asked: dict[str, Sequence[Any]]  # {benchmark: its rows}
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    data_sha256: str  # of the data of training and validation
    initial: InitialAdapter | None = None  # that peft.init_from names


def prepare(suite: Suite, experiment: Experiment, device: torch.device) -> Inputs:
    """Reads the rows and checks them and the method against the model's architecture; no weight is loaded.

    Raises:
        ConfigError: model, method, data or benchmarks are invalid or do not fit together; nothing was written.
    """
    kind = suite.kind(experiment)
    initial, missing = None, []
    try:
        initial = _find_initial(experiment)
    except ConfigError as error:
        missing = error.errors
    skeleton, (processor, rows), _, own, _, _ = gather(
        lambda: _check_model(experiment, device, initial),
        lambda: _read(suite, experiment, initial),
        lambda: _check_benchmarks(suite, experiment),
        lambda: _own_rows(suite, experiment),
        lambda: _raise_if(missing),
        lambda: _raise_if(trackers.package_errors(experiment)),
    )
    _warn_of_unread_data_root(suite, experiment)
    known = kind.known(experiment, processor, rows)
    names = [name for name in experiment.eval if name not in own]
    _, _, _, _, *test_rows = gather(
        lambda: _raise_if(_chat_errors(experiment, processor)),
        lambda: _check_validation(experiment, len(rows.validation)),
        lambda: kind.check(experiment, skeleton, processor, rows),
        lambda: _raise_if(_initial_errors(experiment, initial, processor)),
        *(lambda name=name: _test_rows(suite, experiment, rows.test, name, known) for name in names),
    )
    asked = own | dict(zip(names, test_rows, strict=True))
    collate = kind.collator(experiment.model, processor)
    return Inputs(device, processor, rows, asked, collate, rows.sha256, initial)


def _find_initial(experiment: Experiment) -> InitialAdapter | None:
    source = getattr(experiment.peft, "init_from", None)
    return None if source is None else distributed.main_process_first(lambda: find_initial(source))


def _initial_errors(experiment: Experiment, initial: InitialAdapter | None, processor: Any) -> list[str]:
    """Returns errors if the adapter of peft.init_from is not one that this run trains, on the same base."""
    if initial is None:
        return []
    skeleton = _skeleton(experiment, initial)
    config = methods.ADAPTERS[experiment.peft.method].peft_config(skeleton, experiment.peft)
    errors = fit_errors(get_peft_model(skeleton, config), initial.folder, experiment.peft.init_from)
    return [*errors, *initial.errors(experiment.model, processor)]


def _warn_of_unread_data_root(suite: Suite, experiment: Experiment) -> None:
    """Warns if data_root is not used. It is no error: a sweep may mix datasets from files and generated ones."""
    section = experiment.dataset
    own = any(suite.benchmarks[name].own_rows(config) for name, config in experiment.eval.items())
    if not own and distributed.is_main_process():
        warn_of_unread_root(experiment.data_root, suite.datasets[section.loader].sources(section), section.name)


def _skeleton(experiment: Experiment, initial: InitialAdapter | None) -> nn.Module:
    """Returns the architecture without weights, with the layers that the adapter of peft.init_from brings."""
    skeleton = loading.skeleton(experiment.model)
    if initial is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # intended here
            add_whole_layers(skeleton, initial.folder)
    return skeleton


def _check_model(experiment: Experiment, device: torch.device, initial: InitialAdapter | None) -> nn.Module:
    """Returns the architecture without weights, after checking it against the experiment."""
    skeleton = _skeleton(experiment, initial)
    gather(
        lambda: methods.ADAPTERS[experiment.peft.method].check(skeleton, experiment.peft),
        lambda: loading.check_weights(experiment.model, device),
        lambda: _raise_if(fit.attention_errors(experiment.model, skeleton)),
        lambda: _raise_if(
            fit.packing_errors(experiment.model, skeleton, reads_weights=_reads_weights(experiment)),
        ),
        lambda: _raise_if(_position_errors(experiment, skeleton)),
        lambda: _raise_if(_sharding_errors(experiment, skeleton, device) if experiment.trainer.fsdp else []),
    )
    _raise_if(_peft_errors(experiment, skeleton))
    return skeleton


def _raise_if(errors: Sequence[str]) -> None:
    if errors:
        raise ConfigError(errors)


def _reads_weights(experiment: Experiment) -> str | None:
    """Returns the setting that reads, changes or trains W; None if the run only multiplies by it."""
    if methods.ADAPTERS[experiment.peft.method].needs_dense:
        return f"peft={experiment.peft.name}"
    if experiment.flat and experiment.rho.mode in ("copy", "inplace"):
        return f"rho.mode={experiment.rho.mode}"
    return f"rho={experiment.rho.name}" if experiment.regularized else None


def _sharding_errors(experiment: Experiment, skeleton: nn.Module, device: torch.device) -> list[str]:
    errors = fit.sharding_errors(experiment.model, skeleton)
    precision = choose_precision(experiment.trainer.autocast, experiment.model.dtype, device)
    if precision.held != precision.stored:
        errors.append(
            f"Invalid trainer=fsdp with model.dtype={experiment.model.dtype} on this CPU: it holds such weights as "
            f"float32 ({precision.reason}), and FSDP2 gathers them as they were stored; use model.dtype=float32, or "
            "trainer=ddp."
        )
    return errors


def _position_errors(experiment: Experiment, skeleton: nn.Module) -> list[str]:
    longest = getattr(experiment.dataset, "max_length", None)
    return [] if longest is None else fit.position_errors(experiment.model, skeleton, longest)


def _peft_errors(experiment: Experiment, skeleton: nn.Module) -> list[str]:
    """Returns PEFT's error for an adapter on the experiment's layers; adds such an adapter to `skeleton`."""
    wanted = getattr(experiment.peft, "target_modules", None)
    if wanted is None:
        return []
    targets = find_targets(skeleton, wanted)
    try:
        get_peft_model(skeleton, LoraConfig(r=1, target_modules=targets))
    except ValueError as error:
        return [f"Invalid peft.target_modules={wanted} with {experiment.model.hub_id}: {error}"]
    return []


def _read(suite: Suite, experiment: Experiment, initial: InitialAdapter | None) -> tuple[Any, Any]:
    """Returns the processor and the rows; if the processor fails to load, errors of the data files are added.

    Raises:
        ConfigError: processor or data cannot be loaded, or do not fit together.
    """
    try:
        processor = loading.load_processor(initial.tokens_of(experiment.model) if initial else experiment.model)
    except ConfigError as error:
        raise ConfigError([*error.errors, *_file_errors(suite, experiment)]) from error
    return processor, distributed.main_process_first(lambda: suite.kind(experiment).read(experiment, processor))


def _file_errors(suite: Suite, experiment: Experiment) -> list[str]:
    """Returns errors for files of the dataset that are missing or cannot be reached on the hub."""
    try:
        known = suite.datasets[experiment.dataset.loader].sources(experiment.dataset)
        gather(*(lambda source=source: fingerprint(source, experiment.data_root) for source in known))
    except ConfigError as error:
        return error.errors
    return []


def _check_validation(experiment: Experiment, left: int) -> None:
    """Checks that validation rows are left: those that repeat training rows are removed.

    Raises:
        ConfigError: none is left, and validation is requested.
    """
    size = experiment.dataset.validation_key
    if not left and experiment.dataset.evaluate == "validation":
        raise ConfigError(
            [
                f"Invalid dataset.evaluate=validation: no validation row is left of {experiment.dataset.name}; set "
                f"dataset.{size}, take fewer train rows, or leave the key out."
            ]
        )
    if not left and (keys := keys_of_validation(experiment.optim)):
        given = ", ".join(f"optim.{key}={getattr(experiment.optim, key)}" for key in keys)
        raise ConfigError(
            [
                f"Invalid {given}: no validation row is left of {experiment.dataset.name}, for all stand among its "
                f"train rows, or there are none; set dataset.{size}, take fewer train rows, or leave the keys out."
            ]
        )


def _check_benchmarks(suite: Suite, experiment: Experiment) -> None:
    benchmarks = [(suite.benchmarks[name], config) for name, config in experiment.eval.items()]
    gather(
        *(
            lambda module=module, config=config: module.check_settings(config, experiment.model)
            for module, config in benchmarks
        )
    )


def _chat_errors(experiment: Experiment, processor: Any) -> list[str]:
    """Returns an error for each benchmark that asks in chats, if the tokenizer has no template for them."""
    asking = [name for name, config in experiment.eval.items() if getattr(config, "template", None) == "chat"]
    return [error for name in asking for error in template_errors(processor, f"eval.{name}.template")]


def _own_rows(suite: Suite, experiment: Experiment) -> dict[str, Sequence[Any]]:
    """Returns {benchmark: rows} of the benchmarks that use their own rows with any dataset."""
    names = [name for name, config in experiment.eval.items() if suite.benchmarks[name].own_rows(config)]
    rows = gather(*(lambda name=name: _test_rows(suite, experiment, [], name, {}) for name in names))
    return dict(zip(names, rows, strict=True))


def _test_rows(
    suite: Suite, experiment: Experiment, test: Sequence[Any], name: str, known: Mapping[str, Any]
) -> Sequence[Any]:
    """Returns the rows that a benchmark scores at the end of a run.

    Args:
        test: the dataset's test rows, or the validation rows in their place.
        known: keyword arguments of `check_rows` about the model.

    Raises:
        ConfigError: the rows are missing or cannot be scored.
    """
    module, config = suite.benchmarks[name], experiment.eval[name]
    template, split = getattr(config, "template", None), experiment.dataset.evaluate
    asked = getattr(experiment.dataset, "template", None)  # None: a form of its own, which is no chat
    if module.benchmark_rows is not None and (module.own_rows(config) or (not test and split == "test")):
        rows, source = module.benchmark_rows(experiment.data_root, config), f"{name}'s own rows"
    elif template not in (None, asked) and (asked is not None or template == "chat"):
        raise ConfigError(
            [
                f"Invalid eval.{name}.template={template} with dataset={experiment.dataset.name}: its test rows are "
                f"asked, in dataset.template={asked or 'null'}; leave the key out."
            ]
        )
    else:
        rows, source = test, f"dataset {experiment.dataset.name}, {split} rows"
    module.check_rows(rows, source, config, **known)
    return rows
