"""What a family of models is, and the registry of families: all that depends on the kind of model.

What the configuration must know of a family before anything is imported is in `flatlora.config.families`.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from flatlora.config.sections import ModelConfig
from flatlora.models.clip import Classes
from flatlora.models.hashes import folder_state, weights_sha256
from flatlora.models.sources import source_and_options, validate_finite
from flatlora.utils.precision import choose_precision, hold_as_computed, slow_bf16_warning, use_physical_cores
from flatlora.utils.registry import Registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, besides what its config says.

    Args:
        classes: the classes of a classifier.
        dtype: of the weights, instead of the model's own.
        autocast: the setting of that name: auto, bfloat16 or none.
    """

    device: torch.device
    classes: Classes | None = None
    dtype: str | None = None
    autocast: str = "auto"


class Family(ABC):
    """One kind of model: how it is loaded, what it reads, how it is trained and scored.

    One instance is registered, so it holds no state. Methods raise ConfigError, with the remedy, for what is missing.

    Attributes:
        unit: what throughput is counted in: "tokens" or "images".
        token_mean: whether the loss is a mean over the tokens of a whole optimizer step, whose number `forward` takes
            as `num_items_in_batch`; else it is the mean of a micro-batch.
        label_name: of the input without which a row has no loss; None where it is `labels`.
        encoder_decoder: whether an encoder reads the prompts.
        is_diffusion: whether the loss is that of a denoiser: a mean over random noise and timesteps.
        peft_task: PEFT's `task_type` of its adapters besides FEATURE_EXTRACTION.
        whole_needs_base: whether a model that was trained whole is completed by a part of its backbone.
        processor_file: of a folder in which its processor was saved.
        graphed: whether no micro-step needs the host, so that a GPU can replay it as a CUDA graph.
        largest_graph: elements of the largest input of a micro-step that is captured; None captures all.
    """

    unit: ClassVar[str] = "images"
    token_mean: ClassVar[bool] = False
    label_name: ClassVar[str | None] = None
    encoder_decoder: ClassVar[bool] = False
    is_diffusion: ClassVar[bool] = False
    peft_task: ClassVar[str | None] = None
    whole_needs_base: ClassVar[bool] = False
    processor_file: ClassVar[str | None] = None
    graphed: ClassVar[bool] = False
    largest_graph: ClassVar[int | None] = None

    # --- weights

    @abstractmethod
    def skeleton(self, config: ModelConfig) -> nn.Module:
        """The architecture on the meta device."""

    @abstractmethod
    def weight_files(self, config: ModelConfig) -> Sequence[str]:
        """Names that its weights may have; one of the files must exist."""

    @abstractmethod
    def commit(self, config: ModelConfig) -> str | None:
        """The hub's commit of the files that are read."""

    @abstractmethod
    def load(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        """The model with its weights, as they are stored."""

    @abstractmethod
    def load_trained(self, path: str, config: ModelConfig, options: LoadOptions) -> tuple[nn.Module, Any]:
        """Model and processor of a folder where a run on `config` saved all parameters; `options.dtype` None keeps its
        dtype."""

    def load_backbone(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        """`flatlora.models.loading.load_backbone`."""
        if options.device.type == "cpu":
            use_physical_cores()
        model = self.load(config, options)
        precision = choose_precision(options.autocast, config.dtype, options.device)
        hold_as_computed(model, precision)
        if precision.slow:
            logger.warning("%s", slow_bf16_warning(model, "autocast=bfloat16", "autocast=auto computes in FP32 here"))
        validate_finite(model, config.hub_id)
        model.name_or_path = config.hub_id  # what PEFT writes into the adapter: never a path of this machine
        return model.requires_grad_(False)

    def outline(self, config: ModelConfig) -> nn.Module:
        """The model on the meta device, its files checked where another program may serve it."""
        return self.skeleton(config)

    def state(self, config: ModelConfig) -> str:
        """`flatlora.models.loading.backbone_state`."""
        source, _ = source_and_options(config)
        if config.embedded:
            return f"sha256:{weights_sha256(Path(source))}"
        return folder_state(Path(source)) if os.path.isdir(source) else f"{source}@{self.commit(config)}"

    # --- rows and adapters

    def processor(self, config: ModelConfig) -> Any:
        """What turns a row into tensors: a tokenizer or an image processor; None where there is none."""
        return None

    def holds_processor(self, folder: Path) -> bool:
        """Whether a processor was saved in a folder."""
        return self.processor_file is not None and (folder / self.processor_file).is_file()

    def complete_adapter(self, folder: Path) -> None:
        """Write beside a saved adapter the files that users of this kind of model load, if PEFT's do not suffice."""
        return None

    def of_adapter(self, config: ModelConfig, adapter: Path) -> ModelConfig:
        """The backbone's config with the settings that the tensors of an adapter on it show."""
        return config

    # --- training

    def without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch without the mask that the host would look at, where the model does not need it."""
        return inputs

    def graph_inputs(
        self, inputs: dict[str, torch.Tensor], items: torch.Tensor, shares: int
    ) -> dict[str, torch.Tensor]:
        """The keywords of `forward` in a captured micro-step, its share of the step's mean among them.

        Args:
            inputs: the micro-batch, on the device.
            items: number of losses of the whole optimizer step.
            shares: number of micro-batches of the whole optimizer step.
        """
        raise NotImplementedError

    # --- scoring

    def backend_settings(self, config: ModelConfig) -> dict[str, Any]:
        """Keywords of the backend that scores a model in memory, besides the model and its processor."""
        return {}

    def classes_of_run(self, run: Path) -> Classes | None:
        """The classes that a run's classifier was trained on; None for a family without."""
        return None


FAMILIES: Registry[Family] = Registry("model family", "flatlora.models.families")
