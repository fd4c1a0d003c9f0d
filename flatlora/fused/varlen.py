"""Optimizer steps without padding, for decoder-only models on a GPU.

The rows of a step are joined into as few micro-batches as memory allows. A micro-batch is one sequence of T tokens:
positions restart with each row, and attention is torch's variable-length FlashAttention, in which no row sees another.
The head only gets the tokens that have a label. The loss equals that of padded rows up to rounding; a trial on each
model checks this.

T and the number of rows are rounded up, with a row of padding that has no label, so that few shapes occur.
"""

from __future__ import annotations

import bisect
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from flatlora.fused.packing import attends_to_all_before, reason_against
from flatlora.utils.labels import IGNORED_LABEL
from flatlora.utils.shards import device_of

logger = logging.getLogger(__name__)

VARLEN = "flatlora_varlen"  # its name among transformers' attention functions; transformers builds no mask for it
# Tokens of a micro-batch by memory: few sizes, so that runs on one machine choose the same; larger ones are no faster.
SIZES = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
MOST_TOKENS = SIZES[-1]
_TRIAL_TOKENS = 1024
_TOKENS, _ROWS, _LABELS = 128, 8, 256  # numbers of tokens, rows and labels are rounded up to multiples
_SPARE = 0.7  # share of the free memory that activations may take; backward and the optimizer need the rest


def joins_rows(model: nn.Module) -> bool:
    """Whether `allow_joined_rows` accepted the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "joins_rows", False)


def allow_joined_rows(base: nn.Module) -> list[str]:
    """Lets a causal language model train on joined rows; returns the names of the fast paths, none if it cannot.

    Its forward must accept `shift_labels` and `logits_to_keep`, as `forward_without_logits` does.
    """
    config = base.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not attends_to_all_before(base) or base.dtype != torch.bfloat16 or head > 256 or head % 8:
        return []
    if getattr(config, "attention_dropout", 0):
        return []
    base.joins_rows = True
    device = device_of(next(base.parameters()))
    if reason := reason_against(base, base.forward, lambda batch: base(**moved(pack(batch, MOST_TOKENS)[0], device))):
        base.joins_rows = False
        logger.warning("The rows of %s stay padded: %s.", type(base).__name__, reason)
        return []
    return ["rows joined without padding"]


def pack(batch: Mapping[str, torch.Tensor], most: int) -> list[dict[str, Any]]:
    """Joins padded rows on the host into micro-batches of at most `most` tokens each, of nearly equal sizes.

    Args:
        batch: input_ids, attention_mask and labels, B × L, INT64; the mask is 1 for tokens.
        most: a longer row is a micro-batch of its own.

    Returns:
        Keyword arguments of the model's forward. input_ids, position_ids: 1 × T; logits_to_keep: tokens that have a
        label, and shift_labels: these labels, 1 × N; cu_seq_lens_q: first token of each row, INT32, and
        max_length_q: an upper bound of the rows' lengths.
    """
    mask = batch["attention_mask"].bool()
    following = functional.pad(batch["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
    lengths, packs = mask.sum(1).tolist(), []
    for first, last in _spans(lengths, most):
        own = mask[first:last]
        columns = [batch["input_ids"][first:last][own], own.cumsum(1)[own] - 1, following[first:last][own]]
        packs.append(_joined(lengths[first:last], *columns))
    return packs


def _spans(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """First and last + 1 row of each micro-batch: as few as possible, and the largest as small as possible."""
    fewest = len(_filled(lengths, most))
    return _filled(lengths, bisect.bisect_left(range(most), -fewest, key=lambda cap: -len(_filled(lengths, cap))))


def _filled(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    firsts, tokens = [0], 0
    for row, length in enumerate(lengths):
        if row > firsts[-1] and tokens + length > most:
            firsts.append(row)
            tokens = 0
        tokens += length
    return list(itertools.pairwise([*firsts, len(lengths)]))


def _joined(lengths: list[int], ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    total, kept = len(ids), (labels != IGNORED_LABEL).nonzero().squeeze(1)
    padding, unlabeled = _up(max(total, 1), _TOKENS) - total, _up(max(len(kept), 1), _LABELS) - len(kept)
    ends = torch.tensor([0, *lengths, padding]).cumsum(0)
    empty = _up(len(ends), _ROWS) - len(ends)
    return {
        "input_ids": functional.pad(ids, (0, padding))[None],
        "position_ids": torch.cat([positions, torch.arange(padding)])[None],
        "logits_to_keep": functional.pad(kept, (0, unlabeled)),
        "shift_labels": functional.pad(labels[kept], (0, unlabeled), value=IGNORED_LABEL)[None],
        "cu_seq_lens_q": functional.pad(ends, (0, empty), value=total + padding).int(),
        "max_length_q": max(_TOKENS, 1 << (max(*lengths, padding) - 1).bit_length()),
    }


def _up(value: int, multiple: int) -> int:
    return value + -value % multiple


def moved(pack_: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The micro-batch on a device; the host does not wait for the copy to a GPU."""
    pin = device.type == "cuda"
    return {
        name: (value.pin_memory() if pin else value).to(device, non_blocking=True)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in pack_.items()
    }


