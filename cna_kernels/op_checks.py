"""The checks of an op's arguments, made once for all calls that look alike (``serve.looks``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import BlockWeight, Weight
from .errors import check_tensor
from .extras import Extras, Inputs
from .scale import NEURON_BLOCK

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SUMS = (torch.float32, torch.float64)


# Each check returns the shape of the activations, (T, N); that of ``linear`` returns the shape of the result, (T, O).


def _check_weight(name: str, w: Weight, shape: tuple[int | None, int], x: Tensor) -> None:
    """A weight has the dtype of x, or lies in blocks."""
    if not isinstance(w, BlockWeight):
        return check_tensor(name, w, shape=shape, dtype=x.dtype, device=x.device)
    if w.shape[1] != shape[1] or shape[0] not in (None, w.shape[0]):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {w.dtype} {list(w.shape)}")
    if x.device != w.device:
        raise ValueError(f"{name}: blocks are read on the CPU, got {w.dtype} beside {x.device}")


def _check_gated_mlp(x: Tensor, w_gate: Weight, w_up: Weight | None, w_down: Weight) -> tuple[int, int]:
    check_tensor("x", x, shape=(None, None), dtype=FLOATS)
    n_rows, n_hidden = x.shape
    n_neurons = w_down.shape[-1] if len(w_down.shape) else 0
    _check_weight("w_down", w_down, (n_hidden, n_neurons), x)
    if w_up is None:
        if isinstance(w_gate, BlockWeight):
            raise ValueError("w_gate_up: expected a pair of gate and up where weights lie in blocks")
        _check_weight("w_gate_up", w_gate, (2 * n_neurons, n_hidden), x)
    else:
        _check_weight("w_gate", w_gate, (n_neurons, n_hidden), x)
        _check_weight("w_up", w_up, (n_neurons, n_hidden), x)
    return n_rows, n_neurons


def _check_swiglu(gate: Tensor, up: Tensor) -> tuple[int, int]:
    check_tensor("gate", gate, shape=(None, None), dtype=FLOATS)
    check_tensor("up", up, shape=tuple(gate.shape), dtype=gate.dtype, device=gate.device)
    return gate.shape[0], gate.shape[1]


def _check_down_proj(act: Tensor, w_down: Weight) -> tuple[int, int]:
    check_tensor("act", act, shape=(None, None), dtype=FLOATS)
    _check_weight("w_down", w_down, (None, act.shape[1]), act)
    return act.shape[0], act.shape[1]


def _check_steer_act(act: Tensor) -> tuple[int, int]:
    check_tensor("act", act, shape=(None, None), dtype=FLOATS)
    return act.shape[0], act.shape[1]


def _check_linear(x: Tensor, w: Weight, bias: Tensor | None) -> tuple[int, int]:
    check_tensor("x", x, shape=(None, None), dtype=FLOATS)
    _check_weight("w", w, (None, x.shape[1]), x)
    if bias is not None:
        check_tensor("bias", bias, shape=(w.shape[0],), dtype=x.dtype, device=x.device)
    return x.shape[0], w.shape[0]


_CHECKS: dict[str, Callable[..., tuple[int, int]]] = {
    "gated_mlp": _check_gated_mlp,
    "swiglu": _check_swiglu,
    "down_proj": _check_down_proj,
    "steer_act": _check_steer_act,
    "steer_act_": _check_steer_act,
    "linear": _check_linear,
}


def check(op: str, inputs: Inputs, extras: Extras | tuple[()]) -> None:
    """Raise ValueError naming the argument that is wrong."""
    n_rows, n_neurons = _CHECKS[op](*inputs)
    if extras:
        _check_extras(n_rows, n_neurons, inputs[0].device, extras)


def _check_extras(n_rows: int, n_neurons: int, device: torch.device, extras: Extras) -> None:
    token_weight, act_sum, act_sumsq, offsets, index, value, row_circuit = extras
    if (token_weight is None) != (act_sum is None and act_sumsq is None):
        raise ValueError("token_weight: expected together with act_sum or act_sumsq, got one without the other")
    if token_weight is not None:
        check_tensor("token_weight", token_weight, shape=(n_rows, None), dtype=torch.float32, device=device)
        kinds: tuple[torch.dtype, ...] = SUMS
        for name, sums in (("act_sum", act_sum), ("act_sumsq", act_sumsq)):
            if sums is not None:
                check_tensor(name, sums, shape=(token_weight.shape[1], n_neurons), dtype=kinds, device=device)
                if sums.shape[0] > 1 and sums.stride(0) < n_neurons:
                    raise ValueError(f"{name}: expected rows apart from each other, got strides {list(sums.stride())}")
                kinds = (sums.dtype,)
        if act_sum is act_sumsq:
            raise ValueError("act_sumsq: expected a tensor of its own, got act_sum")
    if offsets is None and row_circuit is None:
        return
    if offsets is None or index is None or value is None or row_circuit is None:
        raise ValueError("scale: expected together with row_circuit, got one without the other")
    edges = -(-n_neurons // NEURON_BLOCK) + 1
    check_tensor("scale.offsets", offsets, shape=(None, edges), dtype=torch.int32, device=device)
    check_tensor("scale.index", index, shape=(None,), dtype=torch.int32, device=device)
    check_tensor("scale.value", value, shape=tuple(index.shape), dtype=torch.float32, device=device)
    check_tensor("row_circuit", row_circuit, shape=(n_rows,), dtype=torch.int32, device=device)
