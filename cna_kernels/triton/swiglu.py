"""swiglu: act = silu(gate) * up, its sums and its scaling in one pass over memory (placement A).

    act[t, n]        = silu(gate[t, n]) * up[t, n]
    act_sum[c, n]   += sum_t weight[t, c] * act[t, n]      act_sumsq likewise over act**2, both before scaling
    act[t, n]       *= scale[row_circuit[t], n]

A program owns BLOCK_N neurons and a run of consecutive tokens, and walks those BLOCK_T at a time: each act element
has one writer. The sums of its tokens stay in registers. With one run for all tokens the program adds them to act_sum
itself; otherwise it stores them as part r of a workspace ``[R, columns, N]`` and ``_fold_kernel`` adds the parts in
the order r = 0, 1, ... Nothing depends on the order in which programs run.

Steered neurons are multiplied after the run is stored (``steer_stored``): the common path has no instruction more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .cost import Cost, instructions
from .steer import Steer, entries, steer_stored
from .sums import Sums, add_row
from .tiles import silu_mul


@triton.jit(do_not_specialize=["T", "rows_per_program", "n_circuits"])
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    act_ptr,
    weight_ptr,
    sum_ptr,
    sumsq_ptr,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    T,
    rows_per_program,
    stride_gate_t,
    stride_up_t,
    stride_weight_t,
    stride_sum_c,
    stride_sumsq_c,
    n_circuits,
    stride_offsets_k,
    N: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    STEER: tl.constexpr,
    GATED: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Without GATED, gate_ptr holds act as computed elsewhere, which is only summed, copied and scaled."""
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    run = tl.program_id(0)
    n_first = tl.program_id(1) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    n_mask = n < N
    t_first = run * rows_per_program
    t_last = tl.minimum(t_first + rows_per_program, T)
    c_first = tl.program_id(2) * BLOCK_C  # more columns than BLOCK_C: programs further along axis 2 add them
    n_stored = tl.where(tl.program_id(2) == 0, N, 0)
    sums = _no_sums(C * SUM, BLOCK_C, BLOCK_N)
    squares = _no_sums(C * SUMSQ, BLOCK_C, BLOCK_N)
    for t_start in range(t_first, t_last, BLOCK_T):
        t = (t_start + tl.arange(0, BLOCK_T)).to(tl.int64)
        t_mask = t < t_last
        mask = t_mask[:, None] & n_mask[None, :]
        act = tl.load(gate_ptr + t[:, None] * stride_gate_t + n[None, :], mask=mask, other=0.0)  # [BLOCK_T, BLOCK_N]
        if GATED:
            up = tl.load(up_ptr + t[:, None] * stride_up_t + n[None, :], mask=mask, other=0.0)
            act = silu_mul(act, up, dtype)
        if STORE:
            tl.store(act_ptr + t[:, None] * N + n[None, :], act, mask=t_mask[:, None] & (n < n_stored)[None, :])
        if SUM or SUMSQ:
            weight_row = weight_ptr + t * stride_weight_t
            sums, squares = _added(act, weight_row, t_mask, c_first, sums, squares, C, SUM, SUMSQ, BLOCK_T, BLOCK_C)

    if SUM or SUMSQ:
        part = (run * (SUM + SUMSQ) * C).to(tl.int64) * N  # where this run's part of the workspace begins
        if BLOCK_C == 0:
            for c in tl.static_range(C):
                if SUM:
                    add_row(sum_ptr, part + c * N, c * stride_sum_c, n, n_mask, sums[c], SPLIT)
                if SUMSQ:
                    add_row(sumsq_ptr, part + (c + SUM * C) * N, c * stride_sumsq_c, n, n_mask, squares[c], SPLIT)
        else:
            c = c_first + tl.arange(0, BLOCK_C)[:, None]
            mask = (c < C) & n_mask[None, :]
            if SUM:
                add_row(sum_ptr, part + c * N, c * stride_sum_c, n[None, :], mask, sums[0], SPLIT)
            if SUMSQ:
                add_row(sumsq_ptr, part + (c + SUM * C) * N, c * stride_sumsq_c, n[None, :], mask, squares[0], SPLIT)

    if STEER and tl.program_id(2) == 0:
        tl.debug_barrier()
        n_last = tl.minimum(n_first + BLOCK_N, N)
        for t_start in range(t_first, t_last, 32):
            t = t_start + tl.arange(0, 32)
            start, end = entries(
                row_circuit_ptr, offsets_ptr, stride_offsets_k, n_circuits, t, t < t_last, n_first, n_last
            )
            steer_stored(act_ptr, N, index_ptr, value_ptr, t, start, end, n_first, n_last, 4)


