"""Helpers of the method tests: configs by name, small batches, logits, a nudge to what is trained."""

from __future__ import annotations

import torch

from flatlora import methods

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))


def config_of(name: str, **settings):
    return methods.ADAPTERS[name].Config(name=name, method=name, **{"lora_r": 4, **settings})


def batches_of(count: int):
    """Distinct batches of two rows, the second padded."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(count):
        ids = torch.randint(3, 96, (2, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


@torch.no_grad()
def logits(model):
    model.eval()
    return model(input_ids=IDS).logits


def nudge(model, std=0.02):
    """Move what is trained, as some steps would."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model, batches):
    """That of all batches together, one tensor per trained parameter."""
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return [p.grad.clone() for p in trained(model)]
