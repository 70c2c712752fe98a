"""SteeringTable: many circuits and multipliers on the device, ready for the ops."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .circuit import Circuit, check_fits
from .errors import InputError
from .scale import NEURON_BLOCK, Scale

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Entries(NamedTuple):
    """What one circuit puts into the table, on the host."""

    start: int  # the place of the first entry; the others follow it
    index: Array  # type: ignore[assignment]  # [k] int32, by layer and neuron; the field hides tuple.index
    edges: list[Array]  # for each layer [experts * (blocks + 1)] int32: the first entry from each edge on
    multiplier: float


class SteeringTable:
    """Circuits, each at a multiplier, as one sparse :class:`Scale` per layer. Memory grows with the
    neurons steered.

    Rows of a batch choose a circuit by its number (``row_circuit``); -1 is unsteered. Changing a multiplier writes a
    device buffer in place: nothing is rebuilt, recompiled or captured again.

    A table made with ``max_circuits`` is live: circuits come, change and go while its buffers keep their addresses.
    Methods may be called from any thread. A forward pass sees a change whole or not at all if its program holds
    ``lock`` while the pass runs (on a GPU: while it is launched, on the same stream). Without the lock the pass may see
    half of a change.

    Args:
        circuits: the circuits, in the order of their numbers 0..K-1.
        multipliers: one for each: 0 ablates, 1 changes nothing, above 1 amplifies.
        n_layers, n_neurons: the shape of the model to steer.
        device: the device of the layers: one for all, or one for each layer.
        max_circuits: the number of circuits that the table can hold; by default it holds the given ones and no others.
        max_entries: the number of neurons that all circuits together may have; default: those of the given circuits, or
            with ``max_circuits``, 0.1% of the model's neurons for each circuit, at least 256 for each.
        n_experts: for mixtures of experts, the experts of a layer: one number, or one for each layer. Neuron
            ``i`` of expert ``e`` has the index ``e * n_neurons / n_experts + i``, and ``layer`` gives a Scale of
            ``K * n_experts`` circuits of ``n_neurons / n_experts`` neurons: circuit ``c * n_experts + e`` is what
            circuit c does in expert e.
        widths: the number of neurons of each layer, where some layers have fewer than ``n_neurons``.
    """

    def __init__(
        self,
        circuits: Sequence[Circuit],
        multipliers: Sequence[float],
        n_layers: int,
        n_neurons: int,
        device: torch.device | str | Sequence[torch.device | str] = "cpu",
        *,
        max_circuits: int | None = None,
        max_entries: int | None = None,
        n_experts: int | Sequence[int] = 1,
        widths: Sequence[int] | None = None,
    ) -> None:
        if len(circuits) != len(multipliers):
            raise ValueError(f"multipliers: expected {len(circuits)}, one for each circuit, got {len(multipliers)}")
        self.n_layers, self.n_neurons = n_layers, n_neurons
        self.lock = threading.RLock()
        self._live = max_circuits is not None
        self.max_circuits = len(circuits) if max_circuits is None else max_circuits
        if max_entries is None:
            share = max(math.ceil(0.001 * n_layers * n_neurons), 256)
            max_entries = self.max_circuits * share if self._live else sum(c.k for c in circuits)
        self.max_entries = max_entries
        self._experts = _one_each(n_experts, n_layers)
        self._widths = [n_neurons] * n_layers if widths is None else list(widths)
        self._edges = [_edges(width, n) for width, n in zip(self._widths, self._experts, strict=True)]
        devices = [torch.device(d) for d in _one_each(device, n_layers)]
        self._circuits: dict[int, Entries] = {}
        self._used = 0  # entries up to the end of the last circuit
        with torch.inference_mode(False):  # buffers made in inference mode could not be changed outside it
            self._arena = {
                where: (
                    torch.zeros(max_entries, dtype=torch.int32, device=where),
                    torch.ones(max_entries, dtype=torch.float32, device=where),
                )
                for where in dict.fromkeys(devices)
            }
            # layers of one device and one number of edges share a tensor, so that a circuit is written in few copies
            groups: dict[tuple[torch.device, int], list[int]] = {}
            for layer, key in enumerate(zip(devices, map(len, self._edges), strict=True)):
                groups.setdefault(key, []).append(layer)
            self._offsets = [torch.empty(0)] * n_layers
            self._groups: list[tuple[list[int], Tensor]] = []
            for (where, n_edges), layers in groups.items():
                shape = (len(layers), self.max_circuits, n_edges)
                offsets = torch.zeros(shape, dtype=torch.int32, device=where)
                self._groups.append((layers, offsets))
                for place, layer in enumerate(layers):
                    self._offsets[layer] = offsets[place]
        self._devices = devices
        for number, (circuit, multiplier) in enumerate(zip(circuits, multipliers, strict=True)):
            self.replace(number, circuit, multiplier)
        self._steered = {layer for circuit in circuits for layer in circuit.by_layer()}

    @property
    def n_circuits(self) -> int:
        """How many circuits the table holds."""
        return len(self._circuits)

    @property
    def numbers(self) -> list[int]:
        """The numbers in use, ascending."""
        return sorted(self._circuits)

    def add(self, circuit: Circuit, multiplier: float) -> int:
        """Add a circuit and return its number, the lowest that is free.

        Raises:
            InputError: the circuit is of another model, the multiplier is no number, or the table is full.
        """
        with self.lock:
            number = next((n for n in range(self.max_circuits) if n not in self._circuits), None)
            if number is None:
                raise InputError("table", f"holds {self.max_circuits} circuits already; see max_circuits")
            self.replace(number, circuit, multiplier)
            return number

    def replace(self, number: int, circuit: Circuit, multiplier: float) -> None:
        """Put a circuit in the place of another, or in a free one. Raises as ``add``, and then changes nothing."""
        check_fits(circuit, self.n_layers, self.n_neurons)
        multiplier = check_multiplier(multiplier)
        if not 0 <= number < self.max_circuits:
            raise InputError("number", f"expected 0 to {self.max_circuits - 1}, got {number}")
        index, edges = self._lay_out(circuit)
        with self.lock:
            old = self._circuits.get(number)
            kept = sum(len(entries.index) for entries in self._circuits.values()) - (
                0 if old is None else len(old.index)
            )
            if kept + len(index) > self.max_entries:
                what = f"has room for {self.max_entries} neurons, {kept} are in use and the circuit has {len(index)}"
                raise InputError("table", f"{what}; see max_entries")
            if old is not None:
                self.remove(number)
            if self._used + len(index) > self.max_entries:
                self._close_gaps()
            self._put(number, Entries(self._used, index, edges, multiplier))
            self._used += len(index)

    def remove(self, number: int) -> None:
        """Take a circuit out; rows that still name it are unsteered."""
        with self.lock:
            if number not in self._circuits:
                raise InputError("number", f"no circuit {number} in the table")
            for _, offsets in self._groups:
                offsets[:, number] = 0
            del self._circuits[number]

    def set_multiplier(self, number: int, multiplier: float) -> None:
        """Change one circuit's multiplier in place."""
        multiplier = check_multiplier(multiplier)
        with self.lock:
            if number not in self._circuits:
                raise InputError("number", f"no circuit {number} in the table")
            entries = self._circuits[number]
            if entries.multiplier != multiplier:
                for _, value in self._arena.values():
                    value[entries.start : entries.start + len(entries.index)] = multiplier
                self._circuits[number] = entries._replace(multiplier=multiplier)

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """Change every circuit's multiplier in place, in the order of their numbers."""
        for multiplier in multipliers:
            check_multiplier(multiplier)
        with self.lock:
            if len(multipliers) != self.n_circuits:
                raise ValueError(f"multipliers: expected {self.n_circuits}, got {len(multipliers)}")
            for number, multiplier in zip(self.numbers, multipliers, strict=True):
                self.set_multiplier(number, multiplier)

    def held(self) -> dict[int, Entries]:
        """What the table holds, for :meth:`hold`."""
        with self.lock:
            return dict(self._circuits)

    def hold(self, held: dict[int, Entries]) -> None:
        """Hold what :meth:`held` gave, and no other circuits."""
        with self.lock:
            for number in self.numbers:
                self.remove(number)
            self._used = 0
            for number, entries in held.items():
                self._put(number, entries._replace(start=self._used))
                self._used += len(entries.index)

    def layer(self, layer: int) -> Scale | None:
        """Return the layer's Scale; None in a table that is not live, where no circuit has a neuron in the layer."""
        if not self._live and layer not in self._steered:
            return None
        offsets = self._offsets[layer]
        if self._experts[layer] > 1:
            offsets = offsets.view(self.max_circuits * self._experts[layer], -1)
        return Scale(offsets, *self._arena[self._devices[layer]])

    def check_rows(self, row_circuit: Sequence[int]) -> None:
        """Raise InputError unless every row names a circuit of the table or -1."""
        for row, number in enumerate(row_circuit):
            if number != -1 and number not in self._circuits:
                held = ", ".join(map(str, self.numbers[:8])) + (", ..." if self.n_circuits > 8 else "")
                raise InputError("row_circuit", f"row {row}: expected -1 or one of {held or 'none'}, got {number}")

    def row_circuit(self, numbers: Sequence[int]) -> Tensor:
        """Return ``[B]`` int32 on the first layer's device after checking that every row names a circuit or -1."""
        numbers = list(numbers)
        self.check_rows(numbers)
        return torch.tensor(numbers, dtype=torch.int32, device=self._devices[0])

    def rows(self, circuit_of_row: Sequence[int]) -> Tensor:
        """Return ``[B]`` int32: the old name of :meth:`row_circuit`, deprecated."""
        return self.row_circuit(circuit_of_row)

    def _lay_out(self, circuit: Circuit) -> tuple[Array, list[Array]]:
        """The circuit's entries, and for each layer the first entry from each edge on, counted from its first entry."""
        members = circuit.by_layer()
        index, edges, start = [], [], 0
        for layer in range(self.n_layers):
            neurons = np.asarray(members.get(layer, ()), dtype=np.int64)
            width, n_experts = self._widths[layer], self._experts[layer]
            if len(neurons) and neurons[-1] >= width:
                raise InputError("circuit", f"layer {layer} has {width} neurons, got neuron {neurons[-1]}")
            edges.append((start + np.searchsorted(neurons, self._edges[layer])).astype(np.int32))
            index.append((neurons % (width // n_experts)).astype(np.int32))
            start += len(neurons)
        return np.concatenate(index) if index else np.zeros(0, np.int32), edges

    def _put(self, number: int, entries: Entries) -> None:
        """Write a circuit's entries, then the offsets that point to them."""
        end = entries.start + len(entries.index)
        for index, value in self._arena.values():
            index[entries.start : end] = torch.from_numpy(entries.index).to(index.device)
            value[entries.start : end] = entries.multiplier
        for layers, offsets in self._groups:
            edges = np.stack([entries.edges[layer] for layer in layers]) + np.int32(entries.start)
            offsets[:, number] = torch.from_numpy(edges).to(offsets.device)
        self._circuits[number] = entries

    def _close_gaps(self) -> None:
        """Move the entries of all circuits together, so that all free entries lie at the end."""
        self._used = 0
        for number, entries in sorted(self._circuits.items(), key=lambda item: item[1].start):
            self._put(number, entries._replace(start=self._used))
            self._used += len(entries.index)


def _one_each(value: Any, n: int) -> list[Any]:
    """A list of n from one value or from a sequence of n."""
    if isinstance(value, (list, tuple)):
        if len(value) != n:
            raise ValueError(f"expected {n} values, one for each layer, got {len(value)}")
        return list(value)
    return [value] * n


def _edges(width: int, n_experts: int) -> Array:
    """The neurons at which the blocks of NEURON_BLOCK neurons begin and end, expert after expert."""
    own = width // n_experts
    within = np.minimum(np.arange(-(-own // NEURON_BLOCK) + 1) * NEURON_BLOCK, own)
    return (np.arange(n_experts)[:, None] * own + within).ravel()


def distinct(
    circuits: Sequence[Circuit | None], multipliers: Sequence[float]
) -> tuple[list[Circuit], list[float], list[int]]:
    """Return each pair of circuit and multiplier once, and the number of each row's pair; -1 for None."""
    numbers: dict[tuple[int, float], int] = {}
    kept: list[tuple[Circuit, float]] = []
    rows = []
    for circuit, multiplier in zip(circuits, multipliers, strict=True):
        if circuit is None:
            rows.append(-1)
            continue
        number = numbers.setdefault((id(circuit), multiplier), len(kept))
        if number == len(kept):
            kept.append((circuit, multiplier))
        rows.append(number)
    return [circuit for circuit, _ in kept], [multiplier for _, multiplier in kept], rows


def check_multiplier(multiplier: float) -> float:
    """Return the multiplier as a float.

    Raises:
        InputError: the multiplier is no finite number that fp32 can hold.
    """
    try:
        finite = math.isfinite(multiplier) and abs(multiplier) <= torch.finfo(torch.float32).max
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise InputError("multiplier", f"expected a finite number, got {multiplier!r}")
    return float(multiplier)
