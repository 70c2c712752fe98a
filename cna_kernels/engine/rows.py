"""Which circuit each row of a batch uses, and between which positions: buffers that a captured graph reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..steering import SteeringTable
from .batching import TOKENS
from .prompt import Prompt, seen_by
from .requests import Arguments, check_phase

FARTHEST = 2**31 - 1  # beyond every position
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Rows:
    """The arguments of the last call of ``Engine.rows``.

    Attributes:
        circuit, start, stop: ``[max_rows]`` int32: the circuit of each row, and the positions between which it steers.
        given: the circuits as they were given, ``[B]`` or ``[B, S]``; None where one number was given for all rows.
        of_shape: a buffer ``[B, S]`` for each shape in which circuits were given by token.
        windowed: whether ``start`` and ``stop`` leave any position out.
        given_as: the arguments themselves. were_given: whether there was a call. given_steer: whether any row has a
        circuit. requests_steer: whether any request of continuous batching may have one. have_steered: whether any row
        ever had.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.circuit, self.start, self.stop = torch.full((3, max_rows), -1, dtype=torch.int32, device=device)
        self.max_rows, self.phase, self.windowed = max_rows, "both", False
        self.given: Tensor | None = None
        self.given_as: tuple[Any, Any, Any, Any] = None, "both", 0, None
        self.were_given = self.given_steer = self.requests_steer = self.have_steered = False
        self._each: list[Arguments] | None = None
        self.of_shape: dict[tuple[int, ...], Tensor] = {}

    def give(
        self,
        table: SteeringTable | None,
        row_circuit: int | Sequence[int] | Tensor | None,
        phase: str,
        start: int | Sequence[int],
        stop: int | Sequence[int] | None,
    ) -> None:
        """See ``Engine.rows``; without a table nobody asks whether it holds the circuits."""
        check_phase(phase)
        numbers = whole_numbers("row_circuit", -1 if row_circuit is None else row_circuit)
        if numbers.dim() > 2:
            raise InputError("row_circuit", f"expected whole numbers [B] or [B, S], got {list(numbers.shape)}")
        if numbers.dim() and numbers.shape[0] > self.max_rows:
            raise InputError("row_circuit", f"{numbers.shape[0]} rows, attached with max_rows={self.max_rows}")
        n_rows = numbers.shape[0] if numbers.dim() else self.max_rows
        bounds = []
        for name, value in (("start", start), ("stop", FARTHEST if stop is None else stop)):
            bound = whole_numbers(name, value)
            if bound.dim() > 1 or (bound.dim() and numbers.dim() == 0):
                raise InputError(name, "expected one position, or one for each of the rows given")
            if (bound < 0).any():
                raise InputError(name, f"expected positions from 0 on, got {int(bound.min())}")
            if bound.dim() and len(bound) != n_rows:
                raise InputError(name, f"expected one position, or one for each of {n_rows} rows, got {len(bound)}")
            bounds.append(bound.clamp(max=FARTHEST))
        with nullcontext() if table is None else table.lock, torch.inference_mode(False):
            if table is not None:
                table.check_rows(numbers.unique().tolist())
                self.were_given = True
            if numbers.dim() == 2:
                shape = tuple(numbers.shape)
                if shape not in self.of_shape:
                    self.of_shape[shape] = torch.empty(shape, dtype=torch.int32, device=self.circuit.device)
                self.given = self.of_shape[shape].copy_(numbers)
            else:
                self.circuit[:n_rows], self.circuit[n_rows:] = numbers.to(self.circuit), -1
                self.given = self.circuit[:n_rows] if numbers.dim() else None
            for shape, buffer in self.of_shape.items():  # what a captured graph reads that was not given now
                if numbers.dim() != 2 or shape != tuple(numbers.shape):
                    buffer.fill_(-1)
            if table is not None:
                table.keep_numbers_of(self.given if numbers.dim() == 2 and self.given is not None else self.circuit)
            for buffer, bound in zip((self.start, self.stop), bounds, strict=True):
                buffer[:n_rows] = bound.to(buffer)
            self.phase, self.given_steer = phase, bool((numbers != -1).any())
            self.have_steered |= self.given_steer
            self.given_as, self._each = (numbers.clone(), phase, _kept(start), _kept(stop)), None
            self.windowed = stop is not None or bool((bounds[0] != 0).any())

    @property
    def steers(self) -> bool:
        """Whether any row, or any request of continuous batching, may have a circuit."""
        return self.given_steer or self.requests_steer

    @property
    def each(self) -> list[Arguments]:
        """What steers each row that was given, or all rows, as requests of continuous batching."""
        if self._each is None:
            numbers, phase, start, stop = self.given_as
            circuits = whole_numbers("row_circuit", -1 if numbers is None else numbers).reshape(-1).tolist()
            bounds = [
                whole_numbers("start", bound).reshape(-1).expand(len(circuits)).clamp(max=FARTHEST).tolist()
                for bound in (start, FARTHEST if stop is None else stop)
            ]
            self._each = [(circuit, phase, *pair) for circuit, *pair in zip(circuits, *bounds, strict=True)]
        return self._each

    def of_tokens(self, shape: tuple[int, int], device: torch.device, call: dict[str, Any], prompt: Prompt) -> Tensor:
        """The circuit of each token of a call of ``shape`` [B, S]: ``[B * S]`` int32, -1 for none.

        ``call``: the arguments of the decoder by name.
        """
        if call.get("cache") is not None and call.get("cu_seq_lens_q") is not None:
            return self._of_requests(call["cache"], shape)
        n_rows, n_tokens = shape
        given, start, stop = self.given, self.start[: shape[0], None], self.stop[: shape[0], None]
        if given is not None and given.dim() == 2:
            if given.shape != shape:
                raise InputError("rows", f"given for calls of {list(given.shape)} tokens, this one has {list(shape)}")
            rows = given
        else:
            if given is not None and given.shape[0] != n_rows:
                sequence = sequences(call, given.shape[0], n_tokens) if n_rows == 1 else None
                if sequence is None:
                    raise InputError("rows", f"expected {n_rows}, one for each row of the batch, got {given.shape[0]}")
                rows, start, stop = (x[sequence.to(x.device)][None] for x in (given, self.start, self.stop))
            elif n_rows > self.max_rows:
                raise InputError("rows", f"the batch has {n_rows}, attached with max_rows={self.max_rows}")
            else:
                rows = self.circuit[:n_rows] if given is None else given
                if n_tokens == 1 and self.phase == "both" and not self.windowed:
                    return rows
                rows = rows[:, None].expand(n_rows, n_tokens)
        if self.windowed:
            position = _positions(call, n_tokens, device).to(rows.device)
            steered = (position >= start) & (position < stop)
            rows = torch.where(steered, rows, -1)
        if self.phase != "both":
            steered = prompt.tokens(n_tokens, rows.device, call)
            rows = torch.where(steered if self.phase == "prompt" else ~steered, rows, -1)
        return rows.reshape(-1).contiguous()

    def _of_requests(self, cache: Any, shape: tuple[int, int]) -> Tensor:
        """The circuit of each token of a batch of continuous batching."""
        tokens: Tensor | None = getattr(cache, TOKENS, None)
        n_tokens = shape[0] * shape[1]
        if tokens is not None and n_tokens <= tokens.shape[0]:
            return tokens[:n_tokens]
        capturing = self.circuit.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.steers or capturing:
            raise InputError("rows", "continuous batching began before attach, or is of another kind; make it anew")
        return torch.full((n_tokens,), -1, dtype=torch.int32, device=self.circuit.device)


