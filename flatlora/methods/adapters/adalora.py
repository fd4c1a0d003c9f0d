"""AdaLoRA (ICLR 2023): W + s/r̂ · B·diag(E)·A, with a rank budget that is allocated to the most important layers.

PEFT builds the layers and scores the triplets (A_k, E_k, B_k) by smoothed sensitivity; this file runs its schedule
from the Trainer: ranks stay at `init_r` for the first `tinit_ratio` of the steps, decrease cubically to `lora_r` on
average, every `delta_t` steps, and are fixed for the last `tfinal_ratio`. s is `lora_alpha` and r̂ is `init_r`, as in
PEFT.

The training loss contains the penalty that keeps A and B near orthogonal; the evaluation loss does not. Deviation from
PEFT in a Trainer: the penalty is divided by the number of micro-batches in a step (fewer at the end of an epoch), so
that gradient accumulation does not strengthen it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from flatlora.config.settings import MOST_STEPS, setting
from flatlora.methods.adapters.lora import Lora, LoraMethodConfig, rank_of, rank_setting
from flatlora.methods.base import ADAPTERS, Start, Training
from flatlora.perturb.callback import checkpoint_file
from flatlora.utils.errors import ConfigError, SettingError

logger = logging.getLogger(__name__)

STATE_FILE = "adalora.safetensors"
_UNKNOWN_STEPS = 2**31  # PEFT needs a number before the Trainer knows it
_BAR = "BAR rescales A and B against each other, and AdaLoRA keeps both near orthonormal"


class AdaLoraMethodConfig(LoraMethodConfig):
    init_r: int | None = setting(None, ge=1, le=2**16, remedy="null is 1.5 times the final rank")
    tinit_ratio: float = setting(0.1, ge=0, lt=1, remedy="it is a share of all steps")
    tfinal_ratio: float = setting(0.3, ge=0, lt=1, remedy="it is a share of all steps")
    delta_t: int = setting(10, ge=1, le=MOST_STEPS, remedy="10 is usual")
    beta1: float = setting(0.85, gt=0, lt=1, remedy="0.85 is usual")
    beta2: float = setting(0.85, gt=0, lt=1, remedy="0.85 is usual")
    orth_reg_weight: float = setting(0.5, ge=0, le=1e6, remedy="0.5 is usual")

    def rule_errors(self) -> list[SettingError]:
        errors = super().rule_errors()
        if self.init_r is not None and self.lora_r is not None and self.init_r <= self.lora_r:
            errors.append(
                SettingError(
                    ("init_r", "lora_r"),
                    f"Invalid peft.init_r={self.init_r} with peft.lora_r={self.lora_r}: AdaLoRA reduces ranks from "
                    "init_r to lora_r on average, so init_r must be larger; raise it, or leave it out.",
                )
            )
        if self.tinit_ratio + self.tfinal_ratio >= 1:
            errors.append(
                SettingError(
                    ("tinit_ratio", "tfinal_ratio"),
                    f"Invalid peft.tinit_ratio={self.tinit_ratio} with peft.tfinal_ratio={self.tfinal_ratio}: they "
                    "leave no step in which ranks are reduced; lower one of them.",
                )
            )
        return errors


@ADAPTERS.register("adalora")
class AdaLora(Lora):
    Config = AdaLoraMethodConfig
    takes_convolutions = False
    own_start = "its ranks begin equal and are reduced, and those of a saved adapter were reduced already"
    not_of_diffusion = "diffusers reads pairs A and B, and AdaLoRA's adapter has a third factor"
    reads_gradients = True  # they determine its ranks
    adds_loss = True  # the penalty
    not_sharded = "PEFT calls the model past the hooks that gather its weights"
    refuses: ClassVar = {
        "nbar": _BAR,
        "obar": _BAR,
        "rwp_lora": "RWP_LoRA perturbs a pair of factors, and AdaLoRA has three",
        "bi_lora": "PEFT trains one AdaLoRA adapter at a time, and Bi-LoRA needs two",
    }

    def check(self, skeleton: nn.Module, config: AdaLoraMethodConfig) -> None:
        super().check(skeleton, config)
        rank = rank_of(skeleton, config)
        if _init_r(rank, config) <= rank:
            raise ConfigError(
                [
                    f"Invalid peft.init_r={config.init_r} with a final rank of {rank} (peft.lora_relative_r="
                    f"{config.lora_relative_r}): AdaLoRA reduces ranks; raise peft.init_r, or leave it out."
                ]
            )

    def needed_rank(self, rank: int, config: AdaLoraMethodConfig) -> tuple[int, str]:
        given = f"peft.init_r={config.init_r}" if config.init_r is not None else rank_setting(config)
        return _init_r(rank, config), f"{given}: AdaLoRA begins with {_init_r(rank, config)} directions of a layer"

    def peft_config(self, model: nn.Module, config: AdaLoraMethodConfig) -> AdaLoraConfig:
        settings = self.settings(model, config)
        rank = settings.pop("r")
        return AdaLoraConfig(
            **settings,
            init_r=_init_r(rank, config),
            target_r=rank,
            tinit=0,
            tfinal=0,
            deltaT=config.delta_t,
            beta1=config.beta1,
            beta2=config.beta2,
            orth_reg_weight=config.orth_reg_weight,
            total_step=_UNKNOWN_STEPS,
        )

    def callbacks(self, model: nn.Module, config: AdaLoraMethodConfig, training: Training) -> list[TrainerCallback]:
        return [RankSchedule(model, config, training)]

    def save(self, model: nn.Module, config: AdaLoraMethodConfig, folder: Path, start: Start) -> None:
        """Write the adapter with its remaining ranks: pruned triplets have E = 0 and are dropped."""
        adapter = model.peft_config["default"]
        adapter.rank_pattern = {
            name: (parameter.detach() != 0).view(-1).tolist()
            for name, parameter in model.base_model.model.named_parameters()
            if "lora_E" in name
        }
        try:
            with warnings.catch_warnings():
                # PEFT warns of the empty factors of a layer that has no triplets left.
                warnings.filterwarnings("ignore", message="Adapter .* invalid shape")
                model.save_pretrained(folder)
        finally:
            adapter.rank_pattern = {}


def _init_r(rank: int, config: AdaLoraMethodConfig) -> int:
    return config.init_r if config.init_r is not None else max(rank + 1, round(1.5 * rank))


class RankSchedule(TrainerCallback):
    """Calls PEFT's allocator after each optimizer step, before gradients are zeroed, and saves its state."""

    def __init__(self, model: nn.Module, config: AdaLoraMethodConfig, training: Training) -> None:
        self.model, self.config, self.training = model, config, training
        self.pattern: dict[str, list[bool]] = {}

    @property
    def _adapter(self) -> AdaLoraConfig:
        return self.model.peft_config["default"]

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        adapter, steps = self._adapter, state.max_steps
        adapter.total_step = steps
        adapter.tinit, adapter.tfinal = int(self.config.tinit_ratio * steps), int(self.config.tfinal_ratio * steps)
        self._shrinks = steps - adapter.tfinal > 1  # the final allocation needs sensitivities of an earlier step
        if not self._shrinks:
            logger.warning("AdaLoRA cannot reduce ranks within %d steps: they stay at peft.init_r.", steps)
        if self.training.token_mean:  # the Trainer then sums the losses of micro-batches, each with the penalty
            device = next(parameter.device for parameter in self.model.parameters() if parameter.requires_grad)
            adapter.orth_reg_weight = _SharedWeight(self.config.orth_reg_weight, device)
            adapter.orth_reg_weight.share_out(self.training.accumulation * self.training.world_size)
        if state.global_step:
            self._load(load_file(checkpoint_file(args, state, STATE_FILE)))

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        if self.training.token_mean:
            count = micro_batches_of(state.global_step, len(train_dataloader), self.training.accumulation)
            self._adapter.orth_reg_weight.share_out(count * self.training.world_size)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if not self._shrinks:
            return
        self._adapter.rank_pattern = self.pattern
        self.model.base_model.update_and_allocate(state.global_step + 1)
        # Removed from the config: PEFT would cut a checkpoint's tensors by it, and a resume needs all of them.
        self.pattern, self._adapter.rank_pattern = self._adapter.rank_pattern or {}, {}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context for an evaluation, whose loss does not contain the penalty."""
        weight, self._adapter.orth_reg_weight = self._adapter.orth_reg_weight, 0.0
        try:
            yield
        finally:
            self._adapter.orth_reg_weight = weight

    def save_state(self, folder: Path) -> None:
        allocator = self.model.base_model.rankallocator
        tables = {"mean": allocator.exp_avg_ipt, "spread": allocator.exp_avg_unc}
        tensors: dict[str, Any] = {
            f"{table}|{name}": value.detach().cpu().contiguous()
            for table, values in tables.items()
            for name, value in values.items()
        }
        tensors |= {f"pattern|{name}": torch.tensor(kept) for name, kept in self.pattern.items()}
        save_file({**tensors, "step": torch.zeros(())}, folder / STATE_FILE)  # never empty: a resume needs the file

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        allocator = self.model.base_model.rankallocator
        parameters = dict(allocator_parameters(self.model))
        for key, value in tensors.items():
            table, _, name = key.partition("|")
            if table == "pattern":
                self.pattern[name] = value.tolist()
            elif table in ("mean", "spread"):
                target = allocator.exp_avg_ipt if table == "mean" else allocator.exp_avg_unc
                target[name] = value.to(parameters[name].device)
                allocator.ipt.setdefault(name, torch.zeros_like(target[name]))


class _SharedWeight(float):
    """The weight of the penalty, divided among the micro-batches of a step.

    For PEFT, and in adapter_config.json, it is the configured number. The share of a micro-batch is on the device, so
    that a CUDA graph reads its current value.
    """

    def __new__(cls, value: float, device: torch.device | None = None) -> _SharedWeight:
        return super().__new__(cls, value)

    def __init__(self, value: float, device: torch.device | None = None) -> None:
        self._share = torch.tensor(float(value), device=device)

    def share_out(self, parts: int) -> None:
        self._share.fill_(float(self) / parts)

    def __mul__(self, penalty: torch.Tensor) -> torch.Tensor:
        return penalty * self._share


def micro_batches_of(step: int, epoch_micro_batches: int, accumulation: int) -> int:
    """Number of micro-batches in optimizer step `step` (from 0): the last step of an epoch has the remaining ones."""
    steps = math.ceil(epoch_micro_batches / accumulation)
    return min(accumulation, epoch_micro_batches - step % steps * accumulation)


def allocator_parameters(model: nn.Module):
    """Parameters by the names that PEFT's allocator uses."""
    return model.base_model.model.named_parameters()
