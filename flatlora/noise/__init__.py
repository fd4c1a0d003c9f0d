"""Standard-normal noise as a pure function of (seed, step, stream, layer, element): one pass a device."""
