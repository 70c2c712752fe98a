"""The steered down-projection of many tokens with both factors left in shared memory (Gluon, warp specialisation).

    y[t, h] = sum_n act[t, n] * scale[row_circuit[t], n] * w_down[h, n]

One program a multiprocessor walks output tiles of 128 tokens and 256 outputs. A producer warp fetches act and weights
by TMA. Two warps, the patcher, see every tile of act before it is multiplied: one without steered neurons they pass
on, in another they multiply the few elements where they lie. Two groups of four warps multiply, 64 tokens each, both
factors from shared memory: steering never puts act into registers, where ``_down_proj_kernel`` of cna_kernels makes
each product wait for the tile to come and go. A step takes the matrix units 1,024 cycles and the patcher 60 without
steered neurons, 300 to 900 with; it only has to stay below the step.

Three barriers a stage: ``raw`` (act has come), ``ready`` (the weights have come and act is patched), ``empty`` (both
groups are through). Each y has one writer. Sums are left out: they would ride on the patcher's reads.

Floor: 2 T N H FLOP.
"""

from __future__ import annotations

import sys

import experiment
import torch
import triton
from gluon_parts import descriptor, grouped_tile, tma_load, tma_store
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cna_kernels import make_scale, ops, reference
from cna_kernels.triton import launch
from shapes import MODELS

NEURON_BLOCK = gl.constexpr(reference.NEURON_BLOCK)
NONE_LEFT = gl.constexpr(0x7FFFFFFF)
BLOCK_T = gl.constexpr(128)
BLOCK_H = gl.constexpr(256)
BLOCK_N = gl.constexpr(64)
PATCH_T = gl.constexpr(32)  # tokens that the patcher holds in registers at once


