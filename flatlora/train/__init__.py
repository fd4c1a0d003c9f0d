"""The training of one run: trainer, data order, checkpoints, metrics, several processes."""
