"""Bugs in how checkpoints, prompts and templates are read."""

from canary import Canary

CANARIES: list[Canary] = []
