"""What circuits put into a :class:`SteeringTable`: their neurons and multipliers on the host, ready to be written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .circuit import Circuit
from .errors import InputError
from .scale import NEURON_BLOCK

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Entries(NamedTuple):
    """What one circuit puts into the table, on the host."""

    start: int  # the place of the first entry; the others follow it
    index: Array  # type: ignore[assignment]  # [k] int32, by layer and neuron; the field hides tuple.index
    edges: list[Array]  # for each layer [experts * (blocks + 1)] int32: the first entry from each edge on
    multiplier: float
    mirrored: Array | None = None  # [k] bool: where the factor is 2 - multiplier; None where it is so nowhere
    own: Array | None = None  # [k] float32: each neuron's own multiplier, which ``multiplier`` then is not

    def values(self) -> float | Array:
        """What each neuron is multiplied by: one number, or ``[k]`` float32."""
        if self.own is not None:
            return self.own
        if self.mirrored is None:
            return self.multiplier
        return np.where(self.mirrored, 2 - self.multiplier, self.multiplier).astype(np.float32)


def lay_out(
    circuit: Circuit, widths: Sequence[int], n_experts: Sequence[int], edges: Sequence[Array]
) -> tuple[Array, list[Array]]:
    """A circuit's entries, and for each layer the first entry from each edge on, counted from the circuit's first.

    Args:
        widths, n_experts: the neurons and the experts of each layer.
        edges: what :func:`edges_of` says of each layer.
    """
    members = circuit.by_layer()
    index, firsts, start = [], [], 0
    for layer, (width, experts) in enumerate(zip(widths, n_experts, strict=True)):
        neurons = np.asarray(members.get(layer, ()), dtype=np.int64)
        if len(neurons) and neurons[-1] >= width:
            raise InputError("circuit", f"layer {layer} has {width} neurons, got neuron {neurons[-1]}")
        firsts.append((start + np.searchsorted(neurons, edges[layer])).astype(np.int32))
        index.append((neurons % (width // experts)).astype(np.int32))
        start += len(neurons)
    return np.concatenate(index) if index else np.zeros(0, np.int32), firsts


def mirrored_of(circuit: Circuit) -> Array | None:
    """Which of the circuit's neurons, by layer and index, get 2 - m: ``[k]`` bool, or None where none does."""
    if not circuit.mirrored:
        return None
    mirrored = set(circuit.mirrored)
    return np.array([pair in mirrored for pair in sorted(circuit.pairs)])


def by_place(circuit: Circuit, multipliers: Sequence[float]) -> Array:
    """The neurons' own multipliers, given in rank order, by layer and index: ``[k]`` float32."""
    if len(multipliers) != circuit.k:
        raise InputError("multiplier", f"expected one number, or {circuit.k}, one for each neuron")
    own = [multiplier for _, multiplier in sorted(zip(circuit.pairs, multipliers, strict=True))]
    return np.array(own, dtype=np.float32)


def without_gaps(circuits: dict[int, Entries]) -> dict[int, Entries]:
    """The circuits, moved so that all free entries lie at the end."""
    moved, start = {}, 0
    for number, entries in sorted(circuits.items(), key=lambda item: item[1].start):
        moved[number] = entries._replace(start=start)
        start += len(entries.index)
    return moved


def edges_of(width: int, n_experts: int) -> Array:
    """The neurons at which the blocks of NEURON_BLOCK neurons begin and end, expert after expert."""
    own = width // n_experts
    within = np.minimum(np.arange(-(-own // NEURON_BLOCK) + 1) * NEURON_BLOCK, own)
    return (np.arange(n_experts)[:, None] * own + within).ravel()
