"""SteeringTable: many circuits and multipliers on the device, ready for the ops."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .circuit import Circuit, check_fits
from .entries import Entries, by_place, edges_of, lay_out, mirrored_of, without_gaps
from .errors import InputError
from .fields import whole_number
from .scale import Scale


class SteeringTable:
    """Circuits, each at a multiplier, as one sparse :class:`Scale` per layer. Memory grows with the
    neurons steered.

    Rows of a batch choose a circuit by its number (``row_circuit``); -1 is unsteered. Changing a multiplier writes a
    device buffer in place: nothing is rebuilt, recompiled or captured again.

    Circuits come, change and go while the table's buffers keep their addresses, as many as ``max_circuits`` and
    ``max_entries`` leave room for. Methods may be called from any thread. A forward pass sees a change whole or not at
    all if its program holds ``lock`` while the pass runs (on a GPU: while it is launched, on the same stream). Without
    the lock the pass may see half of a change. A child of ``fork`` has the table as it was, and a lock of its own.

    A copy, or a pickled table, holds the same circuits in buffers of its own.

    Args:
        circuits: the circuits, in the order of their numbers 0..K-1.
        multipliers: one for each: 0 ablates, 1 changes nothing, above 1 scales up. What a
            circuit's neurons get at it, :meth:`Circuit.multipliers` says.
        n_layers, n_neurons: the shape of the model to steer.
        device: the device of the layers: one for all, or one for each layer.
        max_circuits: the number of circuits that the table can hold; default: as many as are given.
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
        self.max_circuits = len(circuits) if max_circuits is None else max_circuits
        if max_entries is None:
            share = max(math.ceil(0.001 * n_layers * n_neurons), 256)
            max_entries = sum(c.k for c in circuits) if max_circuits is None else self.max_circuits * share
        self.max_entries = max_entries
        self._experts = _one_each(n_experts, n_layers)
        self._widths = [n_neurons] * n_layers if widths is None else list(widths)
        self._edges = [edges_of(width, n) for width, n in zip(self._widths, self._experts, strict=True)]
        devices = [torch.device(d) for d in _one_each(device, n_layers)]
        self._circuits: dict[int, Entries] = {}  # never changed, only replaced: other threads read it without the lock
        self._used = 0  # entries up to the end of the last circuit
        self._writing = False  # whether the buffers may hold less than ``_circuits`` says
        self._freed: dict[int, None] = {}  # numbers that had a circuit and have none, the longest free first
        self._naming: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # rows, by their id
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
            self._offsets = [torch.empty(0, dtype=torch.float32)] * n_layers
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
        _TABLES[id(self)] = self

    def is_laid_out_as(self, other: SteeringTable) -> bool:
        """Whether two tables are of one model: the same layers, neurons, experts and devices."""
        mine, theirs = ((t._widths, t._experts, t._devices, t.n_neurons) for t in (self, other))
        return mine == theirs

    @property
    def n_circuits(self) -> int:
        """How many circuits the table holds."""
        return len(self._circuits)

    @property
    def numbers(self) -> list[int]:
        """The numbers in use, ascending."""
        return sorted(self._circuits)

    def add(self, circuit: Circuit, multiplier: float | Sequence[float]) -> int:
        """Add a circuit and return its number: the lowest that no circuit has had, else the one that is longest free.

        A number that rows still name is not given to another circuit: rows that :meth:`row_circuit` has returned, those
        of :meth:`keep_numbers_of`, and those of ``Engine.rows``. Of other rows the table does not know.

        Raises:
            InputError: the circuit is of another model, the multiplier is no number, or the table is full.
        """
        with self.lock:
            number = next(self._free_numbers(), None)
            if number is None:
                what = f"holds {self.max_circuits} circuits already; see max_circuits"
                if self.n_circuits < self.max_circuits:
                    free = ", ".join(map(str, self._freed))
                    what = f"rows still name what is free ({free}): give them other numbers, or choose one by `replace`"
                raise InputError("table", what)
            self.replace(number, circuit, multiplier)
            return number

    def _free_numbers(self) -> Iterator[int]:
        yield from (n for n in range(self.max_circuits) if n not in self._circuits and n not in self._freed)
        named = {n for rows in list(self._naming.values()) for n in rows.unique().tolist()} if self._freed else set()
        yield from (n for n in self._freed if n not in named)

    def replace(self, number: int, circuit: Circuit, multiplier: float | Sequence[float]) -> None:
        """Put a circuit in the place of another, or in a free one. Raises as ``add``, and then changes nothing.

        ``multiplier``: one number, or a list with one for each neuron, in rank order.
        """
        number = whole_number("number", number)
        check_fits(circuit, self.n_layers, self.n_neurons)
        mine = tuple((n, width // n) for n, width in zip(self._experts, self._widths, strict=True))
        if circuit.experts not in (None, mine):
            raise InputError(
                "experts", "made for another model: expected another number of experts, or of their neurons"
            )
        own, one = None, 1.0
        if isinstance(multiplier, (list, tuple)):
            own = by_place(circuit, [check_multiplier(each) for each in multiplier])
        else:
            one = check_multiplier(multiplier)  # type: ignore[arg-type]  # anything: it refuses what is no number
        if not 0 <= number < self.max_circuits:
            raise InputError("number", f"expected 0 to {self.max_circuits - 1}, got {number}")
        index, edges = lay_out(circuit, self._widths, self._experts, self._edges)
        with self.lock:
            others = {n: entries for n, entries in self._circuits.items() if n != number}
            kept = sum(len(entries.index) for entries in others.values())
            if kept + len(index) > self.max_entries:
                what = f"has room for {self.max_entries} neurons, {kept} are in use and the circuit has {len(index)}"
                raise InputError("table", f"{what}; see max_entries")
            changed: Iterable[int] = [number]
            if self._used + len(index) > self.max_entries:
                others, changed = without_gaps(others), [*others, number]
                self._used = kept
            entries = Entries(self._used, index, edges, one, mirrored_of(circuit), own)
            self._used += len(index)
            self._freed.pop(number, None)
            self._change_to({**others, number: entries}, changed)

    def remove(self, number: int) -> None:
        """Take a circuit out; rows that still name it are unsteered."""
        number = whole_number("number", number)
        with self.lock:
            if number not in self._circuits:
                raise InputError("number", f"no circuit {number} in the table")
            self._freed[number] = None
            self._change_to({n: entries for n, entries in self._circuits.items() if n != number}, [number])

    def set_multiplier(self, number: int, multiplier: float) -> None:
        """Change one circuit's multiplier in place."""
        number, multiplier = whole_number("number", number), check_multiplier(multiplier)
        with self.lock:
            if number not in self._circuits:
                raise InputError("number", f"no circuit {number} in the table")
            entries = self._circuits[number]
            if entries.multiplier != multiplier or entries.own is not None:
                self._writing = True
                changed = entries._replace(multiplier=multiplier, own=None)
                self._circuits = {**self._circuits, number: changed}
                self._put_multiplier(changed)
                self._writing = False

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
        return self._circuits

    def hold(self, held: dict[int, Entries]) -> None:
        """Hold what :meth:`held` gave, and no other circuits."""
        with self.lock:
            before = self._circuits
            self._freed = dict.fromkeys(n for n in (*self._freed, *before) if n not in held)
            self._used = sum(len(entries.index) for entries in held.values())
            self._change_to(without_gaps(held), {*before, *held})

    def layer(self, layer: int) -> Scale:
        """Return the layer's Scale. It is a view: later changes of the table show in it."""
        offsets = self._offsets[layer]
        if self._experts[layer] > 1:
            offsets = offsets.view(self.max_circuits * self._experts[layer], -1)
        return Scale(offsets, *self._arena[self._devices[layer]])

    def check_rows(self, row_circuit: Sequence[int]) -> None:
        """Raise InputError unless every row names a circuit of the table or -1."""
        circuits = self._circuits
        for row, number in enumerate(row_circuit):
            if (named := whole_number("row_circuit", number)) != -1 and named not in circuits:
                held = ", ".join(map(str, sorted(circuits)[:8])) + (", ..." if len(circuits) > 8 else "")
                raise InputError("row_circuit", f"row {row}: expected -1 or one of {held or 'none'}, got {named}")

    def row_circuit(self, numbers: Sequence[int]) -> Tensor:
        """Return ``[B]`` int32 on the first layer's device after checking that every row names a circuit or -1."""
        with self.lock:
            numbers = [whole_number("row_circuit", number) for number in numbers]
            self.check_rows(numbers)
            rows = torch.tensor(numbers, dtype=torch.int32, device=self._devices[0])
            self.keep_numbers_of(rows)
        return rows

    def keep_numbers_of(self, rows: Tensor) -> None:
        """Let :meth:`add` give no number that rows ``[B]`` or ``[B, S]``, int32, name then, while they live."""
        self._naming[id(rows)] = rows

    def rows(self, circuit_of_row: Sequence[int]) -> Tensor:
        """Return ``[B]`` int32: the old name of :meth:`row_circuit`, deprecated."""
        return self.row_circuit(circuit_of_row)

    def _change_to(self, circuits: dict[int, Entries], changed: Iterable[int]) -> None:
        """Hold these circuits from now on; ``changed``: the numbers whose entries or places are not as before."""
        broken_off, self._writing = self._writing, True
        self._circuits = circuits
        changed = list(circuits) if broken_off else changed  # of the change before this one, too
        for _, offsets in self._groups:
            for number in [slice(None)] if broken_off else changed:
                offsets[:, number] = 0
        for number in changed:
            if number in circuits:
                self._put(number, circuits[number])
        self._writing = False

    def _put(self, number: int, entries: Entries) -> None:
        """Write a circuit's entries, then the offsets that point to them."""
        end = entries.start + len(entries.index)
        for index, _ in self._arena.values():
            index[entries.start : end] = torch.from_numpy(entries.index).to(index.device)
        self._put_multiplier(entries)
        for layers, offsets in self._groups:
            edges = np.stack([entries.edges[layer] for layer in layers]) + np.int32(entries.start)
            offsets[:, number] = torch.from_numpy(edges).to(offsets.device)

    def _put_multiplier(self, entries: Entries) -> None:
        """Write what each of a circuit's neurons is multiplied by."""
        values, end = entries.values(), entries.start + len(entries.index)
        for _, value in self._arena.values():
            place = value[entries.start : end]
            place.fill_(values) if isinstance(values, float) else place.copy_(torch.from_numpy(values))

    def __reduce__(self) -> tuple[Any, ...]:
        with self.lock:
            sizes = self.n_layers, self.n_neurons, [str(device) for device in self._devices], self.max_circuits
            held = self._circuits, self._used, list(self._freed)
            return _restored, (type(self), *sizes, self.max_entries, self._experts, self._widths, *held)

    def _after_fork(self) -> None:
        """In a child of ``fork``: no other thread is left that could release the lock, or end its change."""
        self.lock = threading.RLock()
        if self._writing and all(device.type == "cpu" for device in self._devices):
            self._change_to(self._circuits, [])


_TABLES: weakref.WeakValueDictionary[int, SteeringTable] = weakref.WeakValueDictionary()  # all that are alive


def _after_fork() -> None:
    for table in list(_TABLES.values()):
        table._after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _restored(
    kind: type[SteeringTable], n_layers: int, n_neurons: int, devices: list[str], max_circuits: int, max_entries: int,
    n_experts: list[int], widths: list[int], circuits: dict[int, Entries], used: int, freed: list[int],
) -> SteeringTable:  # fmt: skip
    """A table that was copied or pickled."""
    sizes = dict(max_circuits=max_circuits, max_entries=max_entries)
    table = kind([], [], n_layers, n_neurons, devices, n_experts=n_experts, widths=widths, **sizes)
    table._used, table._freed = used, dict.fromkeys(freed)
    table._change_to(circuits, circuits)
    return table


def _one_each(value: Any, n: int) -> list[Any]:
    """A list of n from one value or from a sequence of n."""
    if isinstance(value, (list, tuple)):
        if len(value) != n:
            raise ValueError(f"expected {n} values, one for each layer, got {len(value)}")
        return list(value)
    return [value] * n


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
