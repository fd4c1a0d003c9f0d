"""What the data sets and benchmarks of a suite bring along; run_exp.py puts them together."""

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
    """One kind of rows (text, image, captioned): how they are read, checked, collated and kept.

    `Rows` of a kind have `train`, `validation`, `test` and `sha256`.
    """

    @abstractmethod
    def read(self, experiment: Experiment, processor: Any) -> Any:
        """The rows of the experiment's data set.

        Raises:
            ConfigError: files that are missing, or rows that do not fit.
        """

    @abstractmethod
    def collator(self, model: ModelConfig, processor: Any) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
        """What makes a micro-batch of rows."""

    @abstractmethod
    def known(self, experiment: Experiment, processor: Any, rows: Any) -> dict[str, Any]:
        """Keywords of a benchmark's `check_rows`: what is known of the model before its weights are loaded."""

    @abstractmethod
    def save(self, folder: Path, rows: Any) -> None:
        """Write into a run's folder what scores the run later reads of its rows."""

    @abstractmethod
    def check(self, experiment: Experiment, skeleton: nn.Module, processor: Any, rows: Any) -> None:
        """Check the rows against the model's architecture.

        Raises:
            ConfigError: rows that the model cannot read.
        """

    def encode(self, experiment: Experiment, rows: Any, device: torch.device, base: str) -> Any:
        """The rows as the model reads them; `base` is the state of the backbone's weights."""
        return rows

    def classes(self, rows: Any) -> Any:
        """The classes that a classifier tells apart; None for rows without."""
        return None


@dataclass(frozen=True)
class Suite:
    """Data sets, benchmarks and option files.

    Args:
        conf_dir: the folder of option files.
        script: the entry point, which other processes of a run are started with.
        datasets, benchmarks: the plug-ins.
        kinds: kind of rows → how they are handled.
        backends: kind of rows → what answers a benchmark with a model in memory.
        evaluate: (benchmark, backend, rows, folder, config) → score.
        print_score: prints the score of a benchmark.
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
        """How the rows of an experiment are handled."""
        return self.kinds[experiment.dataset.kind]

    # The methods below make it a `flatlora.config.experiment.Registry`.

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
        for name in experiment.eval:
            scored = self.benchmarks[name].kind
            if scored != experiment.dataset.kind:
                yield SettingError(
                    ("dataset.kind", f"eval.{name}"),
                    f"Invalid eval=[{name}] with dataset={experiment.dataset.name} ({experiment.dataset.kind}): it "
                    f"scores {scored} data sets; leave it out of eval=[...], or change the data set.",
                )
