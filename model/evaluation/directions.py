"""Directions of the residual stream, the competitors of a circuit; and steering with directions.

A direction is a vector that is added to the residual stream, or taken out of it. Each row of a batch can have its own
direction at its own strength, beside rows that a circuit steers.

Sources: contrastive activation addition (CAA), N. Rimsky et al., arXiv 2312.06681; directional ablation, A. Arditi et
al., arXiv 2406.11717; all-layer addition to the MLPs' outputs, the CAA baseline in the public code of arXiv 2605.12290.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cna_kernels.errors import InputError
from cna_kernels.files import FilePath

from ..discovery.packing import TokenPrompt
from ..generate import pad
from ..transformer import Edit, Steering, Transformer

SITES = ("residual", "mlp", "writes")
BATCH = 64  # prompts whose means are taken together


@dataclass(frozen=True)
class Direction:
    """A vector to add to the residual stream, times a strength a, or to take out of the stream.

    Attributes:
        site: "residual": ``x + a * vector`` after a layer. "mlp": ``y + a * vector`` on what its MLP returns.
            "writes": ``y - a * (y . u) u`` on all that embedding, attention and MLPs add; u is the unit vector.
        vectors: fp32 ``[L, H]``, 0 in layers left alone; for "writes" ``[1, H]``.
    """

    site: str
    vectors: Tensor

    def __post_init__(self):
        if self.site not in SITES:
            raise ValueError(f"site: expected one of {', '.join(SITES)}, got {self.site!r}")
        if self.vectors.dim() != 2 or not torch.isfinite(self.vectors).all():
            raise ValueError(f"vectors: expected finite [L, H], got {tuple(self.vectors.shape)}")


class DirectionTable:
    """Directions, each at a strength, on the device. A row of a batch uses one of them by its number, or -1 for none.

    :meth:`row_direction` gives the ``transformer.Edit`` of a batch.
    """

    def __init__(
        self,
        directions: Sequence[Direction],
        strengths: Sequence[float],
        n_layers: int,
        n_hidden: int,
        device: torch.device | str = "cpu",
    ) -> None:
        n = len(directions)
        strength = torch.tensor(list(strengths), dtype=torch.float32)
        if len(strength) != n:
            raise ValueError(f"strengths: expected {n}, one for each direction, got {len(strength)}")
        self.n_directions = n
        # Row n is for rows without a direction: nothing is added or taken out.
        self.added = {site: torch.zeros(n_layers, n + 1, n_hidden, dtype=torch.float32) for site in ("residual", "mlp")}
        self.unit = torch.zeros(n + 1, n_hidden, dtype=torch.float32)
        self.share = torch.zeros(n + 1, 1, dtype=torch.float32)
        for number, direction in enumerate(directions):
            expected = (1 if direction.site == "writes" else n_layers, n_hidden)
            if tuple(direction.vectors.shape) != expected:
                raise ValueError(f"vectors: expected {expected}, got {tuple(direction.vectors.shape)}")
            if direction.site == "writes":
                self.unit[number], self.share[number] = direction.vectors[0], strength[number]
            else:
                self.added[direction.site][:, number] = strength[number] * direction.vectors
        self.layers = {site: added.flatten(1).any(1).tolist() for site, added in self.added.items()}
        self._takes_out = [bool(share) for share in self.share[:, 0]]  # the last is that of rows without a direction
        self.added = {site: added.to(device) for site, added in self.added.items()}
        self.unit, self.share = self.unit.to(device), self.share.to(device)

    def row_direction(self, direction_of_row: Sequence[int]) -> RowEdit:
        """The edit of a batch whose row b uses direction ``direction_of_row[b]``, -1 for none."""
        for number in direction_of_row:
            if not -1 <= number < self.n_directions:
                raise ValueError(f"direction_of_row: expected -1 to {self.n_directions - 1}, got {number}")
        takes_out = any(self._takes_out[number] for number in direction_of_row)
        return RowEdit(
            self, torch.tensor(list(direction_of_row), dtype=torch.int64, device=self.unit.device), takes_out
        )


@dataclass
class RowEdit(Edit):
    """A batch's edit by a :class:`DirectionTable`.

    Attributes:
        chosen: ``[B]`` int64, each row's direction, -1 for none.
        edits_writes: whether a direction of any row is taken out of all writes.
    """

    table: DirectionTable
    chosen: Tensor
    edits_writes: bool = True

    def write(self, layer: int, part: str, y: Tensor) -> Tensor:
        """Return what ``part`` of a layer adds to the stream, ``[B, S, H]``, changed."""
        table = self.table
        if part == "mlp":
            y = self._add("mlp", layer, y)
        if self.edits_writes:
            unit = table.unit[self.chosen][:, None].to(y.dtype)  # [B, 1, H]
            share = table.share[self.chosen][:, None].to(y.dtype)  # [B, 1, 1]
            y = y - share * (y * unit).sum(-1, keepdim=True) * unit
        return y

    def after(self, layer: int, x: Tensor) -> Tensor:
        """Return the stream after a layer, ``[B, S, H]``, changed."""
        return self._add("residual", layer, x)

    def keep(self, rows: Tensor) -> RowEdit:
        """Return the edit of only these rows of the batch; ``rows`` ``[any]`` int64 are their numbers."""
        return RowEdit(self.table, self.chosen[rows], self.edits_writes)

    def alike(self) -> Tensor:
        """``[B]`` int64: rows of one direction are edited alike."""
        return self.chosen

    def _add(self, site: str, layer: int, x: Tensor) -> Tensor:
        if not self.table.layers[site][layer]:
            return x
        return x + self.table.added[site][layer][self.chosen][:, None].to(x.dtype)


class _LastToken(Edit):
    """Changes nothing. Sums, at the last token of each row, what the residual stream and the MLPs' outputs hold."""

    edits_writes = False

    def __init__(self, n_layers: int, n_hidden: int):
        self.totals = {site: torch.zeros(n_layers, n_hidden, dtype=torch.float64) for site in ("residual", "mlp")}
        self.last = torch.empty(0, dtype=torch.float32)  # [B], the last token of each row

    def write(self, layer, part, y):
        if part == "mlp":
            self._sum("mlp", layer, y)
        return y

    def after(self, layer, x):
        self._sum("residual", layer, x)
        return x

    def _sum(self, site, layer, x):
        rows = torch.arange(len(self.last), dtype=torch.int64, device=x.device)
        self.totals[site][layer] += x[rows, self.last].cpu().double().sum(0)


