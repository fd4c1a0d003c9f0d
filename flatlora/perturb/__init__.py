"""Flat-LoRA's perturbation of a model's weights, the callback for a Trainer, and measures of flatness."""