def sequences(call: dict[str, Any], n_sequences: int, n_tokens: int) -> Tensor | None:
    """Which of the sequences that are packed in one row each token belongs to, ``[T]``; None where nothing shows them.

    ``cu_seq_lens_q`` shows them, or ``position_ids`` that begin at 0 again.

    Raises:
        InputError: the row has other than ``n_sequences`` sequences, or a compiler cannot know how many.
    """
    edges: Tensor | None = call.get("cu_seq_lens_q")
    position_ids: Tensor | None = call.get("position_ids")
    if edges is not None:
        found, column = edges.shape[0] - 1, torch.arange(n_tokens, dtype=edges.dtype, device=edges.device)
        sequence = torch.searchsorted(edges[1:].contiguous(), column, right=True).clamp(max=n_sequences - 1)
    elif position_ids is not None and position_ids.dim() == 2 and call.get("past_key_values") is None:
        if torch.compiler.is_compiling():
            raise InputError("rows", "compiled, the sequences of a packed row are not known; give cu_seq_lens_q")
        begins = position_ids[0] == 0
        sequence = begins.cumsum(0) - 1
        if not (begins[:1].all() and (begins[1:] | (position_ids[0].diff() == 1)).all()):
            return None
        found = int(sequence[-1]) + 1
    else:
        return None
    if found != n_sequences:
        raise InputError("rows", f"expected {found}, one for each sequence of a packed row, got {n_sequences}")
    return sequence


def _positions(call: dict[str, Any], n_tokens: int, device: torch.device) -> Tensor:
    """The position of each token, ``[B, S]`` or ``[1, S]``."""
    position_ids: Tensor | None = call.get("position_ids")
    if position_ids is None:
        own = torch.arange(n_tokens, dtype=torch.int64, device=device)
        return own[None] + seen_by(call.get("past_key_values"))
    return position_ids[0] if position_ids.dim() == 3 else position_ids  # 3: a picture's axes; text has equal positions


def whole_numbers(name: str, value: Any) -> Tensor:
    """The value as a tensor of whole numbers. Raises InputError for anything else, bools among it."""
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(name, f"expected whole numbers, got {value!r}") from None
    if not numbers.numel():
        raise InputError(name, "expected whole numbers, got none")
    if numbers.dtype not in WHOLE:
        kind = str(numbers.dtype).removeprefix("torch.")
        mask = "; a mask of rows says no circuit: give each row's number, -1 for none" if kind == "bool" else ""
        raise InputError(name, f"expected whole numbers, got {kind}{mask}")
    return numbers


def _kept(bound: Any) -> Any:
    """A bound that nobody changes."""
    return bound if bound is None or isinstance(bound, int) else whole_numbers("start", bound).clone()
