"""Models that our own forward pass does not serve: transformers runs them, with the engine attached."""
