"""DoRA (ICML 2024): W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖ by rows, m trained (PEFT's code).

The noise of rho=flat is added to W, and the norm is that of W + ε + s·B·A in every rho.mode, as in the published code,
which adds it in place. DoRA scales the noise, like W, by m/‖W + ε + s·B·A‖. So the standard deviation of an element of
row i is σ/√n · m_i, up to a factor of 1/√(1 + σ²), and m_i is the norm of row i of W', as in Flat-LoRA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from flatlora.config.settings import setting
from flatlora.methods.adapters.lora import Lora, LoraMethodConfig
from flatlora.methods.base import ADAPTERS, Start
from flatlora.utils.shards import device_of, holding, is_sharded, whole


class DoraConfig(LoraMethodConfig):
    lora_dropout: float = setting(0.0, ge=0, le=0, remedy="PEFT's DoRA with dropout does not read W through its layer")


@ADAPTERS.register("dora")
class Dora(Lora):
    Config = DoraConfig

    def settings(self, model: nn.Module, config: DoraConfig) -> dict[str, Any]:
        return super().settings(model, config) | {"use_dora": True}

    def apply(self, model: nn.Module, config: DoraConfig, start: Start) -> nn.Module:
        with _magnitudes_of_whole_weights():
            return super().apply(model, config, start)


@contextlib.contextmanager
def _magnitudes_of_whole_weights() -> Iterator[None]:
    """Lets PEFT compute the row norms of layers whose weights are sharded, which are gathered one by one for it."""
    of_peft = DoraLinearLayer.update_layer

    def update_layer(self: DoraLinearLayer, *, base_layer: nn.Module, **kwargs: Any) -> None:
        weight = base_layer.weight
        if not is_sharded(weight):
            of_peft(self, base_layer=base_layer, **kwargs)
            return
        factors = {name: kwargs.pop(name).to(device_of(weight)) for name in ("lora_A", "lora_B")}
        with holding(base_layer, whole(weight)):
            of_peft(self, base_layer=base_layer, **factors, **kwargs)

    DoraLinearLayer.update_layer = update_layer
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = of_peft
