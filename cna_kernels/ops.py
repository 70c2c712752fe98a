"""The public ops: check, dispatch. ``reference.py`` is their definition.

``gated_mlp``, ``swiglu``, ``down_proj`` and ``steer_act`` do three jobs each: their part of the MLP, the streaming sums
of the activations, and the per-neuron scale. ``linear`` serves a model's other layers.

The first call with arguments of some shapes, strides and dtypes is checked, and its backend prepares what serves it;
later calls with such arguments look that up and run it. All ops are registered with torch.library (namespace
``cna_kernels``) for what looks at operations instead of running them: ``torch.compile(fullgraph=True)`` sees one node
per call. Gradients flow through the reference: where an input requires grad, the op runs it directly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.utils._device import DeviceContext

from . import backends, plans
from .checks import check_tensor
from .extras import Extras
from .reference import NEURON_BLOCK, Scale

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def gated_mlp(
    x: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    *,
    weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The gated MLP of a Llama layer, with sums and steering: ``y = (act * scale) @ w_down^T``.

    ``act = silu(x @ w_gate^T) * (x @ w_up^T)``; ``act_sum[c, n] += sum_t weight[t, c] * act[t, n]`` before scaling.

    Args:
        x: ``[T, H]`` bf16, fp16 or fp32. The other floating inputs share its dtype unless said otherwise.
        w_gate_up: ``[2N, H]``, the rows of ``gate_proj`` then those of ``up_proj``; or the two apart, ``[N, H]`` each.
        w_down: ``[H, N]``.
        weight: ``[T, C]`` fp32, how much each token counts in each column.
        act_sum: ``[C, N]`` fp32, added to in place. Needs ``weight``.
        act_sumsq: ``[C, N]`` fp32, the same sum over ``act**2``, in memory of its own. Needs ``weight``.
        scale: the layer's factors for K circuits. Needs ``row_circuit``.
        row_circuit: ``[T]`` int32, the circuit of each token; -1 (or anything outside 0..K-1) leaves the token alone.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; default by CNA_BACKEND, then by device.

    Returns:
        y ``[T, H]``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or stride.
        BackendUnavailable: the backend asked for cannot run here.
    """
    w_gate, w_up = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up, None)
    extras = _extras(weight, act_sum, act_sumsq, scale, row_circuit)
    return call("gated_mlp", (x, w_gate, w_up, w_down), extras, backend)


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The elementwise half, for stacks that own their matrix products: ``act = silu(gate) * up``, then scaled.

    Args:
        gate: ``[T, N]`` bf16, fp16 or fp32. Any row stride: half of a fused gate/up tensor is a normal input.
        up: ``[T, N]``, same dtype.
        weight, act_sum, act_sumsq, scale, row_circuit, backend: as in :func:`gated_mlp`.

    Returns:
        act ``[T, N]``, contiguous, the input for ``down_proj``.
    """
    return call("swiglu", (gate, up), _extras(weight, act_sum, act_sumsq, scale, row_circuit), backend)


def down_proj(
    act: Tensor,
    w_down: Tensor,
    *,
    weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The down-projection, for stacks that hand over ``act``: ``y = (act * scale) @ w_down^T``.

    On a GPU ``act`` of more than 64 tokens is scaled in place for the product and put back after it, bit for bit: while
    the call runs, nothing on another stream may use it. With sums, a copy of up to 2**24 elements is scaled.

    Args:
        act: ``[T, N]`` bf16, fp16 or fp32.
        w_down: ``[H, N]``, same dtype.
        weight, act_sum, act_sumsq, scale, row_circuit, backend: as in :func:`gated_mlp`.

    Returns:
        y ``[T, H]``.
    """
    return call("down_proj", (act, w_down), _extras(weight, act_sum, act_sumsq, scale, row_circuit), backend)


