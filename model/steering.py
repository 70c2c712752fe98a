"""What a forward pass does besides: sum activations (Tap), steer by circuits (Steering), change the stream (Edit)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cna_kernels.steering import SteeringTable
from cna_kernels.sums import ActivationSums


@dataclass
class Tap:
    """Collect sums during a forward pass. ``token_weight`` is ``[B * S, C]`` fp32: how much each token counts."""

    sums: ActivationSums
    token_weight: Tensor


class Edit:
    """Sees, and may change, the residual stream of a forward pass. ``write`` and ``after`` return what replaces it.

    Attributes:
        edits_writes: whether ``write`` changes what embedding and attention add, too, and not only the MLPs' outputs.
    """

    edits_writes = True

    def write(self, layer: int, part: str, y: Tensor) -> Tensor:
        """``y`` ``[B, S, H]`` is what a layer's "attention" or "mlp" returns, or "embedding", the stream's start. On
        our own engine a layer adds just that to the stream."""
        return y

    def after(self, layer: int, x: Tensor) -> Tensor:
        """``x`` ``[B, S, H]`` is the stream after a layer."""
        return x

    def keep(self, rows: Tensor) -> Edit:
        """Return the edit of only these ``rows`` of the batch, ``[B']``, in this order."""
        return self

    def alike(self) -> Tensor | None:
        """``[B]`` int64: rows that are edited alike have the same number. None: that is not known."""
        return None


@dataclass
class Steering:
    """Steer a forward pass.

    Attributes:
        table: circuits at their multipliers, or None.
        row_circuit: ``[B]`` int32: the circuit of each sequence, -1 for none.
        edit: an Edit of the residual stream, or None.
    """

    table: SteeringTable | None
    row_circuit: Tensor | None
    edit: Edit | None = None

    def keep(self, rows: Tensor) -> Steering:
        """Return the steering of only these ``rows`` of the batch, ``[B']``, in this order."""
        row_circuit = None if self.row_circuit is None else self.row_circuit[rows]
        return Steering(self.table, row_circuit, None if self.edit is None else self.edit.keep(rows))

    def alike(self, batch: int) -> Tensor | None:
        """``[B, 2]`` int64: rows that are steered alike have the same numbers. None: that is not known."""
        plain = torch.zeros(batch, dtype=torch.int64)
        circuit = plain if self.row_circuit is None else self.row_circuit.cpu().long()
        edit = plain if self.edit is None else self.edit.alike()
        return None if edit is None else torch.stack((circuit, edit.cpu()), dim=1)


Steer = Steering  # the name of Steering before 0.2