def mean_states(transformer: Transformer, prompts: Sequence[TokenPrompt]) -> dict[str, Tensor]:
    """Return the mean over prompts, at the last token, of the stream after each layer and of each MLP's output.

    Both are fp64 ``[L, H]``: "residual" and "mlp".
    """
    config = transformer.config
    seen = _LastToken(config.num_hidden_layers, config.hidden_size)
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    with torch.inference_mode():
        for start in range(0, len(ordered), BATCH):
            members = ordered[start : start + BATCH]
            input_ids, lengths = pad([prompt.ids for prompt in members], transformer.device)
            seen.last = lengths - 1
            transformer.hidden(input_ids, lengths=lengths, steer=Steering(None, None, seen))
    for site, total in seen.totals.items():
        if not torch.isfinite(total).all():
            raise InputError("prompts", f"cause a value that is not finite in the {site} stream")
    return {site: total / len(prompts) for site, total in seen.totals.items()}


def differences(
    transformer: Transformer, positive: Sequence[TokenPrompt], negative: Sequence[TokenPrompt]
) -> dict[str, Tensor]:
    """Return mean over positive minus mean over negative of both sites of :func:`mean_states`, ``[L, H]`` each."""
    a, b = (mean_states(transformer, prompts) for prompts in (positive, negative))
    return {site: a[site] - b[site] for site in a}


def caa(difference: dict[str, Tensor], layer: int) -> Direction:
    """CAA at one layer: the difference of the residual stream after it. Strength -1 takes the behaviour away.

    Args:
        difference: of the sites "residual" and "mlp", ``[L, H]`` each; see :func:`differences`.
    """
    vectors = torch.zeros_like(difference["residual"])
    vectors[layer] = difference["residual"][layer]
    return Direction("residual", vectors.float())


def caa_as_released(difference: dict[str, Tensor]) -> Direction:
    """CAA as released: the difference of every layer's MLP output, ``[L, H]``, added at that layer.

    ``difference`` is as in :func:`caa`.
    """
    return Direction("mlp", difference["mlp"].float())


def ablation(difference: dict[str, Tensor], layer: int) -> Direction:
    """Directional ablation: the unit vector of the difference after a layer, taken out of every write to the stream.

    ``difference`` ``[L, H]`` is as in :func:`caa`.
    """
    vector = difference["residual"][layer]
    return Direction("writes", (vector / vector.norm().clamp(min=1e-30))[None].float())


def feature(difference: dict[str, Tensor], layer: int, decoder_row: Tensor) -> Direction:
    """A sparse autoencoder's feature: the projection of the residual difference on the feature's direction.

    At strength -1 it takes away what tells the two prompt sets apart along this feature, and nothing else.

    Args:
        difference: ``[L, H]`` for each site, as in :func:`caa`.
        layer: the layer whose output the autoencoder was trained on.
        decoder_row: ``[H]``, the feature's row of ``W_dec``.
    """
    unit = decoder_row.double() / decoder_row.double().norm().clamp(min=1e-30)
    vectors = torch.zeros_like(difference["residual"])
    vectors[layer] = (difference["residual"][layer] @ unit) * unit
    return Direction("residual", vectors.float())


def read_decoder_row(path: FilePath, number: int, n_hidden: int) -> Tensor:
    """Read row ``number``, ``[H]``, of ``W_dec`` ``[features, H]`` from a safetensors file."""
    if not Path(path).is_file():
        raise InputError(path, "cannot be read: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            if "W_dec" not in file.keys():  # noqa: SIM118
                raise InputError(f"{path}: W_dec", "is missing: the decoder of a sparse autoencoder is expected")
            rows = file.get_slice("W_dec")
            shape = rows.get_shape()
            if len(shape) != 2 or shape[1] != n_hidden:
                raise InputError(f"{path}: W_dec", f"expected [features, {n_hidden}], got {shape}")
            if not 0 <= number < shape[0]:
                raise InputError(f"{path}: W_dec", f"has features 0 to {shape[0] - 1}, got {number}")
            row = rows[number : number + 1][0].float()
    except SafetensorError as error:
        raise InputError(path, f"is not a safetensors file: {error}") from None
    if not torch.isfinite(row).all() or not row.any():
        raise InputError(f"{path}: W_dec", f"row {number} is zero or not finite")
    return row
