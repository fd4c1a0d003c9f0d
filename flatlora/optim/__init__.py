"""LoRA-Pro's optimizer."""
