"""A setting: what the circuits of a request, each at its multiplier, do to every neuron. It is known by its content."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..circuit import Circuit
from ..steering import check_multiplier

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Setting:
    """The neurons of a request and what each is multiplied by; two settings of equal content have one ``digest``.

    Attributes:
        n_layers, n_neurons: the shape of the model.
        layer, index: ``[k]`` int32, ascending by layer, then by index.
        value: ``[k]`` float32, none of them 1.
    """

    n_layers: int
    n_neurons: int
    layer: Array
    index: Array
    value: Array

    @functools.cached_property
    def digest(self) -> str:
        parts = (np.array([self.n_layers, self.n_neurons], np.int64), self.layer, self.index, self.value)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def record(self) -> dict[str, Any]:
        """The setting as it travels with a request, to the workers."""
        parts = {name: getattr(self, name).tobytes() for name in ("layer", "index", "value")}
        return {"digest": self.digest, "n_layers": self.n_layers, "n_neurons": self.n_neurons, **parts}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Setting:
        parts = {name: np.frombuffer(record[name], kind) for name, kind in _KINDS.items()}
        return cls(record["n_layers"], record["n_neurons"], **parts)

    def shard(self, low: int, n: int) -> tuple[Circuit, list[float]]:
        """The neurons ``low`` up to ``low + n`` of every layer, counted from ``low``, and their multipliers."""
        inside = (self.index >= low) & (self.index < low + n)
        places = zip(self.layer[inside].tolist(), (self.index[inside] - low).tolist(), strict=True)
        return Circuit(tuple((*place, 0.0) for place in places), self.n_layers, n), self.value[inside].tolist()


_KINDS = {"layer": np.int32, "index": np.int32, "value": np.float32}


def setting_of(circuits: Sequence[Circuit], multipliers: Sequence[float]) -> Setting | None:
    """Merge circuits of one model, each at its multiplier; None where this changes nothing.

    A neuron of several circuits gets the product of their multipliers, one of an aligned circuit what
    :meth:`Circuit.multipliers` says.

    Raises:
        InputError: a multiplier, or a product, is no finite number that fp32 can hold.
    """
    merged: dict[tuple[int, int], float] = {}
    for circuit, multiplier in zip(circuits, multipliers, strict=True):
        each = circuit.multipliers(check_multiplier(multiplier))
        for pair, factor in zip(circuit.pairs, each, strict=True):
            merged[pair] = check_multiplier(merged.get(pair, 1.0) * factor)
    changed = sorted((pair, factor) for pair, factor in merged.items() if np.float32(factor) != 1)
    if not changed:
        return None
    layer, index = np.array([pair for pair, _ in changed], np.int32).T.copy()
    value = np.array([factor for _, factor in changed], np.float32)
    return Setting(circuits[0].n_layers, circuits[0].n_neurons, layer, index, value)
