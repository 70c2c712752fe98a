"""The sums in fp64, as variances need them: a pass of its own over act, beside the kernels that compute and scale it.

    act_sum[c, n] += sum_t token_weight[t, c] * act[t, n]        act_sumsq likewise over act**2

One program owns BLOCK_N neurons, COLUMNS columns and a run of the tokens. It adds in fp64 to a tile of BLOCK_T tokens,
token t to row t % BLOCK_T, and adds up the rows once, at the end. Runs meet in ``sums.py``: each element has one
writer, and the same bits in every run. Tokens are taken GROUP at a time, so that many loads are under way; a group
without weight in these columns is not read. Products of two fp32 numbers are exact in fp64.

Floor: 2 T N bytes of bf16 act, once: 39 us of an H100's 3.0 TB/s for 4,096 tokens of 14,336 neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .sums import Sums, add_row

COLUMNS = 2  # of a program: with more, registers do not suffice for fp64


@triton.jit
def _weight(token_weight_ptr, stride_token_weight_t, t, t_last, c, C: tl.constexpr):
    """token_weight[t, c], and 0 for tokens from t_last on and for a column that there is not."""
    end = tl.where(c < C, t_last, 0)
    return tl.load(token_weight_ptr + t.to(tl.int64) * stride_token_weight_t + c, mask=t < end, other=0.0)


@triton.jit(do_not_specialize=["T", "run_length"])
def _sum_fp64_kernel(
    act_ptr,
    token_weight_ptr,
    sum_ptr,
    sumsq_ptr,
    T,
    run_length,
    stride_act_t,
    stride_token_weight_t,
    stride_sum_c,
    stride_sumsq_c,
    N: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    c_first = tl.program_id(1).to(tl.int64) * COLUMNS
    t_first = tl.program_id(2) * run_length
    t_last = tl.minimum(t_first + run_length, T)
    sums = (tl.zeros([BLOCK_T, BLOCK_N], tl.float64),) * COLUMNS
    squares = (tl.zeros([BLOCK_T, BLOCK_N], tl.float64),) * COLUMNS
    for t_start in range(t_first, t_last, GROUP):
        any_weight = tl.zeros([GROUP], tl.int32)
        for i in tl.static_range(COLUMNS):
            group = t_start + tl.arange(0, GROUP)
            some = _weight(token_weight_ptr, stride_token_weight_t, group, t_last, c_first + i, C)
            any_weight = any_weight | (some != 0.0).to(tl.int32)
        if tl.max(any_weight, axis=0) > 0:
            for block in tl.static_range(GROUP // BLOCK_T):
                t = t_start + block * BLOCK_T + tl.arange(0, BLOCK_T)
                token_weight, counted = (), t < 0
                for i in tl.static_range(COLUMNS):
                    weight = _weight(token_weight_ptr, stride_token_weight_t, t, t_last, c_first + i, C)
                    token_weight, counted = token_weight + (weight,), counted | (weight != 0.0)
                here = act_ptr + t.to(tl.int64)[:, None] * stride_act_t + n[None, :]
                act = tl.load(here, mask=counted[:, None] & n_mask[None, :], other=0.0).to(tl.float32).to(tl.float64)
                new_sums, new_squares = (), ()
                for i in tl.static_range(COLUMNS):
                    weighted = token_weight[i].to(tl.float64)[:, None] * act
                    new_sums = new_sums + (sums[i] + weighted,)
                    new_squares = new_squares + (squares[i] + weighted * act,)
                sums, squares = new_sums, new_squares
    part = tl.program_id(2).to(tl.int64) * ((SUM + SUMSQ) * C * N)
    for i in tl.static_range(COLUMNS):
        c = c_first + i
        mask = n < tl.where(c < C, N, 0)
        if SUM:
            add_row(sum_ptr, part + c * N, c * stride_sum_c, n, mask, tl.sum(sums[i], axis=0), SPLIT)
        if SUMSQ:
            here = part + (c + SUM * C) * N
            add_row(sumsq_ptr, here, c * stride_sumsq_c, n, mask, tl.sum(squares[i], axis=0), SPLIT)


class Config(NamedTuple):
    BLOCK_T: int
    BLOCK_N: int
    GROUP: int  # tokens, a multiple of BLOCK_T
    max_runs: int
    num_warps: int


def _launch_config() -> Config:
    """As measured on an H200. What a program costs beside its tokens grows with its warps, so it has few; 8 elements a
    thread. More runs move more bytes of parts than they win in latency."""
    return Config(8, 64, 64, 4, 2)


def sum_fp64(act, token_weight, act_sum, act_sumsq):
    """Add act ``[T, N]`` to act_sum and act_sumsq, ``[C, N]`` fp64, of which one may be None. Returns act."""
    (T, N), C = act.shape, token_weight.shape[1]
    config = _launch_config()
    run_length = triton.cdiv(triton.cdiv(T, config.max_runs), config.GROUP) * config.GROUP
    runs, columns = triton.cdiv(T, run_length), min(C, COLUMNS)
    sums = Sums(token_weight, act_sum, act_sumsq, runs, N)
    launch.launch(
        _sum_fp64_kernel,
        (triton.cdiv(N, config.BLOCK_N), triton.cdiv(C, columns), runs),
        act,
        *sums.pointers(),
        T,
        run_length,
        act.stride(0),
        *sums.strides(),
        N=N,
        **sums.constants(),
        COLUMNS=columns,
        GROUP=config.GROUP,
        BLOCK_T=config.BLOCK_T,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        device=act.device,
    )
    sums.fold()
    return act
