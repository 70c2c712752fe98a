"""Rank 0 runs the program; the other ranks make the calls of a shared model that rank 0 makes.

A program that all ranks ran would have to take every decision alike: by free memory, by files, by the time. So only
rank 0 runs it, through a Lead. Before each call that needs the other ranks, rank 0 tells them the call and its
arguments, then all ranks make it together. Nothing but these calls runs on the others: they read the checkpoint, and
no other file, write nothing, choose no token and print nothing but an error of their own.

After an error within a call nobody knows how far the others came. So such an error ends all ranks: it is RanksFailed
until ``work`` has ended, because programs that catch an InputError go on without what failed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cna_kernels.circuit import Circuit
from cna_kernels.errors import InputError, InputWarning
from cna_kernels.sums import ActivationSums

from ..checkpoint.formats import open_checkpoint, read_config
from ..discovery.collect import collect
from ..evaluation.directions import DirectionTable
from ..kv_cache import KVCache
from ..memory import is_out_of_memory, usable_device
from ..steering import Steering, Tap
from .messages import Channel, Names, loads
from .sharded_table import ShardedTable
from .tensor_parallel import TIMEOUT, OtherRankFailed, ParallelTransformer, load_parallel, named_if_lost, open_mesh

T = TypeVar("T")
MOMENT = timedelta(seconds=3)  # how long a rank that fails waits to hear whether rank 0 has failed, too


class RanksFailed(Exception):
    """A call that the ranks make together has failed, or a rank is gone. ``error``, an InputError, says which."""

    def __init__(self, error: InputError):
        super().__init__(str(error))
        self.error = error


def run_led(work: Callable[[Lead], T], device: torch.device | str = "cpu", *, timeout: timedelta = TIMEOUT) -> T | None:
    """Run ``work`` on rank 0 of torchrun's processes, and return what it returns. All processes call this function.

    On the other ranks the function returns None when ``work`` has ended on rank 0, with or without an error.

    Args:
        work: gets the Lead, with which ``load(directory, mesh=lead)`` shares a model.
        device, timeout: as for ``open_mesh``.

    Raises:
        InputError: a call failed on this rank, or another rank is gone.
    """
    device = usable_device(device)
    mesh = open_mesh(device, timeout=timeout)
    channel = Channel()
    if mesh.get_local_rank() > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)  # rank 0 gives the same ones
            _follow(channel, _Calls(mesh, device))
        return None
    lead = Lead(mesh, channel, device)
    try:
        return work(lead)
    except RanksFailed as failed:
        raise failed.error from None
    finally:
        lead.end()


class Lead:
    """Rank 0's hold on the other ranks, made by :func:`run_led`."""

    def __init__(self, mesh: DeviceMesh, channel: Channel, device: torch.device):
        self.mesh, self.device, self._channel = mesh, device, channel
        self._names = Names(sent_once=(DirectionTable,))
        self._ended: str | None = None  # why the other ranks take no more calls

    def load(self, directory, config, checkpoint, *, dtype=None, device="cpu") -> LedTransformer:
        """Share a checkpoint among the ranks. The arguments and errors are those of ``load_parallel``."""
        if torch.device(device) != self.device:
            raise InputError("device", f"the ranks of this model run on {self.device}, got {device}")
        model = LedTransformer(self)
        with self.together("load", str(directory), dtype, gives=model):
            model.part = load_parallel(directory, config, checkpoint, mesh=self.mesh, dtype=dtype, device=device)
        return model

    @contextmanager
    def together(self, call: str, *args: object, gives: object = None) -> Iterator[None]:
        """Tell the other ranks to make a call of :class:`_Calls`. This rank makes its own inside the ``with``.

        ``gives``: the object here whose counterpart on the other ranks is what they get from the call.
        """
        if self._ended is not None:
            raise RanksFailed(InputError("ranks", f"take no more calls: {self._ended}"))
        number = None if gives is None else self._names.give(gives)
        try:
            with named_if_lost(self.mesh):
                self._channel.send(self._names.dumps((call, args, number, self._names.dropped())))
                yield
        except BaseException as error:
            named = _named(error, self.mesh)
            self._ended = str(named) or type(named).__name__
            self._channel.fail(self._ended)
            raise (RanksFailed(named) if isinstance(named, InputError) else named) from None

    def end(self) -> None:
        """Let the other ranks go."""
        if self._ended is None:
            self._ended = "they have ended"
            with contextlib.suppress(RuntimeError):  # one is gone already
                self._channel.send(self._names.dumps(("end", (), None, [])))


