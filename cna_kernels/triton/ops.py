"""The Triton backend: ``prepare`` returns what serves calls of an op, by the plan for their shapes.

Arguments are checked by ``cna_kernels.ops``; ``cna_kernels.reference`` is the definition. Where gate and up are
computed here (``gemv``, ``flat``, ``fused``) they stay in fp32; the reference rounds gate and up as ``linear`` does.

``prepare`` chooses once for calls that look alike. The function that it returns repeats the launches of its first call
(``repeat.py``), with PyTorch's products between the launches where the plan has any.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import backends
from ..extras import Extras
from ..scale import Scale
from . import down_proj as down_proj_kernels
from . import launch
from .down_decode import down_gemv, down_split
from .down_proj import rows_fit_tma
from .gate_up_decode import gate_up_decode
from .plan import Call, choose
from .repeat import Repeat
from .steer import patch, put_back
from .sums_fp64 import sum_fp64
from .swiglu import steer_act, steer_act_, swiglu


def prepare(op: str, inputs: tuple, extras: Extras | tuple) -> Callable:
    """Return the function that serves calls with arguments like these; see :func:`cna_kernels.backends.prepare`."""
    if op == "linear" or any(x is not None and x.numel() == 0 for x in inputs):
        return backends.plain(op)
    if any(x is not None and x.dtype == torch.float64 for x in extras[1:3]):
        return _with_fp64_sums(op, inputs, extras)
    return _PREPARE[op](inputs, extras)


def call_of(op: str, inputs: tuple) -> Call:
    """What the choice of a plan may depend on, for gated_mlp and down_proj."""
    x, w_down = inputs[0], inputs[-1]
    (H, N), device = w_down.shape, x.device
    read = inputs if op == "down_proj" else inputs[:-1]  # by TMA; gated_mlp's kernel also writes act [T, N]
    tma = rows_fit_tma(*(each for each in read if each is not None)) and (op == "down_proj" or N % 8 == 0)
    return Call(op, x.shape[0], N, H, x.dtype, launch.arch(device), tma, launch.n_multiprocessors(device))


# The plans of few tokens -> the launcher of the product of act, which depends on the launch that computes act.
_FEW = {"gemv": down_gemv, "flat": down_split}


def _gated_mlp(inputs, extras):
    plan = choose(call_of("gated_mlp", inputs)).name
    if plan in _FEW:
        second = _FEW[plan]
        return Repeat(
            lambda x, w_gate, w_up, w_down, *extras: second(
                gate_up_decode(x, _weights(w_gate, w_up), **_keywords(extras)), w_down, dependent=True
            )
        )
    act_of = _act_of_x(plan)
    return lambda x, w_gate, w_up, w_down, *extras: launch.linear(act_of(x, w_gate, w_up, *extras), w_down)


def _act_of_x(plan):
    """What computes act for gated_mlp: a function of x and its two weights, then the extras."""
    if plan in _FEW:
        return Repeat(lambda x, w_gate, w_up, *extras: gate_up_decode(x, _weights(w_gate, w_up), **_keywords(extras)))
    act_of = _swiglu()

    def by_blas(x, w_gate, w_up, *extras):
        if w_up is None:
            gate, up = launch.linear(x, w_gate).chunk(2, dim=-1)
        else:
            gate, up = launch.linear(x, w_gate), launch.linear(x, w_up)
        return act_of(gate, up, *extras)

    if plan == "blas":
        return by_blas
    from .gate_up import gate_up  # the plan chose it, so it can be imported

    act_of_x = Repeat(lambda x, w_gate, w_up, *extras: gate_up(x, _weights(w_gate, w_up), **_keywords(extras)))

    def fused(x, w_gate, w_up, *extras):
        fits = _on_16_bytes(x, w_gate, w_gate if w_up is None else w_up)
        return (act_of_x if fits else by_blas)(x, w_gate, w_up, *extras)

    return fused


def _swiglu(*_):
    return Repeat(lambda gate, up, *extras: swiglu(gate, up, **_keywords(extras)))


def _steer_act(_, extras):
    run = Repeat(lambda act, *extras: steer_act(act, **_keywords(extras)))
    if extras.scale_offsets is None:
        return lambda act, *extras: run(act, *extras).clone()
    return run


def _steer_act_(inputs, _):
    (act,) = inputs
    if act.is_contiguous():
        return Repeat(lambda act, *extras: steer_act_(act, **_keywords(extras)))
    run = Repeat(lambda act, *extras: steer_act(act, **_keywords(extras)))  # the kernel writes rows without gaps
    return lambda act, *extras: act if (new := run(act, *extras)) is act else act.copy_(new)


def _down_proj(inputs, extras):
    plan = choose(call_of("down_proj", inputs)).name
    if plan == "split":
        return Repeat(_down_split)
    by_blas = _down_proj_by_blas(inputs, extras)
    if plan == "blas":
        return by_blas
    fused = Repeat(lambda act, w_down, *extras: down_proj_kernels.down_proj(act, w_down, **_keywords(extras)))

    def run(act, w_down, *extras):
        fits = _on_16_bytes(act, w_down) and not (extras[-1] is not None and _share_memory(act, w_down))
        return (fused if fits else by_blas)(act, w_down, *extras)

    return run


def _down_split(act, w_down, *extras):
    given = _keywords(extras)
    steer = dict(scale=given.pop("scale"), row_circuit=given.pop("row_circuit"))
    if steer["scale"] is None:
        return down_split(act, w_down, **given)
    return down_split(act, w_down, steer_act(act, **steer), **given, dependent=True)


# From so many elements of act on, reading act for the sums and patching it is faster than a scaled copy: measured on an
# H100, where a pass that copies 512 tokens of an 8B model takes 16 us, and one that copies 4,096 takes 100.
_PATCH_FROM = 1 << 24


def _down_proj_by_blas(inputs, extras):
    act = inputs[0]
    apart = act.shape[0] == 1 or act.stride(0) >= act.shape[1]
    pass_over = Repeat(lambda act, *extras: steer_act(act, **_keywords(extras)))

    def copied(act, w_down, *extras):
        return launch.linear(pass_over(act, *extras), w_down)

    summed = extras.token_weight is not None
    small = summed and act.numel() < _PATCH_FROM and act.is_contiguous()  # a copy may be multiplied otherwise
    if extras.scale_offsets is None or not apart or small:
        return copied
    only_summed = Repeat(lambda act, *sums: steer_act(act, **_keywords(sums)))
    scale = Repeat(lambda act, *steer: patch(act, Scale(*steer[:3]), steer[3]))
    unscale = Repeat(lambda act, saved, *steer: put_back(act, saved, Scale(*steer[:3]), steer[3]))

    def run(act, w_down, *extras):
        if _share_memory(act, w_down):
            return copied(act, w_down, *extras)
        steer = extras[3:]
        if summed:
            only_summed(act, *extras[:3])
        saved = scale(act, *steer)
        try:
            return launch.linear(act, w_down)
        finally:  # also out of memory: act is the caller's
            unscale(act, saved, *steer)

    return run


def _with_fp64_sums(op, inputs, extras):
    """act without extras, then its sums in a pass of their own, then what follows, with its steering."""
    nothing = (None,) * len(extras)
    act_of = {
        "gated_mlp": lambda: _act_of_x(choose(call_of("gated_mlp", inputs)).name),
        "swiglu": _swiglu,
    }.get(op, lambda: lambda act, *_: act)()
    sums, following, after = Repeat(sum_fp64), None, op if op == "steer_act_" else "steer_act"

    def run(*tensors):
        nonlocal following
        tensors, extras = tensors[: len(inputs)], tensors[len(inputs) :]
        w_down = tensors[-1:] if op in ("gated_mlp", "down_proj") else ()
        act = sums(act_of(*tensors[: len(inputs) - len(w_down)], *nothing), *extras[:3])
        if op == "swiglu" and extras[3] is None:
            return act
        steer = Extras(None, None, None, *extras[3:])
        if following is None:  # act looks alike in all calls that ``run`` serves
            following = _PREPARE["down_proj" if w_down else after]((act, *w_down), steer)
        return following(act, *w_down, *steer)

    return run


_PREPARE = {
    "gated_mlp": _gated_mlp,
    "swiglu": _swiglu,
    "steer_act": _steer_act,
    "steer_act_": _steer_act_,
    "down_proj": _down_proj,
}


def _on_16_bytes(*tensors):
    """Whether TMA can start at the tensors' addresses, which may differ between calls that look alike."""
    return not any(x.data_ptr() & 15 for x in tensors)


def _share_memory(a, b):
    """Whether two tensors may share memory: then scaling one in place would change the other."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _weights(w_gate, w_up):
    return w_gate if w_up is None else (w_gate, w_up)


def _keywords(extras):
    return Extras(*extras).keywords()
