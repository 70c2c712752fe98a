"""KVCache: the keys and values of a batch that is being decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import decode
from .checkpoint.config import ModelConfig

if TYPE_CHECKING:
    from .transformer import Transformer


class KVCache:
    """Keys and values of a batch, allocated once. Row b holds sequence b's tokens from position 0, without padding."""

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(batch, dtype=torch.int64, device=device)[:, None]  # [B, 1]
        self.used = 0  # tokens of the longest row so far
        self._step: decode.DecodeStep | None = None

    def update(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[B, KV heads, S, D]`` at ``positions [B, S]``; return all, ``[B, KV heads, used, D]``."""
        self.keys[layer][self.rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][self.rows, :, positions] = values.transpose(1, 2)
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]

    def step_of(self, transformer: Transformer) -> decode.DecodeStep:
        """What decodes on this cache in one call; made when it is first asked for."""
        if self._step is None or not self._step.fits(self):
            self._step = decode.DecodeStep(transformer, self)
        return self._step

    def keep(self, rows: Tensor):
        """Drop all rows of the batch but these ``[B']``, in this order; a row may be named several times."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.rows = torch.arange(len(rows), dtype=torch.int64, device=rows.device)[:, None]
