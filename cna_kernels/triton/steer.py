"""Sparse steering on the device: a token's circuit, the entries it has in a block of neurons, and three ways to use
them: on act in registers (``steer_held``), on act that the same program has stored (``steer_stored``), and on act in
memory, for good (``scale_in_place``) or until a product is done (``patch``).

    act[t, n] *= value[e]   for every entry e of circuit row_circuit[t] with index[e] = n

Nothing dense is kept: memory and loads grow with the steered neurons. A token whose circuit is outside 0..K-1 loads its
``row_circuit`` and nothing more.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..scale import NEURON_BLOCK
from . import launch
from .tiles import scaled

_NEURON_BLOCK = tl.constexpr(NEURON_BLOCK)


# The Scale of a layer is a view of one table, at any address: without this, Triton would compile for each alignment.
ANY_ALIGNMENT = ["row_circuit_ptr", "offsets_ptr", "index_ptr", "value_ptr"]


class SteerArgs(NamedTuple):
    """The ``Steer`` of a call as device functions take them, packed in the first lines of a kernel; see ``SumArgs``."""

    row_circuit_ptr: tl.tensor
    offsets_ptr: tl.tensor
    index_ptr: tl.tensor
    value_ptr: tl.tensor
    n_circuits: tl.tensor
    stride_offsets_k: tl.tensor


@triton.jit
def circuits(t, t_mask, steer_args):
    """Each token's circuit; -1, for none, where t_mask is not set."""
    return tl.load(steer_args.row_circuit_ptr + t, mask=t_mask, other=-1)


@triton.jit
def entries(circuit, n_first, n_last, steer_args):
    """Each token's first entry, and one past its last, in the NEURON_BLOCKs of neurons n_first .. n_last - 1."""
    steered = (circuit >= 0) & (circuit < steer_args.n_circuits)
    row = steer_args.offsets_ptr + circuit.to(tl.int64) * steer_args.stride_offsets_k
    start = tl.load(row + n_first // _NEURON_BLOCK, mask=steered, other=0)
    end = tl.load(row + (n_last + _NEURON_BLOCK - 1) // _NEURON_BLOCK, mask=steered, other=0)
    return start, end


@triton.jit
def first_entries(start, end, steer_args, BLOCK_E: tl.constexpr):
    """Neuron and value of one token's entries start .. start + BLOCK_E - 1; neuron -1 from ``end`` on."""
    entry = start + tl.arange(0, BLOCK_E)
    live = entry < end
    index = tl.load(steer_args.index_ptr + entry, mask=live, other=-1)
    return index, tl.load(steer_args.value_ptr + entry, mask=live, other=1.0)


@triton.jit
def steer_held(act, n, start, end, index, value, steer_args, BLOCK_E: tl.constexpr):
    """act ``[BLOCK_N]`` of neurons n of one token, scaled, before it is stored; for few neurons, because each of them
    is compared with every entry of its NEURON_BLOCK. index, value: as ``first_entries`` returned them."""
    dtype: tl.constexpr = act.dtype
    for first in range(start, end, BLOCK_E):
        same = index[None, :] == n[:, None]  # [BLOCK_N, BLOCK_E], one entry of a circuit at most for a neuron
        found = tl.max(same.to(tl.int32), axis=1) > 0
        multiplier = tl.sum(tl.where(same, value[None, :], 0.0), axis=1)
        act = tl.where(found, scaled(act, multiplier, dtype), act)
        index, value = first_entries(first + BLOCK_E, end, steer_args, BLOCK_E)
    return act


@triton.jit
def steer_stored(act_ptr, stride_act_t, t, start, end, n_first, n_last, steer_args, BLOCK_E: tl.constexpr):
    """Multiply the steered neurons among act[t, n_first:n_last], which this program has stored, in place.

    A few loads for each steered neuron, nothing for the others. The caller puts a barrier between its stores and this
    call: the thread that multiplies an element need not be the one that stored it.
    """
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    row = act_ptr + t.to(tl.int64) * stride_act_t  # [BLOCK_T]
    for first in range(0, tl.max(end - start), BLOCK_E):
        entry = start[:, None] + first + tl.arange(0, BLOCK_E)[None, :]  # [BLOCK_T, BLOCK_E]
        live = entry < end[:, None]
        n = tl.load(steer_args.index_ptr + entry, mask=live, other=0)
        live = live & (n >= n_first) & (n < n_last)
        value = tl.load(steer_args.value_ptr + entry, mask=live, other=1.0)
        here = row[:, None] + n
        act = tl.load(here, mask=live, other=0.0)
        tl.store(here, scaled(act, value, dtype), mask=live)


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
    SAVE: tl.constexpr,
    RESTORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Each program owns the steered neurons of BLOCK_T tokens: it scales them (SAVE: keeps their old values) or
    RESTOREs the old values."""
    steer_args = SteerArgs(row_circuit_ptr, offsets_ptr, index_ptr, value_ptr, n_circuits, stride_offsets_k)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    circuit = circuits(t, t < T, steer_args)
    start, end = entries(circuit, 0, N, steer_args)
    act_row = act_ptr + t.to(tl.int64)[:, None] * stride_act_t
    saved_row = saved_ptr + t.to(tl.int64)[:, None] * stride_saved_t if SAVE or RESTORE else act_row
    for first in range(0, tl.max(end - start), BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)[None, :]  # [BLOCK_T, BLOCK_E]
        entry = start[:, None] + e
        live = entry < end[:, None]
        if SAVE or RESTORE:
            live = live & (e < stride_saved_t)
        n = tl.load(index_ptr + entry, mask=live, other=0)
        live = live & (n >= 0) & (n < N)
        here = act_row + n
        if RESTORE:
            tl.store(here, tl.load(saved_row + e, mask=live, other=0.0), mask=live)
        else:
            act = tl.load(here, mask=live, other=0.0)
            if SAVE:
                tl.store(saved_row + e, act, mask=live)
            tl.store(here, scaled(act, tl.load(value_ptr + entry, mask=live, other=1.0), dtype), mask=live)


def scale_in_place(act, scale, row_circuit):
    """Scale the steered elements of act ``[T, N]`` in place, no others; rows must not overlap. Returns act."""
    _patch(act, None, Steer(scale, row_circuit))
    return act


def patch(act, scale, row_circuit):
    """Scale act ``[T, N]`` in place for the product that comes next; return what ``put_back`` needs after it.

    It touches the steered elements alone, and none of tokens without a circuit; a scaled copy would move all of act.
    Rows must not share memory with each other or with the product's weights. Until ``put_back`` nothing else may use
    act, on any stream, and the scale must not change.
    """
    T, N = act.shape
    # a circuit has at most one entry for a neuron; the elements of saved beyond its entries are never written
    saved = launch.empty(T, max(1, min(N, scale.index.shape[0])), dtype=act.dtype, device=act.device)
    _patch(act, saved, Steer(scale, row_circuit))
    return saved


def put_back(act, saved, scale, row_circuit):
    """Undo ``patch``. Returns act."""
    _patch(act, saved, Steer(scale, row_circuit), restore=True)
    return act


def _patch(act, saved, steer, *, restore=False):
    T, N = act.shape
    launch.launch(
        _patch_kernel,
        (triton.cdiv(T, 4),),
        act,
        saved,
        *steer.pointers(),
        T,
        act.stride(0),
        0 if saved is None else saved.stride(0),
        *steer.sizes(),
        N=N,
        SAVE=saved is not None and not restore,
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
