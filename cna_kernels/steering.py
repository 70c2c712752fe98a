"""SteeringTable: many circuits and multipliers on the device, ready for the ops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import InputError
from .circuit import Circuit, check_fits
from .reference import Scale, make_scale


class SteeringTable:
    """K circuits, each at a multiplier, as one sparse :class:`Scale` per layer. Memory grows with the neurons steered.

    Rows of a batch choose a circuit by its place in the table (``row_circuit``); -1 is unsteered. Changing a
    multiplier writes a device buffer in place: nothing is rebuilt, recompiled or captured again.

    Args:
        circuits: the circuits, in the order of their numbers 0..K-1.
        multipliers: one for each: 0 ablates, 1 changes nothing, above 1 amplifies.
        n_layers, n_neurons: the shape of the model to steer.
    """

    def __init__(
        self, circuits: Sequence[Circuit], multipliers: Sequence[float], n_layers: int, n_neurons: int, device="cpu"
    ):
        if len(circuits) != len(multipliers):
            raise ValueError(f"multipliers: expected {len(circuits)}, one for each circuit, got {len(multipliers)}")
        for circuit in circuits:
            check_fits(circuit, n_layers, n_neurons)
        self.n_circuits = len(circuits)
        members = [circuit.by_layer() for circuit in circuits]
        layers = [[dict.fromkeys(by_layer.get(layer, ()), 1.0) for by_layer in members] for layer in range(n_layers)]
        owners = [number for layer in layers for number, chosen in enumerate(layer) for _ in chosen]
        self._starts = [0, *itertools.accumulate(sum(map(len, layer)) for layer in layers)]  # [L + 1]
        with torch.inference_mode(False):  # buffers made in inference mode could not be changed outside it
            scales = [make_scale(layer, n_neurons, device) for layer in layers]
            self._offsets = torch.stack([scale.offsets for scale in scales])  # [L, K, blocks + 1], from 0 in each layer
            self._index = torch.cat([scale.index for scale in scales])  # [E]
            self._value = torch.cat([scale.value for scale in scales])  # [E]
            self._owner = torch.tensor(owners, dtype=torch.int64, device=device)  # [E], the circuit of each entry
            self._multiplier = torch.ones(self.n_circuits, dtype=torch.float32, device=device)  # [K]
        self.set_multipliers(multipliers)

    def set_multipliers(self, multipliers: Sequence[float]):
        """Change every circuit's multiplier in place."""
        for multiplier in multipliers:
            check_multiplier(multiplier)
        if len(multipliers) != self.n_circuits:
            raise ValueError(f"multipliers: expected {self.n_circuits}, got {len(multipliers)}")
        self._multiplier.copy_(torch.tensor(multipliers, dtype=torch.float32))
        torch.index_select(self._multiplier, 0, self._owner, out=self._value)

    def layer(self, layer: int) -> Scale | None:
        """Return the layer's factors, or None where no circuit has a neuron in it."""
        start, end = self._starts[layer], self._starts[layer + 1]
        if start == end:
            return None
        return Scale(self._offsets[layer], self._index[start:end], self._value[start:end])

    def rows(self, circuit_of_row: Sequence[int]) -> Tensor:
        """Return ``[B]`` int32 on the table's device after checking that every row names a circuit or -1."""
        for number in circuit_of_row:
            if not -1 <= number < self.n_circuits:
                raise ValueError(f"row_circuit: expected -1 to {self.n_circuits - 1}, got {number}")
        return torch.tensor(list(circuit_of_row), dtype=torch.int32, device=self._index.device)


def check_multiplier(multiplier: float):
    """Raise InputError unless the multiplier is a finite number that fp32 can hold."""
    try:
        finite = math.isfinite(multiplier) and abs(multiplier) <= torch.finfo(torch.float32).max
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise InputError("multiplier", f"expected a finite number, got {multiplier!r}")
