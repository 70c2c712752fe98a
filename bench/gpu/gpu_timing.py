"""Timing for ``bench/gpu/gpu.py``: CUDA graphs replayed in turn, and ratios from pairs.

Every competitor is captured in a CUDA graph that goes through all weight sets once; the graphs are replayed in turn,
A B A B, between CUDA events. Ratios are ours over theirs: below 1 is faster.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from typing import NamedTuple

import torch


def measure(mode, runs, sets, synchronize) -> Times:
    """Time ``runs``, name -> function of one set: seconds for one set, in each round. The first is timed twice."""
    replays, failures = {}, {}
    for name, run in runs.items():
        try:
            replays[name] = _prepare(mode, run, sets, synchronize)
        except Exception as error:
            traceback.print_exc()
            failures[name] = brief(error)
            synchronize()
    if not replays:
        return Times({}, failures)
    order = [*replays, next(iter(replays))]
    if mode == "once":
        rounds = [[1.0] * len(order)]
    elif mode == "dry":
        rounds = [[_wall(replays[name]) for name in order]]
    else:
        rounds = _events(replays, order)
    columns = list(zip(*([s / len(sets) for s in each] for each in rounds), strict=True))
    times = dict(zip(order[:-1], columns[:-1], strict=True))
    return Times(times, failures, columns[-1])


def _prepare(mode, run, sets, synchronize):
    """Compile and warm up ``run``, then capture one pass through all sets. Returns a function that replays the pass."""
    everything = lambda: [run(each) for each in sets] and None  # noqa: E731
    run(sets[0])
    if mode != "time":
        return everything
    run(sets[-1])
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in sets:
            run(each)
    return graph.replay


def _wall(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _events(replays, order):
    """Rounds of one sample for each name, in this order. All samples are queued before the host waits for any, so that
    the host's time for a launch stays hidden. A sample is as many replays as take 1 ms. There are as many rounds as fit
    half a second, but at least 5 and at most 31."""

    def sample(replay, times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            replay()
        end.record()
        return start, end

    def seconds(pair):
        return pair[0].elapsed_time(pair[1]) / 1000

    times, longest = {}, 0.0
    for name, replay in replays.items():
        replay()
        pair = sample(replay, 3)
        torch.cuda.synchronize()
        times[name] = max(1, math.ceil(1e-3 / (seconds(pair) / 3)))
        longest += seconds(pair) / 3 * times[name]
    pairs = [[sample(replays[name], times[name]) for name in order] for _ in range(min(31, max(5, int(0.5 / longest))))]
    torch.cuda.synchronize()
    return [[seconds(pair) / times[name] for name, pair in zip(order, each, strict=True)] for each in pairs]


class Times(NamedTuple):
    """What ``measure`` found. ``work`` and ``device`` are for the share of the ceiling."""

    times: dict  # name -> seconds, one a round
    failures: dict  # name -> why it has no times
    again: tuple = ()  # the first name, a second time in each round
    work: object = None
    device: object = None

    def median(self, name):
        return statistics.median(self.times[name]) if name in self.times else None

    def noise(self):
        """Median of larger over smaller time of one graph, replayed twice a round: what a ratio of 1 can look like."""
        first = next(iter(self.times.values()))
        return statistics.median(max(a, b) / min(a, b) for a, b in zip(first, self.again, strict=True))

    def share(self, name) -> dict:
        """The share of the ceiling that ``name`` reaches; see :func:`share_of`."""
        return share_of(self.work, self.median(name), self.device)

    def row(self, row, model, T, ours, theirs, note="", **more):
        head = dict(row=row, model=model, T=T, ours=ours, theirs=theirs, **more)
        failed = [f"{name}: {self.failures[name]}" for name in (ours, theirs) if name in self.failures]
        if said := "; ".join(filter(None, [note, *failed])):
            head["note"] = said
        if failed:
            return head
        ratios = [a / b for a, b in zip(self.times[ours], self.times[theirs], strict=True)]
        spread = [_percentile(self.times[ours], q) * 1e6 for q in (0.2, 0.8)]
        return dict(
            head,
            ratio=statistics.median(ratios),
            low=_percentile(ratios, 0.2),
            high=_percentile(ratios, 0.8),
            noise=self.noise(),
            ours_us=self.median(ours) * 1e6,
            ours_us_20_80=spread,
            theirs_us=self.median(theirs) * 1e6,
            **self.share(ours),
        )


def share_of(work, seconds, device) -> dict:
    """The time at the ceiling over ``seconds``, by memory or matrix units, whichever must take longer."""
    if work is None or device is None:
        return {}
    memory, matrix = work.bytes / device.bytes_per_s, work.flop / device.flop_per_s
    if memory >= matrix:
        bound, rate = "memory", f"{work.bytes / seconds / 1e9:.0f} GB/s"
    else:
        bound, rate = "matrix", f"{work.flop / seconds / 1e12:.1f} TFLOP/s"
    return dict(bytes=work.bytes, flop=work.flop, bound=bound, rate=rate, share=max(memory, matrix) / seconds)


def _percentile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def brief(error):
    return f"{type(error).__name__}: {error}"[:200]
