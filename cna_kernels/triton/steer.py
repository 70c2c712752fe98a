"""Sparse steering on the device: a token's circuit, the entries it has in a block of neurons, and two ways to use them:
on act that the same program has stored (``steer_stored``), and on act that somebody else has (``patch``).

    act[t, n] *= value[e]   for every entry e of circuit row_circuit[t] with index[e] = n

Nothing dense is kept: memory and loads grow with the steered neurons. A token outside 0..K-1 loads its own
``row_circuit`` and nothing more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import NEURON_BLOCK
from . import launch
from .tiles import scaled

_NEURON_BLOCK = tl.constexpr(NEURON_BLOCK)


# Views of one table for all layers start anywhere: without this, each alignment would be compiled on its own.
ANY_ALIGNMENT = ["row_circuit_ptr", "offsets_ptr", "index_ptr", "value_ptr"]


@triton.jit
def entries(row_circuit_ptr, offsets_ptr, stride_offsets_k, n_circuits, t, t_mask, n_first, n_last):
    """Each token's first entry, and one past its last, in the NEURON_BLOCKs of neurons n_first .. n_last - 1."""
    circuit = tl.load(row_circuit_ptr + t, mask=t_mask, other=-1)
    steered = (circuit >= 0) & (circuit < n_circuits)
    row = offsets_ptr + circuit.to(tl.int64) * stride_offsets_k
    start = tl.load(row + n_first // _NEURON_BLOCK, mask=steered, other=0)
    end = tl.load(row + (n_last + _NEURON_BLOCK - 1) // _NEURON_BLOCK, mask=steered, other=0)
    return start, end


@triton.jit
def steer_stored(act_ptr, stride_act_t, index_ptr, value_ptr, t, start, end, n_first, n_last, BLOCK_E: tl.constexpr):
    """Multiply the steered neurons among act[t, n_first:n_last], which this program has stored, in place.

    A few loads for each steered neuron, nothing for the others. The caller puts a barrier between its stores and this
    call: the thread that multiplies an element need not be the one that stored it.
    """
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    row = act_ptr + t.to(tl.int64) * stride_act_t  # [BLOCK_T]
    for first in range(0, tl.max(end - start), BLOCK_E):
        entry = start[:, None] + first + tl.arange(0, BLOCK_E)[None, :]  # [BLOCK_T, BLOCK_E]
        live = entry < end[:, None]
        n = tl.load(index_ptr + entry, mask=live, other=0)
        live = live & (n >= n_first) & (n < n_last)
        factor = tl.load(value_ptr + entry, mask=live, other=1.0)
        here = row[:, None] + n
        act = tl.load(here, mask=live, other=0.0)
        tl.store(here, scaled(act, factor, dtype), mask=live)


@triton.jit(do_not_specialize=["T", "n_circuits"], do_not_specialize_on_alignment=ANY_ALIGNMENT)
def _patch_kernel(
    act_ptr,
    saved_ptr,
    row_circuit_ptr,
    offsets_ptr,
    index_ptr,
    value_ptr,
    T,
    stride_act_t,
    stride_saved_t,
    n_circuits,
    stride_offsets_k,
    N: tl.constexpr,
    RESTORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Each program owns the steered neurons of BLOCK_T tokens: it keeps them and scales them, or puts them back."""
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start, end = entries(row_circuit_ptr, offsets_ptr, stride_offsets_k, n_circuits, t, t < T, 0, N)
    act_row = act_ptr + t.to(tl.int64)[:, None] * stride_act_t
    saved_row = saved_ptr + t.to(tl.int64)[:, None] * stride_saved_t
    for first in range(0, tl.max(end - start), BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)[None, :]  # [BLOCK_T, BLOCK_E]
        entry = start[:, None] + e
        live = (entry < end[:, None]) & (e < stride_saved_t)
        n = tl.load(index_ptr + entry, mask=live, other=0)
        live = live & (n >= 0) & (n < N)
        here = act_row + n
        if RESTORE:
            tl.store(here, tl.load(saved_row + e, mask=live, other=0.0), mask=live)
        else:
            act = tl.load(here, mask=live, other=0.0)
            tl.store(saved_row + e, act, mask=live)
            tl.store(here, scaled(act, tl.load(value_ptr + entry, mask=live, other=1.0), dtype), mask=live)


def patch(act, scale, row_circuit):
    """Scale act ``[T, N]`` in place for the product that comes next; return what ``put_back`` needs after it.

    It touches the steered elements alone, where a scaled copy moves all of act: nothing for tokens without a circuit.
    Rows must not share memory, with each other or with what the product reads besides. Nothing else may use act
    meanwhile, on any stream, and the scale must not change.
    """
    T, N = act.shape
    # a circuit has at most one entry for a neuron; what is not steered is never written here
    saved = launch.empty(T, max(1, min(N, scale.index.shape[0])), dtype=act.dtype, device=act.device)
    _patch(act, saved, Steer(scale, row_circuit), restore=False)
    return saved


def put_back(act, saved, scale, row_circuit):
    """Undo ``patch``. Returns act."""
    _patch(act, saved, Steer(scale, row_circuit), restore=True)
    return act


def _patch(act, saved, steer, *, restore):
    T, N = act.shape
    launch.launch(
        _patch_kernel,
        (triton.cdiv(T, 4),),
        act,
        saved,
        *steer.pointers(),
        T,
        act.stride(0),
        saved.stride(0),
        *steer.sizes(),
        N=N,
        RESTORE=restore,
        BLOCK_T=4,
        BLOCK_E=32,
        num_warps=4,
        device=act.device,
    )


class Steer:
    """The scale and row_circuit of one call as kernel arguments."""

    def __init__(self, scale, row_circuit):
        self.on = scale is not None
        self.scale, self.row_circuit = scale, row_circuit

    def pointers(self):
        """row_circuit_ptr, offsets_ptr, index_ptr, value_ptr"""
        return (self.row_circuit, *self.scale) if self.on else (None,) * 4

    def sizes(self):
        """n_circuits, stride_offsets_k"""
        return (self.scale.offsets.shape[0], self.scale.offsets.stride(0)) if self.on else (0, 0)
