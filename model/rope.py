"""Rotary position embedding (J. Su et al., arXiv 2104.09864) with the scalings of Llama checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checkpoint.config import ModelConfig, Rope


class RotaryEmbedding(nn.Module):
    """cos and sin of every position. ``dynamic`` scaling depends on each sequence's own length, never on its batch."""

    exponent: Tensor
    inv_freq: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rope = config.rope
        self.max_position = config.max_position_embeddings
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        self.register_buffer("exponent", exponent, persistent=False)  # [D / 2]
        self.register_buffer("inv_freq", _scaled(1.0 / self.rope.theta**exponent, self.rope), persistent=False)

    def forward(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin ``[B, 1, S, D]``.

        Args:
            positions: ``[B, S]`` int64.
            lengths: ``[B]`` int64, tokens seen so far in each row; only ``dynamic`` scaling reads it.
        """
        inv_freq = self.inv_freq
        if self.rope.kind == "dynamic":
            inv_freq = self._dynamic(lengths)[:, None]  # [B, 1, D / 2]
        angle = positions[..., None].float() * inv_freq  # [B, S, D / 2]
        angle = torch.cat((angle, angle), dim=-1)[:, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _dynamic(self, lengths):
        """NTK-aware scaling: the base grows with the sequence once it is longer than max_position."""
        factor, dim = self.rope.factor, 2 * self.exponent.shape[0]
        longest = lengths.clamp(min=self.max_position).float()
        stretch = (factor * longest / self.max_position - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / (self.rope.theta * stretch)[:, None] ** self.exponent  # [B, D / 2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the embedding to x ``[B, heads, S, D]``: the halves of D are the two coordinates of each rotation."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _scaled(inv_freq: Tensor, rope: Rope) -> Tensor:
    """The frequencies after scaling. llama3 divides low ones by ``factor``, keeps high ones, and blends in between."""
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind != "llama3":
        return inv_freq
    turns = rope.original_max_position * inv_freq / (2 * math.pi)  # full rotations within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq
