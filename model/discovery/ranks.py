"""Ranks: a run's processes that torchrun has started, and the messages between them through torchrun's store."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from torch.distributed.rendezvous import rendezvous

from cna_kernels.errors import InputError

from .run_directory import POLL


class Ranks:
    """This process, number ``rank`` of ``world`` processes. torchrun ends all of them when one dies."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        try:
            self._store, _, _ = next(rendezvous("env://"))
        except (ValueError, OSError, RuntimeError) as error:
            raise InputError("RANK, WORLD_SIZE", f"expected what torchrun sets: {error}") from None

    def wait_for_start(self):
        """Wait until rank 0 has started the run."""
        self._wait_for(["missing"])

    def share(self, missing: Sequence[int]) -> list[int]:
        """This rank's units: every ``world``-th of the units that rank 0 finds missing."""
        if self.rank == 0:
            self._store.set("missing", json.dumps(missing))
        self.wait_for_start()
        return json.loads(self._store.get("missing"))[self.rank :: self.world]

    def wait(self):
        """Say that this rank's share is done. Rank 0 then waits until all ranks have said so."""
        self._store.set(f"done/{self.rank}", "")
        if self.rank == 0:
            self._wait_for([f"done/{rank}" for rank in range(self.world)])

    def _wait_for(self, keys):
        while not self._store.check(keys):
            time.sleep(POLL)  # the store's own wait would hold back signals
