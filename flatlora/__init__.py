"""Flat-LoRA: low-rank adapters that end up in flat regions of the full weight space.

In one's own script: `FlatLoraCallback` for a transformers Trainer, `WeightPerturbation` for any other loop, and
`LoRAPro`, an optimizer of LoRA's pairs.
"""

from flatlora import _quiet  # noqa: F401  (first: it is about the imports below)
from flatlora.callback import FlatLoraCallback
from flatlora.layers import find_lora_layers
from flatlora.methods.lora_pro import LoRAPro, lora_pairs
from flatlora.perturbation import WeightPerturbation

__all__ = ["FlatLoraCallback", "LoRAPro", "WeightPerturbation", "find_lora_layers", "lora_pairs"]
