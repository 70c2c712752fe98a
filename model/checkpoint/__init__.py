"""Checkpoint files: the shape of a model, its tensors, and exports for other engines."""
