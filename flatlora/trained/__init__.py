"""A trained model: its weights and run from a path, merged into its base, described in a model card, published."""
