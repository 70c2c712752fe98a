"""Which circuit each row of a batch uses, and between which positions: buffers that a captured graph reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..steering import SteeringTable
from .prompt import Prompt, seen_by

PHASES = ("both", "prompt", "answer")
FARTHEST = 2**31 - 1  # beyond every position
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Rows:
    """The arguments of the last call of ``Engine.rows``.

    Attributes:
        circuit, start, stop: ``[max_rows]`` int32: the circuit of each row, and the positions between which it steers.
        given: the circuits as they were given, ``[B]`` or ``[B, S]``; None where one number was given for all rows.
        of_shape: a buffer ``[B, S]`` for each shape in which circuits were given by token.
        windowed: whether ``start`` and ``stop`` leave any position out.
        given_as: the arguments themselves. were_given: whether there was a call. steers: whether any row has a circuit.
        have_steered: whether any ever had.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.circuit, self.start, self.stop = torch.full((3, max_rows), -1, dtype=torch.int32, device=device)
        self.max_rows, self.phase, self.windowed = max_rows, "both", False
        self.given: Tensor | None = None
        self.given_as: tuple[Any, Any, Any, Any] = None, "both", 0, None
        self.were_given = self.steers = self.have_steered = False
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
        if phase not in PHASES:
            raise InputError("phase", f"expected one of {', '.join(PHASES)}, got {phase!r}")
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
            self.phase, self.steers = phase, bool((numbers != -1).any())
            self.have_steered |= self.steers
            self.given_as = numbers.clone(), phase, _kept(start), _kept(stop)
            self.windowed = stop is not None or bool((bounds[0] != 0).any())

    def of_tokens(self, shape: tuple[int, int], device: torch.device, call: dict[str, Any], prompt: Prompt) -> Tensor:
        """The circuit of each token of a call of ``shape`` [B, S]: ``[B * S]`` int32, -1 for none.

        ``call``: the arguments of the decoder by name.
        """
        n_rows, n_tokens = shape
        given = self.given
        if given is not None and given.dim() == 2:
            if given.shape != shape:
                raise InputError("rows", f"given for calls of {list(given.shape)} tokens, this one has {list(shape)}")
            rows = given
        else:
            if given is not None and given.shape[0] != n_rows:
                raise InputError("rows", f"expected {n_rows}, one for each row of the batch, got {given.shape[0]}")
            if n_rows > self.max_rows:
                raise InputError("rows", f"the batch has {n_rows}, attached with max_rows={self.max_rows}")
            rows = self.circuit[:n_rows] if given is None else given
            if n_tokens == 1 and self.phase == "both" and not self.windowed:
                return rows
            rows = rows[:, None].expand(n_rows, n_tokens)
        if self.windowed:
            position = _positions(call, n_tokens, device).to(rows.device)
            steered = (position >= self.start[:n_rows, None]) & (position < self.stop[:n_rows, None])
            rows = torch.where(steered, rows, -1)
        if self.phase != "both":
            steered = prompt.tokens(n_tokens, rows.device, call)
            rows = torch.where(steered if self.phase == "prompt" else ~steered, rows, -1)
        return rows.reshape(-1).contiguous()


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
