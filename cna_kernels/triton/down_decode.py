"""The down-projection of few tokens: second half of the decode pair, and ``down_proj`` by the plan ``split``.

    act_sum[c, n] += sum_t token_weight[t, c] * act[t, n]      act_sumsq likewise
    y[t, h]        = sum_n steered[t, n] * w_down[h, n]

``steered`` is act, or a scaled copy of act. A pass of its own makes the copy; of at most 64 tokens these are a few
megabytes, which stay in L2. Scaling inside the product would walk a layer's steered neurons one by one in every
program, some 1,000 clocks each (read off the machine code), and real circuits put 50 into a late layer.

``_down_gemv_kernel``, one token of finished act (a few in fp32): one program owns BLOCK_H outputs and streams their
whole weight rows. It asks for the first weights while act is still being computed. No sum is split.

``_down_split_kernel``: a program owns BLOCK_H outputs of BLOCK_T tokens and a run of the neurons, with the weights as
the left factor of the matrix units. It stores its part of y in fp32 as ``[S, T, H]``; ``_fold_y_kernel`` adds the
parts as s = 0, 1, ... No atomics, the same bits in every run. For the sums, each tile of a run of neurons goes to one
of the programs along H, which reads the tile once more and is the only writer of its act_sum. With more than one block
of tokens the sums go through parts, too (``sums.py``).

Floor: 2 N H bytes of bf16 weights, once, and 8 S T H bytes of parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..scale import NEURON_BLOCK
from . import launch
from .cost import Cost, instructions
from .sums import SumArgs, Sums, add_tile
from .tiles import dot, rounded


@triton.jit
def _down_gemv_kernel(
    act_ptr,
    w_ptr,
    y_ptr,
    stride_act_t,
    stride_w_h,
    T: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = h < H
    w_row = w_ptr + h.to(tl.int64)[:, None] * stride_w_h
    ys = (tl.zeros([BLOCK_H, BLOCK_N], tl.float32),) * T
    n = tl.arange(0, BLOCK_N)
    w_next = tl.load(w_row + n[None, :], mask=h_mask[:, None] & (n < N)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()  # only now: the first weights are on their way while act is still being computed
    for n_first in range(0, N, BLOCK_N):
        w = w_next.to(tl.float32)
        n = n_first + tl.arange(0, BLOCK_N)
        n_mask = n < N
        later = n + BLOCK_N
        w_next = tl.load(w_row + later[None, :], mask=h_mask[:, None] & (later < N)[None, :], other=0.0)
        new_ys = ()
        for t in tl.static_range(T):
            act = tl.load(act_ptr + t * stride_act_t + n, mask=n_mask, other=0.0).to(tl.float32)
            new_ys = new_ys + (ys[t] + w * act[None, :],)
        ys = new_ys
    for t in tl.static_range(T):
        tl.store(y_ptr + t * H + h, rounded(tl.sum(ys[t], axis=1), y_ptr.dtype.element_ty), mask=h_mask)


@triton.jit(do_not_specialize=["T"])
def _down_split_kernel(
    steered_ptr,
    w_ptr,
    y_ptr,
    act_ptr,
    token_weight_ptr,
    sum_ptr,
    sumsq_ptr,
    T,
    stride_steered_t,
    stride_w_h,
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
    PDL: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program takes SPLIT_N neurons, a multiple of NEURON_BLOCK."""
    sum_args = SumArgs(token_weight_ptr, sum_ptr, sumsq_ptr, stride_token_weight_t, stride_sum_c, stride_sumsq_c)
    run = tl.program_id(2)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = h < H
    w_row = w_ptr + h.to(tl.int64)[:, None] * stride_w_h
    t = (run * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    t_mask = t < T
    n_begin = tl.program_id(1) * SPLIT_N
    n_end = tl.minimum(n_begin + SPLIT_N, N)
    acc = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for n_done in range(0, SPLIT_N, BLOCK_N):  # constant bounds: without them Triton 3.6 serialises the wgmma (C7515)
        n_first = n_begin + n_done
        n = n_first + tl.arange(0, BLOCK_N)
        n_mask = n < n_end
        mask = t_mask[:, None] & n_mask[None, :]
        w = tl.load(w_row + n[None, :], mask=h_mask[:, None] & n_mask[None, :], other=0.0)
        act = tl.load(steered_ptr + t[:, None] * stride_steered_t + n[None, :], mask=mask, other=0.0)
        acc = dot(w, act.T, acc)  # [BLOCK_H, BLOCK_T]

    if SUM or SUMSQ:
        # After the product, not inside it: a branch there makes ptxas serialise the matrix instructions (C7515).
        for tile in range(n_begin // BLOCK_N + tl.program_id(0), tl.cdiv(n_end, BLOCK_N), tl.num_programs(0)):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = n < n_end
            mask = t_mask[:, None] & n_mask[None, :]
            act = tl.load(act_ptr + t[:, None] * stride_act_t + n[None, :], mask=mask, other=0.0)
            add_tile(act, t, t_mask, run, n, n_mask, sum_args, N, C, SUM, SUMSQ, SPLIT, TOKEN_AXIS=0)

    here = y_ptr + t[None, :] * H + h[:, None]  # t is int64
    mask = h_mask[:, None] & t_mask[None, :]
    if PARTS:
        tl.store(here + tl.program_id(1).to(tl.int64) * T * H, acc, mask=mask)
    else:
        tl.store(here, rounded(acc, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "n_elements"])
def _fold_y_kernel(part_ptr, y_ptr, S, n_elements, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """y = part[0] + part[1] + ..., in this order, rounded once; each program owns BLOCK elements of ``[T * H]``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_elements
    if PDL:
        tl.extra.cuda.gdc_wait()
    y = tl.zeros([BLOCK], tl.float32)
    for s in range(S):
        y += tl.load(part_ptr + s * tl.cast(n_elements, tl.int64) + i, mask=mask, other=0.0)
    tl.store(y_ptr + i, rounded(y, y_ptr.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    BLOCK_T: int
    BLOCK_H: int
    BLOCK_N: int
    SPLIT_N: int  # neurons of one program, a multiple of NEURON_BLOCK
    num_warps: int
    num_stages: int


def _gemv_config(itemsize: int) -> Config:
    """As measured on an H100; fp32 by arithmetic, unmeasured. Threads lie along the neurons with 32 bytes each (16 in
    gate_up_decode). 2 rows of weights to a program are at most 2% faster than 4 or 8."""
    return Config(1, 2, 4096 // itemsize, 0, 4, 1)


def _split_config(T: int, N: int, H: int, itemsize: int, n_sm: int) -> Config:
    """As measured on an H100; fp32 and 17 to 32 tokens by arithmetic, unmeasured. A stage of 64 x 128 bf16 weights is
    16 KB, one of 64 x 64 (for 64 tokens) 8 KB. One program a multiprocessor is enough for 16 tokens; more tokens take
    two. A full block of tokens has at most 4 parts: 8 would move as many bytes as a seventh of an 8B model's weights.
    """
    block_t = min(64, max(16, triton.next_power_of_2(T)))
    programs = triton.cdiv(H, 64) * triton.cdiv(T, block_t)
    blocks = triton.cdiv(N, NEURON_BLOCK)
    rounds = 1 if block_t == 16 and itemsize == 2 else 2
    parts = max(1, min(blocks, 256 // block_t, rounds * n_sm // programs))
    split = triton.cdiv(blocks, parts) * NEURON_BLOCK
    if itemsize == 4:  # no matrix unit; wider tiles spill when steered
        return Config(block_t, 64, 32, split, 8, 4)
    block_n, num_stages = {16: (128, 5), 32: (128, 4), 64: (64, 5)}[block_t]
    return Config(block_t, 64, block_n, split, 4, num_stages)


def per_weight(T: int) -> float:
    """Instructions of the multiply-add kernel for one bf16 weight and T tokens (sm_90)."""
    return 2.3 + 1.8 * T


def cost(T: int, N: int, H: int, itemsize: int = 2, *, gemv: bool = False, n_sm: int = 132) -> Cost:
    """The weights once, act once (act stays in L2 after that), and the parts of y written and read in fp32."""
    moved = itemsize * (N * H + T * (N + H))
    if gemv:
        return Cost(moved, 0, instructions(per_weight(T), N * H))
    config = _split_config(T, N, H, itemsize, n_sm)
    parts = triton.cdiv(N, config.SPLIT_N)
    moved += 8 * parts * T * H if parts > 1 else 0
    return Cost(moved, 2 * triton.cdiv(T, config.BLOCK_T) * config.BLOCK_T * N * H, 0)


def down_gemv(act, w_down, *, dependent=False):
    """act ``[T, N]`` -> y ``[T, H]`` without sums or scaling, for a handful of tokens; see ``down_split``."""
    (T, N), H = act.shape, w_down.shape[0]
    y = launch.empty(T, H, dtype=act.dtype, device=act.device)
    config = _gemv_config(act.element_size())
    launch.launch(
        _down_gemv_kernel,
        (triton.cdiv(H, config.BLOCK_H),),
        act,
        w_down,
        y,
        act.stride(0),
        w_down.stride(0),
        T=T,
        N=N,
        H=H,
        BLOCK_H=config.BLOCK_H,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        device=act.device,
        **launch.dependent(act.device, dependent),
    )
    return y


def down_split(act, w_down, steered=None, *, token_weight=None, act_sum=None, act_sumsq=None, dependent=False):
    """act ``[T, N]`` -> y ``[T, H]``, the product of act or of its scaled copy ``steered``, and sums of act; T >= 1.

    dependent: the launch before this one is of this package and writes what the product reads; start while it drains.
    """
    (T, N), H = act.shape, w_down.shape[0]
    steered = act if steered is None else steered
    y = launch.empty(T, H, dtype=act.dtype, device=act.device)
    config = _split_config(T, N, H, act.element_size(), launch.n_multiprocessors(act.device))
    parts, runs = triton.cdiv(N, config.SPLIT_N), triton.cdiv(T, config.BLOCK_T)
    part = y if parts == 1 else launch.empty(parts, T, H, dtype=torch.float32, device=act.device)
    sums = Sums(token_weight, act_sum, act_sumsq, runs, N)
    launch.launch(
        _down_split_kernel,
        (triton.cdiv(H, config.BLOCK_H), parts, runs),
        steered,
        w_down,
        part,
        act,
        *sums.pointers(),
        T,
        steered.stride(0),
        w_down.stride(0),
        act.stride(0),
        *sums.strides(),
        N=N,
        H=H,
        **sums.constants(),
        PARTS=parts > 1,
        SPLIT_N=config.SPLIT_N,
        BLOCK_T=config.BLOCK_T,
        BLOCK_H=config.BLOCK_H,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        device=act.device,
        **launch.registers(act.device),
        **launch.dependent(act.device, dependent),
    )
    if parts > 1:
        launch.launch(
            _fold_y_kernel,
            (triton.cdiv(T * H, 512),),
            part,
            y,
            parts,
            T * H,
            BLOCK=512,
            num_warps=4,
            device=act.device,
            **launch.dependent(act.device, dependent),
        )
    sums.fold()
    return y
