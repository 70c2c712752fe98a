"""``down_split`` for finished act without its second launch: the last program to arrive at a tile adds the parts up.

    y[t, h] = sum_n act[t, n] * w_down[h, n] = part[0, t, h] + part[1, t, h] + ..., rounded once

A program owns BLOCK_H outputs of BLOCK_T tokens and a run s of the neurons, as in ``down_split``. It stores its part,
then counts itself in. Whichever of the S programs of a tile arrives last reads all parts as s = 0, 1, ... and is the
only writer of the tile's y. Which one that is changes from run to run; the order of the sum does not, so neither do
the bits, and they are those of ``down_split``.

The counters, one int32 a tile, are 0 before and after every launch: the last program puts its own back. A launch that
the device gives up midway leaves them wrong, but takes the CUDA context with it, so no later launch sees them. Two
launches must never share counters while both run, see ``Counters``.

Floor: 2 N H bytes of bf16 weights, once, and 8 S T H bytes of parts, mostly in L2.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl

from . import launch
from .cost import Cost
from .down_decode import _split_config
from .down_decode import cost as split_cost
from .tiles import dot, rounded


@triton.jit(do_not_specialize=["T"])
def _split_last_kernel(
    act_ptr,
    w_ptr,
    y_ptr,
    part_ptr,
    counter_ptr,
    T,
    stride_act_t,
    stride_w_h,
    N: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
    SPLIT_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    run = tl.program_id(2)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    h_mask = h < H
    w_row = w_ptr + h.to(tl.int64)[:, None] * stride_w_h
    t = (run * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    t_mask = t < T
    n_begin = tl.program_id(1) * SPLIT_N
    n_end = tl.minimum(n_begin + SPLIT_N, N)
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
    for n_done in range(0, SPLIT_N, BLOCK_N):  # constant bounds, as in down_split
        n = n_begin + n_done + tl.arange(0, BLOCK_N)
        n_mask = n < n_end
        w = tl.load(w_row + n[None, :], mask=h_mask[:, None] & n_mask[None, :], other=0.0)
        mask = t_mask[:, None] & n_mask[None, :]
        act = tl.load(act_ptr + t[:, None] * stride_act_t + n[None, :], mask=mask, other=0.0)
        acc = dot(w, act.T, acc)

    here = t[None, :] * H + h[:, None]  # t is int64
    mask = h_mask[:, None] & t_mask[None, :]
    if S == 1:
        tl.store(y_ptr + here, rounded(acc, y_ptr.dtype.element_ty), mask=mask)
    else:
        size = tl.cast(T, tl.int64) * H  # of one part
        # Past L1, where other multiprocessors do not look; all threads have stored before one of them counts.
        tl.store(part_ptr + tl.program_id(1) * size + here, acc, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        counter = counter_ptr + run * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == S - 1:
            y = tl.zeros([BLOCK_H, BLOCK_T], tl.float32)
            for s in range(S):
                y += tl.load(part_ptr + s * size + here, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + here, rounded(y, y_ptr.dtype.element_ty), mask=mask)
            tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")


class Counters:
    """Zeros for launches to count in: as many as a launch has tiles, for no two launches that may run at once.

    Launches of one stream follow each other, so they share what belongs to the stream. A launch in a CUDA graph gets
    counters of its own for good: graphs are replayed on any stream, beside each other and beside eager calls, while
    one graph never runs beside itself. They come from a pool that is filled outside captures, 4 bytes a tile (8 KB for
    the 32 layers of an 8B graph), and are not taken back. Where the pool is empty the graph zeroes counters itself,
    one node more and still right.
    """

    POOL = 1 << 16

    def __init__(self):
        self.of_stream = {}  # (device, stream) -> zeros
        self.pool = {}  # device -> zeros that no graph has taken
        self.taken = []  # what graphs count in must outlive them
        self.lock = threading.Lock()

    def take(self, device: torch.device, n_tiles: int) -> torch.Tensor:
        """n_tiles zeros, or up to three more, for a launch on the device's current stream."""
        n_tiles = triton.cdiv(n_tiles, 4) * 4  # so that all lie on 16 bytes, as the compiled launch may rely on
        if device.type != "cuda":
            return torch.zeros(n_tiles, dtype=torch.int32, device=device)
        with self.lock, torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                free = self.pool.get(device, ())
                if len(free) < n_tiles:
                    return torch.zeros(n_tiles, dtype=torch.int32, device=device)
                self.pool[device] = free[n_tiles:]
                self.taken.append(free[:n_tiles])
                return self.taken[-1]
            if len(self.pool.get(device, ())) < self.POOL // 2:
                self.pool[device] = torch.zeros(self.POOL, dtype=torch.int32, device=device)
                torch.cuda.synchronize()  # a graph may run on any stream, and none waits for this one
            stream = torch.cuda.current_stream().cuda_stream
            mine = self.of_stream.get((device, stream), ())
            if len(mine) < n_tiles:
                mine = torch.zeros(max(n_tiles, 1024), dtype=torch.int32, device=device)
                self.of_stream[device, stream] = mine
            return mine


COUNTERS = Counters()


def cost(T: int, N: int, H: int, itemsize: int = 2, n_sm: int = 132) -> Cost:
    """As ``down_split``; what is saved is a launch."""
    return split_cost(T, N, H, itemsize, n_sm=n_sm)


def split_last(act, w_down, *, dependent=False):
    """act ``[T, N]``, w_down ``[H, N]`` -> y ``[T, H]``, bit for bit as ``down_split``.

    dependent: the launch before this one is ours and wrote act; start while it drains.
    """
    (T, N), H = act.shape, w_down.shape[0]
    y = launch.empty(T, H, dtype=act.dtype, device=act.device)
    config = _split_config(T, N, H, act.element_size(), launch.n_multiprocessors(act.device))
    parts, runs = triton.cdiv(N, config.SPLIT_N), triton.cdiv(T, config.BLOCK_T)
    tiles_h = triton.cdiv(H, config.BLOCK_H)
    part = counters = None
    if parts > 1:
        part = launch.empty(parts, T, H, dtype=torch.float32, device=act.device)
        counters = launch.taken(COUNTERS.take, act.device, tiles_h * runs)
    launch.launch(
        _split_last_kernel,
        (tiles_h, parts, runs),
        act,
        w_down,
        y,
        part,
        counters,
        T,
        act.stride(0),
        w_down.stride(0),
        N=N,
        H=H,
        S=parts,
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
    return y
