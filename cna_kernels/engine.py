"""attach: put the engine on a transformers model, in place, and take it off again without a trace.

    engine = attach(model)                                            the weights are the model's own
    with torch.inference_mode(), engine.collect(weight) as sums:      sums of the activations of a forward pass
        model(**batch)
    engine.set([engine.select(sums)], [0.0])                          circuits at their multipliers, and
    engine.rows([0, -1])                                              which row of the batch uses which
    model.generate(**batch)

Two kinds of ``forward`` are replaced, as attributes of the modules themselves: that of every MLP, and that of the
decoder, which learns from its arguments which token belongs to which row and at what position. Everything else stays
the model's: attention, caches, ``generate``, hooks, adapters. No hook is registered, so nothing is lost when
``torch.compile`` or a CUDA graph takes over.

What an MLP runs is decided at each call by what its parts are then (``_Site``), the first that holds:

1. backend ``reference``: the model's own modules; sums and steering on the input of ``down_proj``. Unsteered rows are
   the plain model's to the bit.
2. plain Linear layers without bias and SiLU: ``ops.gated_mlp``, all of the MLP in one op.
3. SiLU, but a quantised, adapted, hooked, offloaded or biased layer: its modules, with ``ops.swiglu`` between them.
4. another activation: the same with ``ops.down_proj`` where that layer is plain, else ``ops.steer_act``.

A mixture of experts keeps the model's own grouped products; ``ops.swiglu`` serves the (token, expert) pairs. Its
neurons are (layer, expert, index), in a circuit (layer, expert * own + index), see ``SteeringTable``.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, ops, select
from .checks import InputError, check_tensor
from .circuit import Circuit
from .steering import SteeringTable
from .sums import ActivationSums

__all__ = ["Engine", "attach", "attached"]

SUPPORTED = "Llama, Qwen2, Qwen3, Mistral, Gemma 1 to 3, Phi-3, Qwen3-MoE, Mixtral, and models whose MLPs are the same"
PHASES = ("both", "prompt", "answer")
ENGINE, SITE, BEFORE = "_cna_engine", "_cna_site", "_cna_before"  # attributes that an attached module carries


def attach(
    model: nn.Module,
    *,
    backend: str | None = None,
    max_circuits: int = 64,
    max_entries: int | None = None,
    max_rows: int = 1024,
) -> Engine:
    """Put the engine on a transformers causal LM (or a PEFT model, or a compiled one, around it), in place.

    Args:
        model: the model, with its weights where they will run. Weights are shared, not copied.
        backend: as in :func:`cna_kernels.gated_mlp`; "reference" keeps unsteered rows the plain model's to the bit.
        max_circuits: how many circuits it can hold at a time; it takes buffers for as many.
        max_entries: the neurons of all of them together; default 0.1% of the model's neurons for each, at least 256.
        max_rows: the largest batch.

    Returns:
        The :class:`Engine`. What it cannot fuse it says once, in a warning, and computes exactly all the same.

    Raises:
        InputError: the architecture is not known, or the model is attached already.
    """
    decoder = _decoder_of(model)
    if attached(model) is not None:
        raise InputError("model", "an engine is attached already; see cna_kernels.attached(model)")
    found = [_find_mlp(layer, f"layers[{number}]") for number, layer in enumerate(decoder.layers)]
    for number, (mlp, _) in enumerate(found):
        _check_free(mlp, f"layers[{number}]'s MLP")
    _check_free(decoder, "the decoder")
    engine = Engine(decoder, found, backend, max_circuits, max_entries, max_rows)
    engine._put_on()
    if left := engine.not_fused():
        warnings.warn("cna_kernels: exact, but not fused: " + "; ".join(left), stacklevel=2)
    return engine


def attached(model: nn.Module) -> Engine | None:
    """Return the engine on the model, or None."""
    return getattr(_decoder_of(model), ENGINE, None)


class Engine:
    """What :func:`attach` returns. One forward pass at a time; ``table`` may be changed from any thread meanwhile.

    Attributes:
        table: the live :class:`SteeringTable` of the model: ``add``, ``replace``, ``remove``, ``set_multiplier``.
        n_layers, n_neurons: the model's shape as circuits see it; a mixture of experts counts all its experts' neurons.
        widths: the neurons of each layer. n_experts: their experts, 1 for a dense layer.
    """

    def __init__(
        self,
        decoder: nn.Module,
        found: Sequence[tuple[nn.Module, type[_Site]]],
        backend: str | None,
        max_circuits: int,
        max_entries: int | None,
        max_rows: int,
    ) -> None:
        for name, value in (("max_circuits", max_circuits), ("max_rows", max_rows)):
            if not 1 <= value <= 1 << 20:
                raise InputError(name, f"expected 1 to {1 << 20}, got {value}")
        self.widths = [describe.width(mlp) for mlp, describe in found]
        self.n_experts = [describe.n_experts(mlp) for mlp, describe in found]
        self.n_layers, self.n_neurons = len(found), max(self.widths)
        devices = [describe.device(mlp) for mlp, describe in found]
        for device in dict.fromkeys(devices):
            backends.name_for(device, backend)  # raises where it cannot run
        self.table = SteeringTable(
            [], [], self.n_layers, self.n_neurons, devices, max_circuits=max_circuits, max_entries=max_entries,
            n_experts=self.n_experts, widths=self.widths,
        )  # fmt: skip
        self._decoder, self._devices, self._max_rows = decoder, devices, max_rows
        self._sites = [site(self, mlp, layer, backend) for layer, (mlp, site) in enumerate(found)]
        self._phase = "both"
        self._windowed = False
        self._shape: tuple[int, ...] = ()  # of the rows that were given: () for any batch, (B,) or (B, S)
        with torch.inference_mode(False):
            blank = torch.full((3, max_rows), -1, dtype=torch.int32, device=devices[0])
            self._rows, self._start, self._stop = blank  # [max_rows] each
        self._token_rows: dict[tuple[int, int], Tensor] = {}  # shape -> [B * S]
        self._buffers: dict[tuple[int, bool], list[dict]] = {}  # (columns, squares) -> of each layer
        # for the forward pass at hand
        self._collecting: _Collecting | None = None
        self._tokens: Tensor | None = None  # [T] the circuit of each token
        self._weight: Tensor | None = None  # [T, C]

    # Steering.

    def set(self, circuits: Circuit | Sequence[Circuit], multipliers: float | Sequence[float] = 0.0) -> list[int]:
        """Hold these circuits, at these multipliers (one number is for all), and no others; return their numbers.

        They are 0, 1, ... in this order. What :meth:`rows` said stays: a row keeps its number, and is unsteered where
        that is no longer there. All is checked first: an error leaves what was there.
        """
        circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
        numbers = list(range(len(circuits)))
        factors = [multipliers] * len(circuits) if np.ndim(multipliers) == 0 else list(multipliers)
        limits = dict(max_circuits=self.table.max_circuits, max_entries=self.table.max_entries)
        trial = SteeringTable(
            [], [], self.n_layers, self.n_neurons, "meta", n_experts=self.n_experts, widths=self.widths, **limits
        )
        if len(factors) != len(circuits):
            raise ValueError(f"multipliers: expected {len(circuits)}, one for each circuit, got {len(factors)}")
        for circuit, factor in zip(circuits, factors, strict=True):
            trial.add(circuit, factor)
        with self.table.lock:
            for number in self.table.numbers:
                self.table.remove(number)
            for number, circuit, factor in zip(numbers, circuits, factors, strict=True):
                self.table.replace(number, circuit, factor)
        return numbers

    def rows(
        self,
        circuit_of_row: int | Sequence[int] | Tensor | None,
        *,
        phase: str = "both",
        start: int | Sequence[int] = 0,
        stop: int | Sequence[int] | None = None,
    ) -> None:
        """Say which circuit each row of the batch uses, until said otherwise.

        Args:
            circuit_of_row: a circuit's number, -1 for none: one number for every row of any batch, ``[B]``, or
                ``[B, S]`` for each token of calls of that shape. None is -1 for all. Rows of beam search and of
                several answers to a prompt are rows like any other.
            phase: "prompt" steers tokens of calls with several tokens and the first token of a sequence; "answer"
                those of calls with one token; "both" all. Programs that cut prompts or answers otherwise use ``start``.
            start, stop: positions in the sequence, one number or one for each row: steer tokens at ``start`` and later,
                before ``stop``. Position 0 is the first token that is not padding, as in ``position_ids``.

        Writing these does not recompile, and a captured graph follows, while the batch, the phase and whether there
        are positions stay the same.

        Raises:
            InputError: a row names no circuit of the table, or there are more rows than ``max_rows``.
        """
        self._check_attached()
        if phase not in PHASES:
            raise InputError("phase", f"expected one of {', '.join(PHASES)}, got {phase!r}")
        numbers = torch.as_tensor(-1 if circuit_of_row is None else circuit_of_row)
        if numbers.dim() > 2 or numbers.is_floating_point():
            raise InputError("row_circuit", f"expected whole numbers [B] or [B, S], got {list(numbers.shape)}")
        if numbers.dim() and numbers.shape[0] > self._max_rows:
            raise InputError("row_circuit", f"{numbers.shape[0]} rows, attached with max_rows={self._max_rows}")
        n_rows = numbers.shape[0] if numbers.dim() else self._max_rows
        bounds = []
        for name, value in (("start", start), ("stop", 2**31 - 1 if stop is None else stop)):
            bound = torch.as_tensor(value)
            if bound.is_floating_point() or bound.dim() > 1 or (bound.dim() and len(bound) != n_rows):
                raise InputError(name, f"expected one position, or one for each of {n_rows} rows")
            bounds.append(bound)
        numbers = numbers.to(torch.int32)
        with self.table.lock, torch.inference_mode(False):
            self.table.check_rows(numbers.unique().tolist())
            if numbers.dim() == 2:
                shape = tuple(numbers.shape)
                buffer = self._token_rows.get(shape)
                if buffer is None:
                    buffer = self._token_rows[shape] = torch.empty(math.prod(shape), dtype=torch.int32)
                    buffer = self._token_rows[shape] = buffer.to(self._rows.device)
                buffer.copy_(numbers.flatten())
            else:
                self._rows[:n_rows] = numbers.to(self._rows.device)
            for buffer, bound in zip((self._start, self._stop), bounds, strict=True):
                buffer[:n_rows] = bound.to(buffer)
            self._shape, self._phase = tuple(numbers.shape), phase
            self._windowed = stop is not None or bool((bounds[0] != 0).any())

    # Discovery.

    @contextmanager
    def collect(
        self, weight: Tensor, sums: ActivationSums | None = None, *, squares: bool = False
    ) -> Iterator[ActivationSums]:
        """Sum the activations of the first forward pass inside the ``with``, before any steering.

        Args:
            weight: ``[B, C]``: how much each row's last prompt token counts in each of C columns; the last is the
                attention mask's, or the last of the row where there is none. ``[B, S, C]``: of each token.
            sums: sums of the same columns to go on with; default new ones.
            squares: also sum the squares, which the score "cohen-d" needs.

        Yields:
            The :class:`ActivationSums`. They change when the ``with`` ends, and not if it ends in an error.

        Raises:
            NonFiniteActivation: a sum is not finite; nothing of this pass was counted.
        """
        self._check_attached()
        if self._collecting is not None:
            raise InputError("collect", "is at work already; its `with` has not ended")
        weight = torch.as_tensor(weight)
        if weight.dim() not in (2, 3):
            raise InputError("weight", f"expected [B, C] or [B, S, C], got {list(weight.shape)}")
        n_columns = weight.shape[-1]
        if sums is None:
            sums = self.new_sums(n_columns, squares=squares)
        squares = sums.act_sumsq is not None
        check_tensor("sums.total", sums.total, shape=(self.n_layers, n_columns, self.n_neurons))
        key = n_columns, squares
        with torch.inference_mode(False):
            if key not in self._buffers:
                self._buffers[key] = [self._layer_buffers(layer, *key) for layer in range(self.n_layers)]
            self._collecting = _Collecting(weight.to(self._devices[0], torch.float32), self._buffers[key])
        for buffers in self._buffers[key]:
            for buffer in buffers.values():
                buffer.zero_()
        try:
            yield sums
            if not self._collecting.done:
                raise InputError("collect", "no forward pass ran inside the `with`")
            self._fold(sums, self._collecting)
        finally:
            self._collecting = None

    def new_sums(self, n_columns: int, *, squares: bool = False) -> ActivationSums:
        """Return empty sums of the model's shape."""
        return ActivationSums(self.n_layers, self.n_neurons, n_columns, squares=squares, device=self._devices[0])

    def select(
        self,
        sums: ActivationSums,
        *,
        fraction: float = 0.001,
        top_k: int | None = None,
        score: str = "abs-delta",
        exclude: Sequence[tuple[int, int]] = (),
        skip_layers: Sequence[int] = (),
        position: str | None = None,
    ) -> Circuit:
        """Select the neurons that differ most between column 0, the positive prompts, and column 1, the negative.

        Args:
            sums: of two columns.
            fraction: of the model's neurons to take; ``top_k``, where given, wins.
            score: one of ``select.SCORES``.
            exclude: (layer, index) of neurons to leave out, such as what :meth:`universal` returns.
            skip_layers: layers to leave out.
            position: what the counted tokens are, such as "last prompt token"; the circuit's file will say it.
        """
        width = torch.tensor(self.widths)[:, None]
        excluded = select.mask_layers(self.n_layers, self.n_neurons, skip_layers)
        excluded |= torch.arange(self.n_neurons) >= width
        for layer, index in exclude:
            if not (0 <= layer < self.n_layers and 0 <= index < self.widths[layer]):
                raise InputError("exclude", f"({layer}, {index}) is no neuron of this model")
            excluded[layer, index] = True
        k = top_k
        if k is None:  # of the neurons that there are: rows of `excluded` may be wider than their layer
            k = select.k_from_fraction(fraction, 1, int(width.sum()))
        delta = select.contrast(sums).cpu()
        chosen = select.top_neurons(select.scores(score, sums, delta.to(sums.total.device)).cpu(), k, excluded)
        return Circuit(
            neurons=tuple((layer, index, delta[layer, index].item()) for layer, index in chosen),
            n_layers=self.n_layers,
            n_neurons=self.n_neurons,
            score=score,
            fraction=fraction if top_k is None else None,
            k_rule=select.K_RULE if top_k is None else "given",
            position=position,
            skipped_layers=tuple(skip_layers),
        )

    def universal(
        self, sums: ActivationSums, *, fraction: float = 0.001, threshold: float = 0.8
    ) -> list[tuple[int, int]]:
        """Return the (layer, index) that are among the largest by magnitude in most columns: neurons that fire anyway.

        Args:
            sums: one column for each of some unrelated prompts, as ``collect(torch.eye(n_prompts))`` gives.
            fraction: of the model's neurons, which are the largest.
            threshold: the share of the columns that is most.

        Source: the universal filter of arXiv 2605.12290.
        """
        k = select.k_from_fraction(fraction, 1, sum(self.widths))
        counts = select.count_top(sums.total.abs().cpu(), k)
        return [tuple(pair) for pair in (counts >= max(threshold * len(sums.count) - 1e-9, 1)).nonzero().tolist()]

    # Life.

    def not_fused(self) -> list[str]:
        """What does not run in one op, and why: one line for each reason, with its layers."""
        reasons: dict[str, list[int]] = {}
        for site in self._sites:
            if reason := site.reason():
                reasons.setdefault(reason, []).append(site.layer)
        return [f"{_ranges(layers)}: {reason}" for reason, layers in reasons.items()]

    def detach(self) -> None:
        """Take the engine off; the model is as it was. Nothing changes where that is not possible.

        Raises:
            InputError: something was put on top of the engine since, and must come off first; or it is off already.
        """
        self._check_attached()
        owners = [(self._decoder, "the decoder")]
        owners += [(site.mlp, f"layers[{site.layer}]'s MLP") for site in self._sites]
        for module, name in owners:
            current = module.__dict__.get(_slot(module))
            if getattr(current, "__func__", None) not in (_mlp_forward, _decoder_forward):
                raise InputError("detach", f"the forward of {name} was replaced after attach; take that off first")
        for module, _ in owners:
            before = module.__dict__.pop(BEFORE)
            if before is None:
                delattr(module, _slot(module))
            else:
                setattr(module, _slot(module), before)
        for site in self._sites:
            site.take_off()
            delattr(site.mlp, SITE)
        delattr(self._decoder, ENGINE)

    def _check_attached(self):
        if getattr(self._decoder, ENGINE, None) is not self:
            raise InputError("engine", "was detached from its model")

    def _put_on(self):
        setattr(self._decoder, ENGINE, self)
        _replace_forward(self._decoder, _decoder_forward)
        for site in self._sites:
            setattr(site.mlp, SITE, site)
            _replace_forward(site.mlp, _mlp_forward)
            site.put_on()

    def __deepcopy__(self, _):
        return None  # a copy of an attached model is a plain model

    def __reduce__(self):
        return type(None), ()

    # One forward pass.

    def _begin(self, shape, device, attention_mask, position_ids, past):
        """What the sites need for a call of ``shape`` [B, S] tokens."""
        self._tokens = self._circuit_of_tokens(shape, device, position_ids, past)
        collecting = self._collecting
        if collecting is None or collecting.done:
            self._weight = None
        else:
            self._weight = collecting.of_call(shape, device, attention_mask)

    def _end(self):
        self._tokens = self._weight = None

    def _circuit_of_tokens(self, shape, device, position_ids, past):
        n_rows, n_tokens = shape
        given = self._shape
        if len(given) == 2:
            if tuple(shape) != given:
                raise InputError("rows", f"given for calls of {list(given)} tokens, this one has {list(shape)}")
            rows = self._token_rows[given].view(shape)
        else:
            if len(given) == 1 and given[0] != n_rows:
                raise InputError("rows", f"expected {n_rows}, one for each row of the batch, got {given[0]}")
            if n_rows > self._max_rows:
                raise InputError("rows", f"the batch has {n_rows}, attached with max_rows={self._max_rows}")
            rows = self._rows[:n_rows]
            if n_tokens == 1 and self._phase == "both" and not self._windowed:
                return rows
            rows = rows[:, None].expand(n_rows, n_tokens)
        if self._phase != "both" or self._windowed:
            if position_ids is None:
                seen = past.get_seq_length() if past is not None else 0
                position_ids = (torch.arange(n_tokens, device=device) + seen)[None]
            position = position_ids.to(rows.device)
            steered = (position >= self._start[:n_rows, None]) & (position < self._stop[:n_rows, None])
            if self._phase == "answer":
                steered = steered & (position > 0) if n_tokens == 1 else torch.zeros_like(steered)
            elif self._phase == "prompt" and n_tokens == 1:
                steered = steered & (position == 0)
            rows = torch.where(steered, rows, -1)
        return rows.reshape(-1).contiguous()

    def _extras(self, layer, device):
        """The optional arguments of a layer's op."""
        tokens = self._tokens
        if tokens is None:
            raise InputError("attach", "an MLP ran outside its model's forward pass, where no row is known")
        extras = {"scale": self.table.layer(layer), "row_circuit": tokens.to(device)}
        if self._weight is not None:
            extras["weight"] = self._weight.to(device)
            extras |= self._collecting.buffers[layer]
        return extras

    def _layer_buffers(self, layer, n_columns, squares):
        names = ("act_sum", "act_sumsq") if squares else ("act_sum",)
        shape = n_columns, self.widths[layer]
        return {name: torch.zeros(shape, dtype=torch.float32, device=self._devices[layer]) for name in names}

    def _fold(self, sums, collecting):
        sums.discard()
        for layer, buffers in enumerate(collecting.buffers):
            for name, buffer in buffers.items():
                getattr(sums, name)[layer, :, : self.widths[layer]] = buffer.to(sums.act_sum.device)
        sums.fold(collecting.counted)


