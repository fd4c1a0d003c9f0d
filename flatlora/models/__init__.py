"""Models: finds, checks and loads backbones, with and without adapters."""
