"""The MLP of one token in one launch: weights stream through one ring, across the barrier between its two halves.

    act[n]         = silu(sum_k x[k] * w_gate[n, k]) * sum_k x[k] * w_up[n, k]
    act_sum[c, n] += weight[c] * act[n]      before scaling
    act[n]        *= factor[n]
    y[h]           = sum_n act[n] * w_down[h, n]

One program a multiprocessor. Its producer warp moves weights by TMA, 32 KB a message, through a ring of STAGES: first
the program's rows of gate and up, then, waiting for nothing but room, its rows of w_down. Its eight other warps keep
x in registers, reduce each tile to UNIT_N neurons and are the only writers of their act and act_sum. Then all programs
meet at a barrier in memory, the only one; then the eight warps keep act in registers and reduce UNIT_H outputs a tile,
whose only writers they are. While they wait at the barrier the ring fills with 192 KB of w_down a multiprocessor, so
neither the gap between two launches nor the barrier nor the end of the first half leaves the memory idle.

The barrier needs all programs to run at once: a cooperative launch, or two streams could each hold half of the device
and wait for ever. As a dependent launch the producer starts on the weights before the wait, which only the eight warps
execute; the next launch may start once this one is through the barrier.

Weights are addressed as rows of 64 elements, 128 bytes, so that one message is 32 KB and the reads of shared memory
meet no bank twice. The barrier's counter only grows, by one a program and launch, and is int64: int32 would wrap after
90 minutes of decoding.

Floor: 6 N H bytes of bf16 weights, once.
"""

from __future__ import annotations

import sys

import experiment
import torch
import triton
from gluon_parts import as_box, gdc_launch_dependents, gdc_wait, group_barrier, silu_mul, tma_load
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cna_kernels import make_scale, ops, reference
from cna_kernels.triton import launch
from shapes import MODELS


@gluon.jit
def _producer(
    gate_up_desc,
    down_desc,
    ring,
    full,
    empty,
    n_first_half,
    n_second_half,
    UNIT_N: gl.constexpr,
    UNIT_H: gl.constexpr,
    STAGES: gl.constexpr,
):
    """n_first_half tiles of gate and up, then n_second_half tiles of w_down."""
    for i in range(n_first_half + n_second_half):
        s = i % STAGES
        mbarrier.wait(empty.index(s), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(s), gate_up_desc.block_type.nbytes)  # w_down's tiles are as large
        if i < n_first_half:
            unit = gl.program_id(0) + i * gl.num_programs(0)
            tma_load(gate_up_desc, [0, unit * UNIT_N, 0, 0], full.index(s), ring.index(s))
        else:
            unit = gl.program_id(0) + (i - n_first_half) * gl.num_programs(0)
            tma_load(down_desc, [unit * UNIT_H, 0, 0], full.index(s), as_box(ring.index(s), down_desc))


