"""Progress of a long run on stderr: a bar for people, or JSON lines for machines, and a final line with totals.

A stderr that is closed or full ends no run.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import Any, cast

import torch

from .process import Quiet

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]
try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ModuleNotFoundError:  # lines instead of a bar
    Progress = None  # type: ignore[assignment, misc]

INTERVAL, PLAIN_INTERVAL = 1.0, 10.0  # seconds between JSON lines, and between lines for people


class Meter:
    """Counts prompts and tokens. ``meter(prompts done, prompts in all, tokens done)`` after every forward pass."""

    def __init__(self, show):
        self._show, self._start = show, time.monotonic()
        self.prompts = self.total = self.tokens = 0
        self._before: int | None = None  # prompts that were done before this process went on with a run

    def __call__(self, prompts: int, total: int, tokens: int):
        if self._before is None:
            self._before = prompts if tokens == 0 else 0
        self.prompts, self.total, self.tokens = prompts, total, tokens
        self._show(self)

    def facts(self) -> dict:
        """Progress so far: prompts, tokens, seconds, rates, the remaining time and peak memory."""
        seconds = time.monotonic() - self._start
        rate = (self.prompts - (self._before or 0)) / seconds if seconds else 0.0
        return {
            "prompts": self.prompts,
            "of": self.total,
            "tokens": self.tokens,
            "seconds": round(seconds, 3),
            "prompts_per_s": round(rate, 2),
            "tokens_per_s": round(self.tokens / seconds, 1) if seconds else 0.0,
            "eta_s": round((self.total - self.prompts) / rate, 1) if rate else None,
            "memory_bytes": peak_memory(),
        }


def peak_memory() -> int | None:
    """The most bytes this process has held: of GPU memory where it uses a GPU, else resident. None on Windows."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def metered(*, as_json: bool, notes: dict | None = None, rank: int = 0):
    """Yield a Meter that reports on stderr. At the end print one line of totals, with ``notes`` added.

    Of several workers only rank 0 reports to people; with ``as_json`` every worker prints JSON lines.
    """
    if rank and not as_json:
        yield Meter(lambda _: None)
        return
    if as_json:
        meter = Meter(_every(INTERVAL, lambda meter: _log("progress", meter.facts())))
        yield meter
        _log("done", meter.facts() | (notes or {}))
        return
    if Progress is None:
        meter = Meter(_every(PLAIN_INTERVAL, _say))
        yield meter
    else:
        with _bar() as meter:
            yield meter
    facts = meter.facts()
    extra = "".join(f"; {value} {name}" for name, value in (notes or {}).items() if value)
    print(f"{facts['prompts']:,} prompts in {facts['seconds']:.1f} s: {_rates(facts)}{extra}", file=Quiet(sys.stderr))


@contextmanager
def _bar():
    columns = (
        TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=cast(Any, Quiet(sys.stderr)))) as bar:
        task = bar.add_task("prompts", total=None, rates="")
        yield Meter(
            lambda meter: bar.update(task, completed=meter.prompts, total=meter.total, rates=_rates(meter.facts()))
        )


def _every(seconds, report):
    """A function that calls ``report`` with the meter once in ``seconds`` at most, and when all prompts are done."""
    said = [0.0]

    def show(meter):
        if time.monotonic() - said[0] >= seconds or meter.prompts == meter.total:
            said[0] = time.monotonic()
            report(meter)

    return show


def _say(meter):
    print(f"{meter.prompts:,} of {meter.total:,} prompts: {_rates(meter.facts())}", file=Quiet(sys.stderr), flush=True)


def _rates(facts) -> str:
    rates = f"{facts['prompts_per_s']:,.1f} prompts/s, {facts['tokens_per_s']:,.0f} tokens/s"
    memory = facts["memory_bytes"]
    return rates if memory is None else f"{rates}, {memory / 2**20:,.0f} MiB"


def _log(event, facts):
    print(json.dumps({"event": event, **facts}), file=Quiet(sys.stderr), flush=True)
