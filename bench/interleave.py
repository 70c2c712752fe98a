"""Ratios that survive a shared machine: A B A B in one process, medians, and the noise floor of A against itself."""

from __future__ import annotations

import itertools
import statistics
import time


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(ours, theirs, *, rounds: int = 5) -> dict[str, float]:
    """Time both in turn after one warm-up each.

    Returns:
        ratio: median of ours / theirs, pair by pair; below 1 is faster.
        noise: median of ours / ours over neighbouring rounds, larger over smaller: what a ratio of 1 can look like.
        ours, theirs: median seconds, for orientation only.
    """
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    mine = [a for a, _ in pairs]
    neighbours = [max(a, b) / min(a, b) for a, b in itertools.pairwise(mine)]
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "noise": statistics.median(neighbours),
        "ours": statistics.median(mine),
        "theirs": statistics.median(b for _, b in pairs),
    }
