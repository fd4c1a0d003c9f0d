"""Fast paths of the training step: fused LoRA layers, CUDA graphs, chunked cross entropy, batches without padding."""
