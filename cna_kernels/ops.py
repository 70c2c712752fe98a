"""The public ops: they check their arguments and call a backend. ``reference.py`` is their definition.

``gated_mlp``, ``swiglu`` and ``down_proj`` do three jobs each: their part of the MLP, the streaming sums of the
activations, and the per-neuron scale. ``steer_act`` does the last two, and ``steer_act_``
does them in place. ``linear`` serves a model's other layers.

The first call with arguments of given shapes, strides and dtypes is checked, and the backend prepares a function that
serves it. Later calls that look alike run that function. All ops are registered with torch.library (namespace
``cna_kernels``) for tracers: ``torch.compile(fullgraph=True)`` sees one node per call. Gradients flow through the
reference, sums among it: where an input requires grad, inside transforms of torch.func, and where FLOPs are counted,
the op runs the reference directly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from . import backends, library
from .blocks import BlockWeight, Weight
from .extras import Extras, Inputs
from .op_checks import FLOATS as FLOATS
from .op_checks import check
from .renamed import by_new_name
from .scale import Scale
from .serve import READY, as_given, count_change, is_as_stored, looks, prepare


def gated_mlp(
    x: Tensor,
    w_gate_up: Tensor | tuple[Weight, Weight],
    w_down: Weight,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The gated MLP of a Llama layer, with sums and steering: ``y = (act * scale) @ w_down^T``.

    ``act = silu(x @ w_gate^T) * (x @ w_up^T)``; ``act_sum[c, n] += sum_t token_weight[t, c] * act[t, n]``, not scaled.

    Args:
        x: ``[T, H]`` bf16, fp16 or fp32. The other floating inputs share its dtype unless said otherwise.
        w_gate_up: ``[2N, H]``, the rows of ``gate_proj`` then those of ``up_proj``; or a tuple of the two, ``[N, H]``.
            Weights may be BlockWeights on CPUs, as pairs here; gradients then flow through their numbers.
        w_down: ``[H, N]``.
        token_weight: ``[T, C]`` fp32, how much each token counts in each column.
        act_sum: ``[C, N]`` fp32, or fp64, added to in place. Needs ``token_weight``. Where an input requires grad, what
            is added carries the gradient, and ``act_sum`` requires grad from then on: ``detach_()`` it between steps.
        act_sumsq: ``[C, N]`` of the same dtype, the same sum over ``act**2``, in memory of its own. Needs
            ``token_weight``. A variance needs fp64.
        scale: the layer's multipliers for K circuits. Needs ``row_circuit``.
        row_circuit: ``[T]`` int32, the circuit of each token; -1 (or anything outside 0..K-1) leaves the token alone.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; default by CNA_BACKEND, then by device.
        weight: the old name of ``token_weight``, deprecated.

    Returns:
        y ``[T, H]``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or stride.
        BackendUnavailable: the backend asked for cannot run here.
    """
    w_gate, w_up = w_gate_up if isinstance(w_gate_up, tuple) else (w_gate_up, None)
    extras = _extras(token_weight, act_sum, act_sumsq, scale, row_circuit, weight)
    return call("gated_mlp", (x, w_gate, w_up, w_down), extras, backend)


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The elementwise half, for stacks that own their matrix products: ``act = silu(gate) * up``, then scaled.

    Args:
        gate: ``[T, N]`` bf16, fp16 or fp32. Any row stride: half of a fused gate/up tensor is a normal input.
        up: ``[T, N]``, same dtype.
        token_weight, act_sum, act_sumsq, scale, row_circuit, backend: as in :func:`gated_mlp`.

    Returns:
        act ``[T, N]``, contiguous, the input for ``down_proj``.
    """
    return call("swiglu", (gate, up), _extras(token_weight, act_sum, act_sumsq, scale, row_circuit, weight), backend)


def down_proj(
    act: Tensor,
    w_down: Weight,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The down-projection, for stacks that hand over ``act``: ``y = (act * scale) @ w_down^T``.

    On a GPU an ``act`` of more than 64 tokens (in fp32, 16) is scaled in place for the product and put back after it,
    bit for bit: while the call runs, nothing on another stream may use ``act``. The plan ``blas``, the only one for
    other makers' GPUs, does so for any number of tokens. In a call with sums, a contiguous ``act`` of fewer than 2**24
    elements is copied instead, and the copy is scaled.

    Args:
        act: ``[T, N]`` bf16, fp16 or fp32.
        w_down: ``[H, N]``, same dtype, or a BlockWeight.
        token_weight, act_sum, act_sumsq, scale, row_circuit, backend: as in :func:`gated_mlp`.

    Returns:
        y ``[T, H]``.
    """
    return call(
        "down_proj", (act, w_down), _extras(token_weight, act_sum, act_sumsq, scale, row_circuit, weight), backend
    )


