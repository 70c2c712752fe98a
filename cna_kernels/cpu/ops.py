"""The CPU backend: ``prepare`` returns what serves calls of an op, ``csrc`` or PyTorch's own products (``plan.py``).

Arguments are checked by ``cna_kernels.ops``; ``cna_kernels.reference`` is the definition. Where the engine computes
gate and up they stay in fp32; the reference rounds gate and up as ``linear`` does.

``prepare`` looks at shapes, strides and dtypes once. The function it returns hands over addresses and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, reference
from ..blocks import BlockWeight
from ..extras import Extras, Inputs, Run
from . import library
from .plan import choose
from .typed import describer
from .typed import function as _function
from .typed import threads as _threads


def prepare(op: str, inputs: Inputs, extras: Extras | tuple[()]) -> Run:
    """Return the function that serves calls with arguments like these; see :func:`cna_kernels.backends.prepare`."""
    n_inputs, apart = len(inputs), _apart_all(inputs, extras)
    run = _PREPARE[op](apart[:n_inputs], Extras(*apart[n_inputs:]) if extras else ())
    if all(a is b for a, b in zip(apart, (*inputs, *extras), strict=True)):
        return run
    return lambda *tensors: run(*_apart_all(tensors[:n_inputs], tensors[n_inputs:]))


def _gated_mlp(inputs: Inputs, extras: Extras) -> Run:
    x, w_gate, w_up, w_down = inputs
    (T, H), N = x.shape, w_down.shape[1]
    if any(isinstance(w, BlockWeight) for w in (w_gate, w_up, w_down)):
        return _typed_gated_mlp(inputs, extras)
    if choose("gated_mlp", T, x.dtype).name == "torch":
        return _gated_mlp_by_torch()
    if w_up is not None and w_gate.stride(0) != w_up.stride(0):
        return _with_contiguous_weights(inputs, extras)
    name, function = _function("gated_mlp", x.dtype)
    sizes = T, H, N, H, x.stride(0), w_gate.stride(0), w_down.stride(0)
    from_gate_to_up, pack = N * w_gate.stride(0) * w_gate.element_size(), packer(extras)
    shape = T, H

    def run(x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, *extras: Tensor | None) -> Tensor:
        y, gate = x.new_empty(shape), w_gate.data_ptr()
        up = gate + from_gate_to_up if w_up is None else w_up.data_ptr()
        arrays = y.data_ptr(), x.data_ptr(), gate, up, w_down.data_ptr()
        if status := function(*arrays, pack(*extras), *sizes, _threads()):
            library.check(name, status)
        return y

    return run


def _typed_gated_mlp(inputs: Inputs, extras: Extras) -> Run:
    """Weights in blocks, or some of them: gate and up are two weights, or the halves of one tensor."""
    x, w_gate, w_up, w_down = inputs
    (T, H), N = x.shape, w_down.shape[1]
    name, function = _function("gated_mlp_typed", x.dtype)
    halves = w_up is None
    gate_of, up_of = describer(w_gate), describer(w_gate if halves else w_up)
    down_of, pack, sizes, shape = describer(w_down), packer(extras), (T, H, N, H, x.stride(0)), (T, H)

    def run(x: Tensor, w_gate: Any, w_up: Any, w_down: Any, *extras: Tensor | None) -> Tensor:
        y = x.new_empty(shape)
        if halves:
            w_gate, w_up = w_gate[:N], w_gate[N:]
        weights = gate_of(w_gate), up_of(w_up), down_of(w_down)
        if status := function(y.data_ptr(), x.data_ptr(), *weights, pack(*extras), *sizes, _threads()):
            library.check(name, status)
        return y

    return run


def _gated_mlp_by_torch() -> Run:
    """The products of PyTorch, with the engine's ``swiglu`` between them."""
    act_of: Run | None = None

    def run(x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, *extras: Tensor | None) -> Tensor:
        nonlocal act_of
        gate, up = reference.gate_and_up(x, w_gate if w_up is None else (w_gate, w_up))
        if act_of is None:  # gate and up look alike in all calls that ``run`` serves
            act_of = prepare("swiglu", (gate, up), Extras(*extras))
        return F.linear(act_of(gate, up, *extras), w_down)

    return run


