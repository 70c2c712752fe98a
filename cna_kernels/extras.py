"""The optional arguments that all ops share, as one value that is passed on from the op to the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .scale import Scale

Inputs: TypeAlias = tuple[Any, ...]  # an op's tensors, in the op's order; None for one not given
Run: TypeAlias = Callable[..., Tensor]  # serves a call: a function of the op's tensors, then the extras


class Extras(NamedTuple):
    """What an op sums and how it steers. ``scale`` is given as its three tensors, as torch.library takes them."""

    token_weight: Tensor | None = None
    act_sum: Tensor | None = None
    act_sumsq: Tensor | None = None
    scale_offsets: Tensor | None = None
    scale_index: Tensor | None = None
    scale_value: Tensor | None = None
    row_circuit: Tensor | None = None

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of an op of ``reference.py``, or of a launcher."""
        token_weight, act_sum, act_sumsq, offsets, index, value, row_circuit = self
        scale = None
        if offsets is not None:
            assert index is not None and value is not None, "op_checks.py has seen the three together"
            scale = Scale(offsets, index, value)
        return dict(
            token_weight=token_weight, act_sum=act_sum, act_sumsq=act_sumsq, scale=scale, row_circuit=row_circuit
        )
