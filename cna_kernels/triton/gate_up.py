"""act of many tokens straight from x: the gate/up product with silu and sums behind it, in Gluon.

    gate[t, n], up[t, n] = sum_k x[t, k] * w_gate[n, k], sum_k x[t, k] * w_up[n, k]     never rounded
    act[t, n]            = silu(gate[t, n]) * up[t, n]
    act_sum[c, n]       += sum_t token_weight[t, c] * act[t, n]      act_sumsq likewise, both before scaling
    act[t, n]           *= scale[row_circuit[t], n]

One program a multiprocessor walks output tiles of 128 tokens and 128 neurons. A producer warp fetches x, gate and up by
TMA through a ring of STAGES, 48 KB each. Two groups of four warps share every stage: the first owns tokens 0 to 63 of
the tile, the second 64 to 127, each against 128 rows of gate and 128 of up (an accumulator of 64 x 256, 128 registers a
thread). Only the ring ties the groups together, so at the end of a tile one group computes silu while the other has the
matrix units. With one set of warps that does both, one after the other, the whole MLP takes 1.06 to 1.15 of the time of
``blas`` (measured on an H100).

The kernel saves writing and reading gate and up, 8 T N bytes. Each element of act has one writer. The sums of a group's
64 tokens are a part of their own, which ``Sums`` adds in order; more columns than two are summed by a pass over act.
Steered neurons are multiplied in place afterwards (``steer.scale_in_place``), a few sectors of memory a token.

Floor: 4 T N H FLOP.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import launch
from .cost import Cost
from .steer import scale_in_place
from .sums import Sums
from .swiglu import steer_act

# Triton 3.6 has other names for these.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BLOCK_T, BLOCK_N, BLOCK_K, STAGES, GROUP_T = 128, 128, 64, 4, 8
GROUPS = 2  # of warps, BLOCK_T / GROUPS tokens each
COLUMNS = 2  # the most that this kernel sums; registers do not suffice for 3


@gluon.jit
def _silu_mul(gate, up, dtype: gl.constexpr):
    """As in tiles.py: fp32, rounded once."""
    below = 1.0 + gl.exp2(gate * -1.4426950408889634)
    silu = gl.inline_asm_elementwise(
        "div.approx.f32 $0, $1, $2;", "=f,f,f", [gate, below], dtype=gl.float32, is_pure=True, pack=1
    )
    return (silu * up).to(dtype)


@gluon.jit
def _grouped_tile(tile, tiles_t, tiles_n, GROUP_T: gl.constexpr):
    """(i, j) of output tile number ``tile``, as in down_proj.py."""
    first = tile // (GROUP_T * tiles_n) * GROUP_T
    rows = gl.minimum(tiles_t - first, GROUP_T)
    within = tile % (GROUP_T * tiles_n)
    return first + within % rows, within // rows


@gluon.jit
def _produce(
    x_desc,
    gate_desc,
    up_desc,
    up_row,
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
        i, j = _grouped_tile(tile, tiles_t, TILES_N, GROUP_T)
        for k in range(STEPS):
            s = step % STAGES
            mbarrier.wait(empty.index(s), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(s), x_desc.block_type.nbytes + 2 * gate_desc.block_type.nbytes)
            _tma_load(x_desc, [i * BLOCK_T, k * BLOCK_K], full.index(s), xs.index(s))
            # beyond N rows of gate a stacked weight goes on with those of up: neurons that nobody stores
            _tma_load(gate_desc, [j * BLOCK_N, k * BLOCK_K], full.index(s), ws.index(s).slice(0, BLOCK_N, dim=0))
            up = ws.index(s).slice(BLOCK_N, BLOCK_N, dim=0)
            _tma_load(up_desc, [up_row + j * BLOCK_N, k * BLOCK_K], full.index(s), up)
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
    token_weight_ptr,
    part_ptr,
    stride_token_weight_t,
    N: gl.constexpr,
    C: gl.constexpr,
    SUM: gl.constexpr,
    SUMSQ: gl.constexpr,
    TILES_N: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
):
    """Group 0 or 1 of warps: half of the tokens of every tile."""
    ROWS: gl.constexpr = act_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = act_desc.block_type.shape[1]
    acc_l: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * BLOCK_N, 16]
    )
    step = 0
    for tile in range(gl.program_id(0), tiles_t * TILES_N, gl.num_programs(0)):
        i, j = _grouped_tile(tile, tiles_t, TILES_N, GROUP_T)
        acc = gl.zeros([ROWS, 2 * BLOCK_N], gl.float32, layout=acc_l)
        for k in range(STEPS):
            s = step % STAGES
            mbarrier.wait(full.index(s), step // STAGES & 1)
            x = xs.index(s).slice(GROUP * ROWS, ROWS, dim=0)
            running = warpgroup_mma(x, ws.index(s).permute((1, 0)), acc, is_async=True, use_acc=k != 0)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(running,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)  # the step before is done
            step += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)

        gate, up = acc.reshape((ROWS, 2, BLOCK_N)).permute((0, 2, 1)).split()
        act = _silu_mul(gate, up, act_desc.dtype)
        tma.store_wait(0)
        out.store(act)
        fence_async_shared()
        t_first = (2 * i + GROUP) * ROWS
        _tma_store(act_desc, [t_first, j * BLOCK_N], out)
        if SUM or SUMSQ:
            # Read act back: a thread takes 8 neurons of every 8th token, 16 bytes at a time, and no warp needs another.
            sum_l: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 4], [1, 0])
            t = t_first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sum_l))
            n = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, sum_l))
            token_weight_row = token_weight_ptr + t.to(gl.int64) * stride_token_weight_t
            counted = t < 0
            for c in gl.static_range(C):
                counted = counted | (gl.load(token_weight_row + c, mask=t < T, other=0.0) != 0.0)
            part = part_ptr + (2 * i + GROUP).to(gl.int64) * ((SUM + SUMSQ) * C * N) + n
            if gl.max(counted.to(gl.int32), axis=0) > 0:
                rows = gl.where(counted[:, None], out.load(sum_l).to(gl.float32), 0.0)
                for c in gl.static_range(C):
                    weighted = rows * gl.load(token_weight_row + c, mask=t < T, other=0.0)[:, None]
                    if SUM:
                        gl.store(part + c * N, gl.sum(weighted, axis=0), mask=n < N)
                    if SUMSQ:
                        gl.store(part + (c + SUM * C) * N, gl.sum(weighted * rows, axis=0), mask=n < N)
            else:  # no token counts: act is not read
                for c in gl.static_range((SUM + SUMSQ) * C):
                    gl.store(part + c * N, gl.zeros([BLOCK_N], gl.float32, layout=gl.SliceLayout(0, sum_l)), mask=n < N)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T"])
def _gate_up_kernel(
    x_desc,
    gate_desc,
    up_desc,
    act_desc,
    token_weight_ptr,
    part_ptr,
    T,
    up_row,
    stride_token_weight_t,
    N: gl.constexpr,
    H: gl.constexpr,
    C: gl.constexpr,
    SUM: gl.constexpr,
    SUMSQ: gl.constexpr,
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
    out = gl.allocate_shared_memory(x_desc.dtype, [2, BLOCK_T // 2, BLOCK_N], act_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)  # both groups read a stage
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (0, act_desc, out.index(0), xs, ws, full, empty, tiles_t, T, token_weight_ptr, part_ptr,
                        stride_token_weight_t, N, C, SUM, SUMSQ, TILES_N, STEPS, STAGES, GROUP_T)),
            (_consume, (1, act_desc, out.index(1), xs, ws, full, empty, tiles_t, T, token_weight_ptr, part_ptr,
                        stride_token_weight_t, N, C, SUM, SUMSQ, TILES_N, STEPS, STAGES, GROUP_T)),
            (_produce, (x_desc, gate_desc, up_desc, up_row, xs, ws, full, empty, tiles_t,
                        TILES_N, STEPS, STAGES, GROUP_T)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


def fits(arch: int) -> bool:
    """Whether the kernel can be compiled: wgmma is Hopper's alone, and Gluon has no interpreter."""
    return arch == 90 and not launch.INTERPRETED


