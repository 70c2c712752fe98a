"""Timing for ``bench/gpu.py``: the device, its random data, CUDA graphs replayed in turn, and ratios from pairs.

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
from torch import Tensor

from cna_kernels import make_scale, ops
from cna_kernels.plans import use as use_plans
from cna_kernels.triton import plan as plans


class Layer(NamedTuple):
    w_gate_up: Tensor  # [2N, H]
    w_down: Tensor  # [H, N]
    act_sum: Tensor  # [2, N]


class Bench:
    """The device, its data and its clock.

    mode: "time" measures; "once" only runs everything once, which leaves every kernel in Triton's cache; "dry" is a
    CPU with Triton's interpreter and two calls by the wall clock.
    """

    def __init__(self, mode: str, models: dict, ceilings: dict):
        self.mode, self.models, self.ceilings = mode, models, ceilings
        self.device = torch.device("cpu" if mode == "dry" else "cuda")
        self.arch = 90
        if mode != "dry":
            major, minor = torch.cuda.get_device_capability()
            self.arch = 10 * major + minor
        self.generator = torch.Generator(self.device).manual_seed(0)
        self._layers = (None, [])
        self.compiles = True  # until torch.compile has failed or timed out once

    def synchronize(self):
        """Wait for the device. Raises if an earlier kernel has cost this process the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def random(self, *shape, deviation=1.0, dtype=torch.bfloat16) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x.normal_(0, deviation, generator=self.generator)

    def layers(self, model, T=1) -> list[Layer]:
        """Weight sets to rotate through: at least 4, and of few tokens so many that a replay reads 2 GB."""
        H, N = self.models[model]
        n_sets = 1 if self.mode == "once" else 2 if self.mode == "dry" else max(4, math.ceil(2e9 / (6 * N * H)))
        if self._layers[0] != model:
            self._layers = (None, [])  # the old ones go before the new ones come
            make = lambda: Layer(  # noqa: E731
                self.random(2 * N, H, deviation=H**-0.5),
                self.random(H, N, deviation=N**-0.5),
                self.random(2, N, dtype=torch.float32),
            )
            self._layers = (model, [make() for _ in range(n_sets)])
        return self._layers[1][: n_sets if T <= 64 else 4]

    def weight(self, T) -> Tensor:
        """Two columns in which every token counts: ``[T, 2]``."""
        return self.random(T, 2, dtype=torch.float32).abs_() + 0.1

    def steering(self, T, N, n_circuits, row_circuit=None) -> dict:
        """Circuits of 0.1% of the neurons; token t follows circuit t % K unless told otherwise."""
        chosen = torch.Generator().manual_seed(N)
        size = max(1, N // 1000)
        members = [torch.randperm(N, generator=chosen)[:size].tolist() for _ in range(n_circuits)]
        scale = make_scale([{n: 0.25 * (n % 7) for n in neurons} for neurons in members], N, self.device)
        if row_circuit is None:
            row_circuit = torch.arange(T, device=self.device) % n_circuits
        return dict(scale=scale, row_circuit=row_circuit.int())

    def call(self, op, model, T):
        H, N = self.models[model]
        return plans.Call(op, T, N, H, torch.bfloat16, self.arch, True)

    def plans(self, op, model, T) -> list[str]:
        return [name for name in plans.PLANS[op] if plans.can_serve(self.call(op, model, T), name)]

    def measure(self, runs, sets) -> Times:
        """runs: name -> function of one set. Seconds for one set, a figure for each round; the first is timed twice."""
        replays, failures = {}, {}
        for name, run in runs.items():
            try:
                replays[name] = self._prepare(run, sets)
            except Exception as error:
                traceback.print_exc()
                failures[name] = brief(error)
                self.synchronize()
        if not replays:
            return Times({}, failures)
        order = [*replays, next(iter(replays))]
        if self.mode == "once":
            rounds = [[1.0] * len(order)]
        elif self.mode == "dry":
            rounds = [[_wall(replays[name]) for name in order] for _ in range(2)]
        else:
            rounds = _events(replays, order)
        columns = list(zip(*([s / len(sets) for s in each] for each in rounds), strict=True))
        times = dict(zip(order[:-1], columns[:-1], strict=True))
        return Times(times, failures, columns[-1])

    def _prepare(self, run, sets):
        """Compile and warm up, then capture one pass through all sets."""
        everything = lambda: [run(each) for each in sets] and None  # noqa: E731
        run(sets[0])
        if self.mode != "time":
            return everything
        run(sets[-1])
        self.synchronize()
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
    """Rounds of one sample each in this order. All is queued before anything is waited for, so that the host's time
    for a launch stays hidden; a sample is as many replays as take 1 ms, the rounds together half a second or 5."""

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
    """What ``measure`` found."""

    times: dict  # name -> seconds, one a round
    failures: dict  # name -> why it has no times
    again: tuple = ()  # the first name, a second time in each round

    def median(self, name):
        return statistics.median(self.times[name]) if name in self.times else None

    def noise(self):
        """Median of larger over smaller of the same graph replayed twice: what a ratio of 1 can look like."""
        first = next(iter(self.times.values()))
        return statistics.median(max(a, b) / min(a, b) for a, b in zip(first, self.again, strict=True))

    def row(self, row, model, T, ours, theirs, **more):
        head = dict(row=row, model=model, T=T, ours=ours, theirs=theirs)
        for name in (ours, theirs):
            if name in self.failures:
                return dict(head, note=f"{name}: {self.failures[name]}", **more)
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
            **more,
        )


def _percentile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def brief(error):
    return f"{type(error).__name__}: {error}"[:200]


def relative(got, exact):
    """Frobenius norm of the error over that of the answer; NaN if anything is."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def ours(x, plan="", weight=None, steering=None, op="gated_mlp"):
    """The op through the Triton backend; ``plan`` "" leaves the choice to it."""

    def run(layer):
        use_plans(plan and f"{op}={plan}")
        sums = {} if weight is None else dict(weight=weight, act_sum=layer.act_sum)
        weights = (layer.w_gate_up, layer.w_down) if op == "gated_mlp" else (layer.w_down,)
        return getattr(ops, op)(x, *weights, **sums, **(steering or {}), backend="triton")

    return run