def steer_act(
    act: Tensor,
    *,
    weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums and steering alone, for stacks whose other activation or quantised ``down_proj`` is none of the above.

    Args:
        act: ``[T, N]`` bf16, fp16 or fp32, the input of ``down_proj`` as computed elsewhere.
        weight, act_sum, act_sumsq, scale, row_circuit, backend: as in :func:`gated_mlp`.

    Returns:
        act ``[T, N]``, a scaled copy.
    """
    return call("steer_act", (act,), _extras(weight, act_sum, act_sumsq, scale, row_circuit), backend)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Any other linear layer, ``y = x @ w^T + bias``: the CPU engine's products on CPUs, PyTorch's elsewhere.

    Args:
        x: ``[T, H]`` bf16, fp16 or fp32.
        w: ``[O, H]``, same dtype.
        bias: ``[O]``, same dtype.
        backend: as in :func:`gated_mlp`.

    Returns:
        y ``[T, O]``.
    """
    if x.device.type != "cpu":
        return F.linear(x, w, bias)
    return call("linear", (x, w, bias), (), backend)


def _extras(weight, act_sum, act_sumsq, scale, row_circuit):
    if scale is None:
        return Extras(weight, act_sum, act_sumsq, row_circuit=row_circuit)
    return Extras(weight, act_sum, act_sumsq, *scale, row_circuit)


# Checks: once for each kind of call.


def _check_gated_mlp(x, w_gate, w_up, w_down):
    check_tensor("x", x, shape=(None, None), dtype=FLOATS)
    n_rows, n_hidden = x.shape
    check_tensor("w_down", w_down, shape=(n_hidden, None), dtype=x.dtype, device=x.device)
    n_neurons = w_down.shape[1]
    if w_up is None:
        check_tensor("w_gate_up", w_gate, shape=(2 * n_neurons, n_hidden), dtype=x.dtype, device=x.device)
    else:
        check_tensor("w_gate", w_gate, shape=(n_neurons, n_hidden), dtype=x.dtype, device=x.device)
        check_tensor("w_up", w_up, shape=(n_neurons, n_hidden), dtype=x.dtype, device=x.device)
    return n_rows, n_neurons


def _check_swiglu(gate, up):
    check_tensor("gate", gate, shape=(None, None), dtype=FLOATS)
    check_tensor("up", up, shape=tuple(gate.shape), dtype=gate.dtype, device=gate.device)
    return gate.shape


def _check_down_proj(act, w_down):
    check_tensor("act", act, shape=(None, None), dtype=FLOATS)
    check_tensor("w_down", w_down, shape=(None, act.shape[1]), dtype=act.dtype, device=act.device)
    return act.shape


def _check_steer_act(act):
    check_tensor("act", act, shape=(None, None), dtype=FLOATS)
    return act.shape


def _check_linear(x, w, bias):
    check_tensor("x", x, shape=(None, None), dtype=FLOATS)
    check_tensor("w", w, shape=(None, x.shape[1]), dtype=x.dtype, device=x.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(w.shape[0],), dtype=x.dtype, device=x.device)


_CHECKS = {
    "gated_mlp": _check_gated_mlp,
    "swiglu": _check_swiglu,
    "down_proj": _check_down_proj,
    "steer_act": _check_steer_act,
    "linear": _check_linear,
}


def _check(op, inputs, extras):
    """Raise ValueError naming the argument that is wrong."""
    shape = _CHECKS[op](*inputs)
    if extras:
        _check_extras(*shape, inputs[0].device, extras)


def _check_extras(n_rows, n_neurons, device, extras):
    weight, act_sum, act_sumsq, offsets, index, value, row_circuit = extras
    if (weight is None) != (act_sum is None and act_sumsq is None):
        raise ValueError("weight: expected together with act_sum or act_sumsq, got one without the other")
    if (offsets is None) != (row_circuit is None):
        raise ValueError("scale: expected together with row_circuit, got one without the other")
    if weight is not None:
        check_tensor("weight", weight, shape=(n_rows, None), dtype=torch.float32, device=device)
        for name, sums in (("act_sum", act_sum), ("act_sumsq", act_sumsq)):
            if sums is not None:
                check_tensor(name, sums, shape=(weight.shape[1], n_neurons), dtype=torch.float32, device=device)
        if act_sum is act_sumsq:
            raise ValueError("act_sumsq: expected a tensor of its own, got act_sum")
    if offsets is None:
        return
    edges = -(-n_neurons // NEURON_BLOCK) + 1
    check_tensor("scale.offsets", offsets, shape=(None, edges), dtype=torch.int32, device=device)
    check_tensor("scale.index", index, shape=(None,), dtype=torch.int32, device=device)
    check_tensor("scale.value", value, shape=tuple(index.shape), dtype=torch.float32, device=device)
    check_tensor("row_circuit", row_circuit, shape=(n_rows,), dtype=torch.int32, device=device)


# Dispatch.

# What a call looks like -> what serves it: a function of the op's tensors, then the extras.
_READY: dict[tuple, Callable] = plans.kept()
_MOST = 1 << 14  # kinds of calls to keep; a long run over prompts of all lengths meets many
_KNOWN = (torch.Tensor, torch.nn.Parameter)


def call(op: str, inputs: tuple, extras: Extras | tuple, backend: str | None = None) -> Tensor:
    """Call an op with its tensors as torch.library takes them.

    Args:
        op: "gated_mlp", "swiglu", "down_proj", "steer_act" or "linear".
        inputs: gated_mlp's are x ``[T, H]``, w_gate_up ``[2N, H]`` and None, or w_gate and w_up ``[N, H]``, and w_down
            ``[H, N]``; any other op's are its own, in order.
        extras: what is summed and steered; () for linear.
        backend: as in :func:`gated_mlp`.

    Returns:
        What the op returns, and raises as it does.
    """
    if _observed() or _needs_grad(inputs, extras):
        _check(op, inputs, extras)
        if _needs_grad(inputs, extras):
            _refuse_backend_with_grad(backend)
            with _as_given(inputs[0]):
                return backends.plain(op)(*inputs, *extras)
        return _through_library(op, inputs, extras, backend)
    key = looks(op, inputs, extras, backend)
    try:
        run = _READY.get(key)
    except TypeError:  # sizes that are symbols have no hash
        run = None
    if run is None:
        _check(op, inputs, extras)
        if inputs[0].is_meta or not all(map(_is_as_stored, (*inputs, *extras))):
            return _through_library(op, inputs, extras, backend)
        run = _prepare(key, op, inputs, extras, backend)
    if extras and extras.weight is not None:
        _count_change(extras)
    return run(*inputs, *extras)


def looks(op: str, inputs: tuple, extras: Extras | tuple, backend: str | None) -> tuple:
    """All that checks, backends and plans look at: two calls that share it differ in addresses and values alone."""
    tensors = (*inputs, *extras)
    return (
        op,
        backend,
        extras != () and extras[1] is extras[2],
        *[x if x is None else (type(x), x.shape, x.stride(), x.dtype, x.device, x.is_neg()) for x in tensors],
    )


def _is_as_stored(x):
    """Whether a tensor is what lies at its address: no subclass that means something else by it, no view as -x."""
    return x is None or (type(x) in _KNOWN and not x.is_neg())


def _prepare(key, op, inputs, extras, backend):
    """What serves a checked call, kept for those that look alike."""
    decided = plans.times_forgotten
    run = backends.prepare(op, inputs, extras, backend)
    if decided == plans.times_forgotten:
        if len(_READY) >= _MOST:
            _READY.clear()
        _READY[key] = run
    return run


def _prepare_once(_, op, inputs, extras, backend):
    return backends.prepare(op, inputs, extras, backend)


def _observed():
    """Whether something looks at operations, or rewrites them, that calls of a kernel would be hidden from."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_any_autocast_enabled()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or (torch._C._len_torch_function_stack() > 0 and _function_modes())
    )


def _function_modes():
    """Whether a mode wants to see calls: any but that of ``torch.set_default_device``."""
    n_modes = torch._C._len_torch_function_stack()
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(n_modes))


def _as_given(x):
    """Autocast off: an op computes in the dtypes it is given, and its sums in fp32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _needs_grad(inputs, extras):
    """Whether autograd, or forward-mode AD, may look through the op: then it runs in PyTorch's own operations."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if not extras:
        return any(x is not None and x.requires_grad for x in inputs)
    for name in ("weight", "act_sum", "act_sumsq"):
        x = getattr(extras, name)
        if x is not None and x.requires_grad:
            raise ValueError(f"{name}: no gradient flows through sums; expected a tensor without requires_grad")
    return any(x is not None and x.requires_grad for x in (*inputs, extras.scale_value))


def _count_change(extras):
    """Tell autograd that the sums were written to, so that a graph that saved one of them raises."""
    for tensor in (extras.act_sum, extras.act_sumsq):
        if tensor is not None:
            increment_version(tensor)


def _refuse_backend_with_grad(backend):
    if backend not in (None, "reference"):
        raise ValueError(f"backend: {backend!r} has no gradient; use 'reference' or torch.no_grad()")


# The ops of torch.library. Each comes twice, with sums and without: only the one with sums changes its arguments, and
# PyTorch's inductor (2.13) cannot compile an op that may change an argument and is given None for all it may change.

_LIBRARY = torch.library.Library("cna_kernels", "DEF")
_SUMS = "Tensor weight, Tensor(a!)? act_sum, Tensor(b!)? act_sumsq"
_STEER = "Tensor? scale_offsets, Tensor? scale_index, Tensor? scale_value, Tensor? row_circuit"
# op: its own arguments, and an empty result. gated_mlp: with w_up, w_gate_up is gate's half alone.
_OPS = {
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


def _define(name, arguments, fake, function):
    """Define an op of torch.library, and return it.

    ``torch.library.custom_op`` adds what these ops do not need, in 50 us of Python for each call, which is more than a
    small MLP takes; this way it is 4 us (2 cores of Zen 4, torch 2.13, 2026-11-21).
    """
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cna_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.cna_kernels, name).default


def _implementation(op, n_inputs, with_sums):
    """What runs an op: its own arguments, the extras, and the backend's name."""

    def run(*arguments):
        inputs, given, backend = arguments[:n_inputs], arguments[n_inputs:-1], arguments[-1]
        extras = () if op == "linear" else Extras(*(() if with_sums else (None, None, None)), *given)
        if with_sums:
            _count_change(extras)
        with _as_given(inputs[0]):
            key = looks(op, inputs, extras, backend)
            serve = _READY.get(key)
            if serve is None:
                _check(op, inputs, extras)  # a call of torch.ops may come from anywhere
                known = all(map(_is_as_stored, (*inputs, *extras)))
                serve = (_prepare if known else _prepare_once)(key, op, inputs, extras, backend)
            return serve(*inputs, *extras)

    return run


_PLAIN_OP, _SUMS_OP = {}, {}
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


def _through_library(op, inputs, extras, backend):
    if not extras or extras.weight is None:
        return _PLAIN_OP[op](*inputs, *extras[3:], backend)
    return _SUMS_OP[op](*inputs, *extras, backend)
