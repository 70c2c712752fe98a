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
    """Time both functions in turn, after one warm-up call of each.

    Returns:
        ratio: median of ours / theirs, pair by pair; below 1 is faster.
        noise: median of the larger over the smaller of ours in neighbouring rounds: what a ratio of 1 can look like.
        ours, theirs: median seconds, for orientation only.
    """
    return compare_all(ours, [theirs], rounds=rounds)[0]


def compare_all(ours, competitors, *, rounds: int = 5) -> list[dict[str, float]]:
    """As :func:`compare`, for several competitors that all run in every round; one result for each."""
    runs = [ours, *competitors]
    for run in runs:
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    mine = [row[0] for row in times]
    neighbours = [max(a, b) / min(a, b) for a, b in itertools.pairwise(mine)]
    return [
        {
            "ratio": statistics.median(row[0] / row[number] for row in times),
            "noise": statistics.median(neighbours),
            "ours": statistics.median(mine),
            "theirs": statistics.median(row[number] for row in times),
        }
        for number in range(1, len(runs))
    ]
