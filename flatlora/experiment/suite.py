"""The suite of datasets, benchmarks and option files, which run_exp.py defines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatlora import methods
from flatlora.config.experiment import Experiment
from flatlora.config.sections import ModelConfig
from flatlora.config.settings import Section
from flatlora.experiment.plugins import Benchmark, DataSet
from flatlora.utils.errors import SettingError
from flatlora.utils.registry import Registry


class RowKind(ABC):
    """Handles one kind of rows (text, image, text_to_image): reads, checks, collates and saves them.

    The rows have the attributes `train`, `validation`, `test` and `sha256`.
    """

    @abstractmethod
    def read(self, experiment: Experiment, processor: Any) -> Any:
        """Returns the rows of the experiment's dataset.

        Raises:
            ConfigError: files are missing, or rows are invalid.
        """

    @abstractmethod
    def collator(self, model: ModelConfig, processor: Any) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
        """Returns the function that makes a micro-batch from rows."""

    @abstractmethod
    def known(self, experiment: Experiment, processor: Any, rows: Any) -> dict[str, Any]:
        """Returns keyword arguments of a benchmark's `check_rows`: what is known of the model before loading."""

    @abstractmethod
    def save(self, folder: Path, rows: Any) -> None:
        """Saves the parts of the rows in a run's folder that are needed to score the run later."""

    @abstractmethod
    def check(self, experiment: Experiment, skeleton: nn.Module, processor: Any, rows: Any) -> None:
        """Checks the rows against the model's architecture.

        Raises:
            ConfigError: the model cannot read some rows.
        """

    def encode(self, experiment: Experiment, rows: Any, device: torch.device, base: Callable[[], str]) -> Any:
        """Returns the rows in the form that the model takes; `base` waits for the identity of the backbone."""
        return rows

    def classes(self, rows: Any) -> Any:
        """Returns the classes of a classifier; None for rows without classes."""
        return None

    def chat_template_sha256(self, rows: Any) -> str | None:
        """Returns the SHA-256 of the chat template that rows are written in; None for rows that are no chats."""
        return None


@dataclass(frozen=True)
class Suite:
    """Datasets, benchmarks and option files.

    Args:
        conf_dir: folder of option files.
        script: entry point for further processes of a run.
        datasets, benchmarks: registries of plug-ins.
        kinds: {kind of rows: its handler}.
        backends: {kind of rows: class of the backend for a model in memory}.
        evaluate: (benchmark, backend, rows, folder, config) → score.
        print_score: (benchmark, score) prints a score.
    """

    conf_dir: Path
    script: Path
    datasets: Registry[DataSet]
    benchmarks: Registry[Benchmark]
    kinds: Mapping[str, RowKind]
    backends: Mapping[str, Callable[..., Any]]
    evaluate: Callable[..., dict[str, Any]]
    print_score: Callable[[str, dict[str, Any]], None]

    def kind(self, experiment: Experiment) -> RowKind:
        """Returns the handler of an experiment's rows."""
        return self.kinds[experiment.dataset.kind]

    # The methods below implement `flatlora.config.experiment.Registry`.

    def section_class(self, section: str, raw: Mapping[str, Any]) -> type[Section] | str:
        try:
            if section == "dataset":
                return self.datasets[str(raw.get("loader"))].Config
            if section == "peft":
                return methods.ADAPTERS[str(raw.get("method"))].Config
            if section == "rho":
                return methods.REGULARIZERS[str(raw.get("method"))].Config
            return self.benchmarks[section.removeprefix("eval.")].Config
        except KeyError as error:
            return error.args[0]

    def owners(self, section: str, key: str) -> list[str]:
        return methods.owners(section, key)

    def combination_errors(self, experiment: Experiment) -> list[SettingError]:
        return [*methods.combination_errors(experiment), *self._benchmark_errors(experiment)]

    def _benchmark_errors(self, experiment: Experiment) -> Iterable[SettingError]:
        task, glue = getattr(experiment.dataset, "task", None), experiment.eval.get("glue")
        if glue is not None and task is not None and glue.task != task:
            yield SettingError(
                ("dataset.task", "eval.glue.task"),
                f"Invalid eval.glue.task={glue.task} with dataset={experiment.dataset.name}: its metrics are "
                f"those of {task}; leave the key out.",
            )
        for name, config in experiment.eval.items():
            scored = self.benchmarks[name].kind
            if scored != experiment.dataset.kind:
                yield SettingError(
                    ("dataset.kind", f"eval.{name}"),
                    f"Invalid eval=[{name}] with dataset={experiment.dataset.name} ({experiment.dataset.kind}): it "
                    f"scores {scored} data sets; leave it out of eval=[...], or change the data set.",
                )
            elif experiment.model.traits.classifies and (
                "choices" not in self.benchmarks[name].row_columns or getattr(config, "metric", None) == "published"
            ):
                yield SettingError(
                    ("model.family", f"eval.{name}"),
                    f"Invalid eval=[{name}] with model={experiment.model.name} ({experiment.model.family}): it scores "
                    "classes and generates no text; use eval=[glue] with eval.glue.metric=likelihood, or eval=[].",
                )
            elif experiment.dataset.evaluate == "validation" and (
                self.benchmarks[name].own_rows(config) or self.benchmarks[name].test_only
            ):
                yield SettingError(
                    ("dataset.evaluate", f"eval.{name}"),
                    f"Invalid eval=[{name}] with dataset.evaluate=validation: its rows are test rows; leave it out of "
                    "eval=[...] (eval_loss is of validation rows).",
                )
