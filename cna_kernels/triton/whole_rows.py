"""The decode pair for one token with weight rows held whole in registers: every load is on its way before the wait.

    act[n]         = silu(sum_k x[k] * w_gate[n, k]) * sum_k x[k] * w_up[n, k]     gate and up never rounded
    act_sum[c, n] += weight[c] * act[n]      act_sumsq likewise, both before scaling
    act[n]        *= scale[row_circuit, n]
    y[h]           = sum_n act[n] * w_down[h, n]

``_gate_up_rows_kernel``: a program owns BLOCK_N neurons and is the only writer of their act, act_sum and act_sumsq.
``_down_rows_kernel``: a program owns BLOCK_H outputs. Both ask for all their weights at once, without a loop and
without shared memory, so the multiprocessor has as many bytes in flight as its registers hold. The second half is
launched as a dependent of the first: its weights arrive while act is still being computed, and only act waits
(``gdc_wait`` is volatile, the compiler moves no load across it).

The first half may be a dependent, too, where nothing writes its weights in the launch before it. Then it lets its own
dependent start only after its own wait: w_down is read by that one before anything is waited for.

Floor: 6 N H bytes of bf16 weights, once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .cost import Cost, instructions
from .gate_up_decode import weight_rows
from .steer import ANY_ALIGNMENT, Steer, circuits, entries, steer_stored
from .sums import Sums, add_row
from .tiles import rounded, silu_mul


@triton.jit(do_not_specialize=["n_circuits"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _gate_up_rows_kernel(
    x_ptr,
    w_ptr,
    act_ptr,
    weight_ptr,
    sum_ptr,
    sumsq_ptr,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    stride_w_n,
    up_offset,
    stride_sum_c,
    stride_sumsq_c,
    n_circuits,
    stride_offsets_k,
    N: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    STEER: tl.constexpr,
    WAIT: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """WAIT: launched as a dependent. PDL: the launch after this one is our dependent."""
    chunks: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    n_first = tl.program_id(0) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    n_mask = n < N
    w_row = w_ptr + n.to(tl.int64)[:, None] * stride_w_n
    w_gates, w_ups = (), ()
    for c in tl.static_range(chunks):
        k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        here = w_row + k[None, :]
        mask = n_mask[:, None] & (k < H)[None, :]
        w_gates = w_gates + (tl.load(here, mask=mask, other=0.0, eviction_policy="evict_first"),)
        w_ups = w_ups + (tl.load(here + up_offset, mask=mask, other=0.0, eviction_policy="evict_first"),)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for c in tl.static_range(chunks):
        k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
        gate += w_gates[c].to(tl.float32) * x
        up += w_ups[c].to(tl.float32) * x
    act = silu_mul(tl.sum(gate, axis=1), tl.sum(up, axis=1), act_ptr.dtype.element_ty)  # [BLOCK_N]
    tl.store(act_ptr + n, act, mask=n_mask)

    if SUM or SUMSQ:
        any_column = 0
        for c in range(C):
            any_column = any_column | (tl.load(weight_ptr + c) != 0.0).to(tl.int32)
        counted = tl.where(any_column != 0, act.to(tl.float32), 0.0)
        for c in range(C):
            weighted = tl.load(weight_ptr + c) * counted
            row = tl.cast(c, tl.int64)
            if SUM:
                add_row(sum_ptr, 0, row * stride_sum_c, n, n_mask, weighted, False)
            if SUMSQ:
                add_row(sumsq_ptr, 0, row * stride_sumsq_c, n, n_mask, weighted * counted, False)

    if STEER:
        tl.debug_barrier()
        n_last = tl.minimum(n_first + BLOCK_N, N)
        t = tl.arange(0, 2)  # the one token, and none
        circuit = circuits(row_circuit_ptr, t, t < 1)
        start, end = entries(circuit, offsets_ptr, stride_offsets_k, n_circuits, n_first, n_last)
        steer_stored(act_ptr, N, index_ptr, value_ptr, t, start, end, n_first, n_last, 32)


@triton.jit
def _down_rows_kernel(
    act_ptr,
    w_ptr,
    y_ptr,
    stride_w_h,
    N: tl.constexpr,
    H: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    chunks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = h < H
    w_row = w_ptr + h.to(tl.int64)[:, None] * stride_w_h
    ws = ()
    for c in tl.static_range(chunks):
        n = c * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = h_mask[:, None] & (n < N)[None, :]
        ws = ws + (tl.load(w_row + n[None, :], mask=mask, other=0.0, eviction_policy="evict_first"),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    y = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    for c in tl.static_range(chunks):
        n = c * BLOCK_N + tl.arange(0, BLOCK_N)
        y += ws[c].to(tl.float32) * tl.load(act_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + h, rounded(tl.sum(y, axis=1), y_ptr.dtype.element_ty), mask=h_mask)


class Config(NamedTuple):
    ROWS: int  # neurons, or outputs, of a program
    BLOCK: int  # elements of a row that its threads load at once, 16 bytes each
    num_warps: int


MAX_BYTES = 1 << 16  # of weights in a program: 64 registers of 8 warps


def _config(n_bytes: int, itemsize: int) -> Config:
    """For rows (a pair of them, or one) of n_bytes. By arithmetic, unmeasured.

    About 16 KB a program: 32 of a thread's 64 to 74 registers hold weights, 6 to 8 programs of 4 warps share a
    multiprocessor and have 100 KB and more in flight, where 23 KB would do. Longer rows are not split: they take more
    registers, and from 48 KB on 8 warps.
    """
    rows = min(8, max(1, (1 << 14) // triton.next_power_of_2(n_bytes)))
    num_warps = 4 if n_bytes < 48 << 10 else 8
    return Config(rows, num_warps * 32 * 16 // itemsize, num_warps)


def fits(T: int, N: int, H: int, itemsize: int) -> bool:
    """Whether a program's rows stay in registers: in bf16 H up to 16,384 and N up to 32,768, in fp32 half of that."""
    return T == 1 and max(2 * H, N) * itemsize <= MAX_BYTES


