"""Backbones: where their files are, what they are, and how they are loaded, with adapters and without."""
