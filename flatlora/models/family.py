"""Base class and registry of model families; a family holds all code that depends on the kind of model.

The properties that the configuration needs before a family is imported are in `flatlora.config.families`.
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
from torch.nn import functional

from flatlora.config.sections import ModelConfig
from flatlora.models.clip import Classes
from flatlora.models.hashes import folder_state, weights_sha256
from flatlora.models.sources import source_and_options, validate_finite
from flatlora.utils.precision import choose_precision, hold_as_computed, slow_bf16_warning, use_physical_cores
from flatlora.utils.registry import Registry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a model besides its config.

    Args:
        device: where the model is placed.
        classes: the classes of a classifier.
        dtype: dtype of the weights; None keeps the model's own.
        autocast: value of the setting trainer.autocast: auto, bfloat16 or none.
        head_seed: seed of the layers of a text classifier's head that are not in the files; None: all are there.
        shards: number of processes that share the weights, as trainer.fsdp has it; each reads its rows alone.
        offload: whether two or more of them keep their shares in host memory, see `flatlora.utils.shards.move_to_host`.
    """

    device: torch.device
    classes: Classes | None = None
    dtype: str | None = None
    autocast: str = "auto"
    head_seed: int | None = None
    shards: int = 1
    offload: bool = False


LOSS_SCALE = "loss_scale"  # input of a captured micro-step: a factor of the model's loss


def padded(rows: torch.Tensor, multiple: int, positions: int | None, value: int = 0) -> torch.Tensor:
    """Pads rows (B, L) on the right until L is a multiple of `multiple`, but to no more than `positions`."""
    length = rows.shape[1]
    target = length + -length % multiple
    if positions is not None:
        target = max(length, min(target, positions))
    return functional.pad(rows, (0, target - length), value=value)


class Family(ABC):
    """One kind of model: how it is loaded, trained and scored, and which inputs it takes.

    One instance is registered, so a family holds no state. Methods raise ConfigError with a suggested fix if something
    is missing.

    Attributes:
        unit: unit of throughput: "tokens" or "images".
        token_mean: whether the loss is the mean over the tokens of a whole optimizer step, whose number is passed to
            `forward` as `num_items_in_batch`; else it is the mean over a micro-batch.
        label_name: name of the input that is required for a loss; None for `labels`.
        encoder_decoder: whether the model is an encoder-decoder.
        is_diffusion: whether the loss is a mean over random noise and timesteps, as diffusion models have it.
        peft_task: PEFT's `task_type` of its adapters besides FEATURE_EXTRACTION.
        whole_needs_base: whether a fully fine-tuned model needs a part of its backbone that its files do not hold.
        processor_file: name of a file that exists in every folder with a saved processor.
        graphed: whether a micro-step runs without the host, so that it can be replayed as a CUDA graph.
        largest_graph: maximum number of elements of the largest input of a captured micro-step; None: no maximum.
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
        """Returns the architecture without weights, on the meta device."""

    @abstractmethod
    def weight_files(self, config: ModelConfig) -> Sequence[str]:
        """Returns the possible names of weight files; one of them must exist."""

    @abstractmethod
    def commit(self, config: ModelConfig) -> str | None:
        """Returns the commit on the hub that files are read from; None for a local folder."""

    @abstractmethod
    def load(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        """Loads the model with its weights as stored."""

    @abstractmethod
    def load_trained(self, path: str, config: ModelConfig, options: LoadOptions) -> tuple[nn.Module, Any]:
        """Loads model and processor from a folder in which a run on `config` saved all parameters."""

    def load_backbone(self, config: ModelConfig, options: LoadOptions) -> nn.Module:
        """See `flatlora.models.loading.load_backbone`."""
        if options.device.type == "cpu":
            use_physical_cores()
        model = self.load(config, options)
        precision = choose_precision(options.autocast, config.dtype, options.device)
        hold_as_computed(model, precision)
        if precision.slow:
            remedy = "trainer.autocast=auto computes in FP32 here"
            logger.warning("%s", slow_bf16_warning(model, "trainer.autocast=bfloat16", remedy))
        validate_finite(model, config.hub_id)
        model.name_or_path = config.hub_id  # PEFT saves it with the adapter: no path of this machine
        return model.requires_grad_(False)

    def outline(self, config: ModelConfig) -> nn.Module:
        """Returns the model on the meta device, for models served by another program; may check the weight files."""
        return self.skeleton(config)

    def state(self, config: ModelConfig) -> str:
        """See `flatlora.models.loading.backbone_state`."""
        source, _ = source_and_options(config)
        if config.embedded:
            return f"sha256:{weights_sha256(Path(source))}"
        return folder_state(Path(source)) if os.path.isdir(source) else f"{source}@{self.commit(config)}"

    # --- rows and adapters

    def processor(self, config: ModelConfig) -> Any:
        """Loads the tokenizer or image processor; None for a family without."""
        return None

    def holds_processor(self, folder: Path) -> bool:
        """Whether a processor was saved in `folder`."""
        return self.processor_file is not None and (folder / self.processor_file).is_file()

    def complete_adapter(self, folder: Path) -> None:
        """Writes the files into a saved adapter's folder that other libraries need besides PEFT's."""
        return None

    def of_adapter(self, config: ModelConfig, adapter: Path) -> ModelConfig:
        """Returns the backbone's config with the settings that follow from an adapter's tensors."""
        return config

    # --- training

    def without_mask(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns a micro-batch without its attention mask, if the model computes the same without one."""
        return inputs

    def graph_inputs(
        self, inputs: dict[str, torch.Tensor], items: torch.Tensor, shares: int, positions: int | None
    ) -> dict[str, torch.Tensor]:
        """Returns the inputs of a captured micro-step: keyword arguments of `forward`, and `LOSS_SCALE` if needed.

        Args:
            inputs: the micro-batch, on the device.
            items: number of losses in the whole optimizer step.
            shares: number of micro-batches in the whole optimizer step, over all processes.
            positions: number of positions that the model has, which padding must not exceed; None: no limit.
        """
        device = next(iter(inputs.values())).device
        return {**inputs, LOSS_SCALE: torch.full((), 1 / shares, device=device)}

    # --- scoring

    def backend_settings(self, config: ModelConfig) -> dict[str, Any]:
        """Returns keyword arguments of the backend for a model in memory, besides the model and its processor."""
        return {}

    def classes_of_run(self, run: Path) -> Classes | None:
        """Returns the classes of a run's classifier; None for a family without classes."""
        return None


FAMILIES: Registry[Family] = Registry("model family", "flatlora.models.families")
