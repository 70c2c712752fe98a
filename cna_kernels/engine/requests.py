"""What steers a request of continuous batching, and with what the tokens that its cache holds were computed.

Blocks of a paged cache are found again by a hash of their tokens. What a block holds also depends on what steered these
tokens and all before them. So the cache is told other tokens: a token that was steered by a circuit at a multiplier is
a number of its own, for each content of a circuit and each multiplier.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..entries import Entries
from ..errors import InputError
from ..fields import whole_number
from ..steering import SteeringTable

Runs: TypeAlias = list[tuple[int, int]]  # (position, way): what steered from there on; before the first, nothing
PHASES = ("both", "prompt", "answer")
UNSTEERED = 0  # the way that changes nothing
CHILD = re.compile(r"(__child#\d+)+$")  # how the further answers to a request are called
LARGEST = 2**31 - 1  # of a token as the cache takes it, and of a position
Arguments: TypeAlias = tuple[int | None, str, int, int]  # of a Request


def check_phase(phase: str) -> None:
    if phase not in PHASES:
        raise InputError("phase", f"expected one of {', '.join(PHASES)}, got {phase!r}")


class Request:
    """What steers one request, and all answers to it.

    Attributes:
        circuit: its number, -1 for none, None for what ``Engine.rows`` says of all rows.
        phase, start, stop: as of ``Engine.rows``.
        number: ``[1]`` int32: the circuit, as long as the request is in flight; the table keeps that number.
    """

    def __init__(self, arguments: Arguments) -> None:
        with torch.inference_mode(False):
            self.number = torch.empty(1, dtype=torch.int32)
        self.change(arguments)

    def change(self, arguments: Arguments) -> None:
        self.circuit, self.phase, self.start, self.stop = arguments
        self.number.fill_(-1 if self.circuit is None else self.circuit)

    def __deepcopy__(self, _: object) -> Request:
        return self  # several answers to one prompt begin as copies of their request


def given_for(
    table: SteeringTable,
    row_circuit: Mapping[str, int | None],
    phase: str,
    start: int | Mapping[str, int],
    stop: int | Mapping[str, int] | None,
) -> dict[str, Arguments]:
    """What ``Engine.requests`` was given for each request. Raises InputError, naming the argument."""
    check_phase(phase)
    if not isinstance(row_circuit, Mapping):
        raise InputError("row_circuit", f"expected a circuit's number by request id, got {type(row_circuit).__name__}")
    for name, bound in (("start", start), ("stop", stop)):
        if isinstance(bound, Mapping) and set(bound) != set(row_circuit):
            raise InputError(name, "expected one position, or one for each of the requests given")
    given: dict[str, Arguments] = {}
    for request_id, circuit in row_circuit.items():
        if not isinstance(request_id, str) or CHILD.search(request_id):
            what = "every answer to a request has the request's circuit; " * isinstance(request_id, str)
            raise InputError("row_circuit", f"{what}expected the id of a request, got {request_id!r}")
        number = None if circuit is None else whole_number("row_circuit", circuit)
        if number not in (None, -1) and number not in table.numbers:
            held = ", ".join(map(str, table.numbers[:8])) or "none"
            raise InputError("row_circuit", f"request {request_id}: expected -1 or one of {held}, got {number}")
        bounds = []
        for name, bound in (("start", start), ("stop", LARGEST if stop is None else stop)):
            position = whole_number(name, bound[request_id] if isinstance(bound, Mapping) else bound)
            if position < 0:
                raise InputError(name, f"expected positions from 0 on, got {position}")
            bounds.append(min(position, LARGEST))
        given[request_id] = number, phase, bounds[0], bounds[1]
    return given


def span(phase: str, start: int, stop: int, n_prompt: int) -> tuple[int, int]:
    """The positions that are steered, first and behind the last, of a request whose prompt has ``n_prompt`` tokens."""
    if phase == "prompt":
        stop = min(stop, n_prompt)
    elif phase == "answer":
        start = max(start, n_prompt)
    return start, max(start, stop)


class Ways:
    """A number for each way to steer a token: a circuit's content and its multiplier."""

    def __init__(self, table: SteeringTable) -> None:
        self._table = table
        self._numbers: dict[tuple[bytes, float], int] = {}
        self._last: dict[int, tuple[Entries, int]] = {}  # by circuit: what it was, and its way

    def use(self, table: SteeringTable) -> None:
        """Take another table. What was computed by a way keeps its number: caches may still hold it."""
        self._table, self._last = table, {}

    def of_circuit(self, circuit: int) -> int:
        """The way of a circuit as the table holds it now."""
        entries = self._table.held().get(circuit)
        if entries is None or (entries.multiplier == 1 and entries.mirrored is None) or not len(entries.index):
            return UNSTEERED
        before = self._last.get(circuit)
        if before is None or before[0] is not entries:
            content = hashlib.blake2b(digest_size=16)
            for part in (entries.index, *entries.edges, *([] if entries.mirrored is None else [entries.mirrored])):
                content.update(len(part).to_bytes(8, "little") + part.tobytes())
            key = content.digest(), entries.multiplier
            before = self._last[circuit] = entries, self._numbers.setdefault(key, len(self._numbers) + 1)
        return before[1]


def extended(runs: Runs, start: int, stop: int, steered: tuple[int, int], way: int) -> Runs:
    """The runs of a request whose tokens ``start`` to ``stop`` were computed now, those in ``steered`` by a way."""
    runs = [run for run in runs if run[0] < start]
    first, last = max(steered[0], start), min(steered[1], stop)
    for position, new in ((start, UNSTEERED), (first, way), (last, UNSTEERED)) if first < last else ((start, 0),):
        if runs and runs[-1][0] == position:
            runs.pop()
        if position < stop and new != (runs[-1][1] if runs else UNSTEERED):
            runs.append((position, new))
    return runs


def told_apart(tokens: Sequence[int], runs: Runs, n_vocabulary: int) -> list[int] | None:
    """The tokens as the cache is told them; None where there are too many ways to tell apart."""
    told = list(tokens)
    for place, (start, way) in enumerate(runs):
        stop = min(runs[place + 1][0] if place + 1 < len(runs) else len(told), len(told))
        if way == UNSTEERED or start >= stop:
            continue
        if (way + 1) * n_vocabulary > LARGEST or max(tokens[start:stop]) >= n_vocabulary:
            return None
        told[start:stop] = [-1 - way * n_vocabulary - token for token in tokens[start:stop]]
    return told


def prompt_of(state: Any) -> int:
    """How many tokens the prompt of a ``RequestState`` has; what was answered is read again after its cache is gone."""
    return int(state._true_initial_tokens or len(state.initial_tokens))
