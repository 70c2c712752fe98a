"""The sums in fp64, as variances need them: a pass of its own over act, beside the kernels that compute and scale it.

    act_sum[c, n] += sum_t token_weight[t, c] * act[t, n]        act_sumsq likewise over act**2

One program owns BLOCK_N neurons and COLUMNS columns and walks all tokens: each element has one writer, and the same
bits in every run. A block of tokens without weight in these columns is not read. Products of two fp32 numbers are exact
in fp64.
"""

import triton
import triton.language as tl

from . import launch

COLUMNS = 2  # of a program: with more, registers do not suffice for fp64


@triton.jit(do_not_specialize=["T"])
def _sum_fp64_kernel(
    act_ptr,
    token_weight_ptr,
    sum_ptr,
    sumsq_ptr,
    T,
    stride_act_t,
    stride_token_weight_t,
    stride_sum_c,
    stride_sumsq_c,
    N: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    c_first = tl.program_id(1).to(tl.int64) * COLUMNS
    sums = (tl.zeros([BLOCK_N], tl.float64),) * COLUMNS
    squares = (tl.zeros([BLOCK_N], tl.float64),) * COLUMNS
    for t_start in range(0, T, BLOCK_T):
        t = (t_start + tl.arange(0, BLOCK_T)).to(tl.int64)
        row = token_weight_ptr + t * stride_token_weight_t + c_first
        counted = t < 0
        for i in tl.static_range(COLUMNS):
            t_last = tl.where(c_first + i < C, T, 0)  # no token, where there is no column
            counted = counted | (tl.load(row + i, mask=t < t_last, other=0.0) != 0.0)
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            mask = counted[:, None] & n_mask[None, :]
            act = tl.load(act_ptr + t[:, None] * stride_act_t + n[None, :], mask=mask, other=0.0)
            act = act.to(tl.float32).to(tl.float64)
            new_sums, new_squares = (), ()
            for i in tl.static_range(COLUMNS):
                t_last = tl.where(c_first + i < C, T, 0)
                token_weight = tl.load(row + i, mask=t < t_last, other=0.0).to(tl.float64)
                weighted = token_weight[:, None] * act
                new_sums = new_sums + (sums[i] + tl.sum(weighted, axis=0),)
                new_squares = new_squares + (squares[i] + tl.sum(weighted * act, axis=0),)
            sums, squares = new_sums, new_squares
    for i in tl.static_range(COLUMNS):
        mask = n < tl.where(c_first + i < C, N, 0)
        if SUM:
            here = sum_ptr + (c_first + i) * stride_sum_c + n
            tl.store(here, tl.load(here, mask=mask, other=0.0) + sums[i], mask=mask)
        if SUMSQ:
            here = sumsq_ptr + (c_first + i) * stride_sumsq_c + n
            tl.store(here, tl.load(here, mask=mask, other=0.0) + squares[i], mask=mask)


def sum_fp64(act, token_weight, act_sum, act_sumsq):
    """Add act ``[T, N]`` to act_sum and act_sumsq, ``[C, N]`` fp64, of which one may be None. Returns act."""
    (T, N), C = act.shape, token_weight.shape[1]
    block_n = min(64, max(16, triton.next_power_of_2(N)))
    launch.launch(
        _sum_fp64_kernel,
        (triton.cdiv(N, block_n), triton.cdiv(C, COLUMNS)),
        act,
        token_weight,
        act_sum,
        act_sumsq,
        T,
        act.stride(0),
        token_weight.stride(0),
        *(0 if x is None else x.stride(0) for x in (act_sum, act_sumsq)),
        N=N,
        C=C,
        SUM=act_sum is not None,
        SUMSQ=act_sumsq is not None,
        COLUMNS=COLUMNS,
        BLOCK_T=16,
        BLOCK_N=block_n,
        num_warps=4,
        device=act.device,
    )
    return act
