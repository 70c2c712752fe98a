"""The Triton backend's ``gated_mlp``, ``swiglu``, ``steer_act``, ``down_proj``: each goes to the kernels of its plan.

Arguments are checked by ``cna_kernels.ops``; ``cna_kernels.reference`` is the definition. Where gate and up are
computed here (``gemv``, ``flat``, ``fused``) they stay in fp32; the reference rounds them as ``linear`` does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import reference
from . import down_proj as down_proj_kernels
from . import launch
from . import swiglu as swiglu_kernels
from .down_decode import down_gemv, down_split
from .down_proj import fits_tma
from .gate_up import gate_up
from .gate_up_decode import gate_up_decode
from .plan import Call, choose


def gated_mlp(x, w_gate_up, w_down, **extras):
    """See :func:`cna_kernels.gated_mlp`."""
    (T, H), N = x.shape, w_down.shape[1]
    if 0 in (T, H, N):
        return reference.gated_mlp(x, w_gate_up, w_down, **extras)
    # the kernel with TMA reads gate and up as one box, so they must be one tensor
    tma = isinstance(w_gate_up, torch.Tensor) and fits_tma(x, w_gate_up)
    call = Call("gated_mlp", T, N, H, x.dtype, launch.arch(x.device), tma)
    plan = choose(call).name
    if plan == "gemv":
        return down_gemv(gate_up_decode(x, w_gate_up, **extras), w_down)
    if plan == "flat":
        return down_split(gate_up_decode(x, w_gate_up, **extras), w_down, dependent=True)
    if plan == "fused":
        return F.linear(gate_up(x, w_gate_up, **extras), w_down)
    gate, up = reference.gate_and_up(x, w_gate_up)
    if plan == "gated":
        return down_split(gate, w_down, up, **extras)
    return F.linear(swiglu_kernels.swiglu(gate, up, **extras), w_down)


def swiglu(gate, up, **extras):
    """See :func:`cna_kernels.swiglu`."""
    if gate.numel() == 0:
        return reference.swiglu(gate, up, **extras)
    return swiglu_kernels.swiglu(gate, up, **extras)


def steer_act(act, **extras):
    """See :func:`cna_kernels.steer_act`."""
    if act.numel() == 0:
        return reference.steer_act(act, **extras)
    steered = swiglu_kernels.act_pass(act, **extras)
    return act.clone() if steered is act else steered


def down_proj(act, w_down, **extras):
    """See :func:`cna_kernels.down_proj`."""
    (T, N), H = act.shape, w_down.shape[0]
    if 0 in (T, H, N):
        return reference.down_proj(act, w_down, **extras)
    plan = choose(Call("down_proj", T, N, H, act.dtype, launch.arch(act.device), fits_tma(act, w_down))).name
    if plan == "split":
        return down_split(act, w_down, **extras)
    if plan == "tma":
        return down_proj_kernels.down_proj(act, w_down, **extras)
    return F.linear(swiglu_kernels.act_pass(act, **extras), w_down)
