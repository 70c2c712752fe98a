"""Ways to steer, and what makes each row of a batch use its own.

Every way has one axis, the multiplier m of a circuit: 1 changes nothing, 0 takes the behaviour away as far as the way
can, 2 goes as far in the other direction. A direction's strength is a = sign * (1 - m), the papers' alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cna_kernels.circuit import Circuit
from cna_kernels.steering import SteeringTable

from ..language_model import LanguageModel
from ..transformer import Steer
from .directions import Direction, DirectionTable


@dataclass(frozen=True)
class Method:
    """A way to steer.

    Attributes:
        name: in tables and files.
        about: one line for a reader.
        by: the Circuit or Direction.
        sign: of a direction: -1 takes away what was found in the positive prompts.
    """

    name: str
    about: str
    by: Circuit | Direction
    sign: int = -1

    def strength(self, multiplier: float) -> float:
        """What scales neurons, or a direction, at this multiplier."""
        return multiplier if isinstance(self.by, Circuit) else self.sign * (1 - multiplier)


@dataclass(frozen=True)
class Setting:
    """A method at a multiplier; no method is the model as it is."""

    method: Method | None = None
    multiplier: float = 1.0

    @property
    def name(self) -> str:
        return "unsteered" if self.method is None else f"{self.method.name}, m = {self.multiplier:g}"


UNSTEERED = Setting()


class Interventions:
    """Many settings on the device at once; ``steer`` gives each row of a batch its own."""

    def __init__(self, model: LanguageModel, settings: Sequence[Setting]):
        self.settings = list(settings)
        shape = model.config.num_hidden_layers, model.config.intermediate_size
        circuits, directions = [], []  # (by, strength)
        self._row_circuit, self._row_direction = [], []  # of each setting
        for setting in self.settings:
            numbers = {Circuit: -1, Direction: -1}
            if setting.method is not None:
                by = setting.method.by
                found = circuits if isinstance(by, Circuit) else directions
                numbers[type(by)] = len(found)
                found.append((by, setting.method.strength(setting.multiplier)))
            self._row_circuit.append(numbers[Circuit])
            self._row_direction.append(numbers[Direction])
        self._table = self._directions = None
        if circuits:
            self._table = SteeringTable(*zip(*circuits, strict=True), *shape, model.device)
        if directions:
            n_hidden = model.config.hidden_size
            self._directions = DirectionTable(*zip(*directions, strict=True), shape[0], n_hidden, model.device)

    def steer(self, rows: Sequence[int]) -> Steer | None:
        """What steers a batch whose row b uses setting ``rows[b]``."""
        circuits = [self._row_circuit[row] for row in rows]
        chosen = [self._row_direction[row] for row in rows]
        by_circuit = self._table is not None and max(circuits, default=-1) >= 0
        by_direction = self._directions is not None and max(chosen, default=-1) >= 0
        if not by_circuit and not by_direction:
            return None
        return Steer(
            self._table if by_circuit else None,
            self._table.rows(circuits) if by_circuit else None,
            self._directions.rows(chosen) if by_direction else None,
        )
