"""Scale: the multipliers of one layer's neurons for K circuits, as the ops and kernels take them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A Scale has an offset for every so many neurons: a kernel that owns a block of neurons reads only its entries.
# At 1024 the offsets take about as much memory as the entries of a usual circuit (0.1% of the neurons).
NEURON_BLOCK = 1024


class Scale(NamedTuple):
    """Per-neuron multipliers of one layer for K circuits, stored sparse by circuit; every other multiplier is 1.

    Circuit ``c`` multiplies neuron ``index[e]`` by ``value[e]`` for every e in ``offsets[c, 0] : offsets[c, -1]``.
    Its entries for neurons ``1024 * b : 1024 * (b + 1)`` are ``offsets[c, b] : offsets[c, b + 1]``. Within a circuit
    ``index`` ascends strictly. The circuits' entries lie in any order, and unused entries may lie between them.
    :func:`make_scale` builds one.

    offsets: ``[K, ceil(N / 1024) + 1]`` int32.
    index: ``[E]`` int32, each below N.
    value: ``[E]`` float32.
    """

    offsets: Tensor
    index: Tensor  # type: ignore[assignment]  # the field hides tuple.index
    value: Tensor


def make_scale(circuits: Sequence[Mapping[int, float]], n_neurons: int, device: torch.device | str = "cpu") -> Scale:
    """Build the Scale of one layer from a mapping of neuron to multiplier for each circuit."""
    edges = range(0, n_neurons + NEURON_BLOCK, NEURON_BLOCK)
    offsets: list[list[int]] = []
    index: list[int] = []
    value: list[float] = []
    for circuit in circuits:
        neurons = sorted(circuit)
        offsets.append([len(index) + bisect_left(neurons, edge) for edge in edges])
        index += neurons
        value += [circuit[neuron] for neuron in neurons]
    return Scale(
        torch.tensor(offsets, dtype=torch.int32, device=device).view(len(circuits), len(edges)),
        torch.tensor(index, dtype=torch.int32, device=device),
        torch.tensor(value, dtype=torch.float32, device=device),
    )


def dense_scale(scale: Scale, n_neurons: int) -> Tensor:
    """Return the multipliers as a table ``[K + 1, N]`` float32 whose last row, for unsteered tokens, is all ones."""
    offsets, index, value = scale
    n_circuits, n_entries = offsets.shape[0], index.shape[0]
    if n_entries == 0 or n_circuits == 0:
        return value.new_ones(n_circuits + 1, n_neurons)
    # the circuit of each entry: the last circuit that starts at or before the entry, unless that circuit has ended
    first, end = offsets[:, 0], offsets[:, -1]
    starts, circuits = torch.where(first < end, first, n_entries).sort()
    entry = torch.arange(n_entries, dtype=starts.dtype, device=starts.device)
    circuit = circuits[torch.searchsorted(starts, entry, right=True).clamp(min=1) - 1]
    used = (entry >= first[circuit]) & (entry < end[circuit])
    table = value.new_ones(n_circuits + 2, n_neurons)  # the last row takes the entries of no circuit
    table[torch.where(used, circuit, n_circuits + 1), torch.where(used, index, 0).long()] = value
    return table[:-1]
