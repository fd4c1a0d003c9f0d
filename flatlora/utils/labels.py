"""Labels of tokens and rows, and the losses that they have."""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORED_LABEL = -100  # `ignore_index` of torch's cross entropy, as transformers and TRL use it


def row_losses(logits: torch.Tensor, labels: torch.Tensor, *, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each row, and how many losses it is the sum of.

    Args:
        logits: (rows, tokens, vocabulary), or (rows, classes).
        labels: (rows, tokens), or (rows,).
        shifted: whether the logits of a token predict the next one, as a decoder-only model's do.

    Returns:
        sums, FP32, and counts, INT64, both (rows,).
    """
    if labels.dim() == 1:
        return functional.cross_entropy(logits.float(), labels, reduction="none"), torch.ones_like(labels)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view(labels.shape).sum(dim=1), (labels != IGNORED_LABEL).sum(dim=1)
