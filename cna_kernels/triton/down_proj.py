"""The down-projection of many tokens, fused with the sums: persistent, on TMA descriptors. Only CNA_PLAN chooses it.

    act_sum[c, n] += sum_t token_weight[t, c] * act[t, n]                        act_sumsq likewise, both before scaling
    y[t, h]        = sum_n act[t, n] * scale[row_circuit[t], n] * w_down[h, n]

One program a multiprocessor walks output tiles ``[BLOCK_T, BLOCK_H]``. Each tile is written by one program and is a
single sum over n = 0 .. N - 1: no sum is split, and nothing depends on the order of programs. Tiles are visited in
groups of GROUP_T along the tokens, so that the weights of a group stay in L2.

Sums: after its product, the program of output tile (i, j) adds up the runs j, j + H / BLOCK_H, ... of SUM_N neurons of
its tokens, whose act it has just read. So each run of each token tile is summed once, into part i of the workspace.
Blocks of tokens that count in no column are not read again: if only the last tokens of prompts count, one block in
sixteen is read.

Steering: the steered elements of act are scaled in place, and put back after the product (``steer.patch``). This moves
a few sectors of memory a token, nothing for tokens without a circuit, and the product stays a plain one, which TMA
feeds. If act were scaled in registers, its tiles would wait for their entries one by one. With sums, which need act as
it was, the product reads a scaled copy.

This kernel is for callers that hand over act. Where this package computes act, sums and scaling are done on the way,
and the product after that is a plain one.

Floor: 2 T N H FLOP.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .cost import Cost
from .steer import patch, put_back
from .sums import SumArgs, Sums, columns_at_once, put_sums, sum_run
from .swiglu import steer_act
from .tiles import dot, rounded


@triton.jit
def grouped_tile(tile, tiles_t, tiles_n, GROUP_T: tl.constexpr):
    """(i, j) of output tile number ``tile``: along the tokens first, within groups of GROUP_T token tiles."""
    first = tile // (GROUP_T * tiles_n) * GROUP_T
    rows = tl.minimum(tiles_t - first, GROUP_T)
    within = tile % (GROUP_T * tiles_n)
    return first + within % rows, within // rows


@triton.jit(do_not_specialize=["T"])
def _down_proj_kernel(
    act_desc,
    w_desc,
    act_ptr,
    y_ptr,
    token_weight_ptr,
    sum_ptr,
    sumsq_ptr,
    T,
    stride_act_t,
    stride_token_weight_t,
    stride_sum_c,
    stride_sumsq_c,
    N: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_T: tl.constexpr,
    SUM_T: tl.constexpr,
    SUM_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMN_RUNS: tl.constexpr,
):
    sum_args = SumArgs(token_weight_ptr, sum_ptr, sumsq_ptr, stride_token_weight_t, stride_sum_c, stride_sumsq_c)
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_h: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    for tile in range(tl.program_id(0), tiles_t * tiles_h, tl.num_programs(0)):
        i, j = grouped_tile(tile, tiles_t, tiles_h, GROUP_T)
        t_first, h_first = i * BLOCK_T, j * BLOCK_H
        t = t_first + tl.arange(0, BLOCK_T)
        t_mask = t < T
        acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        for n_first in range(0, N, BLOCK_N):
            act = act_desc.load([t_first, n_first])  # [BLOCK_T, BLOCK_N], zeros beyond the edges
            w = w_desc.load([h_first, n_first])  # [BLOCK_H, BLOCK_N]
            acc = dot(act, w.T, acc)

        h = h_first + tl.arange(0, BLOCK_H)
        here = y_ptr + t.to(tl.int64)[:, None] * H + h[None, :]
        tl.store(here, rounded(acc, y_ptr.dtype.element_ty), mask=t_mask[:, None] & (h < H)[None, :])

        if SUM or SUMSQ:
            for item in range(j, tl.cdiv(N, SUM_N) * COLUMN_RUNS, tiles_h):
                n = item // COLUMN_RUNS * SUM_N + tl.arange(0, SUM_N)
                t_last = tl.minimum(t_first + BLOCK_T, T)
                n_mask = n < N
                c_first = item % COLUMN_RUNS * BLOCK_C
                sums, squares = sum_run(
                    act_ptr, stride_act_t, t_first, t_last, n, n_mask, c_first, sum_args, C, SUM, SUMSQ, SUM_T, BLOCK_C
                )
                put_sums(sums, squares, i, c_first, n, n_mask, sum_args, N, C, SUM, SUMSQ, SPLIT, BLOCK_C)


class Config(NamedTuple):
    BLOCK_T: int
    BLOCK_H: int
    BLOCK_N: int
    GROUP_T: int
    num_warps: int
    num_stages: int


def _launch_config(T: int, H: int, n_sm: int) -> Config:
    """By arithmetic, unmeasured. Tiles of 128 x 256 do 85 FLOP for each byte from L2; 128 x 128 serve where the
    larger tiles, half as many, would leave multiprocessors idle. Stages of 48 KB or 32 KB fill shared memory (227 KB).
    """
    if triton.cdiv(T, 128) * triton.cdiv(H, 256) >= n_sm * 3 // 4:
        return Config(128, 256, 64, 8, 8, 4)
    return Config(128, 128, 64, 8, 8, 5)


def cost(T: int, N: int, H: int, C: int = 0, n_sm: int = 132) -> Cost:
    """The product, padded to whole tiles and whole rounds of the multiprocessors; act once more to sum it."""
    config = _launch_config(T, H, n_sm)
    tiles = triton.cdiv(T, config.BLOCK_T) * triton.cdiv(H, config.BLOCK_H)
    rounds = triton.cdiv(tiles, n_sm) * n_sm
    moved = 2 * (T * N * (2 if C else 1) + N * H + T * H) + 8 * triton.cdiv(T, config.BLOCK_T) * C * N
    return Cost(moved, 2 * rounds * config.BLOCK_T * config.BLOCK_H * N, 0)


def rows_fit_tma(*tensors) -> bool:
    """Whether TMA can address the rows, from a base on 16 bytes: 2-byte elements, each row on 16 bytes, no overlap."""
    return all(
        x.element_size() == 2 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
        for x in tensors
    )


def down_proj(act, w_down, *, token_weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """act ``[T, N]``, w_down ``[H, N]`` -> y ``[T, H]``; bf16 or fp16, where ``rows_fit_tma``, bases on 16 bytes."""
    if scale is None:
        return _product(act, act, w_down, token_weight, act_sum, act_sumsq)
    if token_weight is not None:
        steered = steer_act(act, scale=scale, row_circuit=row_circuit)
        return _product(steered, act, w_down, token_weight, act_sum, act_sumsq)
    saved = patch(act, scale, row_circuit)
    try:
        return _product(act, act, w_down, None, None, None)
    finally:  # also after an error: act is the caller's
        put_back(act, saved, scale, row_circuit)


def _product(steered, act, w_down, token_weight, act_sum, act_sumsq):
    """The product of ``steered``, and the sums of ``act``."""
    (T, N), H = act.shape, w_down.shape[0]
    y = launch.empty(T, H, dtype=act.dtype, device=act.device)
    n_sm = launch.n_multiprocessors(act.device)
    config = _launch_config(T, H, n_sm)
    tiles_t = triton.cdiv(T, config.BLOCK_T)
    sums = Sums(token_weight, act_sum, act_sumsq, tiles_t, N)
    block_c = columns_at_once(sums.n_columns, 90)
    launch.launch(
        _down_proj_kernel,
        (min(n_sm, tiles_t * triton.cdiv(H, config.BLOCK_H)),),
        TensorDescriptor.from_tensor(steered, [config.BLOCK_T, config.BLOCK_N]),
        TensorDescriptor.from_tensor(w_down, [config.BLOCK_H, config.BLOCK_N]),
        act,
        y,
        *sums.pointers(),
        T,
        act.stride(0),
        *sums.strides(),
        N=N,
        H=H,
        **sums.constants(),
        BLOCK_T=config.BLOCK_T,
        BLOCK_H=config.BLOCK_H,
        BLOCK_N=config.BLOCK_N,
        GROUP_T=config.GROUP_T,
        SUM_T=32 if block_c else 8,
        SUM_N=64 if block_c else 1024,
        BLOCK_C=block_c,
        COLUMN_RUNS=triton.cdiv(sums.n_columns, block_c) if block_c else 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        device=act.device,
        **launch.registers(act.device),
    )
    sums.fold()
    return y
