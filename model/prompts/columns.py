"""Columns of a run, and the cross-validation folds and bootstrap replicates that are derived from them.

All of these are summed in the same pass. A *slot* is one streaming sum: first come the columns themselves, then, for
every column that is half of a contrast, its folds and its replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .corpus import Contrast, Entry


@dataclass(frozen=True)
class Columns:
    """
    Attributes:
        n_columns: columns of the corpus.
        contrasts: pairs of columns.
        folds: parts into which the prompts of each column are dealt in turn.
        bootstrap: replicates of the Poisson bootstrap; ``seed`` draws them.
    """

    n_columns: int
    contrasts: tuple[Contrast, ...]
    folds: int = 0
    bootstrap: int = 0
    seed: int = 0

    def derived(self, column: int) -> list[int]:
        """The slots of a column's folds, then of its replicates; an empty list for a column in no contrast."""
        size, place = self.folds + self.bootstrap, self._halves.get(column)
        return [] if place is None else list(range(start := self.n_columns + place * size, start + size))

    def weights(self, entries: Sequence[Entry], first: int) -> tuple[list[int], Tensor]:
        """How much each entry counts in each slot.

        Args:
            first: the number of the first entry in its corpus, which decides how replicates draw the entries.

        Returns:
            the slots that count any of the entries, and the weights ``[P, slots]`` fp32.
        """
        active = sorted({column for entry in entries for column, _, _ in entry.columns})
        place = {column: number for number, column in enumerate(active)}
        base = np.zeros((len(entries), len(active)), dtype=np.float32)
        turn = np.zeros((len(entries), len(active)), dtype=np.int64)
        for row, entry in enumerate(entries):
            for column, weight, of_column in entry.columns:
                base[row, place[column]], turn[row, place[column]] = weight, of_column
        parts, slots = [base], list(active)
        resampled = self._resampled(first, len(entries))
        for column in active:
            derived = self.derived(column)
            if derived:
                slots += derived
                mine = base[:, place[column], None]
                in_fold = turn[:, place[column], None] % max(self.folds, 1) == np.arange(self.folds)
                parts += [mine * in_fold, mine * resampled]
        return slots, torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

    @cached_property
    def _halves(self) -> dict[int, int]:
        columns = sorted({column for contrast in self.contrasts for column in contrast[1:]})
        return {column: place for place, column in enumerate(columns)}

    def _resampled(self, first: int, n: int) -> np.ndarray:
        """How often each prompt is drawn in each replicate, ``[n, bootstrap]``: Poisson with mean 1.

        The Poisson bootstrap (Hanley and MacGibbon, Computer Methods and Programs in Biomedicine 83, 2006) draws every
        prompt's count independently, so that a stream of any length can be resampled. A count depends on the seed, the
        prompt's number and the replicate, and on nothing else.
        """
        if not self.bootstrap:
            return np.zeros((n, 0))
        blocks = -(-self.bootstrap // 4)  # Philox gives four numbers for each value of its counter
        random = np.random.Philox(key=self.seed)
        random.advance(first * blocks)
        uniform = (random.random_raw(n * blocks * 4) >> np.uint64(11)) * 2.0**-53
        chance = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(20)])
        return np.searchsorted(chance, uniform, side="right").reshape(n, -1)[:, : self.bootstrap]
