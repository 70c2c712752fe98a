"""Bugs in steering tables, rows, sums and ops."""

from canary import Canary

CANARIES: list[Canary] = []
