"""Sparse steering on the device: a token's circuit, the entries it has in a block of neurons, and two ways to use them.

    act[t, n] *= value[e]   for every entry e of circuit row_circuit[t] with index[e] = n

Nothing dense is kept: memory and loads grow with the steered neurons. A token outside 0..K-1 loads its own
``row_circuit`` and nothing more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import NEURON_BLOCK
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


@triton.jit
def next_steered(index_ptr, entry, end):
    """The neuron of each token's next entry, beyond all where it has none left ``[BLOCK_T]``, and the nearest."""
    n = tl.load(index_ptr + entry, mask=entry < end, other=0x7FFFFFFF)
    return n, tl.min(n)


@triton.jit
def steer_tile(act, n, n_last, index_ptr, value_ptr, entry, end, steered_n, nearest):
    """Multiply the steered neurons of a tile act ``[BLOCK_T, BLOCK_N]`` in registers; n ascends to n_last - 1.

    For kernels that walk the neurons in order: ``entry`` is each token's next entry, ``steered_n`` its neuron. Call
    it only if ``nearest < n_last``: a tile without steered neurons costs one comparison.

    Returns:
        act, and entry, steered_n, nearest for the tile after this one.
    """
    dtype: tl.constexpr = act.dtype
    while nearest < n_last:
        factor = tl.load(value_ptr + entry, mask=entry < end, other=1.0)
        act = tl.where(steered_n[:, None] == n[None, :], scaled(act, factor[:, None], dtype), act)
        entry += (steered_n < n_last).to(tl.int32)
        steered_n, nearest = next_steered(index_ptr, entry, end)
    return act, entry, steered_n, nearest


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
