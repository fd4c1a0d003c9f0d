"""Base classes of methods that compute the initial adapter from W or from data.

Most of them move part of W into the adapter: W ← W − s·B₀·A₀. The initial adapter is kept in `start/` of the run. A
resumed run subtracts the same bytes, and the saved adapter is converted to s·(B·A − B₀·A₀), which fits the untouched
backbone (PEFT's conversion; its rank is 2r). On a BF16 backbone W − s·B₀·A₀ is rounded, and the conversion cannot undo
that: the converted model differs from the trained one by this rounding, as with every PiSSA adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from flatlora.methods.adapters.lora import Lora, LoraMethodConfig, find_targets, seeded
from flatlora.methods.base import Start
from flatlora.models.starts import ADAPTER, MOVED, load_adapter, lora_layers, move_weights
from flatlora.perturb.layers import has_standard_forward
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import write_folder, write_json
from flatlora.utils.shards import device_of, holding, is_sharded, whole


class ComputedStart(Lora):
    """LoRA with an initial adapter that is computed once per run and kept in `start.folder`."""

    moves_weights = True
    needs_dense = True
    takes_convolutions = False
    own_start = "this method computes an initial adapter of its own, and what it saves is a plain LoRA adapter"

    def check(self, skeleton: nn.Module, config: LoraMethodConfig) -> None:
        super().check(skeleton, config)
        if self.moves_weights:
            validate_forwards(skeleton, find_targets(skeleton, config.target_modules), config.name)

    def apply(self, model: nn.Module, config: LoraMethodConfig, start: Start) -> nn.Module:
        self.check(model, config)
        known = start.resumed and start.folder is not None and start.folder.is_dir()
        if start.resumed and not known and start.rank == 0:
            raise ConfigError(
                [
                    f"{start.folder} is missing: it has the initial adapter of {config.name} that the checkpoint "
                    "belongs to; restore it, or start over with overwrite=true."
                ]
            )
        if start.world_size > 1:  # rank 0 decides, since it may be writing the folder already
            answer = [known]
            torch.distributed.broadcast_object_list(answer, src=0)
            known = answer[0]
        if known:
            adapted = self.adapt(model, config, start)
            load_adapter(adapted, start.folder)
        else:
            adapted = self.begin(model, config, start)
            if start.world_size > 1:
                for parameter in self._factors(adapted):
                    torch.distributed.broadcast(parameter.data, src=0)
            if start.folder is not None and start.rank == 0:
                with write_folder(start.folder) as staging:
                    adapted.save_pretrained(staging)
                    if self.moves_weights:
                        write_json(
                            staging / MOVED, {"subtracted": "scaling * lora_B @ lora_A", "method": config.method}
                        )
        if self.moves_weights:
            move_weights(adapted)
        return adapted

    def adapt(self, model: nn.Module, config: LoraMethodConfig, start: Start) -> nn.Module:
        """The adapted model with LoRA's own initial factors."""
        return super().apply(model, config, start)

    def begin(self, model: nn.Module, config: LoraMethodConfig, start: Start) -> nn.Module:
        """Return the adapted model with its computed initial factors; W is unchanged."""
        raise NotImplementedError

    def save(self, model: nn.Module, config: LoraMethodConfig, folder: Path, start: Start) -> None:
        if not self.moves_weights:
            model.save_pretrained(folder)
            return
        if start.folder is None:
            raise ValueError(
                f"The adapter of {config.method} fits the untouched backbone only after its initial adapter is "
                "subtracted, which was not kept: pass Start(folder=...) to apply() and save()."
            )
        with _beside_gathered_weights():
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start.folder))
        add_trained_modules(model, folder)

    @staticmethod
    def _factors(model: nn.Module) -> list[nn.Parameter]:
        return [p for n, p in model.named_parameters() if "lora_" in n]


class LayerwiseStart(ComputedStart):
    """An initial adapter that PEFT's code computes layer by layer."""

    def begin(self, model: nn.Module, config: LoraMethodConfig, start: Start) -> nn.Module:
        """Return the adapted model with its computed initial factors; W is unchanged."""
        adapted = self.adapt(model, config, start)
        with seeded(start.seed, adapted):
            for _, layer in lora_layers(adapted):
                base = layer.get_base_layer()
                with holding(base, whole(base.weight).clone()):  # PEFT's code changes the weight, in place or not
                    self.initialize(layer, config)
                for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                    factor.data = factor.data.float().contiguous()
        return adapted

    def initialize(self, layer: LoraLayer, config: LoraMethodConfig) -> None:
        """Set the factors of one layer; its weight may be changed."""
        raise NotImplementedError


@contextlib.contextmanager
def _beside_gathered_weights() -> Iterator[None]:
    """Lets PEFT add factors to layers where FSDP2 gathers their weights; the shares of these may be on the host."""
    of_peft = BaseTunerLayer._move_adapter_to_device_of_base_layer

    def move(self: BaseTunerLayer, adapter_name: str, device: torch.device | None = None) -> None:
        weight = getattr(self.get_base_layer(), "weight", None)
        if device is None and weight is not None and is_sharded(weight):
            device = device_of(weight)
        of_peft(self, adapter_name, device)

    BaseTunerLayer._move_adapter_to_device_of_base_layer = move
    try:
        yield
    finally:
        BaseTunerLayer._move_adapter_to_device_of_base_layer = of_peft


def add_trained_modules(model: nn.Module, folder: Path) -> None:
    """Add a trained head to a converted adapter, because PEFT's conversion only keeps the factors."""
    path = folder / ADAPTER
    saved = load_file(path)
    trained = {name: tensor for name, tensor in get_peft_model_state_dict(model).items() if "lora_" not in name}
    if trained.keys() - saved.keys():
        save_file({**saved, **{n: t.contiguous().cpu() for n, t in trained.items()}}, path, metadata={"format": "pt"})


_MOVES = "this method moves part of W into the adapter, which would change the output of a layer with its own forward"


def validate_forwards(model: nn.Module, targets: list[str], name: str, reason: str = _MOVES) -> None:
    """Check that all layers compute W x + b.

    Raises:
        ConfigError: with the first layer that does not, and the reason why the method needs it.
    """
    own = [target for target in targets if not has_standard_forward(model.get_submodule(target))]
    if own:
        kind = type(model.get_submodule(own[0])).__name__
        raise ConfigError(
            [
                f"Invalid peft={name} with {own[0]}={kind} ({len(own)} in all): {reason}; use peft=lora, or leave such "
                "layers out of peft.target_modules."
            ]
        )