def busy(T: int, N: int, n_sm: int) -> float:
    """What part of the multiprocessors' time in whole rounds of tiles is spent on tokens and neurons that exist."""
    tiles = triton.cdiv(T, BLOCK_T) * triton.cdiv(N, BLOCK_N)
    return T * N / (triton.cdiv(tiles, n_sm) * n_sm * BLOCK_T * BLOCK_N)


def cost(T: int, N: int, H: int, C: int = 0, n_sm: int = 132) -> Cost:
    """The product, padded to whole tiles and whole rounds of the multiprocessors; x and the weights once, act once."""
    tiles = triton.cdiv(T, BLOCK_T) * triton.cdiv(N, BLOCK_N)
    rounds = triton.cdiv(tiles, n_sm) * n_sm
    moved = 2 * (T * H + 2 * N * H + T * N) + 8 * GROUPS * triton.cdiv(T, BLOCK_T) * C * N
    return Cost(moved, 4 * rounds * BLOCK_T * BLOCK_N * H, 0)


def gate_up(x, w_gate_up, *, token_weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """x ``[T, H]``, w_gate_up ``[2N, H]`` or a pair -> act ``[T, N]`` summed and scaled; where ``fits``, for
    rows that TMA can address (``down_proj.rows_fit_tma``; those of act, too: N % 8 is 0), from bases on 16 bytes."""
    T = x.shape[0]
    if not isinstance(w_gate_up, tuple):
        w_gate = w_up = w_gate_up
        N = up_row = w_gate_up.shape[0] // 2
    else:
        w_gate, w_up = w_gate_up
        N, up_row = w_gate.shape[0], 0
    act = launch.empty(T, N, dtype=x.dtype, device=x.device)
    few = token_weight is not None and token_weight.shape[1] <= COLUMNS
    runs = GROUPS * triton.cdiv(T, BLOCK_T)
    sums = Sums(token_weight, act_sum, act_sumsq, runs, N) if few else Sums(None, None, None, runs, N)
    constants = sums.constants()
    launch.launch(
        _gate_up_kernel,
        (min(launch.n_multiprocessors(x.device), triton.cdiv(T, BLOCK_T) * triton.cdiv(N, BLOCK_N)),),
        _descriptor(x, BLOCK_T, BLOCK_K),
        _descriptor(w_gate, BLOCK_N, BLOCK_K),
        _descriptor(w_up, BLOCK_N, BLOCK_K),
        _descriptor(act, BLOCK_T // GROUPS, BLOCK_N),
        sums.token_weight,
        sums.part,
        T,
        up_row,
        sums.strides()[0],
        N=N,
        H=x.shape[1],
        C=constants["C"],
        SUM=constants["SUM"],
        SUMSQ=constants["SUMSQ"],
        STAGES=STAGES,
        GROUP_T=GROUP_T,
        num_warps=4,
        maxnreg=168,
        device=x.device,
    )
    sums.fold()
    if token_weight is not None and not few:
        steer_act(act, token_weight=token_weight, act_sum=act_sum, act_sumsq=act_sumsq)
    if scale is not None:
        scale_in_place(act, scale, row_circuit)
    return act


def _descriptor(x, rows, columns):
    """x in boxes of rows and columns, swizzled as wgmma reads them."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.float16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