def steer_act(
    act: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sums and steering alone, for stacks whose activation or quantised ``down_proj`` no other op computes.

    Args:
        act: ``[T, N]`` bf16, fp16 or fp32, the input of ``down_proj`` as computed elsewhere.
        token_weight, act_sum, act_sumsq, scale, row_circuit, backend: as in :func:`gated_mlp`.

    Returns:
        act ``[T, N]``, a scaled copy.
    """
    return call("steer_act", (act,), _extras(token_weight, act_sum, act_sumsq, scale, row_circuit, weight), backend)


def steer_act_(
    act: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`steer_act` in place: only the steered neurons of ``act`` ``[T, N]`` are written. Returns ``act``.

    Tracers see PyTorch's own operations instead of an op of torch.library.
    """
    return call("steer_act_", (act,), _extras(token_weight, act_sum, act_sumsq, scale, row_circuit, None), backend)


def linear(x: Tensor, w: Weight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Any other linear layer, ``y = x @ w^T + bias``: the CPU engine's products on CPUs, PyTorch's elsewhere.

    Args:
        x: ``[T, H]`` bf16, fp16 or fp32.
        w: ``[O, H]``, same dtype, or on CPUs a BlockWeight.
        bias: ``[O]``, same dtype.
        backend: as in :func:`gated_mlp`.

    Returns:
        y ``[T, O]``.
    """
    if x.device.type != "cpu" and isinstance(w, Tensor):
        return F.linear(x, w, bias)
    return call("linear", (x, w, bias), (), backend)


def _extras(
    token_weight: Tensor | None, act_sum: Tensor | None, act_sumsq: Tensor | None, scale: Scale | None,
    row_circuit: Tensor | None, weight: Tensor | None,
) -> Extras:  # fmt: skip
    if weight is not None:
        token_weight = by_new_name("weight", weight, "token_weight", token_weight is not None)
    if scale is None:
        return Extras(token_weight, act_sum, act_sumsq, row_circuit=row_circuit)
    return Extras(token_weight, act_sum, act_sumsq, *scale, row_circuit)


def call(op: str, inputs: Inputs, extras: Extras | tuple[()], backend: str | None = None) -> Tensor:
    """Call an op with its tensors as torch.library takes them.

    Args:
        op: "gated_mlp", "swiglu", "down_proj", "steer_act", "steer_act_" or "linear".
        inputs: for gated_mlp x ``[T, H]``, then w_gate_up ``[2N, H]`` and None, or w_gate and w_up ``[N, H]``, then
            w_down ``[H, N]``; for any other op its own tensors, in order.
        extras: what is summed and steered; () for linear.
        backend: as in :func:`gated_mlp`.

    Returns:
        What the op returns. Raises what the op raises.
    """
    if is_observed() or _needs_grad(inputs, extras):
        check(op, inputs, extras)
        inputs = tuple(x.dense(inputs[0].dtype) if isinstance(x, BlockWeight) else x for x in inputs)
        taken_apart = _is_taken_apart(inputs, extras)
        if taken_apart or _needs_grad(inputs, extras):
            if not taken_apart:
                _refuse_backend_with_grad(backend)
            with as_given(inputs[0]):
                return backends.plain(op)(*inputs, *extras)
        return library.through(op, inputs, extras, backend)
    key = looks(op, inputs, extras, backend)
    try:
        run = READY.get(key)
    except TypeError:  # sizes that are symbols have no hash
        run = None
    if run is None:
        check(op, inputs, extras)
        if inputs[0].is_meta or not all(map(is_as_stored, (*inputs, *extras))):
            return library.through(op, inputs, extras, backend)
        run = prepare(key, op, inputs, extras, backend)
    if extras and extras.token_weight is not None:
        count_change(extras)
    return run(*inputs, *extras)


def is_observed() -> bool:
    """Whether a tracer, a mode or a profiler watches PyTorch's operations: it would not see the launch of a kernel."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._is_any_autocast_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or has_function_modes()
    )


def _is_taken_apart(inputs: Inputs, extras: Extras | tuple[()]) -> bool:
    """Whether an onlooker needs PyTorch's own operations: a transform of torch.func, or a counter of FLOPs."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        if extras and extras.token_weight is not None and any(map(_is_mapped, (*inputs, extras.token_weight))):
            raise ValueError(library.NO_MAPPED_SUMS)
        return True
    n_modes = torch._C._len_torch_dispatch_stack()
    modes = (torch._C._get_dispatch_stack_at(i) for i in range(n_modes))
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)


def _is_mapped(x: Tensor | None) -> bool:
    """Whether a tensor stands for one of many, inside torch.vmap."""
    while x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def has_function_modes() -> bool:
    """Whether a mode for torch functions is active, other than that of ``torch.set_default_device``."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    n_modes = torch._C._len_torch_function_stack()
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(n_modes))


def _needs_grad(inputs: Inputs, extras: Extras | tuple[()]) -> bool:
    """Whether autograd, or forward-mode AD, may look through the op, which then runs in PyTorch's operations."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if not extras:
        return any(x is not None and x.requires_grad for x in inputs)
    for name, x in (("act_sum", extras.act_sum), ("act_sumsq", extras.act_sumsq)):
        if x is not None and x.requires_grad and x.is_leaf:
            raise ValueError(
                f"{name}: a leaf that requires grad cannot be added to; expected one without requires_grad"
            )
    return any(x is not None and x.requires_grad for x in (*inputs, *extras[:3], extras.scale_value))


def _refuse_backend_with_grad(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(f"backend: {backend!r} has no gradient; use 'reference' or torch.no_grad()")
