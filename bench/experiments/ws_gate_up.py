"""The gate/up product of many tokens with its epilogue behind the matrix units' back (Gluon, warp specialisation).

    act[t, n]      = silu(sum_k x[t, k] * w_gate[n, k]) * sum_k x[t, k] * w_up[n, k]     gate and up never rounded
    act_sum[c, n] += sum_t weight[t, c] * act[t, n]

One program a multiprocessor walks output tiles of 128 tokens and 128 neurons. A producer warp fetches x, gate and up
by TMA through a ring of STAGES, 48 KB each. Two groups of four warps share every stage: the first owns tokens 0 to 63
of the tile, the second 64 to 127, each against 128 rows of gate and 128 of up (an accumulator of 64 x 256, 128
registers a thread). Only the ring ties them together, so at a tile's end one computes silu while the other has the
matrix units. ``gate_up`` of cna_kernels does both with the same warps, one after the other.

Each act has one writer. The sums of a group's 64 tokens are a part of their own, ``Sums`` adds the parts in order.

Floor: 4 T N H FLOP.
"""

from __future__ import annotations

import sys

import experiment
import torch
import torch.nn.functional as F
import triton
from gluon_parts import descriptor, grouped_tile, silu_mul, tma_load, tma_store
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cna_kernels import ops, reference
from cna_kernels.triton import launch
from cna_kernels.triton.sums import Sums
from shapes import MODELS


@gluon.jit
def _produce(
    x_desc,
    gate_desc,
    up_desc,
    xs,
    ws,
    full,
    empty,
    tiles_t,
    TILES_N: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = gate_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = gate_desc.block_type.shape[1]
    step = 0
    for tile in range(gl.program_id(0), tiles_t * TILES_N, gl.num_programs(0)):
        i, j = grouped_tile(tile, tiles_t, TILES_N, GROUP_T)
        for k in range(STEPS):
            s = step % STAGES
            mbarrier.wait(empty.index(s), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(s), x_desc.block_type.nbytes + 2 * gate_desc.block_type.nbytes)
            tma_load(x_desc, [i * BLOCK_T, k * BLOCK_K], full.index(s), xs.index(s))
            tma_load(gate_desc, [j * BLOCK_N, k * BLOCK_K], full.index(s), ws.index(s).slice(0, BLOCK_N, dim=0))
            tma_load(up_desc, [j * BLOCK_N, k * BLOCK_K], full.index(s), ws.index(s).slice(BLOCK_N, BLOCK_N, dim=0))
            step += 1


@gluon.jit
def _consume(
    GROUP: gl.constexpr,
    act_desc,
    out,
    xs,
    ws,
    full,
    empty,
    tiles_t,
    T,
    weight_ptr,
    part_ptr,
    stride_weight_t,
    N: gl.constexpr,
    C: gl.constexpr,
    TILES_N: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """Group 0 or 1 of warps: 64 tokens of every tile."""
    BLOCK_N: gl.constexpr = act_desc.block_type.shape[1]
    acc_l: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * BLOCK_N, 16]
    )
    step = 0
    for tile in range(gl.program_id(0), tiles_t * TILES_N, gl.num_programs(0)):
        i, j = grouped_tile(tile, tiles_t, TILES_N, GROUP_T)
        acc = gl.zeros([64, 2 * BLOCK_N], gl.float32, layout=acc_l)
        for k in range(STEPS):
            s = step % STAGES
            mbarrier.wait(full.index(s), step // STAGES & 1)
            x = xs.index(s).slice(GROUP * 64, 64, dim=0)
            running = warpgroup_mma(x, ws.index(s).permute((1, 0)), acc, is_async=True, use_acc=k != 0)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(running,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)  # the step before is over
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)

        gate, up = acc.reshape((64, 2, BLOCK_N)).permute((0, 2, 1)).split()
        act = silu_mul(gate, up, act_desc.dtype)
        tma.store_wait(0)
        out.store(act)
        fence_async_shared()
        t_first = i * 128 + GROUP * 64
        tma_store(act_desc, [t_first, j * BLOCK_N], out)
        if C > 0:
            # Read back: a thread takes 8 neurons of every 8th token, 16 bytes at a time, and no warp needs another.
            sum_l: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 4], [1, 0])
            t = t_first + gl.arange(0, 64, layout=gl.SliceLayout(1, sum_l))
            n = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, sum_l))
            weight_row = weight_ptr + t.to(gl.int64) * stride_weight_t
            counted = t < 0
            for c in gl.static_range(C):
                counted = counted | (gl.load(weight_row + c, mask=t < T, other=0.0) != 0.0)
            part = part_ptr + (2 * i + GROUP) * (C * N) + n
            if gl.max(counted.to(gl.int32), axis=0) > 0:
                rows = gl.where(counted[:, None], out.load(sum_l).to(gl.float32), 0.0)
                for c in gl.static_range(C):
                    weight = gl.load(weight_row + c, mask=t < T, other=0.0)
                    gl.store(part + c * N, gl.sum(rows * weight[:, None], axis=0), mask=n < N)
            else:  # tokens that count nowhere are not read
                for c in gl.static_range(C):
                    gl.store(part + c * N, gl.zeros([BLOCK_N], gl.float32, layout=gl.SliceLayout(0, sum_l)), mask=n < N)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def _ws_gate_up_kernel(
    x_desc,
    gate_desc,
    up_desc,
    act_desc,
    weight_ptr,
    part_ptr,
    T,
    stride_weight_t,
    N: gl.constexpr,
    H: gl.constexpr,
    C: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
    num_warps: gl.constexpr,
):
    BLOCK_T: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = gate_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = gate_desc.block_type.shape[1]
    TILES_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: gl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    tiles_t = gl.cdiv(T, BLOCK_T)
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_T, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 2 * BLOCK_N, BLOCK_K], gate_desc.layout)
    out = gl.allocate_shared_memory(x_desc.dtype, [2, 64, BLOCK_N], act_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)  # both groups have read it
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    act_desc,
                    out.index(0),
                    xs,
                    ws,
                    full,
                    empty,
                    tiles_t,
                    T,
                    weight_ptr,
                    part_ptr,
                    stride_weight_t,
                    N,
                    C,
                    TILES_N,
                    STEPS,
                    STAGES,
                    GROUP_T,
                ),
            ),
            (
                _consume,
                (
                    1,
                    act_desc,
                    out.index(1),
                    xs,
                    ws,
                    full,
                    empty,
                    tiles_t,
                    T,
                    weight_ptr,
                    part_ptr,
                    stride_weight_t,
                    N,
                    C,
                    TILES_N,
                    STEPS,
                    STAGES,
                    GROUP_T,
                ),
            ),
            (_produce, (x_desc, gate_desc, up_desc, xs, ws, full, empty, tiles_t, TILES_N, STEPS, STAGES, GROUP_T)),
        ],
        [4, 1],
        [240, 24],
    )