class _Collecting:
    """The weight of one forward pass, the sums it goes to, and whether the pass has begun."""

    def __init__(self, weight, buffers):
        self.weight, self.buffers = weight, buffers
        self.counted = weight if weight.dim() == 2 else weight.flatten(0, 1)  # [any, C] what is counted in all
        self.done = False

    def of_call(self, shape, device, attention_mask):
        """``[T, C]``"""
        expected = list(shape[: self.weight.dim() - 1])
        if list(self.weight.shape[:-1]) != expected:
            raise InputError("weight", f"expected {[*expected, self.weight.shape[-1]]}, got {list(self.weight.shape)}")
        self.done = True
        weight = self.weight.to(device)
        if weight.dim() == 2:
            place = torch.arange(shape[1], device=device)
            last = place[-1:].expand(shape[0])
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                last = (attention_mask[:, -shape[1] :].to(device) * place).argmax(1)
            weight = (place == last[:, None])[:, :, None] * weight[:, None]
        return weight.flatten(0, 1)


# What replaces a module's forward. Both are called "forward", so that a pickled model asks its class for it again.


def _mlp_forward(self, *args, **kwargs):
    site = getattr(self, SITE, None)
    return _call_plain(self, *args, **kwargs) if site is None else site.run(*args, **kwargs)


