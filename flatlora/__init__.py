"""Flat-LoRA: low-rank adapters that end up in flat regions of the full weight space.

In one's own script: `FlatLoraCallback` for a transformers Trainer, or `WeightPerturbation` for any other loop.
"""

from flatlora.callback import FlatLoraCallback
from flatlora.perturbation import WeightPerturbation, find_lora_layers

__all__ = ["FlatLoraCallback", "WeightPerturbation", "find_lora_layers"]
