"""The down-projection of 2 to 32 tokens in one launch: no split, no workspace, no second pass.

    y[t, h] = sum_n act[t, n] * w_down[h, n]

A program owns BLOCK_H outputs of all tokens and walks all neurons, so nothing is left to add up and each y has one
writer. 16 or 32 rows of weights make about as many programs as there are multiprocessors. wgmma takes no fewer than
64 rows, too few programs, for which ``down_split`` has its split; ``mma.sync`` takes 16, and is fast enough where
reading the weights takes the time.

As a dependent of the launch that computes act, a program first has the beginning of its rows fetched to L2.

Floor: 2 N H bytes of bf16 weights, once. act is read from L2 by every program, T / BLOCK_H times the bytes of the
weights: this is why T ends at 32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .cost import Cost
from .tiles import dot, rounded


@triton.jit
def prefetch_row(ptr, n_bytes: tl.constexpr):
    """Have n_bytes from ptr on fetched to L2, by one thread; both are multiples of 16 (sm_90 on)."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptr, tl.full([], n_bytes, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["T"])
def _down_flat_kernel(
    act_ptr,
    w_ptr,
    y_ptr,
    T,
    stride_act_t,
    stride_w_h,
    N: tl.constexpr,
    H: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """PREFETCH: bytes of each row to ask for before the wait, 0 for none."""
    h_first = tl.program_id(0) * BLOCK_H
    h = h_first + tl.arange(0, BLOCK_H)
    h_mask = h < H
    w_row = w_ptr + h.to(tl.int64)[:, None] * stride_w_h
    t = tl.arange(0, BLOCK_T)
    t_mask = t < T
    act_row = act_ptr + t.to(tl.int64)[None, :] * stride_act_t
    if PREFETCH > 0:
        for r in tl.static_range(BLOCK_H):
            row = tl.minimum(h_first + r, H - 1)
            prefetch_row(w_ptr + row.to(tl.int64) * stride_w_h, PREFETCH)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
    for n_first in range(0, N, BLOCK_N):
        n = n_first + tl.arange(0, BLOCK_N)
        n_mask = n < N
        w = tl.load(w_row + n[None, :], mask=h_mask[:, None] & n_mask[None, :], other=0.0)
        act = tl.load(act_row + n[:, None], mask=t_mask[None, :] & n_mask[:, None], other=0.0)
        acc = dot(w, act, acc)
    here = y_ptr + t.to(tl.int64)[None, :] * H + h[:, None]
    tl.store(here, rounded(acc, y_ptr.dtype.element_ty), mask=h_mask[:, None] & t_mask[None, :])


class Config(NamedTuple):
    BLOCK_T: int
    BLOCK_H: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


MAX_TOKENS = 32


def fits(T: int, itemsize: int) -> bool:
    return T <= MAX_TOKENS and itemsize == 2


def _launch_config(T: int, H: int, n_sm: int) -> Config:
    """By arithmetic, unmeasured. 32 rows, which halve the reads of act, where they make three quarters of a wave of
    programs; else 16. Stages of 16 to 32 KB, 64 to 96 KB in all: two programs fit a multiprocessor, and one alone has
    32 KB or more of weights in flight, where 23 KB would do.
    """
    block_t = 16 if T <= 16 else 32
    block_h = 32 if 4 * triton.cdiv(H, 32) >= 3 * n_sm else 16
    return Config(block_t, block_h, 256, 4, 5 if block_t + block_h <= 48 else 4)


# Of each row before the wait: 8 MB of an 8B model, what the memory delivers while the launch before this one drains.
PREFETCH_BYTES = 2048


def cost(T: int, N: int, H: int, n_sm: int = 132) -> Cost:
    """The weights once, act once (after that it stays in L2), and the product padded to whole tiles of tokens."""
    return Cost(2 * (N * H + T * (N + H)), 2 * _launch_config(T, H, n_sm).BLOCK_T * N * H, 0)


def down_flat(act, w_down, *, dependent=False):
    """act ``[T, N]``, w_down ``[H, N]`` -> y ``[T, H]``, for T <= 32 in bf16 or fp16.

    dependent: the launch before this one is ours and wrote act; start while it drains.
    """
    (T, N), H = act.shape, w_down.shape[0]
    y = launch.empty(T, H, dtype=act.dtype, device=act.device)
    config = _launch_config(T, H, launch.n_multiprocessors(act.device))
    options = launch.dependent(act.device, dependent)
    aligned = w_down.data_ptr() % 16 == 0 and w_down.stride(0) % 8 == 0
    launch.launch(
        _down_flat_kernel,
        (triton.cdiv(H, config.BLOCK_H),),
        act,
        w_down,
        y,
        T,
        act.stride(0),
        w_down.stride(0),
        N=N,
        H=H,
        PREFETCH=min(PREFETCH_BYTES, 2 * N // 16 * 16) if options["PDL"] and aligned else 0,
        BLOCK_T=config.BLOCK_T,
        BLOCK_H=config.BLOCK_H,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        device=act.device,
        **options,
    )
    return y
