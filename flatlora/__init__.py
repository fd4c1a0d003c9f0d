"""Flat-LoRA: low-rank adapters that end up in flat regions of the full weight space.

In one's own script: `FlatLoraCallback` for a transformers Trainer, `WeightPerturbation` for any other loop, and
`LoRAPro`, an optimizer of LoRA's pairs. `fast_dtype` says in which dtype to load a backbone on this machine.
"""

from flatlora import _moved, _quiet  # noqa: F401  (first: they are about the imports below)
from flatlora.optim.lora_pro import LoRAPro, lora_pairs
from flatlora.perturb.callback import FlatLoraCallback
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.perturb.settings import NoiseSettings
from flatlora.utils.precision import fast_dtype

__all__ = [
    "FlatLoraCallback",
    "LoRAPro",
    "NoiseSettings",
    "WeightPerturbation",
    "fast_dtype",
    "find_lora_layers",
    "lora_pairs",
]