def per_weight(weights: float) -> float:
    """Instructions for one bf16 weight where a thread has so many of them, sums across threads included (sm_90)."""
    return 4.4 + 100 / weights


def cost(N: int, H: int, itemsize: int = 2) -> Cost:
    """Both halves: each weight once; x and act stay in cache."""
    issued = 0
    for row, n_rows, pair in ((H, N, 2), (N, H, 1)):
        config = _config(pair * row * itemsize, itemsize)
        of_thread = pair * row * config.ROWS / (32 * config.num_warps)
        issued += instructions(per_weight(of_thread), pair * row * n_rows)
    return Cost(itemsize * (3 * N * H + 2 * (N + H)), 0, issued)


def gate_up_rows(
    x, w_gate_up, *, weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None, dependent=False
):
    """x ``[1, H]``, w_gate_up ``[2N, H]`` or a pair -> act ``[1, N]`` summed and scaled.

    dependent: nothing writes the weights in the launch before this one; start while that drains.
    """
    H = x.shape[1]
    w_gate, N, up_offset = weight_rows(w_gate_up)
    act = launch.empty(1, N, dtype=x.dtype, device=x.device)
    config = _config(2 * H * x.element_size(), x.element_size())
    sums, steer = Sums(weight, act_sum, act_sumsq, 1, N), Steer(scale, row_circuit)
    constants = sums.constants()
    has_pdl = launch.has_pdl(x.device)
    launch.launch(
        _gate_up_rows_kernel,
        (triton.cdiv(N, config.ROWS),),
        x,
        w_gate,
        act,
        *sums.pointers(),
        *steer.pointers(),
        w_gate.stride(0),
        up_offset,
        *sums.strides()[1:],
        *steer.sizes(),
        N=N,
        H=H,
        C=constants["C"],
        SUM=constants["SUM"],
        SUMSQ=constants["SUMSQ"],
        STEER=steer.on,
        WAIT=dependent and has_pdl,
        PDL=has_pdl,
        BLOCK_N=config.ROWS,
        BLOCK_K=config.BLOCK,
        num_warps=config.num_warps,
        device=x.device,
        **(dict(launch_pdl=True) if dependent and has_pdl else {}),
    )
    return act


def down_rows(act, w_down, *, dependent=False):
    """act ``[1, N]`` -> y ``[1, H]``.

    dependent: the launch before this one is ours and wrote act; start while it drains.
    """
    N, H = act.shape[1], w_down.shape[0]
    y = launch.empty(1, H, dtype=act.dtype, device=act.device)
    config = _config(N * act.element_size(), act.element_size())
    launch.launch(
        _down_rows_kernel,
        (triton.cdiv(H, config.ROWS),),
        act,
        w_down,
        y,
        w_down.stride(0),
        N=N,
        H=H,
        BLOCK_H=config.ROWS,
        BLOCK_N=config.BLOCK,
        num_warps=config.num_warps,
        device=act.device,
        **launch.dependent(act.device, dependent),
    )
    return y
