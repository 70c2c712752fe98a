"""The ops in torch.library, namespace ``cna_kernels``: for tracers, which look at operations instead of running them.

Each op but ``linear`` is registered twice, with sums and without, and only the op with sums changes its arguments.
PyTorch's inductor (2.13) cannot compile an op that may change arguments and is given None for all of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .extras import Extras, Inputs, Run
from .op_checks import check
from .serve import READY, as_given, count_change, is_as_stored, looks, prepare

NO_MAPPED_SUMS = "act_sum: torch.vmap cannot add the sums of several calls to one tensor; sum without vmap"
_LIBRARY = torch.library.Library("cna_kernels", "DEF")
_SUMS = "Tensor token_weight, Tensor(a!)? act_sum, Tensor(b!)? act_sumsq"
_STEER = "Tensor? scale_offsets, Tensor? scale_index, Tensor? scale_value, Tensor? row_circuit"
# op -> its own arguments, and a function that makes an empty result. Where gated_mlp has w_up, w_gate_up is w_gate.
_OPS: dict[str, tuple[str, Run]] = {
    "gated_mlp": (
        "Tensor x, Tensor w_gate_up, Tensor? w_up, Tensor w_down",
        lambda x, w_gate_up, w_up, w_down, *_: x.new_empty(x.shape[0], w_down.shape[0]),
    ),
    "swiglu": ("Tensor gate, Tensor up", lambda gate, *_: gate.new_empty(gate.shape)),
    "steer_act": ("Tensor act", lambda act, *_: act.new_empty(act.shape)),
    "down_proj": (
        "Tensor act, Tensor w_down",
        lambda act, w_down, *_: act.new_empty(act.shape[0], w_down.shape[0]),
    ),
    "linear": ("Tensor x, Tensor w, Tensor? bias", lambda x, w, *_: x.new_empty(x.shape[0], w.shape[0])),
}


def _define(name: str, arguments: str, fake: Run, function: Run) -> Run:
    """Define an op of torch.library, and return it.

    A call of an op defined here costs 4 us of Python. ``torch.library.custom_op`` makes it 50 us, more than a small MLP
    takes, for features that these ops do not need (2 cores of Zen 4, torch 2.13, 2026-11-21).
    """
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cna_kernels::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"cna_kernels::{name}", _mapped(name), lib=_LIBRARY)
    defined: Run = getattr(torch.ops.cna_kernels, name).default
    return defined


def _implementation(op: str, n_inputs: int, with_sums: bool) -> Run:
    """Return the function that runs an op: of the op's own arguments, the extras, and the backend's name."""

    def run(*arguments: Any) -> Tensor:
        inputs, given, backend = arguments[:n_inputs], arguments[n_inputs:-1], arguments[-1]
        sums = () if with_sums else (None, None, None)
        extras: Extras | tuple[()] = () if op == "linear" else Extras(*sums, *given)
        if extras and with_sums:
            count_change(extras)
        with as_given(inputs[0]):
            key = looks(op, inputs, extras, backend)
            serve = READY.get(key)
            if serve is None:
                check(op, inputs, extras)  # a call of torch.ops may come from anywhere
                known = all(map(is_as_stored, (*inputs, *extras)))
                serve = (
                    prepare(key, op, inputs, extras, backend)
                    if known
                    else backends.prepare(op, inputs, extras, backend)
                )
            return serve(*inputs, *extras)

    return run


def _mapped(name: str) -> Callable[..., tuple[Tensor, int]]:
    """Return an op's rule for torch.vmap: one call after the other. Sums of several calls have no one tensor."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        if name.endswith("_sums"):
            raise ValueError(NO_MAPPED_SUMS)
        op: Run = getattr(torch.ops.cna_kernels, name).default
        called = [
            op(*(x if dim is None else x.select(dim, place) for x, dim in zip(arguments, in_dims, strict=True)))
            for place in range(info.batch_size)
        ]
        return torch.stack(called), 0

    return rule


_PLAIN_OP: dict[str, Run] = {}
_SUMS_OP: dict[str, Run] = {}
for _op, (_inputs, _fake) in _OPS.items():
    _n_inputs = _inputs.count(",") + 1
    _given = _inputs if _op == "linear" else f"{_inputs}, {_STEER}"
    _PLAIN_OP[_op] = _define(_op, f"{_given}, str? backend", _fake, _implementation(_op, _n_inputs, with_sums=False))
    if _op != "linear":
        _SUMS_OP[_op] = _define(
            f"{_op}_sums",
            f"{_inputs}, {_SUMS}, {_STEER}, str? backend",
            _fake,
            _implementation(_op, _n_inputs, with_sums=True),
        )


def through(op: str, inputs: Inputs, extras: Extras | tuple[()], backend: str | None) -> Tensor:
    """Call an op by its entry in torch.library. An op in place has none: it becomes PyTorch's own operations."""
    if op not in _OPS:
        with as_given(inputs[0]):
            return backends.plain(op)(*inputs, *extras)
    if not extras or extras.token_weight is None:
        return _PLAIN_OP[op](*inputs, *extras[3:], backend)
    return _SUMS_OP[op](*inputs, *extras, backend)
