"""Checkpoint files: what a model is, its tensors, and what leaves for other engines."""
