"""The layers that a perturbation acts on: a frozen weight, and the low-rank terms of the adapters around it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import stored_dtype

logger = logging.getLogger(__name__)

PERTURBED_TYPES = (nn.Linear, nn.Conv2d, Conv1D)


class AdapterTerm(NamedTuple):
    """One active low-rank term of a layer: W' gets `scaling` · B (m × r) · A (r × n)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass
class PerturbedLayer:
    """A linear or convolution layer whose weight is to be perturbed.

    `module` owns the weight and is called by the model (nn.Linear: m × n; GPT-2's Conv1D: stored n × m; nn.Conv2d:
    stored m × c × kh × kw, a row is an output channel and n = c·kh·kw); `adapters` returns the low-rank terms that act
    on it at the time of the call; while `enabled` says no, the layer reads W (in copy and recompute), as a reference
    model made by PEFT's `disable_adapter()` should. `readers` are other modules whose forward reads the weight: DoRA's.
    """

    name: str
    module: nn.Module
    adapters: Callable[[], Sequence[AdapterTerm]] = tuple
    enabled: Callable[[], bool] = lambda: True
    changes: Callable[[], Hashable] | None = None  # as `state`, where it can be had without the terms
    readers: Sequence[nn.Module] = ()
    weight: nn.Parameter = field(init=False)
    squared_norms: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.module, PERTURBED_TYPES):
            raise TypeError(
                f"Invalid layer {self.name}={type(self.module).__name__}: a perturbed layer must be nn.Linear, "
                "nn.Conv2d or Conv1D; take it out of the targets."
            )
        if "weight" not in self.module._parameters:
            raise TypeError(
                f"Invalid layer {self.name}={type(self.module).__name__}: its weight is computed from other tensors "
                "(torch.nn.utils.parametrize or weight_norm), so there is none that noise could be added to; call "
                "torch.nn.utils.parametrize.remove_parametrizations, or take the layer out of the targets."
            )
        self.weight = self.module.weight
        if isinstance(self.module, nn.Conv2d):
            self._validate_like_a_matrix()
        if not self.weight.is_floating_point() and not self.quantized:
            raise TypeError(
                f"Invalid dtype={self.weight.dtype} of {self.name}: a perturbed weight must be floating point, or "
                "bitsandbytes' 4-bit format; load the backbone with model.quantize=none or nf4."
            )

    def _validate_like_a_matrix(self) -> None:
        """A convolution whose weight is no m × n matrix as it lies in memory, or whose adapter is none."""
        if not self.weight.is_contiguous():
            raise TypeError(
                f"Invalid memory format of {self.name}: the weight of a perturbed convolution must be contiguous, not "
                "channels-last; take .to(memory_format=torch.channels_last) off the model (its inputs may keep it)."
            )
        if self.module.groups > 1:
            raise TypeError(
                f"Invalid groups={self.module.groups} of {self.name}: an adapter of a grouped convolution is no "
                "product of two matrices, so W' has no row norms; take it out of the targets."
            )

    def state(self) -> Hashable:
        """What differs whenever `adapters()` would give other tensors or scalings; cheap, as it is asked every step."""
        if self.changes is not None:
            return self.changes()
        return tuple((term.A.data_ptr(), term.B.data_ptr(), term.scaling) for term in self.adapters())

    @property
    def quantized(self) -> bool:
        """Whether the weight is packed: W is what `dense` makes of it."""
        return getattr(self.weight, "quant_state", None) is not None

    @property
    def elsewhere(self) -> str | None:
        """Why the module's parameter is not the whole W on a device; None where it is."""
        if self.weight.is_meta:
            return "offloaded: it is on its device for the time of a forward alone"
        if isinstance(self.weight, DTensor) or not self.weight.numel():
            return "sharded: this process holds a piece of it"
        return None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of `dense()`."""
        return tuple(self.weight.quant_state.shape if self.quantized else self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of `dense()`."""
        return self.weight.quant_state.dtype if self.quantized else self.weight.dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype that W + ε is rounded to: narrower than `dtype` where the weight is held in a wider tensor."""
        return self.dtype if self.quantized else stored_dtype(self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """m × n, one output filter a row."""
        rows, *columns = self.stored_shape[::-1] if isinstance(self.module, Conv1D) else self.stored_shape
        return rows, math.prod(columns)

    def dense(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """W in the stored layout: the weight itself, or what its packed bytes stand for, made anew or in `out`."""
        if not self.quantized:
            return self.weight.detach()
        from bitsandbytes.functional import dequantize_4bit

        if getattr(self.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"The packed weight of {self.name} is in the order of a CPU's own kernel, which cannot be read back: "
                "load the backbone with flatlora.models.loading.load_backbone, or set support_avx512bf16_for_cpu=False."
            )

        if out is not None and out.is_cuda:
            return dequantize_4bit(self.weight.data, self.weight.quant_state, out=out)
        made = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return made if out is None else out.copy_(made)  # bitsandbytes cannot write into a buffer of the host

    def as_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """A stored weight as m × n, one output filter a row (a view)."""
        if isinstance(self.module, nn.Conv2d):
            return stored.view(len(stored), -1)
        return stored.t() if isinstance(self.module, Conv1D) else stored

    def as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """An m × n matrix in the stored layout (a view)."""
        return rows.t() if isinstance(self.module, Conv1D) else rows.view(self.stored_shape)


def has_standard_forward(module: nn.Module) -> bool:
    """Whether a linear or convolution layer computes W x + b: its class may be a subclass with a forward of its own."""
    standard: dict[type[nn.Module], tuple[str, ...]] = {
        nn.Linear: ("forward",),
        nn.Conv2d: ("forward", "_conv_forward"),
        Conv1D: ("forward",),
    }
    base = next(kind for kind in standard if isinstance(module, kind))
    return all(getattr(type(module), name) is getattr(base, name) for name in standard[base])


def find_lora_layers(model: nn.Module) -> list[PerturbedLayer]:
    """Every linear or convolution layer that PEFT wrapped with a LoRA adapter, named as without PEFT and DDP.

    What else is trained has no noise, and is named in a warning: LoRA layers of other kinds (embeddings, for example),
    modules trained whole (`modules_to_save`), tokens (`trainable_token_indices`), biases.

    Raises:
        ConfigError: an adapter is no s·B·A on the weight of its layer, see `named_lora_layers`; or is around
            nn.MultiheadAttention, which reads its weights past the forward of any layer.
        TypeError: FSDP holds the weights; a layer reads pieces that come and go.
    """
    if any("_fsdp_wrapped_module" in name.split(".") for name, _ in model.named_modules()):
        raise TypeError(
            f"Invalid model {type(model).__name__}: FSDP shards its weights, whose row norms no process can then read; "
            "train by DDP or DeepSpeed's ZeRO-2, which leave each process the whole backbone."
        )
    layers, lora_modules = [], set()
    others: Counter[str] = Counter()
    for name, module in named_lora_layers(model):
        lora_modules.add(name)
        if isinstance(module.get_base_layer(), nn.MultiheadAttention):
            raise ConfigError(
                [
                    f"Invalid target_modules={name}: it is an nn.MultiheadAttention, which reads its weights past the "
                    "forward of any layer, so noise would not act; leave it out of target_modules."
                ]
            )
        if not isinstance(module.get_base_layer(), PERTURBED_TYPES):
            others[type(module.get_base_layer()).__name__] += 1
        else:
            layers.append(
                PerturbedLayer(
                    name,
                    module.get_base_layer(),
                    adapters=_adapter_terms(module),
                    enabled=_enabled(module),
                    changes=_adapter_state(module),
                    readers=list(module.lora_magnitude_vector.values()),
                )
            )
    _warn_of_no_noise(others, _trained_beside(model, lora_modules))
    return layers


def _trained_beside(model: nn.Module, lora_modules: set[str]) -> list[str]:
    """Names of trained parameters that are no part of a LoRA adapter."""
    trained = [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in trained if name.partition(".lora_")[0] not in lora_modules or ".lora_" not in name]


def _warn_of_no_noise(others: Counter[str], beside: Sequence[str]) -> None:
    parts = []
    if others:
        kinds = ", ".join(f"{count} around {kind}" for kind, count in others.items())
        parts.append(f"LoRA layers without noise: {kinds}. Linear layers and 2-d convolutions alone are perturbed.")
    if beside:
        more = f" and {len(beside) - _NAMED} more" if len(beside) > _NAMED else ""
        parts.append(f"Parameters trained without noise, for no LoRA is theirs: {', '.join(beside[:_NAMED])}{more}.")
    if parts:
        logger.warning("%s", " ".join(parts))


_NAMED = 4  # parameters in a warning


# Variants of LoRA in PEFT whose change of the weight is another function of A and B than s·B·A.
_UNLIKE_A_PRODUCT = ("ArrowLinear", "QALoraLinear", "BdLoraLinear", "MontecloraLinear", "KasaLinear")


def named_lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's LoRA layers by the names that their layers have without PEFT and DDP.

    Raises:
        ConfigError: an adapter that is trained or active is no s·B·A (r × n, m × r) on the weight of its layer: PEFT's
            `target_parameters`, whose factors may be of a whole bank of experts, and some variants of LoRA.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found = [(plain_name(name), module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    wrapped = [f"{name}.{module.parameter_name}" for name, module in found if isinstance(module, ParamWrapper)]
    variants = [
        f"{name} ({kind})"
        for name, module in found
        for variant in module.lora_variant.values()
        if (kind := type(variant).__name__.removesuffix("Variant")) in _UNLIKE_A_PRODUCT
    ]
    errors = []
    if wrapped:
        errors.append(
            f"Invalid target_parameters={wrapped[0]} ({len(wrapped)} in all): an adapter of a parameter has no layer "
            "that noise could act on, and the factors of a bank of experts are no single B·A; name linear layers in "
            "target_modules and leave target_parameters out."
        )
    if variants:
        errors.append(
            f"Invalid LoRA variant of {variants[0]} ({len(variants)} layers in all): it does not add s·B·A to the "
            "weight, so row norms and closed forms of B·A do not hold; use plain LoRA, rsLoRA or DoRA."
        )
    if errors:
        raise ConfigError(errors)
    yield from found


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # what torch.compile and checkpoint wrappers put into names


def plain_name(name: str) -> str:
    """A module or parameter name as the untouched backbone has it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    for wrapper in ("module.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name.replace(".base_layer.", ".").removesuffix(".base_layer")


def _enabled(module: nn.Module) -> Callable[[], bool]:
    return lambda: not module.disable_adapters


def _adapter_terms(module: nn.Module) -> Callable[[], list[AdapterTerm]]:
    def terms() -> list[AdapterTerm]:
        if module.disable_adapters or module.merged:
            return []  # merged: W already holds s·B·A
        return [_term(module, name) for name in module.active_adapters if name in module.lora_A]

    return terms


def _adapter_state(module: nn.Module) -> Callable[[], Hashable]:
    """Past all properties of PEFT's and torch's modules: a model of 560 layers asks so many times a step."""

    def state() -> Hashable:
        if hasattr(module, "lora_E"):  # made anew at every call
            return object()
        active = module._active_adapter
        factors = [
            (A._parameters["weight"].data_ptr(), B._parameters["weight"].data_ptr(), module.scaling[name])
            for name in ([active] if isinstance(active, str) else active)
            if (A := module.lora_A._modules.get(name)) is not None
            and (B := module.lora_B._modules.get(name)) is not None
        ]
        return module._disable_adapters, len(module.merged_adapters), *factors

    return state


def _term(module: nn.Module, name: str) -> AdapterTerm:
    if hasattr(module, "lora_E"):  # AdaLoRA: s/r̂ · B diag(E) A
        scaling = module.scaling[name] / (module.ranknum[name].item() + 1e-5)
        return AdapterTerm(module.lora_A[name] * module.lora_E[name], module.lora_B[name], scaling)
    # Of a convolution, A is r × c × kh × kw and B is m × r × 1 × 1: as matrices, B·A is what PEFT merges into W.
    A, B = module.lora_A[name].weight.flatten(1), module.lora_B[name].weight.flatten(1)
    return AdapterTerm(A, B, module.scaling[name])