def load_shared(directory, config, checkpoint, *, mesh: DeviceMesh | Lead, **options) -> Any:
    """The transformer of a model that ranks share: a LedTransformer by a Lead, a ParallelTransformer by a mesh."""
    if isinstance(mesh, Lead):
        return mesh.load(directory, config, checkpoint, **options)
    return load_parallel(directory, config, checkpoint, mesh=mesh, **options)


class LedTransformer:
    """Rank 0's ParallelTransformer, for programs that know a Transformer: each call takes the other ranks along.

    Whoever begins or makes a step wants the logits of what comes out. They are computed with it: that is one call of
    the other ranks instead of two.
    """

    answers = True
    part: ParallelTransformer

    def __init__(self, lead: Lead):
        self._lead = lead
        self._last: tuple[Tensor, Tensor] | None = None  # hidden states of the last step, and their logits

    def __getattr__(self, name: str) -> Any:
        if name == "part":  # not loaded yet
            raise AttributeError(name)
        return getattr(self.part, name)  # config, dtype, device, layers, down_columns, ...: of this rank alone

    def __call__(self, input_ids: Tensor, *, tap: Tap | None = None, steer: Steering | None = None) -> Tensor:
        return self.logits(self.hidden(input_ids, tap=tap, steer=steer))

    def hidden(
        self, input_ids: Tensor, *, lengths: Tensor | None = None, tap: Tap | None = None, steer: Steering | None = None
    ) -> Tensor:
        """As of a Transformer, for whole sequences."""
        if tap is not None:
            raise InputError("tap", "ranks that share a model sum activations in `collect` alone")
        with self._lead.together("hidden", self, input_ids, lengths, steer), torch.no_grad():
            return self.part.hidden(input_ids, lengths=lengths, steer=steer)

    def logits(self, hidden: Tensor) -> Tensor:
        """As of a Transformer."""
        if self._last is not None and self._last[0] is hidden:
            return self._last[1]
        with self._lead.together("logits", self, tuple(hidden.shape)), torch.no_grad():
            hidden = hidden.to(self.part.dtype).contiguous()
            dist.broadcast(hidden, 0, group=self.part.mesh.get_group())
            return self.part.logits(hidden)

    def begin(
        self, input_ids: Tensor, lengths: Tensor, cache_length: int, steer: Steering | None = None
    ) -> tuple[Tensor, LedCache]:
        """As of a Transformer."""
        cache = LedCache(self._lead)
        with self._lead.together("begin", self, input_ids, lengths, cache_length, steer, gives=cache), torch.no_grad():
            hidden, cache.part = self.part.begin(input_ids, lengths, cache_length, steer)
            self._last = hidden, self.part.logits(hidden)
        return hidden, cache

    def step(self, tokens: Tensor, lengths: Tensor, cache: LedCache, steer: Steering | None = None) -> Tensor:
        """As of a Transformer."""
        with self._lead.together("step", self, tokens, lengths, cache, steer), torch.no_grad():
            hidden = self.part.step(tokens, lengths, cache.part, steer)
            self._last = hidden, self.part.logits(hidden)
        return hidden

    def new_table(self, circuits: Sequence[Circuit], multipliers: Sequence[float]) -> LedTable:
        """As of a Transformer."""
        config, mesh = self.part.config, self.part.mesh
        shape = config.num_hidden_layers, config.intermediate_size
        table = LedTable(circuits, multipliers, *shape, self.part.device, rank=0, n_ranks=mesh.size())
        with self._lead.together("new_table", self, list(circuits), list(multipliers), gives=table):
            table.lead = self._lead
        return table

    def warm_up(self, longest: int, *, n_columns: int = 2, squares: bool = False) -> list[int]:
        """As of a Transformer; every rank compiles its own kernels."""
        with self._lead.together("warm_up", self, longest, n_columns, squares):
            return self.part.warm_up(longest, n_columns=n_columns, squares=squares)

    @contextmanager
    def own_sums(self, sums: ActivationSums, prompts, column_weights, batch, max_tokens) -> Iterator[ActivationSums]:
        """As of a Transformer: ``collect`` begins here, and begins on the other ranks."""
        how = tuple(sums.total.shape), sums.total_sq is not None, batch, max_tokens
        with (
            self._lead.together("collect", self, list(prompts), column_weights, *how),
            self.part.own_sums(sums, prompts, column_weights, batch, max_tokens) as own,
        ):
            yield own


