"""The settings that the requests of a worker use, in its table: put there when first used, and the oldest taken out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from ..errors import InputError
from ..steering import SteeringTable
from .setting import Setting


class Slots:
    """The numbers of settings in a table.

    A setting is known by its content and never overwritten: another multiplier or another circuit is another setting.
    As the table has room for the settings of all requests that may run at a time, one always comes free.

    Args:
        max_requests: how many requests may run at a time.
        max_neurons: the most neurons of one setting.
        low, n: the neurons ``low`` up to ``low + n`` of each layer are this worker's.
    """

    def __init__(self, n_layers: int, low: int, n: int, max_requests: int, max_neurons: int, device: Any) -> None:
        self.low, self.n = low, n
        n_entries = (max_requests + 1) * max_neurons
        self.table = SteeringTable([], [], n_layers, n, device, max_circuits=2 * max_requests, max_entries=n_entries)
        self._numbers: OrderedDict[str, int] = OrderedDict()  # by digest, the longest unused first

    def __len__(self) -> int:
        return len(self._numbers)

    def number_of(self, record: dict[str, Any], in_use: Collection[str]) -> int:
        """The number of a setting, which is put into the table if it is not there.

        Args:
            record: as :meth:`Setting.record` gave it.
            in_use: the digests of the step at hand, which stay.
        """
        digest = record["digest"]
        number = self._numbers.get(digest)
        if number is None:
            circuit, values = Setting.from_record(record).shard(self.low, self.n)
            while True:
                number = self._free()
                try:
                    if number is None:
                        raise InputError("table", "is full")
                    self.table.replace(number, circuit, values)
                    break
                except InputError:  # the number, or its neurons, have no room: the oldest setting goes
                    oldest = next((each for each in self._numbers if each not in in_use), None)
                    if oldest is None:
                        raise
                    self.table.remove(self._numbers.pop(oldest))
            self._numbers[digest] = number
        self._numbers.move_to_end(digest)
        return number

    def _free(self) -> int | None:
        taken = set(self._numbers.values())
        return next((number for number in range(self.table.max_circuits) if number not in taken), None)
