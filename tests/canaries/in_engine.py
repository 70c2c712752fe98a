"""Bugs in the engine on transformers models."""

from canary import Canary

CANARIES: list[Canary] = []
