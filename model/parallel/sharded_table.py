"""ShardedTable: the part of a SteeringTable that one of several ranks has, each with some neurons of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cna_kernels.circuit import Circuit, check_fits
from cna_kernels.errors import InputError
from cna_kernels.steering import SteeringTable


class ShardedTable(SteeringTable):
    """A SteeringTable of one rank's neurons. Circuits are given whole, and have the same numbers on all ranks.

    Neuron ``index`` of a layer is neuron ``index % n`` of rank ``index // n``, where n is the neurons of a layer over
    the ranks. A circuit without a neuron on this rank is an entry of no neurons.
    """

    def __init__(
        self,
        circuits: Sequence[Circuit],
        multipliers: Sequence[float],
        n_layers: int,
        n_neurons: int,
        device: torch.device | str = "cpu",
        *,
        rank: int,
        n_ranks: int,
    ) -> None:
        """``n_neurons``: the neurons of a whole layer, a multiple of ``n_ranks``."""
        self.rank, self.n_whole = rank, n_neurons
        self._sizes: dict[int, int] = {}  # the neurons of each whole circuit: all ranks have room, or none has
        super().__init__(circuits, multipliers, n_layers, n_neurons // n_ranks, device)

    def replace(self, number: int, circuit: Circuit, multiplier: float | Sequence[float]) -> None:
        """As of a SteeringTable; ``circuit`` and ``multiplier`` are of the whole model."""
        check_fits(circuit, self.n_layers, self.n_whole)
        in_use = sum(size for other, size in self._sizes.items() if other != number)
        if in_use + circuit.k > self.max_entries:
            what = f"has room for {self.max_entries} neurons, {in_use} are in use and the circuit has {circuit.k}"
            raise InputError("table", f"{what}; see max_entries")
        kept = [place for place, (_, index) in enumerate(circuit.pairs) if index // self.n_neurons == self.rank]
        own = tuple(circuit.neurons[place] for place in kept)
        mirrored = circuit.mirrored
        if mirrored is not None:
            mirrored = tuple((layer, i % self.n_neurons) for layer, i in mirrored if i // self.n_neurons == self.rank)
        part = Circuit(
            tuple((layer, index % self.n_neurons, contrast) for layer, index, contrast in own),
            self.n_layers, self.n_neurons, mirrored=mirrored,
        )  # fmt: skip
        if isinstance(multiplier, (list, tuple)):
            if len(multiplier) != circuit.k:
                raise InputError("multiplier", f"expected one number, or {circuit.k}, one for each neuron")
            multiplier = [multiplier[place] for place in kept]
        super().replace(number, part, multiplier)
        self._sizes[number] = circuit.k

    def remove(self, number: int) -> None:
        """As of a SteeringTable."""
        super().remove(number)
        del self._sizes[number]

    def hold(self, held) -> None:
        """Refused: what :meth:`held` gives are the neurons of one rank."""
        raise InputError("table", "`hold` is not for a model that ranks share")
