"""CNA_PLAN: the user's choice of the kernels that serve an op, such as ``gated_mlp=fused,down_proj=blas``.

The environment is read once, at the first call. ``use`` changes the plans of a running process.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

from .errors import InputError

# Every plan of every backend by op. A backend ignores the plans of other backends; an unknown name is an error.
NAMES = {
    "gated_mlp": ("gemv", "flat", "fused", "blas", "csrc", "torch"),
    "down_proj": ("split", "tma", "blas", "csrc", "torch"),
    "linear": ("csrc", "torch"),
    "decode": ("csrc", "torch"),
}


class Plan(NamedTuple):
    """The kernels that serve a call, by one name, and the reason for the choice."""

    name: str
    reason: str


# What ``backends`` and ``serve`` found for earlier calls, a dictionary for each use. ``forget`` empties all of them.
_KEPT: list[dict[Any, Any]] = []
times_forgotten = 0  # calls of ``forget``: whoever keeps a result must have begun and ended at the same number


def kept() -> dict[Any, Any]:
    """Return a new dictionary that ``forget`` empties, for what follows from a call's looks, plans and backend."""
    _KEPT.append({})
    return _KEPT[-1]


def forget() -> None:
    """Decide anew how each call is served: the environment is read again."""
    global times_forgotten
    times_forgotten += 1
    asked.cache_clear()
    for found in _KEPT:
        found.clear()


@functools.cache
def asked() -> dict[str, str]:
    """What CNA_PLAN says, read once. Raises InputError."""
    return read(os.environ.get("CNA_PLAN", ""))


def use(text: str | None) -> None:
    """Set CNA_PLAN for this process, also after the first call of an op; None unsets it. Raises InputError."""
    if read(text or "") != asked():
        os.environ["CNA_PLAN"] = text or ""
        forget()


def override(op: str) -> str | None:
    """The plan that CNA_PLAN names for the op, or None. Raises InputError."""
    return asked().get(op)


def read(text: str) -> dict[str, str]:
    """Read ``op=plan,op=plan``.

    Raises:
        InputError: an op or a plan that does not exist.
    """
    chosen = {}
    for part in filter(None, text.split(",")):
        op, _, name = part.partition("=")
        if name == "engine":  # the name of csrc before 0.2
            name = "csrc"
        if op not in NAMES:
            raise InputError("CNA_PLAN", f"expected one of {', '.join(NAMES)} before '=', got {part!r}")
        if name not in NAMES[op]:
            raise InputError("CNA_PLAN", f"{op}: expected one of {', '.join(NAMES[op])}, got {name!r}")
        chosen[op] = name
    return chosen
