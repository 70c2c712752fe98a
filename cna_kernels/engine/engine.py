"""Engine: steers the rows of a model by circuits, collects sums, selects circuits, and comes off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from .. import backends
from ..circuit import Circuit
from ..errors import InputError
from ..renamed import renamed
from ..steering import SteeringTable
from .batching import Batching
from .decoder import ENGINE, decoder_forward
from .finding import Finding
from .mlps import SteeredMLP, warm_up_mlps
from .passes import ForwardPass
from .patch import is_replaced, mlp_forward, replace_forward, restore_forward
from .prompt import Prompt
from .rows import Rows
from .running import Running, ranges


class Engine(Finding):
    """What :func:`attach` returns. One forward pass at a time; ``table`` may be changed from any thread meanwhile.

    Attributes:
        table: the live :class:`SteeringTable` of the model: ``add``, ``replace``, ``remove``, ``set_multiplier``.
        n_layers, n_neurons: the model's shape as circuits see it; a mixture of experts counts all its experts' neurons.
        widths: the neurons of each layer. n_experts: the experts of each layer, 1 for a dense layer.
        mlp_names: the name of each layer's MLP, or of its experts, in the layer.
    """

    def __init__(
        self,
        decoder: nn.Module,
        mlps: Sequence[nn.Module],
        found: Sequence[tuple[str, type[SteeredMLP]]],
        backend: str | None,
        max_circuits: int,
        max_entries: int | None,
        max_rows: int,
    ) -> None:
        for name, value in (("max_circuits", max_circuits), ("max_rows", max_rows)):
            if not 1 <= value <= 1 << 20:
                raise InputError(name, f"expected 1 to {1 << 20}, got {value}")
        kinds = [kind for _, kind in found]
        self.widths = [kind.width(mlp) for kind, mlp in zip(kinds, mlps, strict=True)]
        self.n_experts = [kind.n_experts(mlp) for kind, mlp in zip(kinds, mlps, strict=True)]
        self.n_layers, self.n_neurons = len(found), max(self.widths)
        self.mlp_names = [name for name, _ in found]
        self._devices = devices = [kind.device(mlp) for kind, mlp in zip(kinds, mlps, strict=True)]
        for device in dict.fromkeys(devices):
            backends.name_for(device, backend)  # raises where the backend cannot run
        self.table = self.new_table(max_circuits=max_circuits, max_entries=max_entries)
        self._rows = rows = Rows(max_rows, devices[0])
        self._prompt, self._batching = Prompt(devices[0]), Batching(rows, self.table)
        self._now = ForwardPass(self._rows)
        self._mlps = [kind(mlps[layer], layer, backend, self._now) for layer, kind in enumerate(kinds)]
        self._take_scales()
        self._decoder: nn.Module | None = decoder  # None once the engine is off
        self._passes: Running | None = Running(decoder, self.mlp_names, self._mlps, self._now, self.table, self._prompt)
        self._was: dict[str, Any] = {}  # the model's provenance, once the engine is off

    def _take_scales(self) -> None:
        for mlp in self._mlps:
            mlp.scale = self.table.layer(mlp.layer)
        self._now.scales = [mlp.scale for mlp in self._mlps if mlp.scale is not None]

    # Steering.

    def new_table(
        self, circuits: Sequence[Circuit] = (), multipliers: Sequence[float] = (), **limits: int | None
    ) -> SteeringTable:
        """Return another table for this model; ``limits``: ``max_circuits``, ``max_entries``. See :meth:`use`."""
        return SteeringTable(
            circuits, multipliers, self.n_layers, self.n_neurons, self._devices, n_experts=self.n_experts,
            widths=self.widths, **limits,
        )  # fmt: skip

    def use(self, table: SteeringTable) -> None:
        """Steer by a table that :meth:`new_table` made, in place of ``table``. All rows are unsteered until
        :meth:`rows` is called again. What was compiled or captured before goes on with the table before.

        Raises:
            InputError: the table is of another model; or continuous batching is running, whose requests name circuits
                of the table before.
        """
        passes = self._check_attached()
        if table is self.table:
            return
        if not table.is_laid_out_as(self.table):
            raise InputError("table", "is of another model, or on other devices: use what new_table returns")
        self._batching.use(table)
        self.table = passes.table = table
        self._take_scales()
        self._rows.give(None, None, "both", 0, None)

    def set(self, circuits: Circuit | Sequence[Circuit], multipliers: float | Sequence[float] = 0.0) -> list[int]:
        """Hold these circuits, at these multipliers (one number is for all), and no others; return their numbers.

        The numbers are 0, 1, ... in the order of the circuits. A row keeps the number that :meth:`rows` gave it, and is
        unsteered if no circuit has that number. All is checked first: an error leaves the table as it was.
        """
        circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
        numbers = list(range(len(circuits)))
        given: Any = multipliers  # a number may be an array, too
        each: list[float] = [given] * len(circuits) if np.ndim(given) == 0 else list(given)
        limits = dict(max_circuits=self.table.max_circuits, max_entries=self.table.max_entries)
        trial = SteeringTable(
            [], [], self.n_layers, self.n_neurons, "meta", n_experts=self.n_experts, widths=self.widths, **limits
        )
        if len(each) != len(circuits):
            raise InputError("multipliers", f"expected {len(circuits)}, one for each circuit, got {len(each)}")
        for circuit, multiplier in zip(circuits, each, strict=True):
            trial.add(circuit, multiplier)
        with self.table.lock:
            for number in self.table.numbers:
                self.table.remove(number)
            for number, circuit, multiplier in zip(numbers, circuits, each, strict=True):
                self.table.replace(number, circuit, multiplier)
        return numbers

    @renamed(circuit_of_row="row_circuit")
    def rows(
        self,
        row_circuit: int | Sequence[int] | Tensor | None,
        *,
        phase: str = "both",
        start: int | Sequence[int] = 0,
        stop: int | Sequence[int] | None = None,
    ) -> None:
        """Say which circuit each row of the batch uses, until said otherwise.

        Args:
            row_circuit: a circuit's number, -1 for none: one number for every row of any batch, ``[B]``, or
                ``[B, S]`` for each token of calls of that shape. None is -1 for all. Rows of beam search and of
                several answers to a prompt are rows like any other; so are sequences packed in one row, which
                ``cu_seq_lens_q`` or ``position_ids`` from 0 on show.
            phase: "prompt", "answer" or "both". ``generate`` of the attached model says where a prompt ends, also in
                chunks, without a cache and with drafted tokens, and so does its continuous batching. Elsewhere a call
                on an empty cache is a prompt, and one token on a cache that holds tokens is an answer; any other call
                refuses a phase but "both".
            start, stop: positions in the sequence, one number or one for each row: steer tokens at ``start`` and later,
                before ``stop``. They are the model's ``position_ids``: ``generate`` counts from the first token that is
                not padding, a call without ``position_ids`` from the first column.

        A new call recompiles nothing, and a captured graph follows it, as long as the batch size, the phase and whether
        positions are given stay the same. In continuous batching it follows all of them.

        Raises:
            InputError: a row names no circuit of the table, or there are more than ``max_rows``.
        """
        self._check_attached()
        self._rows.give(self.table, row_circuit, phase, start, stop)

    def requests(
        self,
        row_circuit: Mapping[str, int | None],
        *,
        phase: str = "both",
        start: int | Mapping[str, int] = 0,
        stop: int | Mapping[str, int] | None = None,
    ) -> None:
        """Say which circuit requests of transformers' continuous batching use: new ones, or those that run already.

        A request that is not named has what :meth:`rows` says: one number is for all, ``[B]`` for the B inputs of each
        ``generate_batch`` or ``add_requests``, in their order. All answers to a request have its circuit. What was said
        of a request is forgotten when it ends.

        Args:
            row_circuit: a circuit's number for each request id, -1 for none; None forgets what was said. Name it
                before ``manager.add_request(..., request_id=...)``; later it changes between two steps.
            phase: "prompt", "answer" or "both"; the manager knows where each prompt ends.
            start, stop: as of :meth:`rows`: one position, or one for each request id.

        Raises:
            InputError: a request names no circuit of the table.
        """
        self._check_attached()
        self._batching.name(row_circuit, phase, start, stop)

    @contextmanager
    def steer(
        self,
        circuits: Circuit | Sequence[Circuit],
        multipliers: float | Sequence[float] = 0.0,
        rows: int | Sequence[int] | Tensor | None = None,
        *,
        phase: str = "both",
        start: int | Sequence[int] = 0,
        stop: int | Sequence[int] | None = None,
    ) -> Iterator[list[int]]:
        """Steer inside the ``with``: :meth:`set` and :meth:`rows` in one; afterwards both are as they were before.

        Args:
            circuits, multipliers: as of :meth:`set`.
            rows: as of :meth:`rows`, a number, ``[B]`` or ``[B, S]``; None is the only circuit, for all rows.
            phase, start, stop: as of :meth:`rows`.

        Yields:
            The numbers of the circuits.
        """
        self._check_attached()
        circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
        if rows is None:
            if len(circuits) != 1:
                raise InputError("rows", f"expected which of {len(circuits)} circuits each row uses, got None")
            rows = 0
        with self.table.lock:
            held, given = self.table.held(), self._rows.given_as
        try:
            with self.table.lock:
                numbers = self.set(circuits, multipliers)
                self.rows(rows, phase=phase, start=start, stop=stop)
            yield numbers
        finally:
            with self.table.lock:
                self.table.hold(held)
                self._rows.give(None, *given)

    # Discovery: in ``finding.py``, and among this class's methods in the reference pages.

    collect, new_sums, select, universal = Finding.collect, Finding.new_sums, Finding.select, Finding.universal
    down_columns, identity, check_circuit = Finding.down_columns, Finding.identity, Finding.check_circuit

    # Warming up, and coming off.

    def warm_up(self, longest: int = 4096, *, n_columns: int = 0, squares: bool = False) -> list[int]:
        """Compile the kernels that forward passes of up to ``longest`` tokens launch, so that no pass compiles any.

        Args:
            longest: the most tokens of a pass, batch times sequence; of a mixture the most (token, expert) pairs.
            n_columns: compile also for passes inside :meth:`collect` with so many columns, with squares if ``squares``.

        Returns:
            The numbers of tokens that the MLPs were called with; empty where nothing is compiled.
        """
        self._check_attached()
        return warm_up_mlps(self._mlps, self.n_experts, longest, n_columns, squares)

    def not_fused(self) -> list[str]:
        """Which MLPs do not run in one op, and why: one line for each reason, with its layers."""
        reasons: dict[str, list[int]] = {}
        for mlp in self._mlps:
            if reason := mlp.reason():
                reasons.setdefault(reason, []).append(mlp.layer)
        return [f"{ranges(layers)}: {reason}" for reason, layers in reasons.items()]

    def detach(self) -> None:
        """Take the engine off; the model is then as it was before ``attach``. Where this raises, nothing has changed.

        Raises:
            InputError: a forward was replaced after ``attach``; the engine is off; continuous batching is running.
        """
        self._check_attached()
        decoder = self._decoder
        assert decoder is not None
        self._batching.check_stopped()
        owners: list[tuple[nn.Module, str, Any]] = [(decoder, "the decoder", decoder_forward)]
        owners += [(mlp.module, f"layers[{mlp.layer}]'s MLP", mlp_forward) for mlp in self._mlps]
        for module, name, function in owners:
            if not is_replaced(module, function):
                raise InputError("detach", f"the forward of {name} was replaced after attach; take that off first")
        if self._now.waits():
            what = "a steered pass with gradients is alive: layers that its backward pass runs again run unsteered now"
            warnings.warn(f"cna_kernels: {what}", stacklevel=2)
        self._was = self._provenance()
        for mlp in self._mlps:
            mlp.take_off()
        restore_forward(decoder)
        self._prompt.take_off()
        self._batching.take_off()
        delattr(decoder, ENGINE)
        self._mlps, self._passes, self._decoder = [], None, None  # nothing of the model is kept alive

    def _check_attached(self) -> Running:
        """The passes of the decoder; InputError where the engine is off."""
        if self._passes is None or getattr(self._decoder, ENGINE, None) is not self:
            raise InputError("engine", "was detached from its model")
        return self._passes

    def _put_on(self, decoder: nn.Module) -> None:
        setattr(decoder, ENGINE, self)
        replace_forward(decoder, decoder_forward)
        for mlp in self._mlps:
            mlp.put_on()

    def __deepcopy__(self, _: object) -> None:
        return None  # a copy of an attached model is a plain model

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