@triton.jit
def _no_sums(COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros to add to: a tuple with one [BLOCK_N] for each column, or one [BLOCK_C, BLOCK_N] for all."""
    if BLOCK_C == 0:
        return (tl.zeros([BLOCK_N], tl.float32),) * COLUMNS
    else:
        return (tl.zeros([BLOCK_C, BLOCK_N], tl.float32),) * min(COLUMNS, 1)


@triton.jit
def _added(
    act,
    weight_row,
    t_mask,
    c_first,
    sums,
    squares,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums with one tile of tokens added: by fp32 multiply-adds for a few columns, on the matrix units for many.

    tf32x3 splits each fp32 factor into tf32 parts: its error is that of fp32, and bf16 and fp16 values are exact.
    """
    if BLOCK_C == 0:
        weight = ()
        counted = t_mask != t_mask
        for c in tl.static_range(C):
            weight = weight + (tl.load(weight_row + c, mask=t_mask, other=0.0),)
            counted = counted | (weight[c] != 0.0)
        act = tl.where(counted[:, None], act.to(tl.float32), 0.0)
        new_sums, new_squares = (), ()
        for c in tl.static_range(C):
            weighted = weight[c][:, None] * act
            if SUM:
                new_sums = new_sums + (sums[c] + tl.sum(weighted, axis=0),)
            if SUMSQ:
                new_squares = new_squares + (squares[c] + tl.sum(weighted * act, axis=0),)
        return new_sums, new_squares
    else:
        c = c_first + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & t_mask[None, :]
        weight = tl.load(weight_row[None, :] + c[:, None], mask=mask, other=0.0)  # [BLOCK_C, BLOCK_T]
        counted = tl.max((weight != 0.0).to(tl.int32), axis=0) > 0
        act = tl.where(counted[:, None], act.to(tl.float32), 0.0)
        new_sums, new_squares = sums, squares
        if SUM:
            new_sums = (tl.dot(weight, act, sums[0], input_precision="tf32x3"),)
        if SUMSQ:
            new_squares = (tl.dot(weight, act * act, squares[0], input_precision="tf32x3"),)
        return new_sums, new_squares


class Config(NamedTuple):
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_C: int  # columns added on the matrix units at a time, 0: one by one
    rows: int  # tokens of one program
    num_warps: int


# A column costs one multiply-add for each element; from this many on the matrix units take over.
FEW_COLUMNS = 8


def _launch_config(T: int, N: int, columns: int, n_sm: int) -> Config:
    """By arithmetic, unmeasured. 1024 neurons for 4 warps are one 16-byte load a thread; BLOCK_T = 4 tokens of gate
    and up keep 8 of those in flight, 32 KB on a multiprocessor with 2 programs (23 KB cover its latency). With sums,
    about 2 programs a multiprocessor in all: parts of the workspace grow with the programs, not with the tokens.
    """
    if columns > FEW_COLUMNS:  # with 4 warps some numbers of columns spill
        block_t, block_n, block_c, num_warps = 32, 64, min(64, triton.next_power_of_2(columns)), 8
    else:
        block_t, block_n, block_c, num_warps = 4, min(1024, max(16, triton.next_power_of_2(N))), 0, 4
    runs = max(1, 2 * n_sm // triton.cdiv(N, block_n))
    rows = max(triton.cdiv(T, runs), block_t) if columns else 4 * block_t
    return Config(block_t, block_n, block_c, triton.cdiv(rows, block_t) * block_t, num_warps)


def per_element(C: int, both: bool = False) -> float:
    """Instructions for one element (sm_90, bf16) with C <= FEW_COLUMNS columns of one kind of sum, or of both."""
    return 13.0 + (1.0 + (5.2 if both else 3.2) * C if C else 0.0)


def cost(T: int, N: int, C: int, itemsize: int = 2) -> Cost:
    """gate, up and act once; a column more is a multiply-add or two for each element. A steered neuron is not counted:
    0.1% of the elements, some 40 instructions each, are 0.04 an element."""
    return Cost(3 * itemsize * T * N, 0, instructions(per_element(C), T * N))


def swiglu(gate, up, *, weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """gate, up ``[T, N]`` -> act ``[T, N]``, summed and scaled. T and N are not 0."""
    act = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _pass(gate, up, act, weight, act_sum, act_sumsq, scale, row_circuit)
    return act


def act_pass(act, *, weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """act ``[T, N]`` as computed elsewhere -> a scaled copy, summed on the way; act itself where there is no scale."""
    steered = act if scale is None else torch.empty(act.shape, dtype=act.dtype, device=act.device)
    if weight is not None or scale is not None:
        _pass(act, None, steered, weight, act_sum, act_sumsq, scale, row_circuit)
    return steered


def _pass(gate, up, act, weight, act_sum, act_sumsq, scale, row_circuit):
    T, N = gate.shape
    C = 0 if weight is None else weight.shape[1]
    config = _launch_config(T, N, C, launch.n_multiprocessors(gate.device))
    runs = triton.cdiv(T, config.rows)
    sums, steer = Sums(weight, act_sum, act_sumsq, runs, N), Steer(scale, row_circuit)
    launch.launch(
        _swiglu_kernel,
        (runs, triton.cdiv(N, config.BLOCK_N), triton.cdiv(C, config.BLOCK_C) if config.BLOCK_C else 1),
        gate,
        up,
        act,
        *sums.pointers(),
        *steer.pointers(),
        T,
        config.rows,
        gate.stride(0),
        0 if up is None else up.stride(0),
        *sums.strides(),
        *steer.sizes(),
        N=N,
        **sums.constants(),
        STEER=steer.on,
        GATED=up is not None,
        STORE=up is not None or steer.on,
        BLOCK_T=config.BLOCK_T,
        BLOCK_N=config.BLOCK_N,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
        device=gate.device,
    )
    sums.fold()