def _decoder_forward(self, *args, **kwargs):
    engine = getattr(self, ENGINE, None)
    if engine is None:
        return _call_plain(self, *args, **kwargs)

    def argument(name, place):
        return kwargs[name] if name in kwargs else args[place] if len(args) > place else None

    embeds, ids = argument("inputs_embeds", 4), argument("input_ids", 0)
    source = ids if embeds is None else embeds
    with nullcontext() if torch.compiler.is_compiling() else engine.table.lock:
        engine._begin(
            source.shape[:2],
            source.device,
            argument("attention_mask", 1),
            argument("position_ids", 2),
            argument("past_key_values", 3),
        )
        try:
            return _call_plain(self, *args, **kwargs)
        finally:
            engine._end()


_mlp_forward.__name__ = _decoder_forward.__name__ = "forward"


def _slot(module):
    """Where a module's forward lies: accelerate keeps it behind its hook, which moves and loads weights first."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _replace_forward(module, function):
    current = module.__dict__.get(_slot(module))
    if getattr(current, "__func__", None) is not function:  # a copy of an attached module has it, without an engine
        setattr(module, BEFORE, current)
        setattr(module, _slot(module), types.MethodType(function, module))


def _call_plain(module, *args, **kwargs):
    """The forward that was there before."""
    before = getattr(module, BEFORE, None)
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def _check_free(module, name):
    current = module.__dict__.get("forward")
    known = (None, type(module).forward, _mlp_forward, _decoder_forward)
    if not hasattr(module, "_hf_hook") and getattr(current, "__func__", current) not in known:
        raise InputError("model", f"the forward of {name} was replaced by something else; take that off first")


# The places where the engine works.


def _plain_linear(module) -> bool:
    """Whether a layer is nothing but a product with a weight: no bias, adapter, quantisation, hook or offloading."""
    if type(module) is not nn.Linear:
        return False
    parts = module.__dict__  # a quarter of the time that attributes of a module take
    parameters = parts["_parameters"]
    weight = parameters["weight"]
    return (
        parameters["bias"] is None
        and "forward" not in parts
        and type(weight) is nn.Parameter
        and weight.dtype in ops.FLOATS
        and not weight.is_meta
        and not (parts["_forward_hooks"] or parts["_forward_pre_hooks"] or parts["_backward_hooks"])
    )


def _is_silu(activation) -> bool:
    return activation is F.silu or isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _kind(module) -> str:
    return f"{type(module).__module__.split('.')[0]}.{type(module).__name__}"


class _Site:
    """An MLP: ``down_proj(activation(gate) * up)``."""

    def __init__(self, engine, mlp, layer, backend):
        self.engine, self.mlp, self.layer, self.backend = engine, mlp, layer, backend
        self.in_modules = backends.name_for(self.device(mlp), backend) == "reference"
        self.silu = _is_silu(self.activation(mlp))

    def __deepcopy__(self, _):
        return None

    def __reduce__(self):
        return type(None), ()

    def put_on(self):
        pass

    def take_off(self):
        pass

    @staticmethod
    def n_experts(mlp):
        return 1

    @staticmethod
    def device(mlp):
        hook = getattr(mlp.down_proj, "_hf_hook", None)  # offloaded weights are on the meta device
        place = getattr(hook, "execution_device", None)
        if place is not None:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        tensors = (x.device for part in (mlp.down_proj, mlp) for x in (*part.parameters(), *part.buffers()))
        return next(tensors, torch.device("cpu"))  # packed out of sight, by PyTorch's own quantisation for CPUs

    def reason(self) -> str | None:
        """Why the MLP is not one op, or None."""
        if self.in_modules:
            return None
        odd = [f"{name} is {_kind(part)}" for name, part in self.parts().items() if type(part) is not nn.Linear]
        odd += [
            f"{name} has a bias, a hook or an unusual weight"
            for name, part in self.parts().items()
            if type(part) is nn.Linear and not _plain_linear(part)
        ]
        if not self.silu:
            odd.insert(0, f"the activation is {type(self.activation(self.mlp)).__name__}")
        return ", ".join(odd) or None

    def run(self, x):
        """x ``[..., H]`` -> y ``[..., H]``"""
        extras = self.engine._extras(self.layer, x.device)
        down, backend = self.mlp.down_proj, self.backend
        if self.in_modules:
            act = self.plain_act(x)
            return down(ops.steer_act(act.flatten(0, -2), **extras, backend=backend).view(act.shape))
        plain = all(_plain_linear(part) for part in self.parts().values()) and _same_dtype(x, down)
        if plain and self.silu:
            return ops.gated_mlp(x.flatten(0, -2), self.weights(), down.weight, **extras, backend=backend).view(x.shape)
        if self.silu:
            gate, up = self.gate_and_up(x)
            act = ops.swiglu(gate.flatten(0, -2), up.flatten(0, -2), **extras, backend=backend)
            return down(act.view(*x.shape[:-1], -1))
        act = self.plain_act(x)
        if _plain_linear(down) and _same_dtype(act, down):
            y = ops.down_proj(act.flatten(0, -2), down.weight, **extras, backend=backend)
            return y.view(*x.shape[:-1], -1)
        return down(ops.steer_act(act.flatten(0, -2), **extras, backend=backend).view(act.shape))


def _same_dtype(x, linear):
    return x.dtype == linear.weight.dtype and not torch.is_autocast_enabled(x.device.type)


class Apart(_Site):
    """gate_proj and up_proj: Llama and most others."""

    @staticmethod
    def activation(mlp):
        return mlp.act_fn

    @staticmethod
    def width(mlp):
        return mlp.down_proj.in_features

    def parts(self):
        mlp = self.mlp
        return {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj, "down_proj": mlp.down_proj}

    def weights(self):
        return self.mlp.gate_proj.weight, self.mlp.up_proj.weight

    def gate_and_up(self, x):
        return self.mlp.gate_proj(x), self.mlp.up_proj(x)

    def plain_act(self, x):
        return self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)


class Joined(_Site):
    """gate_up_proj, one layer: Phi-3."""

    @staticmethod
    def activation(mlp):
        return mlp.activation_fn

    @staticmethod
    def width(mlp):
        return mlp.down_proj.in_features

    def parts(self):
        return {"gate_up_proj": self.mlp.gate_up_proj, "down_proj": self.mlp.down_proj}

    def weights(self):
        return self.mlp.gate_up_proj.weight

    def gate_and_up(self, x):
        return self.mlp.gate_up_proj(x).chunk(2, dim=-1)

    def plain_act(self, x):
        gate, up = self.gate_and_up(x)
        return up * self.mlp.activation_fn(gate)


class Experts(_Site):
    """The experts of a mixture, whose weights are ``[E, 2N, H]`` and ``[E, H, N]``.

    The products stay with the implementation that the model is configured for; it hands the gate and up of its
    (token, expert) pairs to ``_apply_gate``, which is replaced. In the layer's table a pair uses circuit
    ``c * E + expert``, and in its sums column ``c * E + expert``.
    """

    GROUPED, BATCHED, EAGER = "grouped_mm", "batched_mm", "eager"

    def __init__(self, engine, mlp, layer, backend):
        super().__init__(engine, mlp, layer, backend)
        self.pairs = None  # of the call at hand: the token and the expert of each

    @staticmethod
    def activation(mlp):
        return mlp.act_fn

    @staticmethod
    def width(mlp):
        return mlp.num_experts * mlp.down_proj.shape[2]

    @staticmethod
    def n_experts(mlp):
        return mlp.num_experts

    @staticmethod
    def device(mlp):
        return mlp.down_proj.device

    def put_on(self):
        self.mlp._apply_gate = types.MethodType(_apply_gate, self.mlp)

    def take_off(self):
        del self.mlp._apply_gate

    def reason(self):
        if self.in_modules or self.silu:
            return None
        return f"the activation is {type(self.activation(self.mlp)).__name__}"

    def run(self, hidden_states, top_k_index, top_k_weights):
        """``[T, H]``, the experts of each token ``[T, k]`` and what they weigh -> ``[T, H]``"""
        how = self.mlp.config._experts_implementation
        if how == self.EAGER:
            return self.one_by_one(hidden_states, top_k_index, top_k_weights)
        experts, n_each = top_k_index.reshape(-1), top_k_index.shape[-1]
        if how == self.GROUPED:
            experts, order = torch.sort(experts)
            self.pairs = order // n_each, experts
        elif how == self.BATCHED:
            self.pairs = torch.arange(len(experts), device=experts.device) // n_each, experts
        else:
            raise InputError("experts_implementation", f"expected grouped_mm, batched_mm or eager, got {how!r}")
        try:
            return _call_plain(self.mlp, hidden_states, top_k_index, top_k_weights)
        finally:
            self.pairs = None

    def one_by_one(self, x, top_k_index, top_k_weights):
        y = torch.zeros_like(x)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            self.pairs = token, torch.full_like(token, expert)
            act = self.act(F.linear(x[token], self.mlp.gate_up_proj[expert]))
            part = F.linear(act, self.mlp.down_proj[expert]) * top_k_weights[token, place, None]
            y.index_add_(0, token, part.to(y.dtype))
        self.pairs = None
        return y

    def act(self, gate_up):
        """``[P, 2N]`` of the pairs -> their act ``[P, N]``, summed and scaled."""
        token, expert = self.pairs
        gate, up = gate_up.chunk(2, dim=-1)
        n_experts = self.mlp.num_experts
        extras = self.engine._extras(self.layer, gate.device)
        circuit = extras["row_circuit"][token]
        extras["row_circuit"] = torch.where(circuit >= 0, circuit * n_experts + expert, -1).int()
        if "weight" in extras:
            mine = expert[:, None] == torch.arange(n_experts, device=expert.device)  # [P, E]
            extras["weight"] = (extras["weight"][token][:, :, None] * mine[:, None]).flatten(1)  # [P, C * E]
            for name in ("act_sum", "act_sumsq"):
                if name in extras:
                    extras[name] = extras[name].view(-1, gate.shape[1])  # [C, E * N] -> [C * E, N]
        if self.silu and not self.in_modules:
            return ops.swiglu(gate, up, **extras, backend=self.backend)
        return ops.steer_act(self.mlp.act_fn(gate) * up, **extras, backend=self.backend)


def _apply_gate(self, gate_up):
    site = getattr(self, SITE, None)
    return type(self)._apply_gate(self, gate_up) if site is None else site.act(gate_up)


_apply_gate.__name__ = "_apply_gate"


# Finding them.


def _decoder_of(model):
    """The module whose ``layers`` are the model's."""
    inner = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise InputError("model", f"{type(inner).__name__} has no decoder with `layers`; supported: {SUPPORTED}")
    return decoder