@gluon.jit
def _produce(
    act_desc,
    w_desc,
    acts,
    ws,
    raw,
    ready,
    empty,
    tiles_t,
    N: gl.constexpr,
    TILES_H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    step = 0
    for tile in range(gl.program_id(0), tiles_t * TILES_H, gl.num_programs(0)):
        i, j = grouped_tile(tile, tiles_t, TILES_H, GROUP_T)
        for n_first in range(0, N, BLOCK_N):
            s = step % STAGES
            mbarrier.wait(empty.index(s), (step // STAGES & 1) ^ 1)
            mbarrier.expect(raw.index(s), act_desc.block_type.nbytes)
            tma_load(act_desc, [i * BLOCK_T, n_first], raw.index(s), acts.index(s))
            mbarrier.expect(ready.index(s), w_desc.block_type.nbytes)  # one of its two arrivals
            tma_load(w_desc, [j * BLOCK_H, n_first], ready.index(s), ws.index(s))
            step += 1


@gluon.jit
def _first_entries(t, T, row_circuit_ptr, offsets_ptr, index_ptr, n_circuits, stride_offsets_k, N: gl.constexpr):
    """Each token's first entry, one past its last, and the neuron of the first."""
    circuit = gl.load(row_circuit_ptr + t, mask=t < T, other=-1)
    steered = (circuit >= 0) & (circuit < n_circuits)
    row = offsets_ptr + circuit.to(gl.int64) * stride_offsets_k
    entry = gl.load(row, mask=steered, other=0)
    end = gl.load(row + (N + NEURON_BLOCK - 1) // NEURON_BLOCK, mask=steered, other=0)
    return entry, end, gl.load(index_ptr + entry, mask=entry < end, other=NONE_LEFT)


@gluon.jit
def _patched(act, n, n_last, entry, end, steered_n, index_ptr, value_ptr):
    """act ``[PATCH_T, BLOCK_N]`` with its steered neurons multiplied, and the entries that come after it."""
    dtype: gl.constexpr = act.dtype
    while gl.min(steered_n, axis=0) < n_last:
        factor = gl.load(value_ptr + entry, mask=entry < end, other=1.0)[:, None]
        scaled = gl.where(factor == 0.0, 0.0, act.to(gl.float32) * factor).to(dtype)
        act = gl.where(steered_n[:, None] == n[None, :], scaled, act)
        entry += (steered_n < n_last).to(gl.int32)
        steered_n = gl.load(index_ptr + entry, mask=entry < end, other=NONE_LEFT)
    return act, entry, steered_n


@gluon.jit
def _patch(
    acts,
    raw,
    ready,
    tiles_t,
    T,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    n_circuits,
    stride_offsets_k,
    N: gl.constexpr,
    TILES_H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    tile_l: gl.constexpr = gl.BlockedLayout([1, 32], [16, 2], [2, 1], [1, 0])  # 2 threads a token
    token_l: gl.constexpr = gl.SliceLayout(1, tile_l)
    step = 0
    for tile in range(gl.program_id(0), tiles_t * TILES_H, gl.num_programs(0)):
        i, _ = grouped_tile(tile, tiles_t, TILES_H, GROUP_T)
        entry, end, steered_n = (), (), ()
        nearest = NONE_LEFT
        for r in gl.static_range(BLOCK_T // PATCH_T):
            t = i * BLOCK_T + r * PATCH_T + gl.arange(0, PATCH_T, layout=token_l)
            first, last, n_of_first = _first_entries(
                t, T, row_circuit_ptr, offsets_ptr, index_ptr, n_circuits, stride_offsets_k, N
            )
            entry, end, steered_n = entry + (first,), end + (last,), steered_n + (n_of_first,)
            nearest = gl.minimum(nearest, gl.min(n_of_first, axis=0))
        for n_first in range(0, N, BLOCK_N):
            s = step % STAGES
            mbarrier.wait(raw.index(s), step // STAGES & 1)
            if nearest < n_first + BLOCK_N:
                n = n_first + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, tile_l))
                new_entry, new_steered_n = (), ()
                nearest = NONE_LEFT
                for r in gl.static_range(BLOCK_T // PATCH_T):
                    next_entry, next_n = entry[r], steered_n[r]
                    if gl.min(next_n, axis=0) < n_first + BLOCK_N:
                        rows = acts.index(s).slice(r * PATCH_T, PATCH_T, dim=0)
                        act, next_entry, next_n = _patched(
                            rows.load(tile_l), n, n_first + BLOCK_N, next_entry, end[r], next_n, index_ptr, value_ptr
                        )
                        rows.store(act)
                    new_entry, new_steered_n = new_entry + (next_entry,), new_steered_n + (next_n,)
                    nearest = gl.minimum(nearest, gl.min(next_n, axis=0))
                entry, steered_n = new_entry, new_steered_n
                fence_async_shared()
            mbarrier.arrive(ready.index(s), count=1)
            step += 1


@gluon.jit
def _multiply(
    GROUP: gl.constexpr,
    y_desc,
    out,
    acts,
    ws,
    ready,
    empty,
    tiles_t,
    N: gl.constexpr,
    TILES_H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """Group 0 or 1 of warps: 64 tokens of every tile."""
    acc_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_H, 16])
    HALF: gl.constexpr = BLOCK_H // 2
    step = 0
    for tile in range(gl.program_id(0), tiles_t * TILES_H, gl.num_programs(0)):
        i, j = grouped_tile(tile, tiles_t, TILES_H, GROUP_T)
        acc = gl.zeros([64, BLOCK_H], gl.float32, layout=acc_l)
        for n_first in range(0, N, BLOCK_N):
            s = step % STAGES
            mbarrier.wait(ready.index(s), step // STAGES & 1)
            act = acts.index(s).slice(GROUP * 64, 64, dim=0)
            running = warpgroup_mma(act, ws.index(s).permute((1, 0)), acc, is_async=True, use_acc=n_first != 0)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(running,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=n_first > 0)
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)

        left, right = acc.to(y_desc.dtype).reshape((64, 2, HALF)).permute((0, 2, 1)).split()
        t_first = i * BLOCK_T + GROUP * 64
        tma.store_wait(0)
        out.store(left)
        fence_async_shared()
        tma_store(y_desc, [t_first, j * BLOCK_H], out)
        tma.store_wait(0)
        out.store(right)
        fence_async_shared()
        tma_store(y_desc, [t_first, j * BLOCK_H + HALF], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "n_circuits"])
def _ws_down_proj_kernel(
    act_desc,
    w_desc,
    y_desc,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    T,
    n_circuits,
    stride_offsets_k,
    N: gl.constexpr,
    H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
    num_warps: gl.constexpr,
):
    TILES_H: gl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    tiles_t = gl.cdiv(T, BLOCK_T)
    acts = gl.allocate_shared_memory(act_desc.dtype, [STAGES, BLOCK_T, BLOCK_N], act_desc.layout)
    ws = gl.allocate_shared_memory(act_desc.dtype, [STAGES, BLOCK_H, BLOCK_N], w_desc.layout)
    out = gl.allocate_shared_memory(act_desc.dtype, [2, 64, BLOCK_H // 2], y_desc.layout)
    raw = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(raw.index(s), count=1)
        mbarrier.init(ready.index(s), count=2)  # the producer's weights, the patcher
        mbarrier.init(empty.index(s), count=2)  # both groups
    gl.warp_specialize(
        [
            (_multiply, (0, y_desc, out.index(0), acts, ws, ready, empty, tiles_t, N, TILES_H, STAGES, GROUP_T)),
            (_multiply, (1, y_desc, out.index(1), acts, ws, ready, empty, tiles_t, N, TILES_H, STAGES, GROUP_T)),
            (
                _patch,
                (
                    acts,
                    raw,
                    ready,
                    tiles_t,
                    T,
                    row_circuit_ptr,
                    offsets_ptr,
                    index_ptr,
                    value_ptr,
                    n_circuits,
                    stride_offsets_k,
                    N,
                    TILES_H,
                    STAGES,
                    GROUP_T,
                ),
            ),
            (_produce, (act_desc, w_desc, acts, ws, raw, ready, empty, tiles_t, N, TILES_H, STAGES, GROUP_T)),
        ],
        [4, 2, 1],
        [176, 152, 152],
    )


def ws_down_proj(act, w_down, *, scale, row_circuit):
    """act ``[T, N]``, w_down ``[H, N]`` -> y ``[T, H]``; 2-byte elements, rows on 16 bytes."""
    (T, N), H = act.shape, w_down.shape[0]
    y = torch.empty(T, H, dtype=act.dtype, device=act.device)
    tiles = triton.cdiv(T, BLOCK_T.value) * triton.cdiv(H, BLOCK_H.value)
    launch.launch(
        _ws_down_proj_kernel,
        (min(launch.n_multiprocessors(act.device), tiles),),
        descriptor(act, [BLOCK_T.value, BLOCK_N.value]),
        descriptor(w_down, [BLOCK_H.value, BLOCK_N.value]),
        descriptor(y, [64, BLOCK_H.value // 2]),
        row_circuit,
        *scale,
        T,
        scale.offsets.shape[0],
        scale.offsets.stride(0),
        N=N,
        H=H,
        STAGES=4,
        GROUP_T=8,
        num_warps=4,
        maxnreg=168,
        device=act.device,
    )
    return y


def make(new, *, model, T, circuits, steered):
    """circuits: how many, one a token in turn, of ``steered`` neurons each, most of them in the last quarter."""
    H, N = MODELS[model]
    act, w_down = new(T, N), new(H, N, spread=N**-0.5)
    step = max(1, N // 4 // steered)
    members = [range(3 * N // 4 + c % step, N, step) for c in range(circuits)]
    scale = make_scale([{n: 0.5 * (n % 5) for n in chosen} for chosen in members], N, device=act.device)
    row_circuit = new(T, dtype=torch.int32, spread=0).add_(torch.arange(T, device=act.device) % circuits)
    steering = dict(scale=scale, row_circuit=row_circuit)

    def ours():
        return {"y": ws_down_proj(act, w_down, **steering)}

    def rival():
        return {"y": ops.down_proj(act, w_down, **steering, backend="triton")}

    def by_reference(dtype):
        return {"y": reference.down_proj(act.to(dtype), w_down.to(dtype), **steering)}

    return experiment.Trial(ours, rival, by_reference)


CASES = {
    "8B, 1000 tokens, 256 circuits": dict(model="Llama-3.1-8B", T=1000, circuits=256, steered=14),
    "8B, 4096 tokens, one circuit": dict(model="Llama-3.1-8B", T=4096, circuits=1, steered=14),
    "8B, 4096 tokens, one circuit of 52 neurons": dict(model="Llama-3.1-8B", T=4096, circuits=1, steered=52),
    "1B, 4096 tokens, 256 circuits": dict(model="Llama-3.2-1B", T=4096, circuits=256, steered=8),
}

if __name__ == "__main__":
    sys.exit(experiment.main("ws_down_proj", CASES, make))
