"""swiglu: act = silu(gate) * up, its sums and its scaling in one pass over memory.

    act[t, n]        = silu(gate[t, n]) * up[t, n]
    act_sum[c, n]   += sum_t token_weight[t, c] * act[t, n]      act_sumsq likewise over act**2, both before scaling
    act[t, n]       *= scale[row_circuit[t], n]

A program owns BLOCK_N neurons and a run of consecutive tokens, and walks those BLOCK_T at a time: each act element
has one writer. The sums of its tokens stay in registers. With one run for all tokens the program adds them to act_sum
itself; otherwise it stores them as part r of a workspace ``[R, columns, N]`` and ``_fold_kernel`` adds the parts in
the order r = 0, 1, ... Nothing depends on the order in which programs run.

Steered neurons are multiplied after the run is stored (``steer_stored``): the loop over tokens has no instruction more.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .cost import Cost, instructions
from .steer import ANY_ALIGNMENT, Steer, SteerArgs, circuits, entries, steer_stored
from .sums import SumArgs, Sums, added, columns_at_once, no_sums, put_sums
from .tiles import silu_mul


@triton.jit(do_not_specialize=["T", "rows_per_program", "n_circuits"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    act_ptr,
    token_weight_ptr,
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
    stride_token_weight_t,
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
    STEER_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Without GATED, gate_ptr holds act as computed elsewhere, which is only summed, copied and scaled."""
    sum_args = SumArgs(token_weight_ptr, sum_ptr, sumsq_ptr, stride_token_weight_t, stride_sum_c, stride_sumsq_c)
    steer_args = SteerArgs(row_circuit_ptr, offsets_ptr, index_ptr, value_ptr, n_circuits, stride_offsets_k)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    run = tl.program_id(0)
    n_first = tl.program_id(1) * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    n_mask = n < N
    t_first = run * rows_per_program
    t_last = tl.minimum(t_first + rows_per_program, T)
    c_first = tl.program_id(2) * BLOCK_C  # more columns than BLOCK_C: programs further along axis 2 add them
    n_stored = tl.where(tl.program_id(2) == 0, N, 0)
    sums = no_sums(C * SUM, BLOCK_C, BLOCK_N)
    squares = no_sums(C * SUMSQ, BLOCK_C, BLOCK_N)
    for t_start in tl.range(t_first, t_last, BLOCK_T, num_stages=STAGES):
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
            token_weight_row = token_weight_ptr + t * stride_token_weight_t
            sums, squares = added(act, token_weight_row, t_mask, c_first, sums, squares, C, SUM, SUMSQ, BLOCK_C)

    if SUM or SUMSQ:
        put_sums(sums, squares, run, c_first, n, n_mask, sum_args, N, C, SUM, SUMSQ, SPLIT, BLOCK_C)

    if STEER and tl.program_id(2) == 0:
        tl.debug_barrier()
        n_last = tl.minimum(n_first + BLOCK_N, N)
        for t_start in range(t_first, t_last, STEER_T):
            t = t_start + tl.arange(0, STEER_T)
            circuit = circuits(t, t < t_last, steer_args)
            start, end = entries(circuit, n_first, n_last, steer_args)
            steer_stored(act_ptr, N, t, start, end, n_first, n_last, steer_args, 4)


class Config(NamedTuple):
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_C: int  # columns added on the matrix units at a time, 0: one by one
    rows: int  # tokens of one program
    num_warps: int
    stages: int  # of the loop over tokens


def _launch_config(T: int, N: int, columns: int, n_sm: int, arch: int) -> Config:
    """As measured on an H100; more columns than FEW_COLUMNS by arithmetic, unmeasured. 1024 neurons for 4 warps are one
    16-byte load a thread.

    Without sums many short programs hide each other's waits. With sums there are about 2 long programs a
    multiprocessor, because each program adds a part to the workspace: they fetch 3 tiles ahead, 4 KB each of gate and
    up (23 KB in flight cover a multiprocessor's share of the bandwidth).
    """
    block_c = columns_at_once(columns, arch)
    if block_c:  # with 4 warps some numbers of columns spill
        block_t, block_n, num_warps = 32, 64, 8
    else:
        block_t, block_n, num_warps = 2 if columns else 1, min(1024, max(16, triton.next_power_of_2(N))), 4
    runs = max(1, 2 * n_sm // triton.cdiv(N, block_n))
    rows = max(triton.cdiv(T, runs), block_t) if columns else 2
    stages = (3 if block_c else 4) if columns else 1
    return Config(block_t, block_n, block_c, triton.cdiv(rows, block_t) * block_t, num_warps, stages)


def per_element(C: int, both: bool = False) -> float:
    """Instructions for one element (sm_90, bf16) with C <= sums.FEW_COLUMNS columns of one kind of sum, or of both."""
    return 13.0 + (2.0 + (5.7 if both else 3.5) * C if C else 0.0)


def cost(T: int, N: int, C: int, itemsize: int = 2) -> Cost:
    """gate, up and act once; each column adds a multiply-add or two for each element. Steered neurons are not counted:
    0.1% of the elements, at some 40 instructions each, are 0.04 instructions an element."""
    return Cost(3 * itemsize * T * N, 0, instructions(per_element(C), T * N))


def swiglu(gate, up, *, token_weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """gate, up ``[T, N]`` -> act ``[T, N]``, summed and scaled. T and N are not 0."""
    act = launch.empty(*gate.shape, dtype=gate.dtype, device=gate.device)
    _pass(gate, up, act, token_weight, act_sum, act_sumsq, scale, row_circuit)
    return act


def steer_act(act, *, token_weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """act ``[T, N]`` as computed elsewhere -> a scaled copy, summed on the way; act itself where there is no scale."""
    steered = act if scale is None else launch.empty(*act.shape, dtype=act.dtype, device=act.device)
    if token_weight is not None or scale is not None:
        _pass(act, None, steered, token_weight, act_sum, act_sumsq, scale, row_circuit)
    return steered


def steer_act_(act, *, token_weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """act ``[T, N]``, contiguous, summed and then scaled in place: only steered neurons are written."""
    if token_weight is not None or scale is not None:
        _pass(act, None, act, token_weight, act_sum, act_sumsq, scale, row_circuit, store=False)
    return act


def _pass(gate, up, act, token_weight, act_sum, act_sumsq, scale, row_circuit, store=True):
    T, N = gate.shape
    C = 0 if token_weight is None else token_weight.shape[1]
    config = _launch_config(T, N, C, launch.n_multiprocessors(gate.device), launch.arch(gate.device))
    runs = triton.cdiv(T, config.rows)
    sums, steer = Sums(token_weight, act_sum, act_sumsq, runs, N), Steer(scale, row_circuit)
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
        STORE=store and (up is not None or steer.on),
        BLOCK_T=config.BLOCK_T,
        BLOCK_N=config.BLOCK_N,
        BLOCK_C=config.BLOCK_C,
        STEER_T=min(128, triton.next_power_of_2(config.rows)),
        STAGES=config.stages,
        num_warps=config.num_warps,
        device=gate.device,
        **(launch.registers(gate.device) if C else {}),
    )
    sums.fold()