class LedCache:
    """Rank 0's part of a cache. What drops rows here drops them on every rank."""

    part: KVCache

    def __init__(self, lead: Lead):
        self._lead = lead

    def keep(self, rows: Tensor) -> None:
        """As of a KVCache."""
        with self._lead.together("change", self, "keep", rows):
            self.part.keep(rows)


class LedTable(ShardedTable):
    """Rank 0's part of a table. A change is made here first, where bad input shows, and then on the other ranks."""

    lead: Lead | None = None  # before it is known: the table is being made

    def replace(self, number: int, circuit: Circuit, multiplier: float | Sequence[float]) -> None:
        """As of a SteeringTable."""
        super().replace(number, circuit, multiplier)
        self._tell("replace", number, circuit, multiplier)

    def remove(self, number: int) -> None:
        """As of a SteeringTable."""
        super().remove(number)
        self._tell("remove", number)

    def set_multiplier(self, number: int, multiplier: float) -> None:
        """As of a SteeringTable."""
        super().set_multiplier(number, multiplier)
        self._tell("set_multiplier", number, multiplier)

    def _tell(self, method: str, *args: object) -> None:
        if self.lead is not None:
            with self.lead.together("change", self, method, *args):
                pass


class _Calls:
    """What the other ranks do when rank 0 says so. A method returns what rank 0 may name later, or None."""

    def __init__(self, mesh: DeviceMesh, device: torch.device):
        self.mesh, self.device = mesh, device

    def load(self, directory: str, dtype: torch.dtype | None) -> ParallelTransformer:
        files = read_config(directory), open_checkpoint(directory)
        return load_parallel(directory, *files, mesh=self.mesh, dtype=dtype, device=self.device)

    def hidden(self, model: ParallelTransformer, input_ids, lengths, steer) -> None:
        model.hidden(input_ids, lengths=lengths, steer=steer)

    def logits(self, model: ParallelTransformer, shape: tuple[int, ...]) -> None:
        hidden = torch.empty(shape, dtype=model.dtype, device=self.device)
        dist.broadcast(hidden, 0, group=self.mesh.get_group())
        model.logits(hidden)

    def begin(self, model: ParallelTransformer, *args) -> KVCache:
        hidden, cache = model.begin(*args)
        model.logits(hidden)
        return cache

    def step(self, model: ParallelTransformer, *args) -> None:
        model.logits(model.step(*args))

    def new_table(self, model: ParallelTransformer, circuits, multipliers) -> ShardedTable:
        return model.new_table(circuits, multipliers)

    def change(self, held: KVCache | ShardedTable, method: str, *args) -> None:
        getattr(held, method)(*args)

    def warm_up(self, model: ParallelTransformer, longest: int, n_columns: int, squares: bool) -> None:
        model.warm_up(longest, n_columns=n_columns, squares=squares)

    def collect(self, model: ParallelTransformer, prompts, column_weights, shape, squares, batch, max_tokens) -> None:
        n_layers, n_columns, n_neurons = shape
        sums = ActivationSums(n_layers, n_neurons, n_columns, squares=squares)  # as on rank 0; nobody reads them
        collect(model, prompts, column_weights, sums, batch=batch, max_tokens=max_tokens)


def _follow(channel: Channel, calls: _Calls) -> None:
    """Make the calls that rank 0 names until it ends. Raises an error that rank 0 does not have, too."""
    held: dict[int, Any] = {}
    try:
        with named_if_lost(calls.mesh), torch.inference_mode():
            while True:
                call, args, number, dropped = loads(channel.receive(), held, calls.device)
                for gone in dropped:
                    held.pop(gone, None)
                if call == "end":
                    return
                given = getattr(calls, call)(*args)
                if number is not None:
                    held[number] = given
                del args, given  # what rank 0 drops is not kept alive until the next call
    except Exception as error:
        named = _named(error, calls.mesh)
        why = channel.failure(MOMENT)  # if rank 0 knows what is wrong, it has told the user
        if why is None or (why != str(named) and not isinstance(named, OtherRankFailed)):
            raise named from None


def _named(error: BaseException, mesh: DeviceMesh) -> BaseException:
    """The error, or where memory ran out a line that names the rank: ranks cannot go on in halves, out of step."""
    if isinstance(error, Exception) and is_out_of_memory(error):
        return InputError(f"rank {mesh.get_local_rank()}", "out of memory; ask for fewer at once (--batch)")
    return error
