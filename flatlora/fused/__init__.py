"""The fast training step: fused LoRA layers, CUDA graphs, cross entropy in chunks, batches without padding."""
