"""act of many tokens straight from x: the gate/up product with silu, sums and scaling in its epilogue (placement C).

    gate[t, n], up[t, n] = sum_k x[t, k] * w_gate_up[n, k], sum_k x[t, k] * w_gate_up[N + n, k]     never rounded
    act[t, n]            = silu(gate[t, n]) * up[t, n]
    act_sum[c, n]       += sum_t weight[t, c] * act[t, n]      act_sumsq likewise, both before scaling
    act[t, n]           *= scale[row_circuit[t], n]

Persistent, on TMA descriptors, one program a multiprocessor, each act tile written by one program. Gate and up rows of
the same neurons meet in one weight tile: the stacked weight ``[2N, H]`` is addressed as ``[2, N, H]`` and a box of
``[2, BLOCK_N, BLOCK_K]`` is one load and one product, so that no interleaved copy of the weights is needed. The sums of
a token tile are part i of the workspace (``sums.py``).

It saves writing and reading gate and up, 8 T N bytes, but its product competes with cuBLAS and its epilogue is not
overlapped: worth it only if it reaches 88 to 94% of cuBLAS at H <= 4096, and never above (arithmetic). A candidate.

Floor: 4 T N H FLOP.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .cost import Cost
from .down_proj import grouped_tile
from .steer import ANY_ALIGNMENT, Steer, entries, steer_stored
from .sums import Sums, add_tile
from .tiles import dot, silu_mul


@triton.jit(do_not_specialize=["T", "n_circuits"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _gate_up_kernel(
    x_desc,
    w_desc,
    act_ptr,
    weight_ptr,
    sum_ptr,
    sumsq_ptr,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    T,
    stride_weight_t,
    stride_sum_c,
    stride_sumsq_c,
    n_circuits,
    stride_offsets_k,
    N: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    STEER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0)):
        i, j = grouped_tile(tile, tiles_t, tiles_n, GROUP_T)
        t_first, n_first = i * BLOCK_T, j * BLOCK_N
        acc = tl.zeros([BLOCK_T, 2 * BLOCK_N], tl.float32)
        for k in range(0, H, BLOCK_K):
            x = x_desc.load([t_first, k])  # [BLOCK_T, BLOCK_K], zeros beyond the edges
            w = w_desc.load([0, n_first, k]).reshape(2 * BLOCK_N, BLOCK_K)  # gate rows, then up rows
            acc = dot(x, w.T, acc)
        gate, up = acc.reshape(BLOCK_T, 2, BLOCK_N).permute(0, 2, 1).split()
        act = silu_mul(gate, up, act_ptr.dtype.element_ty)  # [BLOCK_T, BLOCK_N]

        t = t_first + tl.arange(0, BLOCK_T)
        t_mask = t < T
        n = n_first + tl.arange(0, BLOCK_N)
        n_mask = n < N
        here = act_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(here, act, mask=t_mask[:, None] & n_mask[None, :])
        if SUM or SUMSQ:
            add_tile(
                act,
                weight_ptr,
                stride_weight_t,
                t,
                t_mask,
                i,
                n,
                n_mask,
                sum_ptr,
                sumsq_ptr,
                stride_sum_c,
                stride_sumsq_c,
                N,
                C,
                SUM,
                SUMSQ,
                SPLIT,
                TOKEN_AXIS=0,
            )
        if STEER:
            tl.debug_barrier()
            n_last = tl.minimum(n_first + BLOCK_N, N)
            start, end = entries(row_circuit_ptr, offsets_ptr, stride_offsets_k, n_circuits, t, t_mask, n_first, n_last)
            steer_stored(act_ptr, N, index_ptr, value_ptr, t, start, end, n_first, n_last, 4)


class Config(NamedTuple):
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_T: int
    num_warps: int
    num_stages: int


def _launch_config() -> Config:
    """By arithmetic, unmeasured: 128 tokens by 128 neurons are a product of 128 x 256, in 4 stages of 48 KB."""
    return Config(128, 128, 64, 8, 8, 4)


def cost(T: int, N: int, H: int, C: int = 0, n_sm: int = 132) -> Cost:
    """The product, padded to whole tiles and whole rounds of the multiprocessors; x and the weights once, act once."""
    config = _launch_config()
    tiles = triton.cdiv(T, config.BLOCK_T) * triton.cdiv(N, config.BLOCK_N)
    rounds = triton.cdiv(tiles, n_sm) * n_sm
    moved = 2 * (T * H + 2 * N * H + T * N) + 8 * triton.cdiv(T, config.BLOCK_T) * C * N
    return Cost(moved, 4 * rounds * config.BLOCK_T * config.BLOCK_N * H, 0)


def gate_up(x, w_gate_up, *, weight=None, act_sum=None, act_sumsq=None, scale=None, row_circuit=None):
    """x ``[T, H]``, w_gate_up ``[2N, H]`` -> act ``[T, N]`` summed and scaled; where ``down_proj.fits_tma`` holds."""
    (T, H), N = x.shape, w_gate_up.shape[0] // 2
    act = launch.empty(T, N, dtype=x.dtype, device=x.device)
    config = _launch_config()
    tiles_t = triton.cdiv(T, config.BLOCK_T)
    sums, steer = Sums(weight, act_sum, act_sumsq, tiles_t, N), Steer(scale, row_circuit)
    row = w_gate_up.stride(0)
    launch.launch(
        _gate_up_kernel,
        (min(launch.n_multiprocessors(x.device), tiles_t * triton.cdiv(N, config.BLOCK_N)),),
        TensorDescriptor.from_tensor(x, [config.BLOCK_T, config.BLOCK_K]),
        TensorDescriptor(w_gate_up, [2, N, H], [N * row, row, 1], [2, config.BLOCK_N, config.BLOCK_K]),
        act,
        *sums.pointers(),
        *steer.pointers(),
        T,
        *sums.strides(),
        *steer.sizes(),
        N=N,
        H=H,
        **sums.constants(),
        STEER=steer.on,
        BLOCK_T=config.BLOCK_T,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_T=config.GROUP_T,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        device=x.device,
        **launch.registers(x.device),
    )
    sums.fold()
    return act
