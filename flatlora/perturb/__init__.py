"""Flat-LoRA's perturbation of a model's weights, the Trainer callback, and flatness measures."""
