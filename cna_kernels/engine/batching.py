"""Phases in transformers' continuous batching, whose calls hold pieces of several requests in one row.

What the device sees of a piece is its length and its position: several tokens, or a request's beginning, are taken for
prompt, one token for answer. The scheduler knows the requests. A batch with a piece that this takes wrongly is refused
before it runs, in graphs as well: the last token of a prompt alone (the prompt was cut, or its beginning was cached),
and an answer that is read again after its blocks were taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

MORE = "give `start` and `stop` instead, which are positions"


class Batching:
    """The schedulers that are watched. ``by_phase``: whether a phase is asked for, which the pieces must then show."""

    def __init__(self, by_phase: Callable[[], bool]) -> None:
        self._by_phase = by_phase
        self._managers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(self, manager: Any) -> Any:
        """Have the scheduler of a ``ContinuousBatchingManager``, which it makes later, ask :meth:`check`."""
        create: Callable[[], Any] | None = getattr(manager, "_create_batch_processor", None)
        if create is None or manager in self._managers:
            return manager  # of another kind: its caches stay unknown, and a phase is refused

        def create_batch_processor() -> Any:
            processor = create()
            schedule_batch = getattr(getattr(processor, "scheduler", None), "schedule_batch", None)
            if schedule_batch is not None and processor.cache not in self._caches:
                processor.scheduler.schedule_batch = self._checked(schedule_batch)
                self._caches.add(processor.cache)
            return processor

        self._managers.add(manager)
        manager._create_batch_processor = create_batch_processor
        return manager

    def _checked(self, schedule_batch: Callable[..., Any]) -> Callable[..., Any]:
        def schedule(*args: Any, **kwargs: Any) -> Any:
            found = schedule_batch(*args, **kwargs)
            if self._by_phase():
                for piece in found[0] or ():
                    self.check(piece)
            return found

        return schedule

    def check(self, piece: Any) -> None:
        """Raise InputError if the length of a piece, a ``FutureRequestState``, does not say its phase."""
        state, n_tokens = piece.state, piece.query_length
        prompt, start = state._true_initial_tokens or len(state.initial_tokens), state.position_offset
        taken_for_prompt = n_tokens > 1 or start == 0
        if start + n_tokens > prompt if taken_for_prompt else start < prompt:
            what = "an answer that is read again" if taken_for_prompt else "the last token of a prompt that was cut"
            raise InputError("phase", f"request {state.request_id}: {what} cannot be told apart; {MORE}")

    def of_pieces(self, cache: Any, edges: Tensor, position: Tensor) -> Tensor:
        """The tokens of prompts in a call, ``[1, T]`` bool. ``edges``: ``[R + 1]``, of the pieces; position ``[1, T]``.

        Raises:
            InputError: nobody watches the scheduler of this cache.
        """
        if cache not in self._caches:
            raise InputError("phase", f"continuous batching began before attach, or is of another kind; {MORE}")
        column = torch.arange(position.shape[1], dtype=edges.dtype, device=edges.device)
        piece = torch.searchsorted(edges[1:].contiguous(), column, right=True).clamp(max=edges.shape[0] - 2)
        return (edges.diff()[piece] > 1)[None] | (position == 0)
