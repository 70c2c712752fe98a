"""First half of the decode pair, T <= 64: act = silu(x @ w_gate^T) * (x @ w_up^T), with sums and scaling.

    gate[t, n], up[t, n] = sum_k x[t, k] * w_gate[n, k], sum_k x[t, k] * w_up[n, k]     never rounded
    act[t, n]            = silu(gate[t, n]) * up[t, n]
    act_sum[c, n]       += sum_t token_weight[t, c] * act[t, n]      act_sumsq likewise, both before scaling
    act[t, n]           *= scale[row_circuit[t], n]

A program owns BLOCK_N neurons for all tokens: it streams their 2 * BLOCK_N weight rows once, finishes act in registers
and is the only writer of act[:, n] and act_sum[:, n]. No workspace, no atomics. Rows of w_up lie ``up_offset`` elements
from those of w_gate, in one tensor or in two; a choice between two pointers would end the prefetch of weights.

Two kernels. For one token, in fp32 for up to 4, plain multiply-adds (``_gate_up_gemv_kernel``). For more tokens in bf16
and fp16 the matrix units (``_gate_up_flat_kernel``) with the weights as the left factor, so that tokens are the short
side: gate and up rows form one tile of 64 rows or more, one product.

Floor: 4 N H bytes of bf16 weights, once. At 64 tokens 4 T N H FLOP take a third of the time of those bytes on an H200.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .cost import Cost, instructions
from .steer import ANY_ALIGNMENT, Steer, SteerArgs, circuits, entries, first_entries, steer_held, steer_stored
from .sums import FEW_COLUMNS, SumArgs, Sums, add_row, add_tile
from .tiles import dot, silu_mul

_FEW_COLUMNS = tl.constexpr(FEW_COLUMNS)


@triton.jit
def _column(weights, counted, T: tl.constexpr):
    """sum_t weights[t] * counted[t], and sum_t weights[t] * counted[t]**2: two [BLOCK_N]."""
    total, squares = weights[0] * counted[0], weights[0] * counted[0] * counted[0]
    for t in tl.static_range(1, T):
        weighted = weights[t] * counted[t]
        total, squares = total + weighted, squares + weighted * counted[t]
    return total, squares


@triton.jit(do_not_specialize=["n_circuits"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _gate_up_gemv_kernel(
    x_ptr,
    w_ptr,
    act_ptr,
    token_weight_ptr,
    sum_ptr,
    sumsq_ptr,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    stride_x_t,
    stride_w_n,
    up_offset,
    stride_token_weight_t,
    stride_sum_c,
    stride_sumsq_c,
    n_circuits,
    stride_offsets_k,
    T: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    STEER: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums and steering load what they need before the weights are loaded: each round trip to memory that is left for
    the end of the last programs costs every call half a microsecond."""
    steer_args = SteerArgs(row_circuit_ptr, offsets_ptr, index_ptr, value_ptr, n_circuits, stride_offsets_k)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    FEW: tl.constexpr = min(C, _FEW_COLUMNS)
    n_first = tl.program_id(0) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    n_mask = n < N
    weights, sum_before, sumsq_before, circuit = (), (), (), ()
    for c in tl.static_range(FEW):
        of_tokens = ()
        for t in tl.static_range(T):
            of_tokens = of_tokens + (tl.load(token_weight_ptr + t * stride_token_weight_t + c),)
        weights = weights + (of_tokens,)
        row = tl.cast(c, tl.int64)
        if SUM:
            sum_before = sum_before + (tl.load(sum_ptr + row * stride_sum_c + n, mask=n_mask, other=0.0),)
        if SUMSQ:
            sumsq_before = sumsq_before + (tl.load(sumsq_ptr + row * stride_sumsq_c + n, mask=n_mask, other=0.0),)
    if STEER:
        for t in tl.static_range(T):
            circuit = circuit + (circuits(t, True, steer_args),)
    w_row = w_ptr + n.to(tl.int64)[:, None] * stride_w_n
    gates = (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),) * T
    ups = (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),) * T
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    for k_first in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = k_first + tl.arange(0, BLOCK_K)
        mask = n_mask[:, None] & (k < H)[None, :]
        w_gate = tl.load(w_row + k[None, :], mask=mask, other=0.0).to(tl.float32)
        w_up = tl.load(w_row + up_offset + k[None, :], mask=mask, other=0.0).to(tl.float32)
        new_gates, new_ups = (), ()
        for t in tl.static_range(T):
            x = tl.load(x_ptr + t * tl.cast(stride_x_t, tl.int64) + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
            new_gates = new_gates + (gates[t] + w_gate * x,)
            new_ups = new_ups + (ups[t] + w_up * x,)
        gates, ups = new_gates, new_ups

    starts, ends = (), ()
    if STEER:
        n_last = tl.minimum(n_first + BLOCK_N, N)
        for t in tl.static_range(T):
            start, end = entries(circuit[t], n_first, n_last, steer_args)
            starts, ends = starts + (start,), ends + (end,)
    acts = ()
    for t in tl.static_range(T):
        acts = acts + (silu_mul(tl.sum(gates[t], axis=1), tl.sum(ups[t], axis=1), dtype),)
    indices, values = (), ()
    if STEER:
        for t in tl.static_range(T):
            index, value = first_entries(starts[t], ends[t], steer_args, 32)
            indices, values = indices + (index,), values + (value,)

    if SUM or SUMSQ:
        counted = ()
        for t in tl.static_range(T):
            any_column = 0
            for c in tl.static_range(FEW):
                any_column = any_column | (weights[c][t] != 0.0).to(tl.int32)
            for c in range(FEW, C):
                weight = tl.load(token_weight_ptr + t * stride_token_weight_t + c)
                any_column = any_column | (weight != 0.0).to(tl.int32)
            counted = counted + (tl.where(any_column != 0, acts[t].to(tl.float32), 0.0),)
        for c in tl.static_range(FEW):
            total, squares = _column(weights[c], counted, T)
            row = tl.cast(c, tl.int64)
            if SUM:
                tl.store(sum_ptr + row * stride_sum_c + n, sum_before[c] + total, mask=n_mask)
            if SUMSQ:
                tl.store(sumsq_ptr + row * stride_sumsq_c + n, sumsq_before[c] + squares, mask=n_mask)
        for c in range(FEW, C):
            of_tokens = ()
            for t in tl.static_range(T):
                of_tokens = of_tokens + (tl.load(token_weight_ptr + t * stride_token_weight_t + c),)
            total, squares = _column(of_tokens, counted, T)
            row = tl.cast(c, tl.int64)
            if SUM:
                add_row(sum_ptr, 0, row * stride_sum_c, n, n_mask, total, False)
            if SUMSQ:
                add_row(sumsq_ptr, 0, row * stride_sumsq_c, n, n_mask, squares, False)

    for t in tl.static_range(T):
        act = acts[t]
        if STEER:
            act = steer_held(act, n, starts[t], ends[t], indices[t], values[t], steer_args, 32)
        tl.store(act_ptr + t * N + n, act, mask=n_mask)


@triton.jit(do_not_specialize=["T", "n_circuits"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _gate_up_flat_kernel(
    x_ptr,
    w_ptr,
    act_ptr,
    token_weight_ptr,
    sum_ptr,
    sumsq_ptr,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    T,
    stride_x_t,
    stride_w_n,
    up_offset,
    stride_token_weight_t,
    stride_sum_c,
    stride_sumsq_c,
    n_circuits,
    stride_offsets_k,
    N: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    STEER: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sum_args = SumArgs(token_weight_ptr, sum_ptr, sumsq_ptr, stride_token_weight_t, stride_sum_c, stride_sumsq_c)
    steer_args = SteerArgs(row_circuit_ptr, offsets_ptr, index_ptr, value_ptr, n_circuits, stride_offsets_k)
    n_first = tl.program_id(0) * BLOCK_N
    r = tl.arange(0, 2 * BLOCK_N)  # rows of the weight tile: BLOCK_N of gate, then BLOCK_N of up
    w_n = n_first + r % BLOCK_N
    w_mask = w_n < N
    w_row = w_ptr + (w_n.to(tl.int64) * stride_w_n + (r // BLOCK_N).to(tl.int64) * up_offset)[:, None]
    t = tl.arange(0, BLOCK_T)
    t_mask = t < T
    x_row = x_ptr + t.to(tl.int64)[None, :] * stride_x_t
    if STEER:
        circuit = circuits(t, t_mask, steer_args)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([2 * BLOCK_N, BLOCK_T], tl.float32)
    for k_first in range(0, H, BLOCK_K):
        k = k_first + tl.arange(0, BLOCK_K)
        w = tl.load(w_row + k[None, :], mask=w_mask[:, None] & (k < H)[None, :], other=0.0)
        x = tl.load(x_row + k[:, None], mask=t_mask[None, :] & (k < H)[:, None], other=0.0)
        acc = dot(w, x, acc)
    if STEER:  # the loads are under way while act is finished and summed
        n_last = tl.minimum(n_first + BLOCK_N, N)
        start, end = entries(circuit, n_first, n_last, steer_args)
    gate, up = acc.reshape(2, BLOCK_N, BLOCK_T).permute(1, 2, 0).split()  # [BLOCK_N, BLOCK_T]
    act = silu_mul(gate, up, act_ptr.dtype.element_ty)

    n = n_first + tl.arange(0, BLOCK_N)
    n_mask = n < N
    here = act_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(here, act, mask=n_mask[:, None] & t_mask[None, :])
    if SUM or SUMSQ:
        run = tl.program_id(1)
        add_tile(act, t, t_mask, run, n, n_mask, sum_args, N, C, SUM, SUMSQ, SPLIT, TOKEN_AXIS=1)
    if STEER:
        tl.debug_barrier()
        steer_stored(act_ptr, N, t, start, end, n_first, n_last, steer_args, 4)


class Config(NamedTuple):
    BLOCK_T: int  # 0: the multiply-add kernel
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


MAX_TOKENS = 64


def max_gemv_tokens(itemsize: int) -> int:
    """The most tokens for which multiply-adds beat the matrix units; fp32 has no exact matrix unit."""
    return 4 if itemsize == 4 else 1


def _launch_config(T: int, N: int, H: int, itemsize: int, n_sm: int) -> Config:
    """As measured on an H100 and an H200; fp32 by arithmetic, unmeasured.

    Multiply-adds: the 128 threads of a program lie along k with 16 bytes each, so that x needs no exchange between
    them; 2 rows of gate and up are 16 KB (8 KB where 2,048 does not divide H), fetched 2 steps ahead through shared
    memory (ptxas breaks up loads that go to registers). 4 rows run short of registers with sums and steering.

    Matrix units: a stage of 64 or 128 rows of weights has 8 to 32 KB. All programs should run at once: a second round
    that fills few multiprocessors costs up to 16% (18,944 neurons, 64 tokens, H200). So the rows and the stages follow
    from N and from how many programs of that size fit on a multiprocessor: 4 of (64, 32, 64), 3 of (64, 64, 64), 2 of
    (16, 64, 128) and 3 of (16, 32, 128).
    """
    if max_gemv_tokens(itemsize) >= T:
        block_k = 512 if itemsize == 4 else 2048 if H % 2048 == 0 else 1024
        return Config(0, 2 if itemsize == 2 or T > 2 else 4, block_k, 4, 3)
    block_t = max(16, triton.next_power_of_2(T))
    few = 64 * n_sm >= N  # neurons: one program a multiprocessor, or two
    if block_t == 16:
        return Config(16, 64 if not few and 2 * 64 * n_sm >= N else 32, 128, 4, 3)
    if few:
        return Config(32, 64, 128, 4, 3) if block_t == 32 else Config(64, 64, 64, 4, 5)
    one_round_of_64 = 4 * 32 * n_sm < N <= 3 * 64 * n_sm
    return Config(block_t, 64 if block_t == 64 and one_round_of_64 else 32, 64, 4, 3)


def per_weight(T: int) -> float:
    """Instructions of the multiply-add kernel for one bf16 weight and T tokens (sm_90)."""
    return 2.6 + 1.3 * T


def cost(T: int, N: int, H: int, itemsize: int = 2) -> Cost:
    """The weights once; x stays in cache. On the matrix units tokens are padded to 16."""
    weights = 2 * N * H
    moved = itemsize * (weights + T * (H + N))
    if max_gemv_tokens(itemsize) >= T:
        return Cost(moved, 0, instructions(per_weight(T), weights))
    return Cost(moved, 2 * max(16, triton.next_power_of_2(T)) * weights, 0)


def weight_rows(w_gate_up):
    """The rows of gate, their number, and the elements from a row of gate to its row of up, in one tensor or in two."""
    if not isinstance(w_gate_up, tuple):
        N = w_gate_up.shape[0] // 2
        return w_gate_up, N, N * w_gate_up.stride(0)
    w_gate, w_up = w_gate_up
    if w_gate.stride(0) != w_up.stride(0):
        w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
    return w_gate, w_gate.shape[0], launch.distance(w_gate, w_up)


def gate_up_decode(x, w_gate_up, *, token_weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """x ``[T, H]``, w_gate_up ``[2N, H]`` or a pair -> act ``[T, N]`` summed and scaled, for 1 <= T <= 64."""
    T, H = x.shape
    w_gate, N, up_offset = weight_rows(w_gate_up)
    act = launch.empty(T, N, dtype=x.dtype, device=x.device)
    config = _launch_config(T, N, H, x.element_size(), launch.n_multiprocessors(x.device))
    sums, steer = Sums(token_weight, act_sum, act_sumsq, 1, N), Steer(scale, row_circuit)
    gemv = config.BLOCK_T == 0
    launch.launch(
        _gate_up_gemv_kernel if gemv else _gate_up_flat_kernel,
        (triton.cdiv(N, config.BLOCK_N),),
        x,
        w_gate,
        act,
        *sums.pointers(),
        *steer.pointers(),
        *(() if gemv else (T,)),
        x.stride(0),
        w_gate.stride(0),
        up_offset,
        *sums.strides(),
        *steer.sizes(),
        N=N,
        H=H,
        **sums.constants(),
        STEER=steer.on,
        PDL=launch.has_pdl(x.device),
        **(dict(T=T, STAGES=config.num_stages) if gemv else dict(BLOCK_T=config.BLOCK_T)),
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        device=x.device,
        **(launch.registers(x.device) if T > 1 else {}),  # one token: more programs at once are worth more
    )
    return act
