"""The optional arguments that ops share, as one value that goes from the op to the kernels unopened."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .scale import Scale


class Extras(NamedTuple):
    """What an op sums and how it steers, with ``scale`` in its three tensors, as torch.library takes them."""

    weight: Tensor | None = None
    act_sum: Tensor | None = None
    act_sumsq: Tensor | None = None
    scale_offsets: Tensor | None = None
    scale_index: Tensor | None = None
    scale_value: Tensor | None = None
    row_circuit: Tensor | None = None

    def keywords(self) -> dict:
        """The keyword arguments of an op of ``reference.py``, or of a launcher."""
        weight, act_sum, act_sumsq, *scale, row_circuit = self
        scale = None if scale[0] is None else Scale(*scale)
        return dict(weight=weight, act_sum=act_sum, act_sumsq=act_sumsq, scale=scale, row_circuit=row_circuit)