def _with_contiguous_weights(inputs: Inputs, extras: Extras) -> Run:
    x, w_gate, w_up, w_down = inputs
    run = prepare("gated_mlp", (x, _dense(w_gate), _dense(w_up), w_down), extras)
    return lambda x, w_gate, w_up, *rest: run(x, _dense(w_gate), _dense(w_up), *rest)


def _dense(weight: Tensor) -> Tensor:
    """A copy whose row stride is its width; ``contiguous`` leaves a single row's stride as it is."""
    return weight.clone(memory_format=torch.contiguous_format)


def _swiglu(inputs: Inputs, extras: Extras) -> Run:
    gate, up = inputs
    name, function = _function("swiglu", gate.dtype)
    shape, sizes, pack = gate.shape, (*gate.shape, gate.shape[1], gate.stride(0), up.stride(0)), packer(extras)

    def run(gate: Tensor, up: Tensor, *extras: Tensor | None) -> Tensor:
        act = gate.new_empty(shape)
        if status := function(act.data_ptr(), gate.data_ptr(), up.data_ptr(), pack(*extras), *sizes, _threads()):
            library.check(name, status)
        return act

    return run


def _down_proj(inputs: Inputs, extras: Extras) -> Run:
    act, w_down = inputs
    (T, N), H = act.shape, w_down.shape[0]
    if isinstance(w_down, BlockWeight):
        return _typed_down_proj(inputs, extras)
    if choose("down_proj", T, act.dtype).name == "torch":
        return backends.plain("down_proj")
    name, function = _function("down_proj", act.dtype)
    shape, sizes, pack = (T, H), (T, H, N, H, act.stride(0), w_down.stride(0)), packer(extras)

    def run(act: Tensor, w_down: Tensor, *extras: Tensor | None) -> Tensor:
        y = act.new_empty(shape)
        if status := function(y.data_ptr(), act.data_ptr(), w_down.data_ptr(), pack(*extras), *sizes, _threads()):
            library.check(name, status)
        return y

    return run


def _typed_down_proj(inputs: Inputs, extras: Extras) -> Run:
    act, w_down = inputs
    (T, N), H = act.shape, w_down.shape[0]
    name, function = _function("down_proj_typed", act.dtype)
    down_of, pack, sizes, shape = describer(w_down), packer(extras), (T, H, N, H, act.stride(0)), (T, H)

    def run(act: Tensor, w_down: BlockWeight, *extras: Tensor | None) -> Tensor:
        y = act.new_empty(shape)
        if status := function(y.data_ptr(), act.data_ptr(), down_of(w_down), pack(*extras), *sizes, _threads()):
            library.check(name, status)
        return y

    return run


def _steer_act(inputs: Inputs, extras: Extras) -> Run:
    (act,) = inputs
    name, function = _function("steer_act", act.dtype)
    shape, sizes, pack = act.shape, (*act.shape, act.shape[1], act.stride(0)), packer(extras)

    def run(act: Tensor, *extras: Tensor | None) -> Tensor:
        steered = act.new_empty(shape)
        if status := function(steered.data_ptr(), act.data_ptr(), pack(*extras), *sizes, _threads()):
            library.check(name, status)
        return steered

    return run


def _steer_act_(inputs: Inputs, extras: Extras) -> Run:
    (act,) = inputs
    name, function = _function("steer_act", act.dtype)
    sizes, pack = (*act.shape, act.stride(0), act.stride(0)), packer(extras)

    def run(act: Tensor, *extras: Tensor | None) -> Tensor:
        at = act.data_ptr()
        if status := function(at, at, pack(*extras), *sizes, _threads()):
            library.check(name, status)
        return act

    return run