@gluon.jit
def _everyone_is_here(counter_ptr):
    """The barrier: what any program stored before it, all read after it (past L1)."""
    group_barrier()
    n_programs = gl.num_programs(0)
    arrived = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
    full_house = ((arrived - 1) // n_programs + 1) * n_programs
    while arrived < full_house:
        arrived = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    group_barrier()


@gluon.jit
def _consumer(
    down_desc,
    ring,
    full,
    empty,
    n_first_half,
    n_second_half,
    x_ptr,
    act_ptr,
    y_ptr,
    counter_ptr,
    weight_ptr,
    sum_ptr,
    factor_ptr,
    stride_sum_c,
    N: gl.constexpr,
    H: gl.constexpr,
    C: gl.constexpr,
    STEER: gl.constexpr,
    SEGMENTS_H: gl.constexpr,
    SEGMENTS_N: gl.constexpr,
    UNIT_N: gl.constexpr,
    UNIT_H: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    dtype: gl.constexpr = act_ptr.dtype.element_ty
    # A thread holds 8 elements, 16 bytes, of every 32nd segment of all rows of a tile.
    tile_l: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, 4, 8], [1, 1, WARPS, 1], [3, 2, 1, 0])
    segment_l: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, tile_l)))
    within_l: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, tile_l)))
    segment = gl.arange(0, SEGMENTS_H, layout=segment_l)[None, None, :, None]
    k = segment * 64 + gl.arange(0, 64, layout=within_l)[None, None, None, :]
    gdc_wait()
    x = gl.load(x_ptr + k, mask=k < H, other=0.0).to(gl.float32)  # [1, 1, SEGMENTS_H, 64], kept for all tiles
    unit_l: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0]))
    i = 0
    for u in range(n_first_half):
        s = i % STAGES
        n = (gl.program_id(0) + u * gl.num_programs(0)) * UNIT_N + gl.arange(0, UNIT_N, layout=unit_l)
        n_mask = n < N
        sums = ()
        for c in gl.static_range(C):  # before the wait for the tile, off the critical path
            sums = sums + (gl.load(sum_ptr + c * stride_sum_c + n, mask=n_mask, other=0.0),)
        if STEER:
            factor = gl.load(factor_ptr + n, mask=n_mask, other=1.0)
        mbarrier.wait(full.index(s), i // STAGES & 1)
        w = ring.index(s).load(tile_l)
        mbarrier.arrive(empty.index(s), count=1)
        both = gl.sum(gl.sum(w.to(gl.float32) * x, axis=3), axis=2)  # [2, UNIT_N]
        gate, up = gl.split(gl.permute(both, [1, 0]))
        act = silu_mul(gl.convert_layout(gate, unit_l), gl.convert_layout(up, unit_l), dtype)
        for c in gl.static_range(C):
            weight = gl.load(weight_ptr + c)
            counted = gl.where(weight != 0.0, act.to(gl.float32), 0.0)
            gl.store(sum_ptr + c * stride_sum_c + n, sums[c] + weight * counted, mask=n_mask)
        if STEER:
            act = gl.where(factor == 0.0, 0.0, act.to(gl.float32) * factor).to(dtype)
        gl.store(act_ptr + n, act, mask=n_mask)
        i += 1

    _everyone_is_here(counter_ptr)
    gdc_launch_dependents()

    row_l: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, WARPS, 1], [2, 1, 0])
    segment = gl.arange(0, SEGMENTS_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, row_l)))[None, :, None]
    n = segment * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, row_l)))[None, None, :]
    act = gl.load(act_ptr + n, mask=n < N, other=0.0, cache_modifier=".cg").to(gl.float32)  # [1, SEGMENTS_N, 64]
    for u in range(n_second_half):
        s = i % STAGES
        mbarrier.wait(full.index(s), i // STAGES & 1)
        w = as_box(ring.index(s), down_desc).load(row_l)
        mbarrier.arrive(empty.index(s), count=1)
        y = gl.sum(gl.sum(w.to(gl.float32) * act, axis=2), axis=1)  # [UNIT_H]
        h = (gl.program_id(0) + u * gl.num_programs(0)) * UNIT_H + gl.arange(0, UNIT_H, layout=y.type.layout)
        gl.store(y_ptr + h, y.to(dtype), mask=h < H)
        i += 1


@gluon.jit
def _persistent_mlp_kernel(
    gate_up_desc,
    down_desc,
    x_ptr,
    act_ptr,
    y_ptr,
    counter_ptr,
    weight_ptr,
    sum_ptr,
    factor_ptr,
    stride_sum_c,
    N: gl.constexpr,
    H: gl.constexpr,
    C: gl.constexpr,
    STEER: gl.constexpr,
    SEGMENTS_H: gl.constexpr,
    SEGMENTS_N: gl.constexpr,
    UNIT_N: gl.constexpr,
    UNIT_H: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    ring = gl.allocate_shared_memory(gate_up_desc.dtype, [STAGES] + gate_up_desc.block_type.shape, gate_up_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    n_first_half = gl.cdiv(N // UNIT_N - gl.program_id(0), gl.num_programs(0))
    n_second_half = gl.cdiv(H // UNIT_H - gl.program_id(0), gl.num_programs(0))
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    down_desc,
                    ring,
                    full,
                    empty,
                    n_first_half,
                    n_second_half,
                    x_ptr,
                    act_ptr,
                    y_ptr,
                    counter_ptr,
                    weight_ptr,
                    sum_ptr,
                    factor_ptr,
                    stride_sum_c,
                    N,
                    H,
                    C,
                    STEER,
                    SEGMENTS_H,
                    SEGMENTS_N,
                    UNIT_N,
                    UNIT_H,
                    STAGES,
                    num_warps,
                ),
            ),
            (
                _producer,
                (gate_up_desc, down_desc, ring, full, empty, n_first_half, n_second_half, UNIT_N, UNIT_H, STAGES),
            ),
        ],
        [1],
        [24],
    )


TILE_BYTES = 1 << 15
SEGMENT = 64  # elements


def fits(T: int, N: int, H: int, itemsize: int) -> bool:
    """One token of two bytes; a row of w_down, and a pair of gate and up, within one tile: N <= 16,384, H <= 8,192."""
    return T == 1 and itemsize == 2 and N % SEGMENT == H % SEGMENT == 0 and N <= 1 << 14 and H <= 1 << 13


def persistent_mlp(
    x, w_gate_up, w_down, counter, *, weight=None, act_sum=None, factor=None, cooperative=True, dependent=False
):
    """x ``[1, H]``, contiguous weights -> y ``[1, H]``.

    counter: ``[1]`` int64, 0 at first, of this stream alone. factor: ``[N]`` fp32.
    """
    H, N = w_down.shape
    assert fits(x.shape[0], N, H, x.element_size()), f"{x.shape=} {N=}"
    segments_h, segments_n = (triton.next_power_of_2(size // SEGMENT) for size in (H, N))
    rows = TILE_BYTES // (2 * SEGMENT)  # segments of a tile
    unit_n, unit_h = rows // (2 * segments_h), rows // segments_n
    gate_up_desc = TensorDescriptor(
        w_gate_up,
        [2, N, H // SEGMENT, SEGMENT],
        [N * H, H, SEGMENT, 1],
        [2, unit_n, segments_h, SEGMENT],
        gl.NVMMASharedLayout(128, 16, 4),
    )
    down_desc = TensorDescriptor(
        w_down,
        [H, N // SEGMENT, SEGMENT],
        [N, SEGMENT, 1],
        [unit_h, segments_n, SEGMENT],
        gl.NVMMASharedLayout(128, 16, 3),
    )
    act = torch.empty(1, N, dtype=x.dtype, device=x.device)
    y = torch.empty(1, H, dtype=x.dtype, device=x.device)
    launch.launch(
        _persistent_mlp_kernel,
        (launch.n_multiprocessors(x.device),),
        gate_up_desc,
        down_desc,
        x,
        act,
        y,
        counter,
        weight,
        act_sum,
        factor,
        0 if act_sum is None else act_sum.stride(0),
        N=N,
        H=H,
        C=0 if weight is None else weight.shape[1],
        STEER=factor is not None,
        SEGMENTS_H=segments_h,
        SEGMENTS_N=segments_n,
        UNIT_N=unit_n,
        UNIT_H=unit_h,
        STAGES=6,
        num_warps=8,
        maxnreg=96,
        device=x.device,
        **(dict(launch_cooperative_grid=True) if cooperative else {}),
        **(dict(launch_pdl=True) if dependent else {}),
    )
    return y


def make(new, *, model, features, cooperative=True, dependent=False):
    (H, N), fp32 = MODELS[model], torch.float32
    x, w_gate_up, w_down = new(1, H), new(2 * N, H, spread=H**-0.5), new(H, N, spread=N**-0.5)
    counter = new(1, dtype=torch.int64, spread=0)
    extras, scale, factor, before = {}, {}, None, None
    if features:
        extras = dict(weight=new(1, 2, dtype=fp32), act_sum=new(2, N, dtype=fp32))
        before = extras["act_sum"].clone()
        circuit = {n: 0.5 * (n % 5) for n in range(3, N, 1000)}
        scale = dict(scale=make_scale([circuit], N, device=x.device), row_circuit=new(1, dtype=torch.int32, spread=0))
        factor = new(N, dtype=fp32, spread=0).add_(1)
        for n, value in circuit.items():
            factor[n] = value

    def ours():
        how = dict(cooperative=cooperative, dependent=dependent)
        return results(persistent_mlp(x, w_gate_up, w_down, counter, **extras, factor=factor, **how), extras)

    def rival():
        return results(ops.gated_mlp(x, w_gate_up, w_down, **extras, **scale, backend="triton"), extras)

    def by_reference(dtype):
        wide = torch.promote_types(dtype, fp32)
        sums = dict(weight=extras["weight"].to(wide), act_sum=before.to(wide, copy=True)) if features else {}
        y = reference.gated_mlp(x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype), **sums, **scale)
        return results(y, sums)

    return experiment.Trial(ours, rival, by_reference)


def results(y, extras):
    return {"y": y} | ({"act_sum": extras["act_sum"]} if extras else {})


# Cooperative alone, then as a dependent launch, too; each is also captured in a graph for its time.
CASES = {
    "1B, plain": dict(model="Llama-3.2-1B", features=False),
    "1B, sums and scaling": dict(model="Llama-3.2-1B", features=True),
    "8B, plain": dict(model="Llama-3.1-8B", features=False),
    "8B, sums and scaling": dict(model="Llama-3.1-8B", features=True),
    "8B, sums and scaling, dependent": dict(model="Llama-3.1-8B", features=True, dependent=True),
}

if __name__ == "__main__":
    sys.exit(experiment.main("persistent_mlp", CASES, make))
