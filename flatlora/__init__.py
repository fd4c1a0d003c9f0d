"""Flat-LoRA: low-rank adapters that end up in flat regions of the full weight space.

In one's own script: `FlatLoraCallback` for a transformers Trainer, or `WeightPerturbation` for any other loop.
"""

from flatlora.callback import FlatLoraCallback
from flatlora.layers import find_lora_layers
from flatlora.perturbation import WeightPerturbation

__all__ = ["FlatLoraCallback", "WeightPerturbation", "find_lora_layers"]
