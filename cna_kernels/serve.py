"""The functions that serve calls of ops: looked up by what a call looks like, prepared by a backend the first time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backends, plans
from .blocks import BlockWeight
from .extras import Extras, Inputs, Run

Looks: TypeAlias = tuple[Any, ...]
# What a call looks like -> the function that serves it: of the op's tensors, then the extras.
READY: dict[Looks, Run] = plans.kept()
_MOST = 1 << 14  # kinds of calls to keep; a long run over prompts of all lengths meets many
_KNOWN = (torch.Tensor, torch.nn.Parameter, BlockWeight)


def looks(op: str, inputs: Inputs, extras: Extras | tuple[()], backend: str | None) -> Looks:
    """All that checks, backends and plans look at: calls of equal looks differ in addresses and values alone."""
    tensors = (*inputs, *extras)
    return (
        op,
        backend,
        extras[1] is extras[2] if extras else False,
        *[x if x is None else (type(x), x.shape, x.stride(), x.dtype, x.device, x.is_neg()) for x in tensors],
    )


def is_as_stored(x: Tensor | None) -> bool:
    """Whether a tensor's values are those at its address: it is no subclass with another meaning, and no view as -x."""
    return x is None or (type(x) in _KNOWN and not x.is_neg())


def prepare(key: Looks, op: str, inputs: Inputs, extras: Extras | tuple[()], backend: str | None) -> Run:
    """Return the function that serves a checked call, and keep it for calls that look alike."""
    decided = plans.times_forgotten
    run = backends.prepare(op, inputs, extras, backend)
    if decided == plans.times_forgotten:
        if len(READY) >= _MOST:
            READY.clear()
        READY[key] = run
    return run


def as_given(x: Tensor) -> AbstractContextManager[object]:
    """A context with autocast off: an op computes in the dtypes of its tensors, and its sums in fp32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def count_change(extras: Extras) -> None:
    """Tell autograd that the sums were written to, so that a graph that saved one of them raises."""
    for tensor in (extras.act_sum, extras.act_sumsq):
        if tensor is not None:
            increment_version(tensor)
