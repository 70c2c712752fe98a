"""Bugs in identity and files."""

from canary import Canary

CANARIES: list[Canary] = []