def _trial_pack(model: nn.Module) -> dict[str, Any]:
    ids = torch.arange(_TRIAL_TOKENS)[None] % model.config.get_text_config().vocab_size
    return pack({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, _TRIAL_TOKENS)[0]


def tokens_that_fit(loss_of: Callable[[dict[str, Any]], torch.Tensor], model: nn.Module, device: torch.device) -> int:
    """Tokens of a micro-batch for which the free memory of a GPU suffices, one of `SIZES`.

    The activations of a trial are measured, which does not change the random state. A first one, not measured, compiles
    kernels and gathers the weights that FSDP2 keeps.

    Args:
        loss_of: micro-batch → loss, as in training.
    """
    generator = torch.cuda.get_rng_state(device)
    for _ in range(2):
        before = torch.cuda.memory_allocated(device)
        loss = loss_of(moved(_trial_pack(model), device))
        per_token = max(1, torch.cuda.memory_allocated(device) - before) / _TRIAL_TOKENS
        del loss
    torch.cuda.set_rng_state(generator, device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    optimizer = 8 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)  # Adam's
    return _rounded((_SPARE * (torch.cuda.mem_get_info(device)[0] + reserved) - optimizer) / per_token)


def _rounded(tokens: float) -> int:
    """The largest of `SIZES` up to `tokens`, or the smallest."""
    return max((size for size in SIZES if size <= tokens), default=SIZES[0])


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of joined rows (1 × heads × T × d), with fewer heads of keys and values if they are shared.

    Raises:
        ValueError: the model asks for what the kernel would leave out; `reason_against` then keeps its rows padded.
    """
    asked = [name for name in _NOT_COMPUTED if kwargs.get(name) is not None]
    if asked or dropout:
        raise ValueError(f"its attention has {', '.join(asked or ['dropout'])}")
    states = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    attend = _kernel() if query.is_cuda else attend_reference
    return attend(*states, cu_seq_lens_q, max_length_q, scaling)[None], None


AttentionInterface.register(VARLEN, _attend)

# Arguments of transformers' attention functions: s_aux are sinks, softcap bounds the scores.
_NOT_COMPUTED = ("sliding_window", "softcap", "s_aux")


@functools.cache
def _kernel() -> Callable[..., torch.Tensor]:
    """`torch.nn.attention.varlen.varlen_attn`, causal."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}  # torch 2.10

    def attend(query, key, value, starts, longest, scaling):
        more = {}
        if (shared := query.shape[1] // key.shape[1]) > 1:
            if "enable_gqa" in known:
                more["enable_gqa"] = True
            else:
                key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
        return varlen_attn(query, key, value, starts, starts, longest, longest, scale=scaling, **causal, **more)

    return attend


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """Slow reference: T × heads × d (keys and values may have fewer), one row after the other."""
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    outs = [
        functional.scaled_dot_product_attention(
            *(tensor[first:last].transpose(0, 1) for tensor in (query, key, value)), is_causal=True, scale=scaling
        ).transpose(0, 1)
        for first, last in zip(starts.tolist(), starts[1:].tolist(), strict=False)
        if last > first
    ]
    return torch.cat(outs)
