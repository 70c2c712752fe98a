"""Every op in plain PyTorch: the definition that the kernels are tested against.

    act            = silu(gate) * up                      computed in fp32, rounded once to the inputs' dtype
    act_sum[c, n]   += sum_t token_weight[t, c] * act[t, n]     fp32, from the rounded act, before scaling
    act_sumsq[c, n] += sum_t token_weight[t, c] * act[t, n]^2   likewise; or both in fp64, as variances need them
    y              = (act * scale[row_circuit[t]]) @ w_down^T

The definition says where values are rounded. Sums read the rounded ``act``, as ``down_proj`` does, so they equal what
a hook on the input of ``down_proj`` would collect, and all ops give the same sums. The product with a scale is
computed in fp32 from the rounded ``act`` and rounded again, as a hook that multiplies would do. Hugging Face eager
rounds silu(gate) before the product with up; here silu(gate) stays in fp32.

Gradients flow through everything, the sums among it: what is added to ``act_sum`` requires grad where ``act`` does.

A scale of 0 writes exactly 0 whatever ``act`` holds. A token whose weights are all 0 is never read by the sums.

Inputs may also be float64: the same definition, everything in float64 (tests use it as the exact answer).
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from .scale import Scale, dense_scale

_STATISTICS = threading.local()  # .only: whether this thread's sums are statistics, through which no gradient flows


def sum_statistics_only(only: bool) -> None:
    """Say whether the sums of this thread's calls from now on are statistics alone, which keep no graph alive."""
    _STATISTICS.only = only


def gated_mlp(
    x: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
) -> Tensor:
    """The whole MLP: x ``[T, H]``, w_gate_up ``[2N, H]`` or its halves as a pair, w_down ``[H, N]`` -> y ``[T, H]``."""
    gate, up = gate_and_up(x, w_gate_up)
    act = swiglu(
        gate, up, token_weight=token_weight, act_sum=act_sum, act_sumsq=act_sumsq, scale=scale, row_circuit=row_circuit
    )
    return F.linear(act, w_down)


def gate_and_up(x: Tensor, w_gate_up: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """gate and up, ``[T, N]`` each: the halves of one product, with row stride 2N, or two products."""
    if isinstance(w_gate_up, tuple):
        return F.linear(x, w_gate_up[0]), F.linear(x, w_gate_up[1])
    gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return gate, up


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up: gate, up ``[T, N]`` -> act ``[T, N]``, summed before and scaled after."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    act = (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
    _accumulate(act, token_weight, act_sum, act_sumsq)
    return _scaled(act, scale, row_circuit)


def down_proj(
    act: Tensor,
    w_down: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
) -> Tensor:
    """The down-projection: act ``[T, N]``, w_down ``[H, N]`` -> y ``[T, H]``."""
    _accumulate(act, token_weight, act_sum, act_sumsq)
    return F.linear(_scaled(act, scale, row_circuit), w_down)


def steer_act(
    act: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
) -> Tensor:
    """The sums and the scaling alone: act ``[T, N]`` -> a copy, scaled."""
    _accumulate(act, token_weight, act_sum, act_sumsq)
    return act.clone() if scale is None else _scaled(act, scale, row_circuit)


def steer_act_(
    act: Tensor,
    *,
    token_weight: Tensor | None = None,
    act_sum: Tensor | None = None,
    act_sumsq: Tensor | None = None,
    scale: Scale | None = None,
    row_circuit: Tensor | None = None,
) -> Tensor:
    """The sums and the scaling in place: act ``[T, N]`` -> act."""
    _accumulate(act, token_weight, act_sum, act_sumsq)
    return act if scale is None else act.copy_(_scaled(act, scale, row_circuit))


def _accumulate(act: Tensor, token_weight: Tensor | None, act_sum: Tensor | None, act_sumsq: Tensor | None) -> None:
    """Add the weighted sums of this call's tokens to act_sum and act_sumsq, both ``[C, N]``, in place."""
    if act_sum is None and act_sumsq is None:
        return
    if token_weight is None:
        raise ValueError("token_weight: expected together with act_sum or act_sumsq, got one without the other")
    counted = (token_weight != 0).any(dim=1, keepdim=True)  # [T, 1]
    if getattr(_STATISTICS, "only", False):
        act = act.detach()
    for sums, squared in ((act_sum, False), (act_sumsq, True)):
        if sums is not None:
            own = torch.where(counted, act.to(sums.dtype), 0)
            sums += token_weight.to(sums.dtype).t() @ (own.square() if squared else own)


def _scaled(act: Tensor, scale: Scale | None, row_circuit: Tensor | None) -> Tensor:
    """Return act with every row multiplied by its circuit's multipliers, ``[T, N]``."""
    if scale is None:
        return act
    if row_circuit is None:
        raise ValueError("scale: expected together with row_circuit, got one without the other")
    wide = torch.promote_types(act.dtype, torch.float32)
    multiplier = dense_scale(scale, act.shape[1]).to(wide)  # [K + 1, N], the last row is all ones
    n_circuits = multiplier.shape[0] - 1
    steered = (row_circuit >= 0) & (row_circuit < n_circuits)
    multiplier = multiplier[torch.where(steered, row_circuit, n_circuits).long()]  # [T, N]
    return torch.where(multiplier == 0, 0, (act.to(wide) * multiplier).to(act.dtype))
