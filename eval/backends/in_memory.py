"""Base class of backends with a model in this process."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from flatlora.utils.precision import Precision


class InMemoryBackend:
    """Holds a model, with or without a PEFT adapter (not merged, as merging rounds), and describes how it computes.

    Args:
        model: the model; it is put into evaluation mode.
        precision: autocast of the model; None: none, in the dtype of the weights.
        identity: what identifies the model in generation.json, such as hashes.
    """

    name: ClassVar[str]  # in generation.json

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int,
        precision: Precision | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.batch_size = model.eval(), batch_size
        self.precision, self.identity = precision, identity or {}
        self.device = next(model.parameters()).device

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "batch_size": self.batch_size,
            "autocast": self.precision.label if self.precision else "None",
            "device": self.device.type,
            **self.identity,
        }
