"""Standard-normal noise as a pure function of (seed, step, stream, layer, element) (host, torch, Triton)."""
