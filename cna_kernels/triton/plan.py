"""Which kernels serve a call: a pure function of op, shape, dtype and device, and the reason for each choice.

Whether a call sums or scales, and how many circuits it has, does not enter the choice. Rows that no circuit touches
must come out bit for bit as in a call without both, and two different kernels round differently.

A reason is a measurement (``bench/results/gpu-h100.md``), or says that it is arithmetic. ``cna doctor`` prints choices
for a shape, and ``CNA_PLAN=gated_mlp=fused,down_proj=blas`` overrides it for the calls that the named plan can serve.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import plans
from ..plans import Plan
from .gate_up_decode import MAX_TOKENS, max_gemv_tokens

try:
    from . import gate_up
except ImportError:  # Gluon is experimental: in another Triton it may be elsewhere
    gate_up = None  # type: ignore[assignment]

# Every plan by op: the kernels it runs, in order. "linear" is torch.nn.functional.linear, cuBLAS on NVIDIA devices.
PLANS = {
    "gated_mlp": {
        "gemv": "gate_up_gemv, down_gemv",
        "flat": "gate_up_flat, down_split, fold_y",
        "fused": "gate_up, linear",
        "blas": "linear, swiglu, linear",
    },
    "down_proj": {
        "split": "a scaled copy if there is a scale, down_split, fold_y",
        "tma": "down_proj, between two patches of act if there is a scale",
        "blas": "linear, after one pass over act if it is summed, between two patches of it if scaled and not copied",
    },
}


class Call(NamedTuple):
    """The facts about a call that the choice of a plan may depend on."""

    op: str
    T: int
    N: int
    H: int
    dtype: torch.dtype
    arch: int  # 10 * major + minor of an NVIDIA device, 0 for any other
    tma: bool  # rows on 16 bytes, 2-byte elements; each call checks its addresses
    n_sm: int = 132  # multiprocessors


def can_serve(call: Call, name: str) -> bool:
    """Whether the plan can serve the call, fast or not."""
    itemsize = call.dtype.itemsize
    flat = call.T <= MAX_TOKENS and itemsize == 2
    return {
        ("gated_mlp", "gemv"): max_gemv_tokens(itemsize) >= call.T,
        ("gated_mlp", "flat"): flat,
        ("gated_mlp", "fused"): call.tma and gate_up is not None and gate_up.fits(call.arch),
        ("gated_mlp", "blas"): True,
        ("down_proj", "split"): call.T <= 512,  # the product of more tokens is not bound by the weights
        ("down_proj", "tma"): call.tma and call.arch >= 90,
        ("down_proj", "blas"): True,
    }[call.op, name]


def default(call: Call) -> Plan:
    """The plan for a call where nothing overrides it."""
    few = can_serve(call, "gemv" if call.op == "gated_mlp" else "split")
    if call.arch == 0:
        return Plan("blas", "not an NVIDIA device: only the elementwise kernel is used; unmeasured")
    if call.dtype.itemsize == 4:
        if call.op == "gated_mlp":
            if few:
                return Plan("gemv", "2 launches, each weight read once; by arithmetic, unmeasured")
        elif call.T <= 16:
            return Plan("split", "bound by reading the weights once; by arithmetic, unmeasured")
        return Plan("blas", "fp32 has no exact matrix unit: cuBLAS; by arithmetic, unmeasured")
    if call.op == "down_proj":
        if call.T <= MAX_TOKENS:
            return Plan("split", "0.95 of the time of blas at 16 tokens; measured on an H100")
        return Plan("blas", "0.7 to 0.94 of the time of split, 0.5 to 0.7 of that of tma; measured on an H100")
    if few:
        return Plan("gemv", "each weight read once, at 93 to 100% of what memory gives; measured on an H100")
    if can_serve(call, "flat"):
        return Plan("flat", "each weight read once, 0.94 to 0.99 of the time of blas; measured on an H100")
    if can_serve(call, "fused") and gate_up.busy(call.T, call.N, call.n_sm) >= 0.93:
        return Plan("fused", "gate and up never leave the chip, 0.92 to 0.99 of the time of blas; measured on an H100")
    return Plan("blas", "tiles of fused would leave multiprocessors idle, or it cannot serve; measured on an H100")


def choose(call: Call) -> Plan:
    """The plan for a call: CNA_PLAN if it names one for the op that can serve the call, else the default.

    Raises:
        InputError: CNA_PLAN names an op or a plan that does not exist.
    """
    name = plans.override(call.op)
    if name in PLANS[call.op] and can_serve(call, name):
        return Plan(name, "CNA_PLAN")
    return default(call)


def by_tokens(
    op: str, N: int, H: int, dtype: torch.dtype, arch: int, longest: int = 4096, n_sm: int = 132
) -> list[tuple[int, Plan]]:
    """(first T, plan) of each range of T = 1 .. longest on which one plan serves calls with aligned rows."""
    tma = dtype.itemsize == 2 and N % 8 == 0 and H % 8 == 0
    ranges: list[tuple[int, Plan]] = []
    for T in range(1, longest + 1):
        plan = choose(Call(op, T, N, H, dtype, arch, tma, n_sm))
        if not ranges or ranges[-1][1] != plan:
            ranges.append((T, plan))
    return ranges
