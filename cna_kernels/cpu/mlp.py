"""The CPU backend's ``gated_mlp``, ``swiglu``, ``down_proj``, ``steer_act`` and ``linear``: the engine of ``csrc``, or
PyTorch's own products where the plan says so.

Arguments are checked by ``cna_kernels.ops``; ``cna_kernels.reference`` is the definition. Where the engine computes
gate and up they stay in fp32; the reference rounds them as ``linear`` does.
"""

from __future__ import annotations

from ctypes import byref

import torch
import torch.nn.functional as F

from .. import reference
from . import library
from .plan import choose

_SUFFIX = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def gated_mlp(x, w_gate_up, w_down, **extras):
    """See :func:`cna_kernels.gated_mlp`."""
    (T, H), N = x.shape, w_down.shape[1]
    if choose("gated_mlp", T, x.dtype).name == "torch":
        gate, up = reference.gate_and_up(x, w_gate_up)
        return F.linear(swiglu(gate, up, **extras), w_down)
    x, w_down = _rows(x), _rows(w_down)
    w_gate, w_up = w_gate_up if isinstance(w_gate_up, tuple) else w_gate_up.chunk(2)
    w_gate, w_up = _rows(w_gate), _rows(w_up)
    if w_gate.stride(0) != w_up.stride(0):
        w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
    y = x.new_empty(T, H)
    arrays = (y.data_ptr(), x.data_ptr(), w_gate.data_ptr(), w_up.data_ptr(), w_down.data_ptr())
    strides = (y.stride(0), x.stride(0), w_gate.stride(0), w_down.stride(0))
    _run("gated_mlp", x.dtype, arrays, (T, H, N, *strides), extras)
    return y


def swiglu(gate, up, **extras):
    """See :func:`cna_kernels.swiglu`."""
    gate, up = _rows(gate), _rows(up)
    act = gate.new_empty(gate.shape)
    arrays = (act.data_ptr(), gate.data_ptr(), up.data_ptr())
    _run("swiglu", gate.dtype, arrays, (*gate.shape, act.stride(0), gate.stride(0), up.stride(0)), extras)
    return act


def down_proj(act, w_down, **extras):
    """See :func:`cna_kernels.down_proj`."""
    (T, N), H = act.shape, w_down.shape[0]
    if choose("down_proj", T, act.dtype).name == "torch":
        return reference.down_proj(act, w_down, **extras)
    act, w_down = _rows(act), _rows(w_down)
    y = act.new_empty(T, H)
    arrays = (y.data_ptr(), act.data_ptr(), w_down.data_ptr())
    _run("down_proj", act.dtype, arrays, (T, H, N, y.stride(0), act.stride(0), w_down.stride(0)), extras)
    return y


def steer_act(act, **extras):
    """See :func:`cna_kernels.steer_act`."""
    act = _rows(act)
    steered = act.new_empty(act.shape)
    arrays = (steered.data_ptr(), act.data_ptr())
    _run("steer_act", act.dtype, arrays, (*act.shape, steered.stride(0), act.stride(0)), extras)
    return steered


def linear(x, w, bias=None):
    """See :func:`cna_kernels.ops.linear`."""
    (T, H), O = x.shape, w.shape[0]  # noqa: E741
    if choose("linear", T, x.dtype).name == "torch":
        return F.linear(x, w, bias)
    x, w = _rows(x), _rows(w)
    y = x.new_empty(T, O)
    arrays = (y.data_ptr(), x.data_ptr(), w.data_ptr(), None if bias is None else bias.data_ptr())
    _run("linear", x.dtype, arrays, (T, O, H, y.stride(0), x.stride(0), w.stride(0)))
    return y


def _run(op, dtype, arrays, sizes, extras=None):
    function = f"cna_{op}_{_SUFFIX[dtype]}"
    arguments = arrays if extras is None else (*arrays, _extras(**extras))
    library.check(function, getattr(library.load(), function)(*arguments, *sizes, torch.get_num_threads()))


def _extras(*, weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """The optional arguments as the library takes them, a pointer that keeps its tensors alive, or None."""
    if weight is None and scale is None:
        return None
    extras = library.Extras(version=library.ABI_VERSION)
    if weight is not None:
        weight = extras.weight_tensor = _rows(weight)
        extras.weight, extras.weight_stride, extras.n_columns = weight.data_ptr(), weight.stride(0), weight.shape[1]
        if act_sum is not None:
            extras.act_sum, extras.act_sum_stride = act_sum.data_ptr(), act_sum.stride(0)
        if act_sumsq is not None:
            extras.act_sumsq, extras.act_sumsq_stride = act_sumsq.data_ptr(), act_sumsq.stride(0)
    if scale is not None and row_circuit.numel():
        offsets, index, value = scale
        offsets = extras.offsets_tensor = _rows(offsets)
        extras.row_circuit, extras.offsets = row_circuit.data_ptr(), offsets.data_ptr()
        extras.index, extras.value = index.data_ptr(), value.data_ptr()
        extras.n_circuits, extras.offsets_stride = offsets.shape[0], offsets.stride(0)
        extras.n_entries = index.shape[0]
    return byref(extras)


def _rows(x):
    """The tensor with rows that follow one another in memory: an expanded one has them on top of each other."""
    return x if x.shape[0] <= 1 or x.stride(0) >= x.shape[1] else x.contiguous()
