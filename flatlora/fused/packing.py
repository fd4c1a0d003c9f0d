"""Micro-batches without padding: the rows of a batch as one sequence, for decoder-only models on a CPU.

All layers except attention work on each token separately, where padding costs as much as tokens do. Here the tokens of
all rows go through the model as one row of T = Σ lengths tokens, whose positions restart with each row. Only attention
pads its queries, keys and values, for a few rows of similar length at a time, calls the model's own attention function
with a causal mask, and removes the padding again. The output head only gets the tokens that have a label.

The loss equals that of the padded batch up to rounding. Tests check this, and so does a trial on each model before
packing is used.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flatlora.fused.cross_entropy import forward_without_logits, has_frozen_linear_head
from flatlora.utils.errors import reason_of
from flatlora.utils.labels import IGNORED_LABEL
from flatlora.utils.shards import call_as_forward, device_of, reshard

logger = logging.getLogger(__name__)

_MASKS = {"eager": eager_mask, "sdpa": sdpa_mask}


_ROWS_TOGETHER = 4  # rows of similar length in one call of attention


class RowGroup(NamedTuple):
    """Consecutive tokens of a packed sequence: `rows` = B rows, which are padded to `length` = L tokens."""

    places: torch.Tensor  # index of each token in the padded rows, row · L + position, INT64
    rows: int
    length: int


def remove_padding(base: nn.Module) -> list[str]:
    """Lets a causal language model train on packed rows; returns the names of the fast paths, none if it cannot.

    The model's `forward` is replaced: a training batch with labels and a mask is packed, all other calls are unchanged.
    """
    attention = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if attention not in _MASKS or not is_decoder_only(base):
        return []
    if reason := narrow_attention(base):
        logger.warning(
            "The batches of %s stay padded, and its head computes all logits: %s.", type(base).__name__, reason
        )
        return []
    original, done = base.forward, ["batches without padding"]
    base.config._attn_implementation = _packed_name(attention)
    training = original
    if has_frozen_linear_head(base):
        training = forward_without_logits(base)
        done.append("chunked cross entropy")
    base.forward = _forward_without_padding(base, original, training)
    if reason := reason_against(base, original, lambda batch: base(**batch)):
        base.forward, base.config._attn_implementation = original, attention
        logger.warning("The batches of %s stay padded: %s.", type(base).__name__, reason)
        return []
    return done


def attends_to_all_before(base: nn.Module) -> bool:
    """Whether every layer is causal attention to all earlier tokens, without a window or chunks."""
    return is_decoder_only(base) and narrow_attention(base) is None


def is_decoder_only(base: nn.Module) -> bool:
    """Whether a model is a causal language model of transformers, a head on a decoder named `model`."""
    decoder = isinstance(base, PreTrainedModel) and isinstance(getattr(base, "model", None), nn.Module)
    if not decoder or getattr(base.config, "is_encoder_decoder", False):
        return False
    return base.get_output_embeddings() is not None  # an encoder that classifies, such as ModernBERT, has none


def narrow_attention(base: PreTrainedModel) -> str | None:
    """Why some layers do not attend to all earlier tokens, for a message; None if all do."""
    config = base.config.get_text_config()  # of a model that also reads images, a part of its config
    for setting in ("sliding_window", "attention_chunk_size"):
        if width := getattr(config, setting, None):
            return f"its attention has a window ({setting}={width})"
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention"}):
        return f"its layers are not all causal attention to every earlier token (layer_types: {', '.join(others)})"
    return None


def loss_without_padding(
    forward: Callable[..., Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """Returns the output of a causal model's `forward` for a batch, computed without padding; logits only for labels.

    Args:
        input_ids, attention_mask, labels: B × L, INT64; the mask is 1 for tokens, on either side of the padding, and
            labels are -100 where a token has no loss.
        kwargs: passed on, such as `num_items_in_batch`.
    """
    lengths, order = attention_mask.sum(1).sort(stable=True)
    tokens = attention_mask[order].bool()
    positions = (attention_mask[order].cumsum(1) - 1)[tokens]
    following = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[order, 1:][tokens]
    labeled = (following != IGNORED_LABEL).nonzero().squeeze(1)
    return forward(
        input_ids=input_ids[order][tokens][None],
        position_ids=positions[None],
        attention_mask=torch.zeros(1, 1, 1, 1),  # with four dimensions, so that transformers builds none of T × T
        labels=following[None],
        shift_labels=following[labeled][None],
        logits_to_keep=labeled,
        row_groups=_groups(lengths.tolist(), positions),
        use_cache=False,
        **kwargs,
    )


def _groups(lengths: list[int], positions: torch.Tensor) -> list[RowGroup]:
    """Groups of rows of a packed sequence that is sorted by length."""
    groups, start = [], 0
    for first in range(0, len(lengths), _ROWS_TOGETHER):
        own = lengths[first : first + _ROWS_TOGETHER]
        row = torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own))
        groups.append(RowGroup(row * own[-1] + positions[start : start + len(row)], len(own), own[-1]))
        start += len(row)
    return groups


def _forward_without_padding(
    base: nn.Module, original: Callable[..., Any], training: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(original)  # generate() and Trainer look at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        batch = [kwargs.get(name) for name in ("input_ids", "attention_mask", "labels")]
        plain = all(kwargs.get(name) is None for name in _NOT_PACKED)
        if args or not base.training or not plain or any(tensor is None for tensor in batch) or batch[1].dim() != 2:
            return original(*args, **kwargs)
        if not bool((batch[2][:, 1:] != IGNORED_LABEL).any()):
            return original(*args, **kwargs)  # no label: keep the model's own behavior
        given = {name: value for name, value in kwargs.items() if value is not None and name not in _REPLACED}
        return loss_without_padding(training, *batch, **given)

    return forward


_REPLACED = ("input_ids", "attention_mask", "labels", "shift_labels", "logits_to_keep", "use_cache")
_NOT_PACKED = ("inputs_embeds", "position_ids", "past_key_values", "output_attentions", "output_hidden_states")


@torch.no_grad()
def reason_against(
    base: nn.Module, padded: Callable[..., Any], packed: Callable[[dict[str, torch.Tensor]], Any]
) -> str | None:
    """Why packed rows cannot be used, from a trial on two short rows; None if the losses are equal.

    Args:
        padded: forward of padded rows, in evaluation mode.
        packed: the batch, on the host → output of the same rows without padding; the model, but none of its layers,
            is in training mode.
    """
    ids = torch.arange(3, 13).view(2, 5) % base.config.get_text_config().vocab_size
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED_LABEL)}
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        device = device_of(next(base.parameters()))
        given = {name: tensor.to(device) for name, tensor in batch.items()}
        loss = call_as_forward(base, padded, **given, use_cache=False).loss
        base.training = True  # layers, such as dropout, stay in evaluation mode
        other = packed(batch).loss
    except torch.OutOfMemoryError:
        raise  # one of several processes would go another way than the others
    except (TypeError, KeyError, RuntimeError, ValueError, AttributeError) as error:
        return f"it does not accept packed rows ({reason_of(error)})"
    finally:
        for module, mode in modes:
            module.training = mode
        reshard(base)
    tolerance = 1e-4 if base.dtype == torch.float32 else 3e-2
    if not (other - loss).abs() <= tolerance * loss.abs():
        return f"its loss changes without padding ({other:.6g} instead of {loss:.6g})"
    return None


def _packed_name(attention: str) -> str:
    return f"flatlora_packed_{attention}"


def _packed_attention(
    attention: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_groups: list[RowGroup] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's own attention; packed rows (1 × heads × T × d) are padded before and unpadded after it."""
    own = ALL_ATTENTION_FUNCTIONS.get(attention) or sys.modules[type(module).__module__].eager_attention_forward
    if row_groups is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    tokens, outs = [len(group.places) for group in row_groups], []
    for group, *parts in zip(row_groups, *(states.split(tokens, dim=2) for states in (query, key, value)), strict=True):
        mask = _causal_mask(group.length, query.dtype) if attention == "eager" else None
        out, _ = own(module, *(_Pad.apply(part, group) for part in parts), mask, **kwargs)  # B × L × heads × d
        outs.append(_Unpad.apply(out, group))
    return torch.cat(outs, dim=1), None


