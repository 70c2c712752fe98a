"""Warming up: compiling the kernels for calls of any number of tokens ahead, so that no call waits for a compiler.

Triton compiles a kernel at its first launch, in about a second. As T runs over 1 .. 4096 an op launches some 10 to 17
different kernels, the first of them at 1, 2, 17, 33, 65, ... tokens: a serving loop would wait at each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch

from . import backends, ops
from .extras import Extras, Inputs
from .scale import Scale


def warm_up(
    op: str,
    inputs_of: Callable[[int], Inputs],
    extras_of: Callable[[int], Extras],
    longest: int = 4096,
    backend: str | None = None,
) -> list[int]:
    """Call an op with every number of tokens for which it launches a kernel that no smaller number launches.

    Args:
        op: "gated_mlp", "swiglu", "down_proj" or "steer_act".
        inputs_of: the op's tensors for a number of tokens T, with the shapes, strides and dtypes of the calls to come:
            ``(x, w_gate_up, None, w_down)``, ``(x, w_gate, w_up, w_down)``, ``(gate, up)``, ``(act, w_down)`` or
            ``(act,)``. What they hold does not matter.
        extras_of: the extras for a number of tokens T: what is summed and steered. The calls change the sums.
        longest: the largest T.
        backend: as in :func:`cna_kernels.gated_mlp`.

    Returns:
        The numbers of tokens that were called, ascending; empty with a backend that compiles nothing.
    """
    if backends.name_for(inputs_of(1)[0].device, backend) != "triton":
        return []
    with torch.inference_mode():
        called = list(_first_to_launch(op, inputs_of, extras_of, longest))
        for T in called:
            ops.call(op, inputs_of(T), extras_of(T), backend)
    return called


def _first_to_launch(
    op: str, inputs_of: Callable[[int], Inputs], extras_of: Callable[[int], Extras], longest: int
) -> Iterator[int]:
    """Each T that launches a kernel that no smaller T launches, found by listing launches; no kernel runs."""
    from .triton import launch, repeat
    from .triton import ops as triton_ops

    seen: set[Hashable] = set()
    for T in range(1, longest + 1):
        inputs, extras = inputs_of(T), extras_of(T)
        with launch.listing() as listed:
            triton_ops.prepare(op, inputs, extras)(*inputs, *extras)
        new = {repeat.variant(kernel, args, options) for kernel, _, args, options in listed} - seen
        if new:
            seen |= new
            yield T


def blank_extras(
    n_tokens: int,
    n_neurons: int,
    device: torch.device,
    *,
    scale: Scale | None = None,
    n_columns: int = 0,
    squares: bool = False,
) -> Extras:
    """Extras with ``n_columns`` columns of sums (0: without sums), and with ``scale`` if given; no token uses it."""
    extras = Extras()
    if n_columns:
        kind = torch.float64 if squares else torch.float32  # as in ActivationSums
        token_weight = torch.zeros((n_tokens, n_columns), dtype=torch.float32, device=device)
        sums = [torch.zeros((n_columns, n_neurons), dtype=kind, device=device) for _ in range(1 + squares)]
        extras = Extras(token_weight, *sums)
    if scale is None:
        return extras
    rows = torch.full((n_tokens,), -1, dtype=torch.int32, device=device)
    return Extras(*extras[:3], *scale, rows)
