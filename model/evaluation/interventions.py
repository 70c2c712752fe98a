"""Methods to steer by, and a table that gives each row of a batch its own method.

All methods share one axis, the multiplier m: 1 changes nothing, 0 takes the behaviour away as far as the method can, 2
goes as far in the other direction. A direction's strength is a = sign * (1 - m), which the papers call alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cna_kernels.circuit import Circuit
from cna_kernels.steering import SteeringTable

from ..language_model import LanguageModel
from ..transformer import Steering
from .directions import Direction, DirectionTable


@dataclass(frozen=True)
class Method:
    """A way to steer.

    Attributes:
        name: its name in tables and files.
        about: one line that describes it in reports.
        by: the Circuit or Direction that steers.
        sign: of a Direction; -1 takes away what was found in the positive prompts.
    """

    name: str
    about: str
    by: Circuit | Direction
    sign: int = -1

    def strength(self, multiplier: float) -> float:
        """The factor of a circuit's neurons, or of a direction, at this multiplier."""
        return multiplier if isinstance(self.by, Circuit) else self.sign * (1 - multiplier)


@dataclass(frozen=True)
class Variant:
    """A method at a multiplier; method None is the unsteered model."""

    method: Method | None = None
    multiplier: float = 1.0

    @property
    def name(self) -> str:
        return "unsteered" if self.method is None else f"{self.method.name}, m = {self.multiplier:g}"

    @property
    def strength(self) -> float:
        """See :meth:`Method.strength`; 1 for the unsteered model."""
        return 1.0 if self.method is None else self.method.strength(self.multiplier)


UNSTEERED = Variant()


class Interventions:
    """Many variants on the device at once; :meth:`steer` gives each row of a batch its own variant."""

    def __init__(self, model: LanguageModel, variants: Sequence[Variant]):
        self.variants = list(variants)
        circuits: list[tuple[Circuit, float]] = []
        directions: list[tuple[Direction, float]] = []
        self._row_circuit: list[int] = []  # for each variant, its circuit's number in the table, or -1
        self._row_direction: list[int] = []
        for variant in self.variants:
            by = None if variant.method is None else variant.method.by
            self._row_circuit.append(len(circuits) if isinstance(by, Circuit) else -1)
            self._row_direction.append(len(directions) if isinstance(by, Direction) else -1)
            if isinstance(by, Circuit):
                circuits.append((by, variant.strength))
            elif by is not None:
                directions.append((by, variant.strength))
        self._table: SteeringTable | None = None
        self._directions: DirectionTable | None = None
        if circuits:
            found, strengths = zip(*circuits, strict=True)
            self._table = model.transformer.new_table(found, strengths)
        if directions:
            vectors, strengths = zip(*directions, strict=True)
            shape = model.config.num_hidden_layers, model.config.hidden_size
            self._directions = DirectionTable(vectors, strengths, *shape, model.device)

    def steer(self, rows: Sequence[int]) -> Steering | None:
        """The Steering of a batch whose row b uses variant ``rows[b]``; None where no row is steered."""
        circuits = [self._row_circuit[row] for row in rows]
        chosen = [self._row_direction[row] for row in rows]
        table = self._table if max(circuits, default=-1) >= 0 else None
        directions = self._directions if max(chosen, default=-1) >= 0 else None
        if table is None and directions is None:
            return None
        return Steering(
            table,
            None if table is None else table.row_circuit(circuits),
            None if directions is None else directions.row_direction(chosen),
        )
