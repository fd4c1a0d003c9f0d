"""Forwards that read W + ε: wrappers of a module's own forward, and the recomputed linear layer and convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from flatlora.perturb.epsilon import Draw
from flatlora.perturb.layers import PerturbedLayer, has_standard_forward
from flatlora.utils.shards import holding


class Perturbation(Protocol):
    """The part of `WeightPerturbation` that the forwards use."""

    @property
    def mode(self) -> str: ...

    @property
    def layers(self) -> Sequence[PerturbedLayer]: ...

    def reading(self, index: int) -> Reading | None:
        """The `Reading` of layer number `index` now; None while it reads W."""
        ...

    def perturbed_weight(self, index: int, draw: Draw) -> torch.Tensor:
        """W + ε of layer number `index` in the stored layout."""
        ...


class Reading(NamedTuple):
    """W + ε of one layer in one forward; the backward must read the same."""

    perturbation: Perturbation
    layer: int  # its number
    draw: Draw

    def weight(self) -> torch.Tensor:
        """W + ε in the stored layout."""
        return self.perturbation.perturbed_weight(self.layer, self.draw)


class _Wrapper:
    """Replaces the forward of a module that reads the weight of layer number `index`.

    The call is wrapped, and the parameter stays W for everything else that reads it: tied weights, hashes, checkpoints,
    merges, and an evaluation after an interrupted step.
    """

    def __init__(self, perturbation: Perturbation, index: int, module: nn.Module) -> None:
        self.perturbation, self.index, self.module = perturbation, index, module
        self.layer = perturbation.layers[index]
        self.replaced = module.__dict__.get("forward")  # such as that of accelerate's hooks
        self.plain = self.replaced or type(module).forward.__get__(module)

    def attach(self) -> None:
        self.module.forward = self

    @staticmethod
    def detach(module: nn.Module) -> None:
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, _Wrapper):
            del module.forward
            if wrapper.replaced is not None:
                module.forward = wrapper.replaced

    def reading(self) -> Reading | None:
        return self.perturbation.reading(self.index)

    def run_plain(self, reading: Reading, *args: Any, keeps_weight: bool, **kwargs: Any) -> torch.Tensor:
        """Run the module's own forward with W + ε as the layer's weight.

        Args:
            keeps_weight: whether autograd keeps the weight for the backward. In recompute mode the next layer
                overwrites it, so the forward then runs again in the backward.
        """

        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            with holding(self.layer.module, reading.weight()):
                return self.plain(*args, **kwargs)

        if self.perturbation.mode == "copy" or not keeps_weight:
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=not _is_capturing(), **kwargs)


class PerturbedForward(_Wrapper):
    """The forward of a layer in copy and recompute mode: reads W + ε if there is a `reading`, else W."""

    def __init__(self, perturbation: Perturbation, index: int, module: nn.Module) -> None:
        super().__init__(perturbation, index, module)
        self.is_standard = self.layer.quantized or (self.replaced is None and has_standard_forward(module))
        self._checked = self.is_standard

    @torch.compiler.disable  # the weight that is read changes in every step, so torch.compile must break its graph here
    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        reading = self.reading()
        if reading is None:
            return self.plain(x, *args, **kwargs)
        if not self.is_standard or args or kwargs:
            self._check_own_forward(x, *args, **kwargs)
            return self.run_plain(reading, x, *args, keeps_weight=True, **kwargs)
        if self.perturbation.mode == "copy":
            return _apply(self.layer.module, x, reading.weight())
        if isinstance(self.layer.module, nn.Conv2d):
            return _recomputed_convolution(x, self.layer, reading)
        return _RecomputedLinear.apply(x, self.layer.module.bias, self.layer, reading)

    @torch.no_grad()
    def _check_own_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Test a forward that is not torch's on its first call: with its own weight, and with another one.

        Raises:
            TypeError: the output differs with the same weight, or does not change with another one.
        """
        if self._checked or _is_capturing() or not x.any():
            return
        self._checked, weight = True, self.layer.weight.detach()
        own, same, other = self._outputs([None, weight, -weight], (x, *args), kwargs)
        tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(own.abs().max()), "equal_nan": True}
        if torch.allclose(own, same, **tolerance) and not (torch.equal(own, other) and own.any()):
            return
        raise TypeError(
            f"Invalid layer {self.layer.name}={type(self.module).__name__}: its forward does not compute with its "
            "weight parameter (but with a copy, or one that a hook loads), so noise would change its output wrongly or "
            "not at all; remove the layer from the adapter's target_modules."
        )

    def _outputs(
        self, weights: Sequence[torch.Tensor | None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Outputs of the layer's own forward with each weight (None: its own); restores generators and buffers."""
        devices = [self.layer.device] if self.layer.device.type == "cuda" else []
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        outputs = []
        for weight in weights:
            with torch.random.fork_rng(devices=devices), holding(self.layer.module, weight):
                outputs.append(self.plain(*args, **kwargs).clone())
            for name, buffer in buffers.items():
                self.module.get_buffer(name).copy_(buffer)
        return outputs


class PerturbedReader(_Wrapper):
    """The forward of a layer's DoRA module in PEFT: its norm is ‖W + ε + s·B·A‖, as in inplace mode."""

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        reading = self.reading()
        if reading is None:
            return self.plain(*args, **kwargs)
        # The norm is detached. With dropout there is no base_result, and the module multiplies by the weight itself.
        return self.run_plain(reading, *args, keeps_weight=kwargs.get("base_result") is None, **kwargs)


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured, during which the host must not read values from the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _apply(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The forward of torch's own class, or transformers' Conv1D, with another weight."""
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(x, weight, module.bias)
    if isinstance(module, Conv1D):
        rows = torch.addmm(module.bias, x.reshape(-1, x.shape[-1]), weight)
        return rows.view(*x.shape[:-1], module.nf)
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight, module.bias)
    bias = None if module.bias is None else module.bias.to(weight.dtype)  # the casts of a packed layer's own forward
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def as_own_tensor(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A view of the output of an autograd function that is none to autograd, which forbids to change views in place.

    Some models do that to the output of a layer, such as DeBERTa's attention.
    """
    return torch.ops.aten._unsafe_view(y, list(shape))


class _RecomputedLinear(torch.autograd.Function):
    """y = x (W + ε)ᵀ + b, where W + ε is written to the shared scratch buffer in forward and again in backward.

    W is frozen, so x is not saved for backward, and only the draw of ε is. Casts follow autocast as in `F.linear`.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, bias: torch.Tensor | None, layer: PerturbedLayer, reading: Reading
    ) -> torch.Tensor:
        ctx.layer, ctx.reading, ctx.input_dtype = layer, reading, x.dtype
        y = _apply(layer.module, x, reading.weight())
        return as_own_tensor(y, y.shape)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_rows, grad_x, grad_bias = grad_y.reshape(-1, grad_y.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            perturbed = ctx.reading.weight().to(grad_y.dtype)
            grad_x = (grad_rows @ ctx.layer.as_rows(perturbed)).view(*grad_y.shape[:-1], -1).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_rows.sum(dim=0).to(ctx.layer.module.bias.dtype)
        return grad_x, grad_bias, None, None


def _recomputed_convolution(x: torch.Tensor, layer: PerturbedLayer, reading: Reading) -> torch.Tensor:
    module, single = layer.module, x.dim() == 3
    x, padding = _padded(x[None] if single else x, module)
    y = _RecomputedConvolution.apply(x, module.bias, layer, reading, padding)
    return y[0] if single else y


def _padded(x: torch.Tensor, module: nn.Conv2d) -> tuple[torch.Tensor, tuple[int, int]]:
    """Returns the padded input, and the zero padding that is left to the convolution, as torch splits the two."""
    left, right, top, bottom = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        return functional.pad(x, (left, right, top, bottom), mode=module.padding_mode), (0, 0)
    if (left, top) != (right, bottom):  # padding="same" of an even kernel: one more at the end
        x = functional.pad(x, (0, right - left, 0, bottom - top))
    return x, (top, left)


class _RecomputedConvolution(torch.autograd.Function):
    """y = x ∗ (W + ε) + b, as in `_RecomputedLinear`: W + ε is written in forward and backward, x is not saved."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        layer: PerturbedLayer,
        reading: Reading,
        padding: tuple[int, int],
    ) -> torch.Tensor:
        ctx.layer, ctx.reading, ctx.padding, ctx.input_dtype = layer, reading, padding, x.dtype
        ctx.input_layout = x.shape, x.stride()
        module = layer.module
        return functional.conv2d(x, reading.weight(), bias, module.stride, padding, module.dilation)

    @staticmethod
    def backward(ctx, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        module, (of_x, of_bias) = ctx.layer.module, ctx.needs_input_grad[:2]
        # The operator that autograd calls; it reads only the layout of x, which decides the algorithm.
        like_x = torch.empty_strided(*ctx.input_layout, dtype=grad_y.dtype, device=grad_y.device)
        grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
            grad_y,
            like_x,
            ctx.reading.weight().to(grad_y.dtype),
            [len(module.bias)] if of_bias else None,
            module.stride,
            ctx.padding,
            module.dilation,
            False,
            (0, 0),
            module.groups,
            (of_x, False, of_bias),
        )
        grad_x = grad_x.to(ctx.input_dtype) if of_x else None
        grad_bias = grad_bias.to(module.bias.dtype) if of_bias else None
        return grad_x, grad_bias, None, None, None
