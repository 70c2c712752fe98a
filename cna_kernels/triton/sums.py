"""The streaming sums on the device: which part of the sums a program adds, and the fixed order in which parts meet.

    act_sum[c, n] += sum_t token_weight[t, c] * act[t, n]        act_sumsq likewise over act**2

A program that sees all tokens of its neurons adds to act_sum itself. One that sees only run r of the tokens stores part
r of a workspace ``[R, columns, N]`` (columns: those of act_sum, then those of act_sumsq), and ``_fold_kernel`` adds the
parts as r = 0, 1, ... Each element has one writer in either case: no atomics, and the same bits in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch


class SumArgs(NamedTuple):
    """The ``Sums`` of a call as device functions take them, packed in the first lines of a kernel.

    A kernel's own parameters are flat, so that Triton specialises each by itself. Constants stay parameters everywhere:
    in a tuple built on the device a constexpr would become a plain value.
    """

    token_weight_ptr: tl.tensor
    sum_ptr: tl.tensor
    sumsq_ptr: tl.tensor
    stride_token_weight_t: tl.tensor
    stride_sum_c: tl.tensor
    stride_sumsq_c: tl.tensor


@triton.jit
def add_row(ptr, part, row, n, mask, value, SPLIT: tl.constexpr):
    """Store value as this run's part of the workspace, or add it to the sums themselves."""
    if SPLIT:
        tl.store(ptr + part + n, value, mask=mask)
    else:
        here = ptr + row + n
        tl.store(here, tl.load(here, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def no_sums(COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros for ``added`` to add to: a tuple with one [BLOCK_N] a column, or one [BLOCK_C, BLOCK_N] for all."""
    if BLOCK_C == 0:
        return (tl.zeros([BLOCK_N], tl.float32),) * COLUMNS
    else:
        return (tl.zeros([BLOCK_C, BLOCK_N], tl.float32),) * min(COLUMNS, 1)


@triton.jit
def added(
    act,
    token_weight_row,
    t_mask,
    c_first,
    sums,
    squares,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums with one tile act ``[BLOCK_T, BLOCK_N]`` added, for kernels whose threads lie along the neurons.

    A few columns (BLOCK_C = 0) by fp32 multiply-adds; many on the matrix units, BLOCK_C of them from c_first on.
    tf32x3 splits each fp32 factor into tf32 parts: its error is that of fp32, and bf16 and fp16 values are exact.
    """
    if BLOCK_C == 0:
        token_weight = ()
        counted = t_mask != t_mask
        for c in tl.static_range(C):
            token_weight = token_weight + (tl.load(token_weight_row + c, mask=t_mask, other=0.0),)
            counted = counted | (token_weight[c] != 0.0)
        act = tl.where(counted[:, None], act.to(tl.float32), 0.0)
        new_sums, new_squares = (), ()
        for c in tl.static_range(C):
            weighted = token_weight[c][:, None] * act
            if SUM:
                new_sums = new_sums + (sums[c] + tl.sum(weighted, axis=0),)
            if SUMSQ:
                new_squares = new_squares + (squares[c] + tl.sum(weighted * act, axis=0),)
        return new_sums, new_squares
    else:
        c = c_first + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & t_mask[None, :]
        token_weight = tl.load(token_weight_row[None, :] + c[:, None], mask=mask, other=0.0)  # [BLOCK_C, BLOCK_T]
        counted = tl.max((token_weight != 0.0).to(tl.int32), axis=0) > 0
        act = tl.where(counted[:, None], act.to(tl.float32), 0.0)
        new_sums, new_squares = sums, squares
        if SUM:
            new_sums = (tl.dot(token_weight, act, sums[0], input_precision="tf32x3"),)
        if SUMSQ:
            new_squares = (tl.dot(token_weight, act * act, squares[0], input_precision="tf32x3"),)
        return new_sums, new_squares


@triton.jit
def any_counts(token_weight_row, t_mask, c_first, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """1 if a token of the block counts in a column that ``added`` is about to add, else 0."""
    if BLOCK_C == 0:
        counted = t_mask != t_mask
        for c in tl.static_range(C):
            counted = counted | (tl.load(token_weight_row + c, mask=t_mask, other=0.0) != 0.0)
        return tl.max(counted.to(tl.int32), axis=0)
    else:
        counted = 0
        for first in range(c_first, tl.minimum(c_first + BLOCK_C, C), 16):  # 16 columns at a time: registers are full
            c = first + tl.arange(0, 16)
            mask = (c < C)[:, None] & t_mask[None, :]
            token_weight = tl.load(token_weight_row[None, :] + c[:, None], mask=mask, other=0.0)  # [16, BLOCK_T]
            counted = counted | tl.max(tl.max((token_weight != 0.0).to(tl.int32), axis=0), axis=0)
        return counted


@triton.jit
def put_sums(
    sums,
    squares,
    run,
    c_first,
    n,
    n_mask,
    sum_args,
    N: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add what ``added`` has gathered for neurons n to the sums themselves, or store it as part ``run``."""
    part = tl.cast(run, tl.int64) * ((SUM + SUMSQ) * C * N)
    step_sum = tl.cast(sum_args.stride_sum_c, tl.int64)
    step_sumsq = tl.cast(sum_args.stride_sumsq_c, tl.int64)
    if BLOCK_C == 0:
        for c in tl.static_range(C):
            if SUM:
                add_row(sum_args.sum_ptr, part + c * N, c * step_sum, n, n_mask, sums[c], SPLIT)
            if SUMSQ:
                here = part + (c + SUM * C) * N
                add_row(sum_args.sumsq_ptr, here, c * step_sumsq, n, n_mask, squares[c], SPLIT)
    else:
        c = c_first + tl.arange(0, BLOCK_C)[:, None]
        mask = (c < C) & n_mask[None, :]
        if SUM:
            add_row(sum_args.sum_ptr, part + c * N, c * step_sum, n[None, :], mask, sums[0], SPLIT)
        if SUMSQ:
            here = part + (c + SUM * C) * N
            add_row(sum_args.sumsq_ptr, here, c * step_sumsq, n[None, :], mask, squares[0], SPLIT)


@triton.jit
def sum_run(
    act_ptr,
    stride_act_t,
    t_first,
    t_last,
    n,
    n_mask,
    c_first,
    sum_args,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums of act[t_first:t_last, n], read BLOCK_T tokens at a time; a block without weight is not read."""
    BLOCK_N: tl.constexpr = n.shape[0]
    sums = no_sums(C * SUM, BLOCK_C, BLOCK_N)
    squares = no_sums(C * SUMSQ, BLOCK_C, BLOCK_N)
    for t_start in tl.range(t_first, t_last, BLOCK_T, num_stages=2):
        t = (t_start + tl.arange(0, BLOCK_T)).to(tl.int64)
        t_mask = t < t_last
        token_weight_row = sum_args.token_weight_ptr + t * sum_args.stride_token_weight_t
        if any_counts(token_weight_row, t_mask, c_first, C, BLOCK_C) > 0:
            mask = t_mask[:, None] & n_mask[None, :]
            act = tl.load(act_ptr + t[:, None] * stride_act_t + n[None, :], mask=mask, other=0.0)
            sums, squares = added(act, token_weight_row, t_mask, c_first, sums, squares, C, SUM, SUMSQ, BLOCK_C)
    return sums, squares


@triton.jit
def add_tile(
    act,
    t,
    t_mask,
    run,
    n,
    n_mask,
    sum_args,
    N: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKEN_AXIS: tl.constexpr,
):
    """Add the sums over all tokens of one finished act tile, however its threads lie; tokens are axis TOKEN_AXIS."""
    neuron_axis: tl.constexpr = 1 - TOKEN_AXIS
    counted = t_mask != t_mask
    row = sum_args.token_weight_ptr + t.to(tl.int64) * sum_args.stride_token_weight_t
    for c in range(C):
        counted = counted | (tl.load(row + c, mask=t_mask, other=0.0) != 0.0)
    act = tl.where(tl.expand_dims(counted, neuron_axis), act.to(tl.float32), 0.0)
    part = tl.cast(run, tl.int64) * ((SUM + SUMSQ) * C * N)
    for c in range(C):
        token_weight = tl.expand_dims(tl.load(row + c, mask=t_mask, other=0.0), neuron_axis)
        weighted = token_weight * act
        if SUM:
            total = tl.sum(weighted, axis=TOKEN_AXIS)
            row_sum = tl.cast(c, tl.int64) * sum_args.stride_sum_c
            add_row(sum_args.sum_ptr, part + c * N, row_sum, n, n_mask, total, SPLIT)
        if SUMSQ:
            total = tl.sum(weighted * act, axis=TOKEN_AXIS)
            row_sumsq = tl.cast(c, tl.int64) * sum_args.stride_sumsq_c
            add_row(sum_args.sumsq_ptr, part + (c + SUM * C) * N, row_sumsq, n, n_mask, total, SPLIT)


@triton.jit(do_not_specialize=["R"])
def _fold_kernel(
    part_ptr,
    sum_ptr,
    sumsq_ptr,
    R,
    stride_sum_c,
    stride_sumsq_c,
    N: tl.constexpr,
    C: tl.constexpr,
    SUM: tl.constexpr,
    SUMSQ: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum[c, n] += part[0, c, n] + part[1, c, n] + ...; one program owns BLOCK_N neurons of one column."""
    column = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    total = tl.zeros([BLOCK_N], part_ptr.dtype.element_ty)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for r_start in range(0, R, BLOCK_R):
        r = (r_start + tl.arange(0, BLOCK_R)).to(tl.int64)
        part = part_ptr + (r[:, None] * ((SUM + SUMSQ) * C) + column) * N + n[None, :]
        total += tl.sum(tl.load(part, mask=(r < R)[:, None] & n_mask[None, :], other=0.0), axis=0)
    if SUM and SUMSQ:
        if column < C:
            add_row(sum_ptr, 0, column * stride_sum_c, n, n_mask, total, False)
        else:
            add_row(sumsq_ptr, 0, (column - C) * stride_sumsq_c, n, n_mask, total, False)
    elif SUM:
        add_row(sum_ptr, 0, column * stride_sum_c, n, n_mask, total, False)
    else:
        add_row(sumsq_ptr, 0, column * stride_sumsq_c, n, n_mask, total, False)


# So many columns are summed by multiply-adds, one or two for each element and column. More columns go to the matrix
# units: registers do not suffice for 8.
FEW_COLUMNS = 4


def columns_at_once(n_columns: int, arch: int) -> int:
    """BLOCK_C of ``added``: 0 for a few columns, else how many a program takes; sm_80 has registers for 32."""
    if n_columns <= FEW_COLUMNS:
        return 0
    return min(64 if arch >= 90 else 32, max(16, triton.next_power_of_2(n_columns)))


class Sums:
    """The sums of one call as kernel arguments, with a workspace where ``runs`` programs share a neuron.

    Args:
        token_weight: ``[T, C]`` fp32, or None for no sums.
        act_sum, act_sumsq: ``[C, N]`` fp32, or both fp64; each may be None.
        runs: how many programs share the tokens of a neuron.
    """

    def __init__(self, token_weight, act_sum, act_sumsq, runs: int, n_neurons: int):
        self.token_weight, self.act_sum, self.act_sumsq = token_weight, act_sum, act_sumsq
        self.n_columns = 0 if token_weight is None else token_weight.shape[1]
        if self.n_columns == 0:
            self.token_weight = self.act_sum = self.act_sumsq = None
        self.part = None
        if self.n_columns and runs > 1:
            columns = self.n_columns * ((act_sum is not None) + (act_sumsq is not None))
            kind = (act_sumsq if act_sum is None else act_sum).dtype
            self.part = launch.empty(runs, columns, n_neurons, dtype=kind, device=token_weight.device)

    def pointers(self):
        """token_weight_ptr, sum_ptr, sumsq_ptr"""
        if self.part is not None:
            return self.token_weight, self.part, self.part
        return self.token_weight, self.act_sum, self.act_sumsq

    def strides(self):
        """stride_token_weight_t, stride_sum_c, stride_sumsq_c"""
        return tuple(0 if x is None else x.stride(0) for x in (self.token_weight, self.act_sum, self.act_sumsq))

    def constants(self):
        return dict(
            C=self.n_columns,
            SUM=int(self.act_sum is not None),
            SUMSQ=int(self.act_sumsq is not None),
            SPLIT=self.part is not None,
        )

    def fold(self):
        """Add the parts to act_sum and act_sumsq, if this call has parts."""
        if self.part is None:
            return
        runs, columns, n_neurons = self.part.shape
        block_r = min(32, triton.next_power_of_2(runs))  # all parts in flight at once: one round trip to memory
        launch.launch(
            _fold_kernel,
            (triton.cdiv(n_neurons, 128), columns),
            self.part,
            self.act_sum,
            self.act_sumsq,
            runs,
            *self.strides()[1:],
            N=n_neurons,
            C=self.n_columns,
            SUM=int(self.act_sum is not None),
            SUMSQ=int(self.act_sumsq is not None),
            BLOCK_R=block_r,
            BLOCK_N=128,
            num_warps=4,
            device=self.part.device,
            **launch.dependent(self.part.device),
        )
