"""The layers that a perturbation acts on: each has a frozen weight and the low-rank terms of its adapters.

LoRA and its relatives   W' = W + Σ s·B·A
DeLoRA                   the same, with A scaled by its norms and those of W's columns
HiRA                     W' = W ⊙ (1 + Σ B·A)
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import stored_dtype
from flatlora.utils.shards import device_of, first_row, is_sharded, share, whole

logger = logging.getLogger(__name__)

PERTURBED_TYPES = (nn.Linear, nn.Conv2d, Conv1D)


class AdapterTerm(NamedTuple):
    """One active low-rank term of a layer: `scaling` · B (m × r) · A (r × n), which is added to W (HiRA: to 1)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass
class PerturbedLayer:
    """A linear or convolution layer whose weight is perturbed.

    Args:
        name: the layer's name in the model without PEFT; the noise is keyed by it.
        module: the module that owns the weight and is called by the model. nn.Linear stores m × n, GPT-2's Conv1D
            n × m, and nn.Conv2d m × c × kh × kw (a row is an output channel, n = c·kh·kw).
        adapters: returns the low-rank terms that are active at the time of the call.
        enabled: while it returns False, the layer reads W (in copy and recompute mode), for a reference model made with
            PEFT's `disable_adapter()`.
        changes: a cheaper implementation of `state`, if there is one.
        readers: other modules whose forward reads the weight, such as DoRA's.
        tied_to: names of modules that have the same parameter, such as the embedding of a tied head. They read W, which
            mode=inplace cannot give them.
        multiplies: whether W' = W ⊙ (1 + Σ s·B·A), as in HiRA, whose branch reads W besides the layer's own forward.
        first_row: index of the first row in the whole layer, for a process's share of a sharded one; see `own_rows`.
        runs_on: the device of passes through the layer; None takes that of the weight, see `device`.
    """

    name: str
    module: nn.Module
    adapters: Callable[[], Sequence[AdapterTerm]] = tuple
    enabled: Callable[[], bool] = lambda: True
    changes: Callable[[], Hashable] | None = None
    readers: Sequence[nn.Module] = ()
    tied_to: Sequence[str] = ()
    multiplies: bool = False
    first_row: int = 0
    runs_on: torch.device | None = None
    weight: nn.Parameter = field(init=False)
    squared_norms: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.module, PERTURBED_TYPES):
            raise TypeError(
                f"Invalid layer {self.name}={type(self.module).__name__}: a perturbed layer must be nn.Linear, "
                "nn.Conv2d or Conv1D; remove it from the targets."
            )
        if "weight" not in self.module._parameters:
            raise TypeError(
                f"Invalid layer {self.name}={type(self.module).__name__}: its weight is computed from other tensors "
                "(torch.nn.utils.parametrize or weight_norm), so noise cannot be added to it; call "
                "torch.nn.utils.parametrize.remove_parametrizations, or remove the layer from the targets."
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
        """Raise TypeError for a convolution whose weight or adapter is not an m × n matrix in memory."""
        if not self.weight.is_contiguous():
            raise TypeError(
                f"Invalid memory format of {self.name}: the weight of a perturbed convolution must be contiguous, not "
                "channels-last; do not call .to(memory_format=torch.channels_last) on the model (only on its inputs)."
            )
        if self.module.groups > 1:
            raise TypeError(
                f"Invalid groups={self.module.groups} of {self.name}: an adapter of a grouped convolution is not a "
                "product of two matrices, so W' has no row norms; remove it from the targets."
            )

    def state(self) -> Hashable:
        """A value that changes whenever `adapters()` would return other tensors or scalings; called each step."""
        if self.changes is not None:
            return self.changes()
        return tuple((term.A.data_ptr(), term.B.data_ptr(), term.scaling) for term in self.adapters())

    @property
    def quantized(self) -> bool:
        """Whether the weight is packed, so that W must be read with `dense`."""
        return getattr(self.weight, "quant_state", None) is not None

    @property
    def device(self) -> torch.device:
        """The device of passes through the layer; a share of the weight may be on the host."""
        return self.runs_on or device_of(self.weight)

    @property
    def offloaded(self) -> bool:
        """Whether a GPU computes with the weight, and FSDP2 keeps it, or this process's share of it, on the host."""
        if self.runs_on is None and not isinstance(self.weight, DTensor):
            return False
        return self.device.type == "cuda" and share(self.weight).is_cpu

    @property
    def elsewhere(self) -> str | None:
        """Why the module's parameter is not the whole W on a device; None if it is."""
        if self.weight.is_meta:
            return "offloaded: it is on its device only during a forward pass"
        if (isinstance(self.weight, DTensor) and not self.sharded) or not self.weight.numel():
            return "sharded: this process holds only a part of it"
        return None

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has split the rows of W among the processes; it gathers them for a pass through the layer."""
        return is_sharded(self.weight) and not isinstance(self.module, Conv1D)  # whose rows are columns

    def own_rows(self, rows: torch.Tensor) -> PerturbedLayer:
        """This process's share of a sharded layer, as a layer with the same adapter.

        Args:
            rows: W of the share, as a matrix; see `share_of_rows`.
        """
        first, last = first_row(self.weight), first_row(self.weight) + len(rows)
        holder = nn.Linear(1, 1, bias=False, device="meta")
        holder.weight = nn.Parameter(rows, requires_grad=False)
        holder.weight.stored_dtype = self.stored_dtype
        return PerturbedLayer(
            self.name,
            holder,
            adapters=lambda: [term._replace(B=term.B[first:last]) for term in self.adapters()],
            changes=self.changes,
            multiplies=self.multiplies,
            first_row=first,
            runs_on=self.device,
        )

    def share_of_rows(self) -> torch.Tensor:
        """A view of the rows of W that this process holds, as a matrix: all of them if W is not sharded."""
        return self.as_rows(share(self.weight))

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
        """Dtype that W + ε is rounded to: narrower than `dtype` if the weight is held in a wider tensor."""
        return self.dtype if self.quantized else stored_dtype(self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), with one output filter per row."""
        rows, *columns = self.stored_shape[::-1] if isinstance(self.module, Conv1D) else self.stored_shape
        return rows, math.prod(columns)

    def dense(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """W in the stored layout, on `device`: the weight itself, or what was unpacked, gathered or copied from it.

        Outside of a pass through a sharded layer all processes must call this together.
        """
        if self.sharded:  # FSDP2 replaces the module's parameter by the whole one, which moves in memory each time
            weight = whole(self.module.weight)
            return weight if out is None else out.copy_(weight)
        if self.offloaded:
            weight = self.weight.detach()
            copied = torch.empty_like(weight, device=self.device) if out is None else out
            return copied.copy_(weight, non_blocking=True)
        if not self.quantized:
            return self.weight.detach()
        from bitsandbytes.functional import dequantize_4bit

        if getattr(self.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"The packed weight of {self.name} is in the format of a CPU kernel and cannot be unpacked: load the "
                "backbone with flatlora.models.loading.load_backbone, or set support_avx512bf16_for_cpu=False."
            )

        if out is not None and out.is_cuda:
            return dequantize_4bit(self.weight.data, self.weight.quant_state, out=out)
        weight = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return weight if out is None else out.copy_(weight)  # on the host, bitsandbytes cannot write into a buffer

    def as_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """A view of a stored weight as an m × n matrix, one output filter per row."""
        if isinstance(self.module, nn.Conv2d):
            return stored.view(len(stored), -1)
        return stored.t() if isinstance(self.module, Conv1D) else stored

    def as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """A view of an m × n matrix in the stored layout."""
        return rows.t() if isinstance(self.module, Conv1D) else rows.view(self.stored_shape)


def has_standard_forward(module: nn.Module) -> bool:
    """Whether a linear or convolution layer uses torch's own forward; its class may be a subclass that overrides it."""
    standard: dict[type[nn.Module], tuple[str, ...]] = {
        nn.Linear: ("forward",),
        nn.Conv2d: ("forward", "_conv_forward"),
        Conv1D: ("forward",),
    }
    base = next(kind for kind in standard if isinstance(module, kind))
    return all(getattr(type(module), name) is getattr(base, name) for name in standard[base])


def find_lora_layers(model: nn.Module) -> list[PerturbedLayer]:
    """Finds every linear or convolution layer with a LoRA, DeLoRA or HiRA adapter of PEFT, by its name without PEFT.

    Everything else that is trained gets no noise and is named in a warning: LoRA on other layers (such as embeddings),
    whole modules (`modules_to_save`), tokens (`trainable_token_indices`), biases.

    Raises:
        ConfigError: an adapter of LoRA is not s·B·A on the weight of its layer, see `named_lora_layers`; or it is on
            nn.MultiheadAttention, which does not read its weights in the forward of a layer.
        TypeError: the model is sharded by FSDP's first version.
    """
    if any("_fsdp_wrapped_module" in name.split(".") for name, _ in model.named_modules()):
        raise TypeError(
            f"Invalid model {type(model).__name__}: FSDP shards its weights in flat pieces, so no process can compute "
            "row norms; use FSDP2 (fully_shard), which shards rows, DDP or DeepSpeed ZeRO-2."
        )
    from peft.tuners.hira.layer import HiraLayer
    from peft.tuners.lora import LoraLayer

    layers, lora_modules = [], set()
    owners = _owners(model)
    others: Counter[str] = Counter()
    for name, module in (*named_lora_layers(model), *normalized_or_multiplied_layers(model)):
        lora_modules.add(name)
        if isinstance(module.get_base_layer(), nn.MultiheadAttention):
            raise ConfigError(
                [
                    f"Invalid target_modules={name}: it is an nn.MultiheadAttention, which does not read its weights "
                    "in the forward of a layer, so noise would have no effect; leave it out of target_modules."
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
                    changes=_adapter_state(module) if isinstance(module, LoraLayer) else None,
                    readers=list(module.lora_magnitude_vector.values()) if isinstance(module, LoraLayer) else (),
                    tied_to=[owner for owner in owners[id(module.get_base_layer().weight)] if owner != name],
                    multiplies=isinstance(module, HiraLayer),
                )
            )
    _warn_of_no_noise(others, _trained_beside(model, lora_modules))
    return layers


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: names of the modules that have it}."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].append(plain_name(name))
    return owners


def _trained_beside(model: nn.Module, lora_modules: set[str]) -> list[str]:
    """Names of trained parameters that are not part of an adapter of these modules."""
    trained = [plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in trained if _OF_ADAPTERS.split(name, maxsplit=1)[0] not in lora_modules]


def _warn_of_no_noise(others: Counter[str], beside: Sequence[str]) -> None:
    parts = []
    if others:
        kinds = ", ".join(f"{count} around {kind}" for kind, count in others.items())
        parts.append(f"LoRA layers without noise: {kinds}. Only linear layers and 2-d convolutions are perturbed.")
    if beside:
        more = f" and {len(beside) - _NAMED} more" if len(beside) > _NAMED else ""
        parts.append(f"Parameters trained without noise, as they have no LoRA: {', '.join(beside[:_NAMED])}{more}.")
    if parts:
        logger.warning("%s", " ".join(parts))


_NAMED = 4  # parameters in a warning


# Variants of LoRA in PEFT whose change of the weight is not s·B·A.
_UNLIKE_A_PRODUCT = ("ArrowLinear", "QALoraLinear", "BdLoraLinear", "MontecloraLinear", "KasaLinear")


def named_lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's LoRA layers, by the names of their layers without PEFT and DDP.

    Raises:
        ConfigError: an adapter is not s·B·A (A: r × n, B: m × r) on the weight of its layer: PEFT's
            `target_parameters`, whose factors may belong to several experts, and some variants of LoRA.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers = [(plain_name(name), module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    wrapped = [f"{name}.{module.parameter_name}" for name, module in layers if isinstance(module, ParamWrapper)]
    variants = [
        f"{name} ({kind})"
        for name, module in layers
        for variant in module.lora_variant.values()
        if (kind := type(variant).__name__.removesuffix("Variant")) in _UNLIKE_A_PRODUCT
    ]
    errors = []
    if wrapped:
        errors.append(
            f"Invalid target_parameters={wrapped[0]} ({len(wrapped)} in all): an adapter of a parameter has no layer "
            "to perturb, and the factors of several experts are not a single B·A; name linear layers in target_modules "
            "and leave target_parameters out."
        )
    if variants:
        errors.append(
            f"Invalid LoRA variant of {variants[0]} ({len(variants)} layers in all): it does not add s·B·A to the "
            "weight, so row norms and closed forms of B·A do not hold; use plain LoRA, rsLoRA or DoRA."
        )
    if errors:
        raise ConfigError(errors)
    yield from layers


def normalized_or_multiplied_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's DeLoRA and HiRA layers, by the names of their layers without PEFT and DDP."""
    from peft.tuners.delora.layer import DeloraLayer
    from peft.tuners.hira.layer import HiraLayer

    for name, module in model.named_modules():
        if isinstance(module, DeloraLayer | HiraLayer):
            yield plain_name(name), module


_OF_ADAPTERS = re.compile(r"\.(?:lora|delora|hira)_|\.ranknum\.")  # begins the part of a name that is an adapter's


def is_adapters(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name."""
    return _OF_ADAPTERS.search(name) is not None


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # parts of names from torch.compile and checkpoint wrappers


def plain_name(name: str) -> str:
    """The name of a module or parameter in the backbone without PEFT, DDP and other wrappers."""
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
        return [_term(module, name) for name in module.active_adapters if name in factors]

    factors = _left_factors(module)
    return terms


def _left_factors(module: nn.Module) -> nn.Module:
    """{name of an adapter: its A}."""
    return next(getattr(module, kind) for kind in ("lora_A", "delora_A", "hira_A") if hasattr(module, kind))


def _adapter_state(module: nn.Module) -> Callable[[], Hashable]:
    """Reads private attributes instead of properties, which are slow: a model may have 560 layers, each step."""

    def state() -> Hashable:
        if hasattr(module, "lora_E"):  # AdaLoRA: `_term` returns a new tensor at every call
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
    if hasattr(module, "hira_A"):
        return AdapterTerm(module.hira_A[name].flatten(1), module.hira_B[name].flatten(1), 1.0)
    if hasattr(module, "delora_A"):
        return _normalized_term(module, name)
    if hasattr(module, "lora_E"):  # AdaLoRA: s/r̂ · B diag(E) A
        scaling = module.scaling[name] / (module.ranknum[name].item() + 1e-5)
        return AdapterTerm(module.lora_A[name] * module.lora_E[name], module.lora_B[name], scaling)
    # For a convolution, A is r × c × kh × kw and B is m × r × 1 × 1; flattened, B·A is what PEFT merges into W.
    A, B = module.lora_A[name].weight.flatten(1), module.lora_B[name].weight.flatten(1)
    return AdapterTerm(A, B, module.scaling[name])


def _normalized_term(module: nn.Module, name: str) -> AdapterTerm:
    """DeLoRA: B · diag(λ/r / (‖a_k‖ ‖b_k‖)) · A · diag(w), with PEFT's least norm."""
    A, B = module.delora_A[name], module.delora_B[name]
    norms = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    strengths = module.delora_lambda[name] / module.r[name] / norms
    return AdapterTerm(strengths[:, None] * A * module.delora_w_norm[name], B, 1.0)
