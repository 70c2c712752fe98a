"""The forward pass at hand, and those whose layers gradient checkpointing may run once more.

A backward pass runs checkpointed layers again, when other passes have run, rows and circuits have changed. The layers'
own pass is found by the number that autograd gives to every node of its graph: a pass knows its first and last number,
and the node that is at work tells which pass it comes from. What a pass must know is kept as long as its graph lives.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import checkpoint

from ..errors import InputError
from ..scale import Scale
from .rows import Rows


class State(NamedTuple):
    """What MLPs must know of their pass.

    tokens: ``[T]`` int32, the circuit of each token; None outside a pass.
    token_weight: ``[T, C]`` fp32, how much each token counts, or None where nothing is summed.
    in_modules: whether the MLPs call their layers one by one, because others watch the layers.
    scales: each layer's Scale as it was, in a pass that is run again; None for the engine's table.
    """

    tokens: Tensor | None = None
    token_weight: Tensor | None = None
    in_modules: bool = False
    scales: Sequence[Scale] | None = None


class Graded:
    """A pass with gradients: its state, and the numbers of its nodes in autograd's graph."""

    def __init__(self, state: State, first: int, last: int) -> None:
        self.state, self.first, self.last = state, first, last


class ForwardPass:
    """The pass at hand.

    Attributes:
        state: what it is. scales: each layer's part of the engine's table.
        graded: the passes that may run again, dead ones until the next pass with gradients.
    """

    def __init__(self, rows: Rows) -> None:
        self.state, self.rows = State(), rows
        self.scales: list[Scale] = []
        self.graded: list[weakref.ref[Graded]] = []
        self._in_backward: State | None = None
        self._copied: tuple[tuple[int, ...], list[Scale]] = (), []

    # In the order of a pass: begin, what MLPs ask for, end.

    def begin(self, state: State) -> tuple[State, int]:
        """Set the state; what comes back is for ``end``: the state before, and the number of autograd's next node."""
        before, self.state = self.state, state
        number = 0 if torch.compiler.is_compiling() else _next_number()
        return before, number

    def end(self, begun: tuple[State, int], result: Any = None) -> None:
        """Go back to the state before. ``result`` is what the decoder returned, None if it raised."""
        state, (self.state, first) = self.state, begun
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        nodes = list(_nodes(result))
        if not nodes or state.tokens is None:
            return
        if state.scales is None:
            scales = self._copy_scales() if self.rows.steers else None
            state = State(state.tokens.clone(), None, state.in_modules, scales)
        graded = Graded(state, first, _next_number())
        for node in nodes:
            node.register_prehook(functools.partial(self._start_backward, graded))  # lives as long as the node
        self.graded = [weakref.ref(graded), *(ref for ref in self.graded if ref() is not None)]

    def _start_backward(self, graded: Graded, *_: Any) -> None:
        self._in_backward = graded.state
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._in_backward = None

    def again(self) -> State | None:
        """The state of the pass to which the node of autograd belongs that is at work; None if there is none.

        A compiler cannot ask for the node. It takes the pass whose backward pass began last: autograd works through the
        nodes from the last one back, so that a pass is done before one before it begins.

        Raises:
            InputError: passes of several threads have nodes of this number.
        """
        if torch.compiler.is_compiling():
            return self._in_backward
        number = _number_at_work()
        if number is None:
            return None
        found = [graded.state for graded in self._alive() if graded.first <= number < graded.last]
        if len(found) > 1:
            raise InputError("attach", "layers run again, and passes of several threads may be their own")
        return found[0] if found else None

    def again_as_a_whole(self) -> State | None:
        """The state of the pass that a checkpoint around the whole model runs again; None if none runs again.

        Raises:
            InputError: which pass it is cannot be known.
        """
        number = _number_at_work()
        if number is None or not _is_run_again():
            return None
        before = [graded for graded in self._alive() if graded.last <= number]
        if before:  # the node at work comes after the decoder: it is of the model's head
            return max(before, key=lambda graded: graded.last).state
        if not self.rows.steers:
            return None
        what = "a checkpoint around the whole model runs it again, with which rows cannot be known"
        raise InputError("rows", f"{what}; use use_reentrant=False, or gradient_checkpointing_enable()")

    def check_not_run_again(self) -> None:
        """Raise InputError if a layer of a pass that may have been steered runs again, and the pass is gone."""
        if self.rows.have_steered and torch.is_grad_enabled() and not torch.compiler.is_compiling() and _is_run_again():
            what = "a layer runs again for its gradients, and its pass is gone, with the rows that were steered"
            raise InputError("attach", f"{what}; keep what the model returned until the backward pass")

    def waits(self) -> bool:
        """Whether a steered pass is alive whose layers a backward pass may run again."""
        return any(graded.state.scales is not None for graded in self._alive())

    def _alive(self) -> list[Graded]:
        return [graded for ref in self.graded if (graded := ref()) is not None]

    def _copy_scales(self) -> list[Scale]:
        """Copies of the table's tensors as they are now; one copy serves all passes until the table changes."""
        version = tuple(x._version for scale in self.scales for x in scale)
        if version != self._copied[0]:
            copies: dict[int, Tensor] = {}
            for scale in self.scales:
                for x in scale:
                    if id(x) not in copies:
                        copies[id(x)] = x.clone()
            self._copied = version, [Scale(*(copies[id(x)] for x in scale)) for scale in self.scales]
        return self._copied[1]


def _next_number() -> int:
    """The number that autograd gives to the next node of this thread."""
    return torch._C._autograd._get_sequence_nr()


def _number_at_work() -> int | None:
    """The number of the node of autograd that is at work; None outside of backward passes that build graphs."""
    node = torch._C._current_autograd_node() if torch.is_grad_enabled() else None
    return None if node is None else int(node._sequence_nr())


def _is_run_again() -> bool:
    """Whether torch.utils.checkpoint runs a function again, for its gradients, around this call."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__ and frame.f_code.co_name in ("recompute_fn", "backward"):
            return True
        frame = frame.f_back
    return False


def _nodes(result: Any) -> Iterator[Any]:
    """The nodes of autograd that made the tensors of a decoder's result."""
    if isinstance(result, Tensor):
        if result.grad_fn is not None:
            yield result.grad_fn
    elif isinstance(result, (tuple, list, Mapping)):
        for part in result.values() if isinstance(result, Mapping) else result:
            yield from _nodes(part)
