"""The checkpoints of `cna demo`, data only."""
