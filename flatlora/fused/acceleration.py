"""Applies the fast paths of the training step to a model.

Fused LoRA layers and a head that never holds all logits; on a GPU Liger's kernels and CUDA graphs of micro-steps, on a
CPU batches without padding. `accelerate` applies those that the model and the machine support, for
`trainer.kernels=auto`. Weights, names and checkpoints do not change; fast paths that cannot be used are logged once.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flatlora.fused.cross_entropy import forward_without_logits, has_frozen_linear_head
from flatlora.fused.graphs import Captured, GraphCapture
from flatlora.fused.lora_linear import fuse, groups_of, recompute_norm, refresh
from flatlora.fused.packing import attends_to_all_before, remove_padding
from flatlora.fused.quick_gelu import fuse_quick_gelu
from flatlora.fused.varlen import VARLEN, allow_joined_rows
from flatlora.noise import triton_kernels
from flatlora.utils.shards import plain_class

logger = logging.getLogger(__name__)

_GRAPHS = 32  # number of micro-batch shapes that are captured; further shapes run without a graph
GRAPH_TOKENS = 4096  # larger micro-batches keep the GPU busy for longer than the host needs to launch them


def accelerate(model: nn.Module, device: torch.device) -> list[str]:
    """Applies the fast paths for `device` to a PEFT model; returns their names, for the record."""
    if device.type != "cpu" and not triton_kernels.available(device):
        return []
    done = []
    if fused := fuse(model):
        done.append(f"{fused} fused LoRA layers")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if device.type == "cpu":
        return done + remove_padding(base)
    if activations := fuse_quick_gelu(base):
        done.append(f"{activations} fused QuickGELU")
    if not isinstance(base, PreTrainedModel):
        return done  # a diffusion model; Liger and the rest are for language models
    if importlib.util.find_spec("liger_kernel") is None:
        logger.warning("liger-kernel is not installed: norms, rotary embeddings and the head use transformers' code.")
        return done
    if _apply_liger(base):
        done.append("Liger RMSNorm, RoPE and SwiGLU")
    if leave_out_mask(base):
        done.append("causal attention without a mask")
    if has_frozen_linear_head(base):
        base.forward = forward_without_logits(base)
        done += ["chunked cross entropy", *allow_joined_rows(base)]
    return done


def _apply_liger(base: nn.Module) -> bool:
    """Apply Liger's kernels to this model only: undo its changes to transformers' module, which affect all models."""
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.warning("Liger has no kernels for %s: transformers' code is used.", base.config.model_type)
        return False
    modeling = sys.modules[plain_class(base).__module__]
    before = dict(vars(modeling))
    # Without its cross entropy, which synchronizes with the host in every micro-step and so cannot be captured.
    _apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
    for name, module in base.named_modules():
        if name.endswith(_NORM_BEFORE_MLP):
            recompute_norm(module)
    _restore_other_activations(base)
    rotary = getattr(modeling, _ROTARY, None)
    for name, value in before.items():
        setattr(modeling, name, value)
    if rotary is not before.get(_ROTARY):
        for module in base.modules():
            if _ROTARY in inspect.unwrap(type(module).forward).__code__.co_names:
                module.forward = _with_rotary(module.forward, modeling, rotary)
    return True


def _restore_other_activations(base: nn.Module) -> None:
    """Restore the forward of layers whose activation is not the one that Liger's kernel computes.

    Liger checks the activation only where it builds a model, not where it changes one: a Llama with ReLU would be
    computed with SiLU.
    """
    x, restored = torch.linspace(-4.0, 4.0, 33), 0
    for module in base.modules():
        kernel = getattr(module.__dict__.get("forward"), "__qualname__", "")
        activation = next((getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name)), None)
        if not kernel.startswith("Liger") or activation is None:
            continue
        computed = functional.gelu(x, approximate="tanh") if "GEGLU" in kernel else functional.silu(x)
        if not torch.allclose(activation(x), computed, atol=1e-5):
            del module.forward
            restored += 1
    if restored:
        logger.warning("%d layers keep transformers' forward: Liger's kernel has another activation.", restored)


_ACTIVATIONS = ("act_fn", "activation_fn", "act")  # their names in transformers' layers
_NORM_BEFORE_MLP = ".post_attention_layernorm"  # its name in Llama, Mistral and Qwen
_ROTARY = "apply_rotary_pos_emb"  # a global function of the module: replaced only while this model's attention runs


def _with_rotary(original: Callable[..., Any], modeling: ModuleType, rotary: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        plain = getattr(modeling, _ROTARY)
        setattr(modeling, _ROTARY, rotary)
        try:
            return original(*args, **kwargs)
        finally:
            setattr(modeling, _ROTARY, plain)

    return forward


# torch's attention under a name for which transformers builds no mask: torch's causal flag is faster than an equivalent
# mask, and transformers does not use the flag while a CUDA graph is captured.
_MASKLESS = "flatlora_sdpa_without_mask"
AttentionInterface.register(_MASKLESS, sdpa_attention_forward)


def leave_out_mask(base: PreTrainedModel) -> bool:
    """Lets a causal model's attention use torch's causal flag in training; returns whether it can."""
    possible = attends_to_all_before(base) and base.config._attn_implementation == "sdpa"
    if possible:
        base.model.forward = _forward_without_mask(base.model)
    return possible


def _forward_without_mask(decoder: nn.Module) -> Callable[..., Any]:
    original = decoder.forward

    @functools.wraps(original)
    def forward(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        joined = kwargs.get("cu_seq_lens_q") is not None
        alone = not args[1:] and all(kwargs.get(name) is None for name in ("past_key_values", "position_ids"))
        if not joined and (not decoder.training or attention_mask is not None or not alone):
            given = {} if attention_mask is None else {"attention_mask": attention_mask}
            return original(*args, **given, **kwargs)
        config, usual = decoder.config, decoder.config._attn_implementation
        config._attn_implementation = VARLEN if joined else _MASKLESS
        try:
            return original(*args, **kwargs)
        finally:
            config._attn_implementation = usual

    return forward


class GraphedMicroStep:
    """Forward and backward of a micro-batch; small ones are captured in one CUDA graph per shape and replayed.

    For small micro-batches the host cannot launch kernels as fast as the GPU runs them; a replay is one launch. All
    gradients are in one flat buffer with a fixed address, and casts that only depend on the optimizer step are done
    once per step. On a CPU there is only the buffer.

    Args:
        compute: micro-batch (dict of tensors and numbers) → loss; must not synchronize with the host.
        model: the model that is trained; its fused layers add their gradients to the buffer themselves.
        largest: micro-batches whose largest input has more elements are not captured; None captures all.
    """

    def __init__(
        self,
        compute: Callable[[dict[str, Any]], torch.Tensor],
        model: nn.Module,
        largest: int | None = GRAPH_TOKENS,
    ) -> None:
        self.compute, self._groups = compute, groups_of(model)
        for group in self._groups:
            group.managed = True
        # The gradients of the A of a group lie one below the other: then they are one product.
        together = [member.factors[0] for group in self._groups for member in group.members if member.covers()]
        trained = [p for p in (*together, *model.parameters()) if p.requires_grad]
        self.parameters = list(dict.fromkeys(trained))
        flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        self.gradient = flat
        parts = flat.split([p.numel() for p in self.parameters])
        self._gradients = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        self._graphs: dict[Hashable, _MicroStep | None] = {}
        self._capture, self._largest = GraphCapture(flat.device) if flat.is_cuda else None, largest

    def __call__(self, inputs: dict[str, Any], state: Hashable = None) -> torch.Tensor:
        """Returns the loss of a micro-batch and adds its gradients to the parameters'.

        `state` identifies everything else that decides which kernels run, such as whether weights are perturbed. A
        shape that cannot be captured is logged and runs without a graph.
        """
        if self.parameters[0].grad is not self._gradients[0]:  # zero_grad() has dropped the old ones
            self.restart()
        key = state, tuple((name, _kind(value)) for name, value in sorted(inputs.items()))
        if key not in self._graphs:
            size = max(value.numel() for value in inputs.values() if isinstance(value, torch.Tensor))
            too_large = self._largest is not None and size > self._largest
            if self._capture is None or too_large or len(self._graphs) >= _GRAPHS:
                return self._run(inputs).detach()
            self._graphs[key] = self._try_capture(inputs)
        if self._graphs[key] is None:
            return self._run(inputs).detach()
        static, loss = self._graphs[key]
        for name, value in static.items():
            if isinstance(value, torch.Tensor):
                value.copy_(inputs[name], non_blocking=True)
        return loss.replay().clone()

    def restart(self) -> None:
        """Zero the gradients and cast the factors again, after an optimizer step."""
        self.gradient.zero_()
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        refresh([cast for group in self._groups for cast in group.casts()])

    def close(self) -> None:
        """Drop the graphs, and let other training loops use the layers."""
        self._graphs.clear()
        for group in self._groups:
            group.managed = False

    def _run(self, inputs: dict[str, Any]) -> torch.Tensor:
        loss = self.compute(inputs)
        loss.backward()
        return loss

    @property
    def captured(self) -> int:
        """Number of captured shapes."""
        return sum(graph is not None for graph in self._graphs.values())

    def _try_capture(self, inputs: dict[str, Any]) -> _MicroStep | None:
        """Capture a micro-step; gradients and RNG are those of before."""
        device = self.gradient.device
        static = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        gradient, generator = self.gradient.clone(), torch.cuda.get_rng_state(device)
        shapes = {name: tuple(getattr(value, "shape", (value,))) for name, value in inputs.items()}
        captured = self._capture(lambda: self._run(static).detach(), shapes, warm_ups=2)
        self.gradient.copy_(gradient)
        torch.cuda.set_rng_state(generator, device)
        return captured and _MicroStep(static, captured)


def _kind(value: torch.Tensor | int) -> Hashable:
    """What a graph fixes of an input: a tensor's shape and dtype, a number's value."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


class _MicroStep(NamedTuple):
    """A captured micro-step, and the buffers that it reads."""

    inputs: dict[str, torch.Tensor | int]
    loss: Captured[torch.Tensor]
