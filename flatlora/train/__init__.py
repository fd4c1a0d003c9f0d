"""Training of one run: trainer, data order, checkpoints, metrics, distributed processes."""