def ws_gate_up(x, w_gate_up, *, weight=None, act_sum=None):
    """x ``[T, H]``, w_gate_up ``[2N, H]`` -> act ``[T, N]``; 2-byte elements, rows on 16 bytes."""
    (T, H), N = x.shape, w_gate_up.shape[0] // 2
    act = torch.empty(T, N, dtype=x.dtype, device=x.device)
    sums = Sums(weight, act_sum, None, 2 * triton.cdiv(T, 128), N)
    launch.launch(
        _ws_gate_up_kernel,
        (min(launch.n_multiprocessors(x.device), triton.cdiv(T, 128) * triton.cdiv(N, 128)),),
        descriptor(x, [128, 64]),
        descriptor(w_gate_up[:N], [128, 64]),
        descriptor(w_gate_up[N:], [128, 64]),
        descriptor(act, [64, 128]),
        weight,
        sums.part,
        T,
        0 if weight is None else weight.stride(0),
        N=N,
        H=H,
        C=sums.n_columns,
        STAGES=4,
        GROUP_T=8,
        num_warps=4,
        maxnreg=168,
        device=x.device,
    )
    sums.fold()
    return act


def make(new, *, model, T, features):
    (H, N), fp32 = MODELS[model], torch.float32
    x, w_gate_up, w_down = new(T, H), new(2 * N, H, spread=H**-0.5), new(H, N, spread=N**-0.5)
    extras, before = {}, None
    if features:
        extras = dict(weight=new(T, 2, dtype=fp32), act_sum=new(2, N, dtype=fp32))
        extras["weight"][::3] = 0
        before = extras["act_sum"].clone()

    def ours():
        return results(F.linear(ws_gate_up(x, w_gate_up, **extras), w_down), extras)

    def rival():
        return results(ops.gated_mlp(x, w_gate_up, w_down, **extras, backend="triton"), extras)

    def by_reference(dtype):
        wide = torch.promote_types(dtype, fp32)
        sums = dict(weight=extras["weight"].to(wide), act_sum=before.to(wide, copy=True)) if features else {}
        return results(reference.gated_mlp(x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype), **sums), sums)

    return experiment.Trial(ours, rival, by_reference)


def results(y, extras):
    return {"y": y} | ({"act_sum": extras["act_sum"]} if extras else {})


CASES = {
    "8B, 1000 tokens, sums": dict(model="Llama-3.1-8B", T=1000, features=True),
    "8B, 4096 tokens, plain": dict(model="Llama-3.1-8B", T=4096, features=False),
    "8B, 4096 tokens, sums": dict(model="Llama-3.1-8B", T=4096, features=True),
    "1B, 4096 tokens, sums": dict(model="Llama-3.2-1B", T=4096, features=True),
}

if __name__ == "__main__":
    sys.exit(experiment.main("ws_gate_up", CASES, make))