def _linear(inputs: Inputs, extras: tuple[()]) -> Run:
    x, w, _ = inputs
    (T, H), O = x.shape, w.shape[0]  # noqa: E741
    if isinstance(w, BlockWeight):
        return _typed_linear(inputs)
    if choose("linear", T, x.dtype).name == "torch":
        return F.linear
    name, function = _function("linear", x.dtype)
    shape, sizes = (T, O), (T, O, H, O, x.stride(0), w.stride(0))

    def run(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(shape)
        arrays = y.data_ptr(), x.data_ptr(), w.data_ptr(), None if bias is None else bias.data_ptr()
        if status := function(*arrays, *sizes, _threads()):
            library.check(name, status)
        return y

    return run


def _typed_linear(inputs: Inputs) -> Run:
    x, w, _ = inputs
    (T, H), O = x.shape, w.shape[0]  # noqa: E741
    name, function = _function("linear_typed", x.dtype)
    weight_of, sizes, shape = describer(w), (T, O, H, O, x.stride(0)), (T, O)

    def run(x: Tensor, w: BlockWeight, bias: Tensor | None) -> Tensor:
        y = x.new_empty(shape)
        arrays = y.data_ptr(), x.data_ptr(), weight_of(w), None if bias is None else bias.data_ptr()
        if status := function(*arrays, *sizes, _threads()):
            library.check(name, status)
        return y

    return run


_PREPARE: dict[str, Callable[[Inputs, Any], Run]] = {
    "gated_mlp": _gated_mlp,
    "swiglu": _swiglu,
    "down_proj": _down_proj,
    "steer_act": _steer_act,
    "steer_act_": _steer_act_,
    "linear": _linear,
}


_FIELDS = struct.Struct(f"@{len(library.Extras._fields_)}q")


def packer(like: Extras) -> Callable[..., bytes | None]:
    """A function of the extras that returns ``cna_extras`` as bytes, or None where nothing is summed or steered.

    ``like``: extras like those of the calls to come. The bytes hold addresses: the caller keeps the tensors alive.
    """
    token_weight, act_sum, act_sumsq, offsets, index, _, row_circuit = like
    sizes = None
    if offsets is not None and index is not None and row_circuit is not None and row_circuit.numel() > 0:
        sizes = offsets.shape[0], index.shape[0], offsets.stride(0)
    if token_weight is None and sizes is None:
        return lambda *_: None
    columns = (
        [0] * 4
        if token_weight is None
        else [token_weight.shape[1], *(_row_stride(x) for x in (token_weight, act_sum, act_sumsq))]
    )
    steer, sizes = sizes is not None, sizes or (0, 0, 0)
    pack, version = _FIELDS.pack, library.ABI_VERSION
    wide = torch.float64 in (x.dtype for x in (act_sum, act_sumsq) if x is not None)

    def run(
        token_weight: Any, act_sum: Any, act_sumsq: Any, offsets: Any, index: Any, value: Any, row_circuit: Any
    ) -> bytes:
        weights, sums, sums_fp64 = 0, (0, 0), (0, 0)
        if token_weight is not None:
            weights, sums = token_weight.data_ptr(), (_address(act_sum), _address(act_sumsq))
            if wide:
                sums, sums_fp64 = sums_fp64, sums
        steering = 0, 0, 0, 0
        if steer:
            steering = row_circuit.data_ptr(), offsets.data_ptr(), index.data_ptr(), value.data_ptr()
        return pack(version, weights, *sums, *columns, *steering, *sizes, *sums_fp64)

    return run


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _apart_all(inputs: Inputs, extras: tuple[Tensor | None, ...]) -> Inputs:
    """The tensors. Those that are only read are copied if their rows share memory, as after ``expand``."""
    token_weight, sums, steer = extras[:1], extras[1:3], extras[3:]
    return (*map(_apart, inputs), *map(_apart, token_weight), *sums, *map(_apart, steer))


def _apart(x: Tensor | None) -> Tensor | None:
    if isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        return x.contiguous()
    return x