def _find_mlp(layer, where):
    """The MLP of a layer and the kind of site that serves it, known by the code of its forward."""
    found = [(module, site) for module in layer.modules() if (site := _site_for(module)) is not None]
    if len(found) != 1:
        what = "no MLP that is known (gate_proj or gate_up_proj with down_proj)" if not found else "several MLPs"
        raise InputError("model", f"{where}, a {type(layer).__name__}, has {what}; supported: {SUPPORTED}")
    mlp, site = found[0]
    if site is Experts and (mlp.has_bias or mlp.is_transposed or not mlp.has_gate or mlp._is_expert_parallel):
        raise InputError("model", f"{where}: experts with a bias, transposed, without a gate or parallel; {SUPPORTED}")
    return mlp, site


def _site_for(module):
    """The kind of site by what the module's forward does: the code of one of three modules of transformers."""
    if not hasattr(module, "down_proj"):
        return None
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    code = _code(type(module))
    for known, site in ((LlamaMLP, Apart), (Phi3MLP, Joined), (MixtralExperts, Experts)):
        if code == _code(known):
            return site
    return None


def _code(kind):
    function = getattr(kind.forward, "__wrapped__", kind.forward)
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts)


def _ranges(numbers):
    """[0, 1, 2, 5] as "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' * (len(numbers) > 1)} {text}"
