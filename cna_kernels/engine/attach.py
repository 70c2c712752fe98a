"""attach: put the engine on a transformers model, in place, and take it off again without a trace.

    engine = attach(model)                                            the weights are the model's own
    with torch.inference_mode(), engine.collect(token_weight) as sums:      sums of the activations of a forward pass
        model(**batch)
    engine.set([engine.select(sums)], [0.0])                          circuits at their multipliers, and
    engine.rows([0, -1])                                              which circuit each row of the batch uses
    model.generate(**batch)

Two kinds of ``forward`` are replaced, as attributes of the modules themselves: that of every MLP (``mlps.py``; of
experts also ``_apply_gate``), and that of the decoder, which learns from its arguments which token belongs to which row
and at what position. Everything else stays the model's: attention, caches, ``generate``, hooks, adapters. No hook is
registered, so nothing is lost when ``torch.compile`` or a CUDA graph takes over.
"""

from __future__ import annotations

import warnings

from torch import nn

from ..errors import InputError
from ..fields import whole_number
from .decoder import ENGINE, decoder_forward
from .engine import Engine
from .find import find_decoder, find_mlps
from .forwards import learn_activations
from .patch import STEERED, is_replaced


def attach(
    model: nn.Module,
    *,
    backend: str | None = None,
    max_circuits: int = 64,
    max_entries: int | None = None,
    max_rows: int = 1024,
) -> Engine:
    """Put the engine on a transformers causal LM (or a PEFT or compiled model around one), in place.

    Args:
        model: the model, with its weights on the devices where they will run. Weights are shared, not copied.
        backend: as in :func:`cna_kernels.gated_mlp`; "reference" keeps unsteered rows the plain model's to the bit.
        max_circuits: how many circuits the engine can hold at a time; it allocates buffers for so many.
        max_entries: how many neurons all circuits together may have; default 0.1% of the model's neurons for each
            circuit, at least 256 for each.
        max_rows: the largest batch, in rows.

    Returns:
        The :class:`Engine`. A warning names the layers that it cannot fuse; it computes these exactly all the same.

    Raises:
        InputError: the architecture is not known, or the model is attached already.
    """
    max_circuits, max_rows = whole_number("max_circuits", max_circuits), whole_number("max_rows", max_rows)
    max_entries = None if max_entries is None else whole_number("max_entries", max_entries)
    if max_entries is not None and max_entries < 0:
        raise InputError("max_entries", f"expected 0 or more, got {max_entries}")
    decoder = find_decoder(model)
    if attached(model) is not None:
        raise InputError("model", "an engine is attached already; see cna_kernels.attached(model)")
    learn_activations()
    found = find_mlps(decoder)
    mlps = [mlp for *_, mlp in found]
    if len(set(map(id, mlps))) < len(mlps):
        raise InputError("model", "two of its layers share an MLP, which cannot be steered apart")
    if any(getattr(mlp, STEERED, None) is not None for mlp in mlps):
        raise InputError("model", "an MLP of it has an engine already, that of another model around it")
    current = decoder.__dict__.get("forward")
    known = "_hf_hook" in decoder.__dict__ or is_replaced(decoder, decoder_forward)
    if current is not None and not known and getattr(current, "__func__", current) is not type(decoder).forward:
        raise InputError("model", "the forward of the decoder was replaced by something else; take that off first")
    engine = Engine(
        decoder, mlps, [(name, kind) for name, kind, _ in found], backend, max_circuits, max_entries, max_rows
    )
    engine._put_on(decoder)
    engine._prompt.put_on(model, decoder, lambda around: getattr(around, ENGINE, None))
    if left := engine.not_fused():
        warnings.warn("cna_kernels: exact, but not fused: " + "; ".join(left), stacklevel=2)
    return engine


def attached(model: nn.Module) -> Engine | None:
    """Return the engine on the model, or None."""
    return getattr(find_decoder(model), ENGINE, None)
