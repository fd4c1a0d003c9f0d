"""Cross entropy of a causal model's head without the logits of a whole batch in memory.

For a frozen head W (V × H) the gradient (softmax(h Wᵀ) − onehot) W can be computed together with the loss. The forward
does so for a few rows at a time, with Liger's kernel on a GPU and in-place torch operations on a CPU, and reuses the
memory of the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from flatlora.utils.labels import IGNORED_LABEL
from flatlora.utils.shards import call_as_forward, plain_class, reshard, whole

_GPU_ROWS = 1024  # tokens whose logits are in memory at a time
_CPU_ROWS = 128


def has_frozen_linear_head(base: nn.Module) -> bool:
    """Whether a causal model's loss is the cross entropy of hidden · Wᵀ with a frozen W, without any other term."""
    head = getattr(base, "lm_head", None)
    plain = head is not None and plain_class(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    config = base.config.get_text_config()  # of a model that also reads images, a part of its config
    changed = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _CHANGES_LOGITS)
    with_router_loss = getattr(config, "output_router_logits", False)
    decoder = hasattr(base, "model") and not base.config.is_encoder_decoder
    return plain and decoder and not (changed or with_router_loss) and _has_plain_loss(base)


# Config keys for a cap or a scale of the logits; others are found by a trial.
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@torch.no_grad()
def _has_plain_loss(base: nn.Module) -> bool:
    """Whether the model's own loss of a trial is the cross entropy of its head's product with the next token.

    The head gets hidden states that make large logits, at which a cap, a scale or a further term shows.
    """
    weight = whole(base.lm_head.weight)
    count, vocabulary = 8, len(weight)
    ids = (torch.arange(count, device=weight.device)[None] + 3) % vocabulary
    labels = torch.arange(count, device=weight.device)[None] * (vocabulary // count)
    hidden = torch.arange(count * weight.shape[1], device=weight.device).sin().view(1, count, -1).to(weight.dtype)
    hidden *= _TRIAL_SPREAD / (hidden @ weight.t()).float().std().clamp_min(1e-6)
    logits = (hidden @ weight.t()).float()
    expected = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    hook = base.lm_head.register_forward_pre_hook(lambda module, args: (hidden.to(args[0].dtype), *args[1:]))
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        loss = base(input_ids=ids, labels=labels, use_cache=False).loss
    except torch.OutOfMemoryError:
        raise  # one of several processes would go another way than the others
    except (TypeError, KeyError, RuntimeError, ValueError, AttributeError):
        return False
    finally:
        hook.remove()
        for module, mode in modes:
            module.training = mode
        reshard(base)
    return bool((loss - expected).abs() <= 1e-2 * expected)


_TRIAL_SPREAD = 60.0  # standard deviation of the logits; caps are at 30


def forward_without_logits(base: nn.Module) -> Callable[..., Any]:
    """Returns a forward for training that only returns the loss and never holds the logits of a whole batch."""
    original = base.forward

    @functools.wraps(original)  # generate() and Trainer look at the signature
    def forward(
        *args: Any,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not base.training or (labels is None and shift_labels is None):
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return original(*args, logits_to_keep=logits_to_keep, **kwargs)
        hidden = base.model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden = hidden[:, logits_to_keep]
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
        head = base.lm_head
        loss = call_as_forward(
            head, lambda hidden: linear_cross_entropy(hidden, head.weight, shift_labels, num_items_in_batch), hidden
        )
        return CausalLMOutputWithPast(loss=loss)

    return forward


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy of hidden (… × H) times a frozen head (V × H), with the logits of only some rows in memory.

    Args:
        labels: shape …, INT64; -100 has no loss.
        items: divisor of the sum of losses; None is the number of labels with a loss, without synchronization.
    """
    labels = labels.reshape(-1)
    total = _HeadLoss.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels)
    return total / ((labels != IGNORED_LABEL).sum() if items is None else items)


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Slow reference for `linear_cross_entropy`: all logits at once, in FP32."""
    logits = hidden.reshape(-1, hidden.shape[-1]).float() @ weight.float().t()
    total = nn.functional.cross_entropy(logits, labels.reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / ((labels != IGNORED_LABEL).sum() if items is None else items)


class _HeadLoss(torch.autograd.Function):
    """Sum of the losses; the gradient is computed in forward, from the same logits."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss, grad_hidden = (_on_gpu if hidden.is_cuda else _on_cpu)(hidden, weight, labels)
        ctx.save_for_backward(grad_hidden)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad).to(ctx.dtype), None, None


def _on_cpu(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses and its gradient for hidden (rows × H); products are in autocast's dtype if it is enabled."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    grad_hidden, total = torch.empty_like(hidden, dtype=dtype), torch.zeros(())
    with torch.autocast("cpu", enabled=False):
        weight = weight.to(dtype)
        for start in range(0, labels.shape[0], _CPU_ROWS):
            rows = slice(start, start + _CPU_ROWS)
            target, scores = labels[rows], (hidden[rows].to(dtype) @ weight.t()).float()
            with_loss = (target != IGNORED_LABEL)[:, None]
            target = target.clamp_min(0)[:, None]
            scores.sub_(scores.amax(1, keepdim=True))
            chosen = scores.gather(1, target)
            sums = scores.exp_().sum(1, keepdim=True)
            total += ((sums.log() - chosen) * with_loss).sum()
            scores.mul_(with_loss / sums)  # softmax
            scores.scatter_add_(1, target, -with_loss.float())
            torch.mm(scores.to(dtype), weight, out=grad_hidden[rows])
    return total, grad_hidden


def _on_gpu(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_on_cpu`, but with Liger's kernel and products in the weight's dtype."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    losses = torch.zeros(labels.shape[0], device=hidden.device)
    grad_hidden = torch.empty_like(hidden, dtype=weight.dtype)
    columns = weight.shape[0]
    block = min(1 << 15, 1 << (columns - 1).bit_length())
    for start in range(0, labels.shape[0], _GPU_ROWS):
        rows = slice(start, min(start + _GPU_ROWS, labels.shape[0]))
        logits, target, loss = hidden[rows].to(weight.dtype) @ weight.t(), labels[rows], losses[rows]
        # Writes each row's loss to `loss`, and overwrites the logits with their gradient.
        liger_cross_entropy_kernel[(logits.shape[0],)](
            X_ptr=logits,
            X_stride=logits.stride(0),
            Y_ptr=target,
            Y_stride=1,
            weight_ptr=None,
            loss_ptr=loss,
            z_loss_ptr=None,
            loss_stride=1,
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=columns,
            n_non_ignore=1.0,
            sum_non_ignore_weight=1.0,
            weight_sum=0.0,
            ignore_index=IGNORED_LABEL,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="sum",
            softcap=None,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=True,
            BLOCK_SIZE=block,
            num_warps=32,
        )
        torch.mm(logits, weight, out=grad_hidden[rows])
    return losses.sum(), grad_hidden
