"""transformers' continuous batching: a call holds pieces of several requests in one row, and the scheduler knows which.

Four of its objects are watched, each by methods put in the place of its own: the manager, to which requests come; the
scheduler, which takes them over; the inputs, which say which pieces are in a batch; and the processor, which launches
it. Just before a launch, with the table locked, the circuit of every token is written to a buffer of the cache. The
decoder reads it there, in captured graphs as well. The cache itself is told what steered its tokens, see `requests.py`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..steering import SteeringTable
from .managers import COMPLETE, check_known, is_running
from .requests import (
    CHILD,
    Arguments,
    Request,
    Runs,
    Ways,
    extended,
    given_for,
    prompt_of,
    span,
    told_apart,
)

if TYPE_CHECKING:
    from .rows import Rows

TOKENS = "_cna_tokens"  # of a cache: the circuit of each token of the batch at hand, [max_batch_tokens] int32
REQUEST, RUNS = "_cna_request", "_cna_runs"  # of a request's state: what steers it, and what steered its cache


class Batching:
    """The managers that are watched, and the requests that were named for any of them.

    Attributes:
        named: what steers requests that no scheduler has seen yet, by their ids.
    """

    def __init__(self, rows: Rows, table: SteeringTable) -> None:
        self.rows, self.table, self.ways = rows, table, Ways(table)
        self.named: dict[str, Request] = {}
        self._watched: weakref.WeakSet[Watched] = weakref.WeakSet()

    def name(
        self,
        row_circuit: Mapping[str, int | None],
        phase: str,
        start: int | Mapping[str, int],
        stop: int | Mapping[str, int] | None,
    ) -> None:
        """See ``Engine.requests``."""
        with self.table.lock:
            for request_id, arguments in given_for(self.table, row_circuit, phase, start, stop).items():
                self.named.pop(request_id, None)
                if running := self._in_flight(request_id):
                    running.change(arguments)
                elif arguments[0] is not None:
                    self.named[request_id] = self.new(arguments)
                self.rows.requests_steer |= arguments[0] not in (None, -1)
            self.rows.were_given = True

    def new(self, arguments: Arguments) -> Request:
        request = Request(arguments)
        self.table.keep_numbers_of(request.number)
        return request

    def settle(self) -> None:
        """A manager has nothing in flight."""
        if not self.named and not any(watched.added or watched.live for watched in self._watched):
            self.rows.requests_steer = False

    def _in_flight(self, request_id: str) -> Request | None:
        found = (watched.in_flight(request_id) for watched in self._watched)
        return next((request for request in found if request is not None), None)

    def check_inputs(self, n_inputs: int) -> None:
        """Raise InputError unless the rows that were given are one for each of so many requests, or one for all."""
        given = self.rows.given
        if given is not None and (given.dim() != 1 or len(given) != n_inputs):
            got = list(given.shape) if given.dim() != 1 else len(given)
            raise InputError("rows", f"expected {n_inputs}, one for each request of continuous batching, got {got}")

    def watch(self, manager: Any) -> Any:
        """Watch a ``ContinuousBatchingManager``, and return it.

        Raises:
            InputError: its requests cannot be told apart: this transformers is built otherwise, or it began before.
        """
        if any(watched.manager() is manager for watched in self._watched):
            return manager
        check_known(manager)
        if manager.batch_processor is not None or is_running(manager):
            what = "this manager began before attach; call destroy_cached_continuous_batching_manager() first"
            raise InputError("init_continuous_batching", what)
        self._watched.add(Watched(manager, self))
        return manager

    def use(self, table: SteeringTable) -> None:
        """Take another table. Raises InputError if a manager is running."""
        self.check_stopped("table")
        self.named.clear()
        self.table = table
        self.ways.use(table)

    def check_stopped(self, where: str = "detach") -> None:
        """Raise InputError if a manager is running, whose requests are in the middle of their answers."""
        if any(is_running(watched.manager()) for watched in self._watched):
            raise InputError(where, "continuous batching is running; stop its manager first")

    def take_off(self) -> None:
        for watched in list(self._watched):
            watched.take_off()
        self._watched.clear()
        self.named.clear()


class Watched:
    """One manager, and what belongs to it; the manager keeps it alive.

    Attributes:
        added: what steers requests that were added by :meth:`add_requests` and that the scheduler has not seen yet.
        live: what steers those that it has seen, by the ids of the requests.
        pieces: of the batch that is launched next: state, first position, tokens.
    """

    def __init__(self, manager: Any, batching: Batching) -> None:
        self.batching, self.manager = batching, weakref.ref(manager)
        self.added: dict[str, Request] = {}
        self.live: weakref.WeakValueDictionary[str, Request] = weakref.WeakValueDictionary()
        self.pieces: list[tuple[Any, int, int]] = []
        self._replaced: list[tuple[weakref.ref[Any], str]] = []
        self._processor: weakref.ref[Any] | None = None
        self._here = threading.local()  # .held_back: requests that `add_requests` of this thread adds, or None
        for name in ("_create_batch_processor", "add_request", "add_requests"):
            self._replace(manager, name, getattr(self, name.removeprefix("_")))

    def _replace(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        """Put ``method`` in the place of an object's own; its first argument is that one."""
        own = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: method(own, *args, **kwargs))
        self._replaced.append((weakref.ref(owner), name))

    def take_off(self) -> None:
        for ref, name in self._replaced:
            if (owner := ref()) is not None:
                vars(owner).pop(name, None)
        manager, processor = self.manager(), self._processor() if self._processor else None
        if processor is not None:
            delattr(processor.cache, TOKENS)
        if manager is not None:
            manager.batch_processor, manager.warmed_up = None, False  # its graphs would run the engine's kernels

    # The manager, in threads of the program.

    def create_batch_processor(self, own: Callable[[], Any]) -> Any:
        processor = own()
        if self._processor is None or self._processor() is not processor:
            self._processor = weakref.ref(processor)
            cache = processor.cache
            n_tokens = int(cache.max_batch_tokens)
            self._numbers, self._n_written = np.full(n_tokens, -1, dtype=np.int32), 0
            self._n_vocabulary = int(getattr(processor.config, "vocab_size", 1 << 19))
            self._shares = bool(cache.use_prefix_sharing)
            with torch.inference_mode(False):
                tokens = torch.full((n_tokens,), -1, dtype=torch.int32, device=self.batching.rows.circuit.device)
            setattr(cache, TOKENS, tokens)
            self._replace(processor.scheduler, "add_waiting_request", self.add_waiting_request)
            self._replace(processor.inputs_and_outputs, "prepare_batch_tensors", self.prepare_batch_tensors)
            self._replace(processor, "prepare_next_batch", self.prepare_next_batch)
            self._replace(processor, "_generation_step", self.launch)
            self._replace(cache, "search_prefix_match", self.search_prefix_match)
            self._replace(cache, next(name for name in COMPLETE if hasattr(cache, name)), self.mark_complete_blocks)
        return processor

    def add_requests(self, own: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Give each request what ``Engine.rows`` says of its row, in the order of ``inputs``."""
        rows = self.batching.rows
        with self.batching.table.lock:
            self.batching.check_inputs(len(inputs))
            by_row = rows.each if rows.given is not None else None
        if by_row is None:
            return own(inputs, *args, **kwargs)
        held_back: list[Callable[[], Any]] = []
        self._here.held_back = held_back
        try:
            request_ids = own(inputs, *args, **kwargs)
        finally:
            self._here.held_back = None
        if len(held_back) != len(inputs) or len(request_ids) != len(inputs):
            raise InputError("rows", "this transformers adds requests otherwise; name them with Engine.requests")
        with self.batching.table.lock:
            for request_id, arguments in zip(request_ids, by_row, strict=True):
                self.added[request_id] = self.batching.new(arguments)
                rows.requests_steer |= arguments[0] != -1
        left = set(request_ids) if getattr(self.manager(), "is_tp_driver", True) else set[str]()
        try:
            for add in held_back:
                left.discard(add())
        finally:
            for request_id in left:  # the manager has stopped, or its queue is full
                self.added.pop(request_id, None)
        return request_ids

    def add_request(self, own: Callable[..., Any], input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        held_back = getattr(self._here, "held_back", None)
        if held_back is not None:
            held_back.append(lambda: own(input_ids, *args, **kwargs))
            return None
        request_id = args[0] if args else kwargs.get("request_id")
        if request_id not in self.batching.named and self.in_flight(request_id) is None:
            self._check_for_all(request_id)
        return own(input_ids, *args, **kwargs)

    def in_flight(self, request_id: str | None) -> Request | None:
        """What steers a request that has not ended, or an answer to it."""
        request = None if request_id is None else self.added.get(request_id) or self.live.get(request_id)
        if request is None or request_id in self.added:
            return request
        return request if any(getattr(state, REQUEST, None) is request for state in self._states()) else None

    def _states(self) -> list[Any]:
        processor = self._processor() if self._processor else None
        if processor is None:
            return []
        scheduler = processor.scheduler
        return [*list(scheduler.active_requests.values()), *list(scheduler.waiting_requests.values())]

    # The scheduler, the cache and the launch, in the thread of the manager.

    def add_waiting_request(self, own: Callable[..., Any], state: Any) -> Any:
        """A request comes: a new one, one whose cache was taken, or a further answer that found no room."""
        batching, request_id = self.batching, state.request_id
        with batching.table.lock:
            request = self.added.pop(request_id, None) or batching.named.pop(request_id, None)
            if request is None:
                request_id = CHILD.sub("", request_id)
                request = self.live.get(request_id)
            if request is not None:
                self.live[request_id] = request
            setattr(state, REQUEST, request)
        return own(state)

    def prepare_next_batch(self, own: Callable[[], bool]) -> bool:
        more = own()
        if not more and not self._states():  # nothing is in flight, so that no number is in use
            self.pieces = []
            with self.batching.table.lock:
                for request in list(self.live.values()):
                    request.number.fill_(-1)
                self.live.clear()
                self.batching.settle()
        return more

    def prepare_batch_tensors(self, own: Callable[..., Any], requests_in_batch: Any, *args: Any, **kwargs: Any) -> Any:
        self.pieces = [(one.state, one.state.position_offset, one.query_length) for one in requests_in_batch]
        return own(requests_in_batch, *args, **kwargs)

    def launch(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        processor = self._processor() if self._processor else None
        assert processor is not None, "it launches"
        with self.batching.table.lock:
            self._write(getattr(processor.cache, TOKENS), processor.inputs_and_outputs.compute_stream)
            return own(*args, **kwargs)

    def _write(self, tokens: Tensor, stream: Any) -> None:
        """Write the circuit of each token of the batch, in the order of the stream that will read them."""
        numbers, edge = self._numbers, 0
        before, self._n_written = self._n_written, 0
        numbers[:before] = -1
        for state, start, n_tokens in self.pieces:
            circuit, (first, last) = self._steering(state)
            if self._shares:
                runs: Runs = vars(state).setdefault(RUNS, [])
                runs[:] = extended(runs, start, start + n_tokens, (first, last), self.batching.ways.of_circuit(circuit))
            first, last = max(first, start), min(last, start + n_tokens)
            if first < last:
                numbers[edge + first - start : edge + last - start] = circuit
                self._n_written = edge + last - start
            edge += n_tokens
        n_written = max(before, self._n_written)
        if n_written:
            given = torch.from_numpy(numbers[:n_written].copy())
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                tokens[:n_written].copy_(given.pin_memory() if tokens.is_cuda else given, non_blocking=True)

    def _steering(self, state: Any) -> tuple[int, tuple[int, int]]:
        """A request's circuit, and the positions between which it is steered."""
        request: Request | None = getattr(state, REQUEST, None)
        if request is None or request.circuit is None:
            circuit, phase, start, stop = self._check_for_all(state.request_id)
        else:
            circuit, phase, start, stop = request.circuit, request.phase, request.start, request.stop
        if circuit is None or circuit == -1:
            return -1, (0, 0)
        return circuit, span(phase, start, stop, prompt_of(state))

    def _check_for_all(self, request_id: str | None) -> Arguments:
        """What steers a request that was not named. Raises InputError where rows were given one by one."""
        rows = self.batching.rows
        if not rows.given_steer:
            return -1, "both", 0, 0
        if rows.given is not None:
            who = "a request" if request_id is None else f"request {request_id}"
            raise InputError("rows", f"given one by one, and {who} has none of them; name it with Engine.requests")
        return rows.each[0]

    def search_prefix_match(self, own: Callable[..., int], request_id: str, prompt_ids: list[int]) -> int:
        """Find blocks of the same tokens that were steered alike."""
        state = next((state for state in self._states() if state.request_id == request_id), None)
        if state is None:
            return 0
        with self.batching.table.lock:
            circuit, steered = self._steering(state)
            runs = extended([], 0, len(prompt_ids), steered, self.batching.ways.of_circuit(circuit))
        told = told_apart(prompt_ids, runs, self._n_vocabulary)
        n_tokens = 0 if told is None else own(request_id, told)
        setattr(state, RUNS, [run for run in runs if run[0] < n_tokens])
        return n_tokens

    def mark_complete_blocks(self, own: Callable[..., Any], state: Any, complete: Any) -> Any:
        """Have the cache know the blocks that a request has filled by their tokens and by what steered these."""
        told = told_apart(state.initial_tokens + state.generated_tokens, vars(state).get(RUNS, []), self._n_vocabulary)
        if told is None:
            return None
        return own(_Told(state, told), complete)


class _Told:
    """A request's state with other tokens."""

    def __init__(self, state: Any, tokens: list[int]) -> None:
        self._state, self.initial_tokens, self.generated_tokens = state, tokens, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)
