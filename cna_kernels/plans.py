"""CNA_PLAN: the user's word on which kernels serve an op, such as ``gated_mlp=fused,down_proj=blas``."""

from __future__ import annotations

import os
from typing import NamedTuple

from .checks import InputError

# Every plan of every backend by op. A plan that another backend has is passed over; an unknown one is an error.
NAMES = {
    "gated_mlp": ("gemv", "flat", "gated", "fused", "blas", "engine", "torch"),
    "down_proj": ("split", "tma", "blas", "engine", "torch"),
    "linear": ("engine", "torch"),
}


class Plan(NamedTuple):
    """What serves a call, and why."""

    name: str
    reason: str


def override(op: str) -> str | None:
    """The plan that CNA_PLAN names for the op, or None. Raises InputError."""
    text = os.environ.get("CNA_PLAN")
    return read(text).get(op) if text else None


def read(text: str) -> dict[str, str]:
    """Read ``op=plan,op=plan``.

    Raises:
        InputError: an op or a plan that does not exist.
    """
    chosen = {}
    for part in filter(None, text.split(",")):
        op, _, name = part.partition("=")
        if op not in NAMES:
            raise InputError("CNA_PLAN", f"expected one of {', '.join(NAMES)} before '=', got {part!r}")
        if name not in NAMES[op]:
            raise InputError("CNA_PLAN", f"{op}: expected one of {', '.join(NAMES[op])}, got {name!r}")
        chosen[op] = name
    return chosen
