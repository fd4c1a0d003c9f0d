"""Flat-LoRA: low-rank adapters that end up in flat regions of the full weight space.

`FlatLoraCallback` is for a transformers Trainer, `WeightPerturbation` for any other training loop, and `LoRAPro` is an
optimizer for LoRA's factors. `fast_dtype` returns the dtype to load a backbone in on this machine.
"""

from flatlora import _moved, _quiet  # noqa: F401  (first: they act on the imports below)
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