for _attention, _mask in _MASKS.items():
    AttentionInterface.register(_packed_name(_attention), functools.partial(_packed_attention, _attention))
    AttentionMaskInterface.register(_packed_name(_attention), _mask)


@functools.lru_cache(maxsize=64)
def _causal_mask(length: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask, 1 × 1 × L × L: 0 for a token and those before it, the dtype's minimum elsewhere."""
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]


class _Pad(torch.autograd.Function):
    """1 × heads × T × d → B × heads × L × d, with zeros as padding."""

    @staticmethod
    def forward(ctx, packed: torch.Tensor, group: RowGroup) -> torch.Tensor:
        ctx.group = group
        return _padded(packed[0].transpose(0, 1), group).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _packed(grad.transpose(1, 2), ctx.group).transpose(0, 1)[None], None


class _Unpad(torch.autograd.Function):
    """B × L × heads × d → 1 × T × heads × d."""

    @staticmethod
    def forward(ctx, padded: torch.Tensor, group: RowGroup) -> torch.Tensor:
        ctx.group = group
        return _packed(padded, group)[None]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _padded(grad[0], ctx.group), None


def _padded(tokens: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """T × heads × d → B × L × heads × d."""
    out = tokens.new_zeros(group.rows * group.length, *tokens.shape[1:])
    return out.index_copy_(0, group.places, tokens).view(group.rows, group.length, *tokens.shape[1:])


def _packed(padded: torch.Tensor, group: RowGroup) -> torch.Tensor:
    """B × L × heads × d → T × heads × d."""
    return padded.reshape(group.rows * group.length, *padded.shape[2:]).index_select(0, group.places)
