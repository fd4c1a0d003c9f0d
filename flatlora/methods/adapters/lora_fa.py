"""LoRA-FA (2023): A is frozen, and B's gradient becomes s⁻² g_B (AAᵀ)⁻¹, the nearest to the full gradient.

Uses PEFT's optimizer, which multiplies by (AAᵀ)⁻¹ under BF16 autocast; here only in runs with BF16 autocast.
Its eps is not bias-corrected: it divides by √v + eps before the correction, where AdamW divides by √(v/(1 − β₂ᵗ)) +
eps. This equals AdamW with an eps of eps/√(1 − β₂ᵗ) in step t: 32 times `optim.adam_epsilon` at first, and soon 1 time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer, lorafa
from torch import nn

from flatlora.methods.adapters.lora import Lora, LoraMethodConfig
from flatlora.methods.base import ADAPTERS, Start, Training


@ADAPTERS.register("lora_fa")
class LoraFA(Lora):
    takes_convolutions = False
    refuses: ClassVar = {
        "nbar": "BAR rescales A and B against each other, and LoRA-FA's A is frozen",
        "obar": "BAR rescales A and B against each other, and LoRA-FA's A is frozen",
        "rwp_lora": "RWP_LoRA perturbs both factors, and LoRA-FA's A is frozen",
        "bi_lora": "LoRA-FA's optimizer freezes every A, and Bi-LoRA trains two",
    }
    has_optimizer = True

    def apply(self, model: nn.Module, config: LoraMethodConfig, start: Start) -> nn.Module:
        adapted = super().apply(model, config, start)
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return adapted

    def optimizer(self, model: nn.Module, config: LoraMethodConfig, training: Training) -> torch.optim.Optimizer:
        adapter: LoraConfig = model.peft_config["default"]
        of_peft = create_lorafa_optimizer(
            model,
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lr=training.optim.lr,
            weight_decay=training.optim.weight_decay,
        )
        optimizer = _Optimizer(of_peft.param_groups, in_bf16=training.autocast == torch.bfloat16)
        for group in optimizer.param_groups:  # PEFT's function has no arguments for these
            group["betas"] = (training.optim.adam_beta1, training.optim.adam_beta2)
            group["eps"] = training.optim.adam_epsilon
        optimizer.register_load_state_dict_post_hook(_state_to_parameters)
        return optimizer


class _Optimizer(lorafa.LoraFAOptimizer):
    """PEFT's optimizer, with g_B (AAᵀ)⁻¹ in BF16 if the run uses BF16 autocast, else in FP32.

    PEFT uses BF16 whenever the machine supports it, as every x86 CPU and most GPUs do.
    """

    def __init__(self, param_groups: list[dict[str, Any]], *, in_bf16: bool) -> None:
        super().__init__(param_groups)
        self._in_bf16 = in_bf16

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        original, lorafa.is_bf16_available = lorafa.is_bf16_available, lambda: self._in_bf16
        try:
            return super().step(closure)
        finally:
            lorafa.is_bf16_available = original


def _state_to_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Move loaded state to the parameters' device: PEFT's optimizer keys it by name, so torch does not do so."""
    devices = {name[: name.find("lora")] + "lora": p.device for name, p in _named(optimizer)}
    for name, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(name, str) and isinstance(value, torch.Tensor):
                state[key] = value.to(devices[name])


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
